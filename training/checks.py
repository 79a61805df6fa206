"""The checks before a training: pure functions of what is known, which yield what they find.

A check may also raise UserError, which counts as a problem. prepare.py knows their order.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import common
from common import Config, Gpu, Message, visible_cards
from runs.adapter import EMBEDDINGS, HEADS, Adapter
from runs.base_tensors import check_fits
from runs.configuration import Loaded
from runs.files import existing_folder
from runs.folder import read_run
from runs.target import missing_from_model
from runs.weights import read_rows, read_tensors
from training import hardware, memory, packing
from training.arguments import uses_vllm
from training.findings import Fact, Finding, Note, Problem, Risk
from training.memory import GB, ModelSize
from training.plan import TrainingPlan, step_batch
from training.processes import STAGES, Processes
from training.resume import Inputs, ResumePlan, find_changes
from training.rewards import Reward

# Packages without which nothing trains; another one of requirements.txt may be missing.
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo")
CLEARLY = 1.2  # times the free memory: above this, an estimate is taken at its word


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def check_python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Fact("{version}", version=found)
    else:
        yield Problem("Python {version}, not 3.11 to 3.13: make setup PYTHON=python3.12", version=found)


def check_processes(config: Config, processes: Processes) -> Iterator[Finding]:
    """Whether the processes that a launcher (torchrun, accelerate launch) has started can train together."""
    count, here = processes.count, processes.here
    cards = len(visible_cards()) if count > 1 else 0
    if 0 < cards < here:
        yield Problem("{count} processes for {cards} GPU{cards:plural}: start one per GPU", count=here, cards=cards)
    elif count > 1 and config.stage not in STAGES:
        yield Problem("stage {stage} trains in one process, not {count}", count=count, stage=config.stage)
    elif count > 1:
        yield Fact("{count}, each with its part of every step's samples", count=count)


def check_card(config: Config, gpu: Gpu | None) -> Iterator[Finding]:
    if gpu is None:
        yield Fact("no NVIDIA GPU found (nvidia-smi lists none); training runs on the CPU")
        if config.quantization_bit == 8:
            yield Problem("quantization_bit: Unsloth trains 8 bit on a GPU only; take it out, or use 4")
        return
    free, total = gpu.free_memory / GB, gpu.total_memory / GB
    yield Fact("{name}, {free:.1f} of {total:.1f} GB free", name=gpu.name, free=free, total=total)
    if reason := hardware.gpu_fault(gpu):
        yield Problem("{reason}; to train on the CPU instead, hide the GPU: CUDA_VISIBLE_DEVICES=-1", reason=reason)
    else:
        cuda, built = ".".join(map(str, gpu.cuda)), hardware.torch_cuda()[0]
        yield Fact("driver {driver} (CUDA {cuda}), torch for CUDA {built}.x", driver=gpu.driver, cuda=cuda, built=built)


def check_packages(gpu: Gpu | None) -> Iterator[Finding]:
    """Compares what is installed with what `make setup` installs for this device."""
    missing, other = [], []
    for name, wanted in pinned_packages("cpu" if gpu is None else "gpu").items():
        try:
            found = version(name)
        except PackageNotFoundError:
            (missing if name in NEEDED else other).append(name)
            continue
        if found.split("+")[0] != wanted:
            other.append(f"{name} {found} ({wanted})")
    if missing:
        yield Problem("{names} not installed: run make setup", names=missing)
    if other:
        yield Note("not the tested versions (in brackets): {names}; make setup installs those", names=other)
    if not missing and not other:
        yield Fact("torch {torch}, unsloth {unsloth}, as pinned", torch=version("torch"), unsloth=version("unsloth"))


def pinned_packages(device: str) -> dict[str, str]:
    """Name → version of the requirements for `device`, "cpu" or "gpu"."""
    names = ("requirements.txt", f"requirements-{device}.txt", "requirements-unsloth.txt")
    lines = "".join((common.ROOT / name).read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))


def check_imports() -> Iterator[Finding]:
    """Imports Unsloth as the training will, in a process of its own: it takes seconds and may end the process."""
    code = "from training.model import import_unsloth; import_unsloth()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=common.ROOT)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        yield Problem("does not import: {reason}", reason=last)
    else:
        yield Fact("imports")


def check_output(folder: Path) -> Iterator[Finding]:
    """Whether the run folder, or the folder in which it will be made, can be written."""
    there, place = folder, folder.resolve()
    if common.ROOT.is_relative_to(place) or (place / "config.json").is_file():
        yield Problem("output_dir: {path} is the kit's, or a model's; name a folder of the run's own", path=place)
        return
    while not there.exists() and not there.is_symlink():
        there = there.parent
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        yield Problem("output_dir: {path} cannot be written ({reason})", path=there, reason=error.strerror)


def check_trackers(config: Config) -> Iterator[Finding]:
    for package in config.report_to:
        if package != "none" and importlib.util.find_spec(package) is None:
            install = f"{sys.executable} -m pip install {package}"
            yield Problem("report_to: {package} is not installed; {install}", package=package, install=install)


# ---------------------------------------------------------------------------------------------------------------------
# The model and the adapter


def check_model(config: Config, model: ModelSize | None) -> Iterator[Finding]:
    """Whether the base model is on the disk, and can follow the settings."""
    path = Path(config.model_name_or_path).expanduser()
    if model and model.folder:
        yield Fact("{folder} is complete, {gb:.2f} GB", folder=path, gb=model.bytes / GB)
    elif is_embedded_missing(config):
        yield Fact("{folder} will be made from its package by the first run", folder=path)
    elif path.exists():
        if missing := missing_from_model(path):
            yield Problem("{model} is incomplete, {missing} missing; fetch it again", model=path, missing=missing)
    else:
        fetch = common.command("download.py", hub_name(config.model_name_or_path) or f"ORG/{path.name}")
        yield Problem("there is no model {folder}; fetch it: {command}", folder=path, command=fetch)
    context = model and model.settings.get("max_position_embeddings")
    if context and config.cutoff_len > context:
        yield Problem("cutoff_len: the context of {model} is {context} tokens", model=path, context=context)
    if model is None or model.folder is None:  # the names of its modules are a guess
        return
    quantization = model.settings.get("quantization_config")
    method = quantization.get("quant_method", "?") if quantization else None
    if method not in (None, "bitsandbytes"):
        yield Problem(
            "{folder} is quantized ({method}); use the 16-bit model, with quantization_bit: 4",
            folder=path,
            method=method,
        )
    elif config.adapter_name_or_path is None:
        yield from check_targets(config, model)


def check_targets(config: Config, model: ModelSize) -> Iterator[Finding]:
    """What of `lora_target`, `additional_target` and `lora_bias` the model does not have or cannot train."""
    given = {"use_dora": config.use_dora, "lora_dropout": config.lora_dropout, "lora_bias": config.lora_bias == "true"}
    refused = [name for name, value in given.items() if value]
    if refused and memory.has_experts(model) and {"all", *memory.EXPERTS} & set(config.lora_target):
        others = sorted(memory.linear_modules(model) - memory.EXPERTS)
        yield Problem(
            "{settings}: not for experts; take it out, or set lora_target: {targets}", settings=refused, targets=others
        )
    matrices = {name for name, shape in model.shapes.items() if name.endswith(".weight") and len(shape) == 2}
    modules = {name.split(".")[-2] for name in matrices} | {"lm_head"}  # a tied one has no weights of its own
    unknown = [target for target in config.lora_target if target.split(".")[-1] not in modules]
    if config.lora_target != ("all",) and unknown:
        known = sorted(memory.linear_modules(model))
        yield Problem("lora_target: the model has no {targets}; it has {modules}", targets=unknown, modules=known)
    adapted = memory.adapted_weights(config, model.shapes)
    narrow = min((min(model.shapes[name][-2:]) for name in adapted), default=config.lora_rank)
    if config.pissa_init and narrow < config.lora_rank:
        yield Problem("pissa_init: a layer of {width} has no more components; set lora_rank: {width}", width=narrow)
    yield from check_whole(config, model.shapes, adapted)


def check_whole(config: Config, shapes: memory.Shapes, adapted: list[str]) -> Iterator[Finding]:
    """What of additional_target and lora_bias the model cannot follow; `adapted` are the weights with an adapter."""
    for target in config.additional_target:
        meant = memory.whole_tensors((target,), shapes)
        others = [n for n, shape in meant.items() if len(shape) > 1 and not n.endswith(EMBEDDINGS + HEADS)]
        if not meant:
            vectors = {n.split(".")[-2] for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 1}
            known = [*sorted(n.split(".")[-2] for n in shapes if n.endswith(EMBEDDINGS)), "lm_head", *sorted(vectors)]
            yield Problem("additional_target: the model has no {target}; it has {known}", target=target, known=known)
        elif others:
            module = others[0].rpartition(".")[0]
            yield Problem("additional_target: {module} is a linear layer; name it in lora_target", module=module)
    if config.lora_bias in ("all", "lora_only") and not any(name.endswith(".bias") for name in shapes):
        yield Problem("lora_bias: {value}: the model has no biases; use lora_bias: true", value=config.lora_bias)
    lacking = [name for name in adapted if f"{name.removesuffix('weight')}bias" not in shapes]
    if config.lora_bias == "true" and lacking:
        module = lacking[0].rpartition(".")[0]
        yield Note("lora_bias: {module} has no bias; such an adapter cannot be merged or become a GGUF", module=module)


def is_embedded_missing(config: Config) -> bool:
    """Whether the embedded model is meant, and not made from its package yet."""
    return config.model_name_or_path == common.EMBEDDED_MODEL and not Path(common.EMBEDDED_MODEL).exists()


def hub_name(name: str) -> str | None:
    """A model's ORG/NAME on the hub, where `name` is one or the folder of a model that a shipped recipe fetches."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if is_hub_name and not name.startswith("models/") and not Path(name).parent.exists():
        return name
    fetched = {
        found.partition("/")[2]: found
        for recipe in sorted((common.ROOT / "configs").glob("*.yaml"))
        for found in re.findall(r"download\.py (\S+/\S+)", recipe.read_text(encoding="utf-8"))
    }
    return fetched.get(Path(name).name) if Path(name).parent == Path("models") else None


def check_adapter(loaded: Loaded) -> Iterator[Finding]:
    """The adapter to train further: a complete LoRA adapter; settings that it ignores are noted."""
    config, given = loaded.config, loaded.given
    if config.adapter_name_or_path is None:
        return
    folder = Path(config.adapter_name_or_path).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            yield Problem("adapter_name_or_path: {folder} has no {file}; name a run", folder=folder, file=name)
            return
    settings = Adapter(folder).settings
    if not settings.keys() >= {"peft_type", "r", "lora_alpha", "target_modules"} or settings["peft_type"] != "LORA":
        kind = str(settings.get("peft_type"))
        yield Problem("adapter_name_or_path: {folder} is no LoRA adapter (peft_type {kind})", folder=folder, kind=kind)
        return
    base = Path(config.model_name_or_path).expanduser()
    if not missing_from_model(base):
        check_fits(folder, base)
    targets, whole = set(config.lora_target), set(settings.get("modules_to_save") or ())
    ignored = [name for name, own in own_settings(settings).items() if asked_for(config, name) != own]
    ignored += ["lora_target"] if targets != {"all"} and targets != set(settings["target_modules"]) else []
    ignored += ["additional_target"] if not whole >= set(config.additional_target) - {"lm_head"} else []
    if ignored := [name for name in ignored if name in given]:
        yield Note("{names} ignored: {folder} keeps its own", names=ignored, folder=folder)


def own_settings(adapter: dict[str, Any]) -> dict[str, Any]:
    """Option → value, of those that the `adapter_config.json` of a LoRA adapter decides."""
    return {
        "lora_rank": adapter["r"],
        "lora_alpha": adapter["lora_alpha"],
        "lora_dropout": adapter.get("lora_dropout", 0.0),
        "use_rslora": adapter.get("use_rslora", False),
        "use_dora": adapter.get("use_dora", False),
        "lora_bias": "true" if adapter.get("lora_bias") else adapter.get("bias", "none"),
        "pissa_init": False,
    }


def asked_for(config: Config, name: str) -> Any:
    return config.alpha if name == "lora_alpha" else getattr(config, name)


def check_rewards(config: Config, rewards: Sequence[Reward]) -> Iterator[Finding]:
    if config.stage == "grpo":
        way = "vllm" if uses_vllm(config) else "transformers"
        yield Fact("{names}; replies are generated by {way}", names=[reward.name for reward in rewards], way=way)


# ---------------------------------------------------------------------------------------------------------------------
# The data, and whether memory and disk suffice


def check_untokenized(config: Config, processes: Processes) -> Iterator[Finding]:
    """What is known of the data of a model that is not on the disk."""
    from preprocessing import dataset

    count = len(dataset.read_conversations(config)[0])
    yield Fact("{count:,} conversations; tokens are counted once the model is there", count=count)
    limit = Message("at most ") if config.packing and config.max_steps <= 0 else ""
    steps, batch = packing.total_steps(processes.as_one(config), count), step_batch(config, processes.count)
    yield Fact("{limit}{steps:,} optimizer steps of {batch}", limit=limit, steps=steps, batch=batch)


def check_inputs(config: Config, resume: ResumePlan, inputs: Inputs) -> Iterator[Finding]:
    """Whether an interrupted run is resumed with the data, model, tokenizer and template that it was begun with.

    Others are accepted where the checkpoint is named: whoever names it has read what differs.
    """
    folder, checkpoint = Path(config.output_dir), resume.checkpoint
    if checkpoint is None or not checkpoint.resolve().is_relative_to(folder.resolve()):
        return
    recorded = (read_run(folder) or {}).get("inputs")
    changes = find_changes(recorded, inputs) if recorded else []
    begun = {"folder": folder, "changes": changes}
    if changes and config.resume_from_checkpoint in (None, "true"):
        yield Problem(
            "{folder} was begun with other inputs:\n  {changes:lines}\nrestore them, or start over with "
            "overwrite_output_dir=true, or resume anyway with resume_from_checkpoint={checkpoint}",
            checkpoint=checkpoint,
            **begun,
        )
    elif changes:
        yield Note("{folder} was begun with other inputs:\n  {changes:lines}", **begun)


def check_untrained(config: Config, folder: Path, tokenizer: Any, samples: Any) -> Iterator[Finding]:
    """Whether the data has control tokens whose embeddings are zero: those that a base model was never trained on.

    Unsloth looks at the first 250 samples, too, and ends on a card with a ValueError once the model is loaded.
    """
    in_full = {"embed_tokens", "lm_head"} <= set(config.additional_target)
    if config.stage not in packing.FLAT_STAGES or config.adapter_name_or_path or in_full:
        return
    embeddings = [tensor for name, tensor in read_tensors(folder).items() if name.endswith(EMBEDDINGS)]
    if len(embeddings) != 1:
        return
    accepted = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    used = set(itertools.chain(*samples[:250]["input_ids"])) & set(tokenizer.added_tokens_decoder) - accepted
    rows = read_rows(embeddings[0], sorted(used))
    if zero := [tokenizer.decode([token]) for token, row in rows.items() if row.abs().max() <= 1e-16]:
        yield Problem(
            "{model} was never trained on {tokens} (embeddings of zeros); take the instruct model, or set "
            "additional_target: embed_tokens,lm_head",
            model=folder,
            tokens=zero,
        )


def check_memory(
    config: Config, model: ModelSize, gpu: Gpu | None, plan: TrainingPlan | None, here: int = 1
) -> Iterator[Finding]:
    """Compares the estimate with what is free, and names the smallest change that makes the recipe fit.

    A micro-batch that does not fit is split while it trains (training/splitting.py): only a longest sample that needs
    clearly more than the card has is a reason not to begin. `here`: processes of this machine, which share its memory.
    """
    longest = plan.longest if plan else None
    parts = memory.estimate_memory(config, model, gpu, longest)
    if parts is None:
        yield Note("memory cannot be estimated for this kind of model")
        return
    if gpu:
        yield from check_fast_lora(config, model)
    need, have = sum(parts.values()), gpu.free_memory if gpu else hardware.free_memory() / here
    estimate = Fact(
        "{limit}about {need:.1f} GB at the peak ({parts}), {have:.1f} GB are free",
        limit="" if plan or config.packing else Message("at most "),
        need=need / GB,
        parts=[
            Message("{part} {gb:.1f}", part=memory.PARTS[name], gb=size / GB)
            for name, size in parts.items()
            if size >= 0.05 * GB
        ],
        have=have / GB,
    )
    if need <= have:
        yield estimate
        return
    alone = memory.estimate_memory(dataclasses.replace(config, per_device_train_batch_size=1), model, gpu, longest)
    # without a card never: the system swaps, and the estimate is rougher
    is_certain = gpu is not None and plan is not None and sum(alone.values()) > CLEARLY * have
    found = Message("memory: {estimate}; no setting makes it fit: take a smaller model", estimate=estimate)
    if change := memory.smallest_change(config, model, gpu, longest, have):
        settings = " ".join(f"{name}={value}" for name, value in change.items())
        found = Message("memory: {estimate}; this would fit: {settings}", estimate=estimate, settings=settings)
    yield (Problem if is_certain else Risk).of(found)


def check_fast_lora(config: Config, model: ModelSize) -> Iterator[Finding]:
    """Unsloth's kernels take the adapters of a layer together: with one left out they are computed one by one."""
    everything = dataclasses.replace(config, lora_target=("all",))
    has_all, is_own = config.lora_target == everything.lora_target, memory.is_own(config, model.settings)
    missing = memory.linear_modules(model) - set(config.lora_target)
    if has_all or not missing or config.adapter_name_or_path or not is_own:
        return
    more = memory.adapter_bytes(everything, model.shapes) - memory.adapter_bytes(config, model.shapes)
    yield Note(
        "lora_target lacks {missing}, which Unsloth's fast LoRA needs; lora_target: all takes {gb:.2f} GB more",
        missing=sorted(missing),
        gb=more / GB,
    )


def check_disk(config: Config, model: ModelSize, plan: TrainingPlan | None) -> Iterator[Finding]:
    """Whether all checkpoints of the run have space, and its exports."""
    folder = existing_folder(Path(config.output_dir))
    free, fetched = shutil.disk_usage(folder).free, 0 if model.folder else model.bytes
    checkpoints = memory.checkpoint_bytes(config, model) * checkpoints_at_once(config, plan)
    exports = 2 * model.bytes
    estimate = Fact(
        "{free:.1f} GB are free in {folder}; {model}checkpoints take about {checkpoints:.2f} GB, the merged model "
        "and a 16-bit GGUF {exports:.1f} GB more",
        free=free / GB,
        folder=folder,
        model=Message("the model takes about {gb:.1f} GB, ", gb=fetched / GB) if fetched else "",
        checkpoints=checkpoints / GB,
        exports=exports / GB,
    )
    if free < fetched + checkpoints:
        yield Problem("disk: {estimate}; free some, or set another output_dir", estimate=estimate)
    elif free < fetched + checkpoints + exports:
        yield Note("disk: {estimate}: enough to train, not to export", estimate=estimate)
    else:
        yield estimate


def checkpoints_at_once(config: Config, plan: TrainingPlan | None) -> int:
    """The most checkpoints that are on the disk at one time, the one being written and the final adapter included."""
    saves = plan.count_saves() if plan else 10
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)  # and the best one
    return kept + 2
