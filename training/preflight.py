"""One list of checks before a training. `--dry-run` makes all and prints each result; a start ends with what fails.

A check yields its findings; a UserError that it raises is a fault. Cheap checks come first, and what one finds out
(the card, the model's size, the data) is kept in `Run` for the next ones and for the training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import common
from common import Config, Gpu, Message, UserError
from runs.adapter import Adapter
from runs.base_tensors import check_fits
from runs.configuration import Loaded
from runs.disk import existing_folder
from runs.embedded_model import make_embedded
from runs.folder import read_run
from runs.target import missing_from_model
from training import hardware, packing, resume
from training.inputs import describe_inputs, find_changes
from training.memory import (
    EMBEDDED_SHAPE,
    GB,
    ModelSize,
    checkpoint_bytes,
    estimate_memory,
    linear_modules,
    model_like,
    needs,
    read_model,
    smallest_change,
)
from training.plan import TrainingPlan, describe_evaluations, describe_steps, find_warnings, make_plan
from training.resume import ResumePlan

if TYPE_CHECKING:
    from preprocessing.chat_template import ChatTemplate
    from preprocessing.dataset import Prepared


# Packages without which nothing trains; another one of requirements.txt may be missing.
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo")
CLEARLY = 1.2  # an estimate of memory that is so many times what is free is taken at its word
LABELS = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}


@dataclass(frozen=True)
class Finding:
    """What a check has found: `level` is "ok", "note" or "fault"."""

    level: str
    message: Message


def ok(message: Message) -> Finding:
    return Finding("ok", message)


def note(message: Message) -> Finding:
    return Finding("note", message)


def fault(message: Message) -> Finding:
    return Finding("fault", message)


@dataclass
class Run:
    """A training that is to be, and what the checks have found out about it so far."""

    loaded: Loaded
    folder: Path
    config: Config  # with batches that the model can take
    gpu: Gpu | None = None
    model: ModelSize | None = None
    ask_hub: bool = False  # about a model that is not on the disk
    resume: ResumePlan = field(default_factory=ResumePlan)
    template_exists: bool = True
    tokenizer: Any = None
    template: ChatTemplate | None = None
    data: Prepared | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # as run.json records them
    plan: TrainingPlan | None = None

    @classmethod
    def of(cls, loaded: Loaded) -> Run:
        return cls(loaded, Path(loaded.config.output_dir), loaded.config)

    @property
    def can_tokenize(self) -> bool:
        return self.model is not None and self.model.folder is not None and self.template_exists


Check = Callable[[Run], Iterable[Finding]]


# ---------------------------------------------------------------------------------------------------------------------
# The two ways to make the checks


def dry_run(run: Run) -> int:
    """Makes all checks and prints what they find; returns the exit status, 0 or 2."""
    run.ask_hub = True
    print(Message("dry_run_question", recipe=run.loaded.recipe or Message("default_recipe")))
    faults: list[Message] = []
    for name, check in {**CHECKS, **CHECKS_WITH_DATA, "unsloth": check_imports}.items():
        if check is check_imports and faults:
            continue  # it takes ten seconds
        for finding in _findings(check, run):
            if finding.message in faults:
                continue
            if finding.level == "fault":
                faults.append(finding.message)
            print(f"  {LABELS[finding.level]}  {name:<10}{finding.message}")
    print(Message("dry_run_no", count=len(faults)) if faults else Message("dry_run_yes"))
    return 2 if faults else 0


def _findings(check: Check, run: Run) -> Iterator[Finding]:
    try:
        yield from check(run)
    except UserError as error:
        yield fault(error.message)


def check_before_loading(run: Run) -> list[Message]:
    """Makes the checks that need nothing heavy, and returns what is to be noted.

    Raises UserError with all that is wrong. Nothing more is looked at of a recipe that does not train, or of a
    finished run.
    """
    notes, faults = [], []
    for name, check in {**CHECKS, "data": check_rows}.items():
        for finding in _findings(check, run):
            if finding.level == "fault" and finding.message not in faults:
                faults.append(finding.message)
            elif finding.level == "note" and name in ("run", "adapter"):
                notes.append(finding.message)
        if (name == "recipe" and faults) or (name == "run" and run.resume.finished and not faults):
            break
    if len(faults) == 1:
        raise UserError.from_message(faults[0])
    if faults:
        raise UserError("several_faults", count=len(faults), faults=faults)
    return notes


def check_with_data(run: Run) -> list[Message]:
    """Tokenizes the data, plans the training, and makes the checks that need that.

    Raises UserError for the first that fails; returns what is to be noted. Too little memory is only noted, unless by
    far: how much is needed is an estimate.
    """
    notes = []
    for name, check in CHECKS_WITH_DATA.items():
        for finding in check(run):
            if finding.level == "fault" and (name != "memory" or cannot_begin(run)):
                raise UserError.from_message(finding.message)
            if finding.level == "fault" or (finding.level == "note" and name in ("batches", "inputs", "memory")):
                notes.append(finding.message)
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# This machine


def check_python(_: Run) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield ok(Message("python_fits", version=found))
    else:
        yield fault(Message("python_does_not_fit", version=found))


def check_processes(_: Run) -> Iterator[Finding]:
    """A launcher (torchrun, accelerate launch) has started several processes, which would write to one run folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        yield fault(Message("several_processes", count=int(count)))


def check_card(run: Run) -> Iterator[Finding]:
    run.gpu = gpu = common.find_gpu()
    if gpu is None:
        yield note(Message("no_card"))
        if run.config.quantization_bit == 8:
            yield fault(Message("eight_bit_needs_card"))
        return
    yield ok(Message("card_found", name=gpu.name, free=gpu.free_memory / GB, total=gpu.total_memory / GB))
    if reason := hardware.gpu_fault(gpu):
        yield fault(Message("card_unusable", reason=reason))
    else:
        cuda = ".".join(map(str, gpu.cuda))
        yield ok(Message("driver_fits", driver=gpu.driver, cuda=cuda, built_for=hardware.torch_cuda()[0]))


def check_packages(run: Run) -> Iterator[Finding]:
    """Compares what is installed with what `make setup` installs for this device."""
    missing, other = [], []
    for name, wanted in pinned_packages("cpu" if run.gpu is None else "gpu").items():
        try:
            found = version(name)
        except PackageNotFoundError:
            if name in NEEDED:
                missing.append(name)
            else:
                other.append(f"{name} - ({wanted})")
            continue
        if found.split("+")[0] != wanted:
            other.append(f"{name} {found} ({wanted})")
    if missing:
        yield fault(Message("packages_missing", names=missing))
    if other:
        yield note(Message("packages_not_as_pinned", names=other))
    if not missing and not other:
        yield ok(Message("packages_as_pinned", torch=version("torch"), unsloth=version("unsloth")))


def pinned_packages(device: str) -> dict[str, str]:
    """Name → version of the requirements for `device`, "cpu" or "gpu"."""
    names = ("requirements.txt", f"requirements-{device}.txt", "requirements-unsloth.txt")
    lines = "".join((common.ROOT / name).read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))


def check_trackers(run: Run) -> Iterator[Finding]:
    for package in run.config.report_to:
        if package != "none" and importlib.util.find_spec(package) is None:
            yield fault(Message("tracker_not_installed", package=package, python=sys.executable))


def check_imports(_: Run) -> Iterator[Finding]:
    """Imports Unsloth in a process of its own; it takes ten seconds and may end the process."""
    command = [sys.executable, "-c", "import unsloth"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        yield fault(Message("unsloth_does_not_import", reason=last))
    else:
        yield ok(Message("unsloth_imports"))


# ---------------------------------------------------------------------------------------------------------------------
# The run folder and the adapter to go on with


def check_run(run: Run) -> Iterator[Finding]:
    run.resume = resume.plan_resume(run.loaded, run.folder)
    for message in (*run.resume.damaged, run.resume.message):
        if message:
            yield note(message)


def check_output(run: Run) -> Iterator[Finding]:
    """Whether the run folder, or the folder in which it will be made, can be written."""
    folder = run.folder
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        yield fault(Message("output_is_no_folder", folder=run.folder, path=folder))
    else:
        try:
            tempfile.TemporaryDirectory(dir=folder).cleanup()
        except OSError as error:
            yield fault(Message("output_not_writable", folder=run.folder, path=folder, reason=error.strerror))


def check_template(run: Run) -> Iterator[Finding]:
    from preprocessing.chat_template import check_name

    run.template_exists = False
    if run.config.template is not None:
        check_name(run.config.template)
    run.template_exists = True
    yield from ()


def check_adapter(run: Run) -> Iterator[Finding]:
    """The adapter to go on with: a whole LoRA adapter; settings that it does not follow are noted."""
    named = run.config.adapter_name_or_path
    if named is None:
        return
    folder = Path(named).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            yield fault(Message("adapter_lacks_file", folder=folder, file=name))
            return
    try:
        settings = Adapter(folder).settings
        kind, has = settings["peft_type"], (settings["r"], settings["lora_alpha"], set(settings["target_modules"]))
    except (KeyError, TypeError):
        yield fault(Message("adapter_unreadable", folder=folder))
        return
    if kind != "LORA":
        yield fault(Message("adapter_is_no_lora", folder=folder, kind=kind))
        return
    base = Path(run.config.model_name_or_path).expanduser()
    if not missing_from_model(base):
        check_fits(folder, base)
    given = (run.config.lora_rank, run.config.alpha, set(run.config.lora_target))
    names = ("lora_rank", "lora_alpha", "lora_target")
    ignored = [
        name
        for name, its, ours in zip(names, has, given, strict=True)
        if its != ours and ours != {"all"} and name in run.loaded.given
    ]
    if ignored:
        yield note(Message("adapter_settings_ignored", names=ignored, folder=folder, rank=settings["r"]))


# ---------------------------------------------------------------------------------------------------------------------
# The base model


def check_model(run: Run) -> Iterator[Finding]:
    """Keeps the model's size: all of it where it is on the disk; else what config.json says, where that can be had."""
    name = run.config.model_name_or_path
    path = Path(name).expanduser()
    missing = missing_from_model(path)
    if not missing:
        run.model = read_model(path)
        yield ok(Message("model_is_whole", folder=path, gb=run.model.bytes / GB))
    elif name == common.EMBEDDED_MODEL and not path.exists():
        run.model = model_like(EMBEDDED_SHAPE)
        yield note(Message("model_will_be_made", folder=path))
    elif path.exists():
        yield fault(Message("model_not_whole", model=path, missing=missing))
    else:
        yield from _missing_model(run, path)
    if run.model:
        yield from _model_faults(run.config, run.model)


def _missing_model(run: Run, path: Path) -> Iterator[Finding]:
    name = hub_name(run.config.model_name_or_path)
    fetch = common.command("download.py", name or f"ORG/{path.name}")
    yield fault(Message("model_not_on_disk", folder=path, command=fetch))
    if name and run.ask_hub:
        yield from _ask_hub(run, name)


def _ask_hub(run: Run, name: str) -> Iterator[Finding]:
    """What can be told of a model before it is fetched."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not is_reachable(hub):
        yield note(Message("hub_not_reachable", hub=hub))
        return
    yield note(Message("hub_answers", hub=hub))
    if settings := hub_config(hub, name):
        run.model = model_like(settings)


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


def hub_config(hub: str, name: str) -> dict[str, Any] | None:
    """config.json of a model on the hub; None where it cannot be had."""
    try:
        with urllib.request.urlopen(f"{hub}/{name}/resolve/main/config.json", timeout=5) as answer:
            return json.load(answer)
    except (OSError, ValueError):  # offline, gated, or no hub
        return None


def is_reachable(address: str) -> bool:
    """Whether a server accepts a connection at `address` within three seconds."""
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def _model_faults(config: Config, model: ModelSize) -> Iterator[Finding]:
    """What of the settings the model cannot follow."""
    context = model.settings.get("max_position_embeddings")
    if context and config.cutoff_len > context:
        name = config.model_name_or_path
        yield fault(Message("cutoff_beyond_context", cutoff_len=config.cutoff_len, model=name, context=context))
    if model.folder is None:  # the names of its modules are a guess
        return
    method = quantization_method(model.folder)
    if method not in (None, "bitsandbytes"):
        yield fault(Message("trained_base_is_quantized", folder=model.folder, method=method))
        return
    matrices = {name for name, shape in model.shapes.items() if name.endswith(".weight") and len(shape) == 2}
    modules = {name.split(".")[-2] for name in matrices} | {"lm_head"}  # a tied one has no weights of its own
    unknown = [target for target in config.lora_target if target.split(".")[-1] not in modules]
    if config.lora_target != ("all",) and unknown and config.adapter_name_or_path is None:
        yield fault(Message("unknown_lora_target", targets=unknown, modules=sorted(linear_modules(model))))


def quantization_method(folder: Path) -> str | None:
    """How the weights of a model on the disk are quantized ("gptq", "awq", "bitsandbytes", ...); None: they are not."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = settings.get("quantization_config")
    return str(quantization.get("quant_method", "?")) if quantization else None


def make_missing_model(run: Run) -> None:
    """Makes the embedded model where it is asked for the first time; the checks let no other missing one pass."""
    if run.model.folder is None:
        make_embedded(Path(run.config.model_name_or_path))
        for finding in check_model(run):
            if finding.level == "fault":
                raise UserError.from_message(finding.message)


# ---------------------------------------------------------------------------------------------------------------------
# The data, and what follows from it


def check_rows(run: Run) -> Iterator[Finding]:
    """The rows of small data files, without tokenizing."""
    from preprocessing import dataset

    dataset.check(run.config)
    yield from ()


def check_batches(run: Run) -> Iterator[Finding]:
    if run.can_tokenize:
        run.config, changed = packing.fit_batches(run.config)
        if changed:
            yield note(changed)


def check_data(run: Run) -> Iterator[Finding]:
    """Tokenizes the data, of which every faulty row is named, and plans the training."""
    from preprocessing import dataset
    from preprocessing.chat_template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    if not run.can_tokenize:
        yield from _count_conversations(run)
        return
    run.tokenizer = load_base_tokenizer(run.config)
    run.template = load_template(run.config.template, run.tokenizer, run.config.stage)
    run.data = dataset.prepare(run.config, run.tokenizer, run.template)
    lengths = run.data.train_lengths
    tokens, longest = int(lengths.sum()), int(lengths.max())
    yield ok(Message("data_tokenized", samples=len(lengths), tokens=tokens, longest=longest))


def _count_conversations(run: Run) -> Iterator[Finding]:
    """What is known of a run before its data can be tokenized."""
    from preprocessing import dataset

    conversations = len(dataset.read_conversations(run.config)[0])
    yield ok(Message("data_not_tokenized", conversations=conversations))
    steps = packing.total_steps(run.config, conversations)
    batch, accumulation = run.config.per_device_train_batch_size, run.config.gradient_accumulation_steps
    limit = Message("at_most") if run.config.packing and run.config.max_steps <= 0 else ""
    yield ok(Message("steps_expected", limit=limit, steps=steps, batch=batch, accumulation=accumulation))


def check_inputs(run: Run) -> Iterator[Finding]:
    """Whether an interrupted run goes on with the data, model, tokenizer and template that it was begun with.

    Others are accepted where the checkpoint is named: whoever names it has read what differs.
    """
    if run.data is None:
        return
    run.inputs = describe_inputs(run.model.folder, run.template, run.data)
    checkpoint = run.resume.checkpoint
    if checkpoint is None or not checkpoint.resolve().is_relative_to(run.folder.resolve()):
        return
    recorded = (read_run(run.folder) or {}).get("inputs")
    changes = find_changes(recorded, run.inputs) if recorded else []
    if changes and run.config.resume_from_checkpoint in (None, "true"):
        yield fault(Message("inputs_changed", folder=run.folder, changes=changes, checkpoint=checkpoint))
    elif changes:
        yield note(Message("inputs_changed_accepted", folder=run.folder, changes=changes))


def check_plan(run: Run) -> Iterator[Finding]:
    if run.data is None:
        return
    run.plan = make_plan(run.config, run.data)
    resume.check_steps_left(run.resume, run.folder, run.plan)
    yield ok(describe_steps(run.config, run.plan))
    yield ok(describe_evaluations(run.config, run.plan))
    for warning in find_warnings(run.config, run.plan):
        yield note(warning)


def check_memory(run: Run) -> Iterator[Finding]:
    """Compares the estimate with what is free, and names the smallest change that makes the recipe fit.

    A micro-batch that does not fit is split while it trains (training/splitting.py), so that only a longest sample
    which by itself needs clearly more than a card has is a reason not to begin.
    """
    if run.model is None:
        yield note(Message("size_unknown"))
        return
    config = run.config
    longest = (
        run.plan.longest if run.plan and not config.packing else config.cutoff_len * (2 if config.stage == "dpo" else 1)
    )
    try:
        parts = estimate_memory(config, run.model, config.per_device_train_batch_size * longest, run.gpu)
    except KeyError:
        yield note(Message("memory_unknown"))
        return
    need, have = sum(parts.values()), run.gpu.free_memory if run.gpu else hardware.free_memory()
    limit = "" if run.plan or config.packing else Message("at_most")
    finding = Message("memory_estimate", limit=limit, need=need / GB, parts=_memory_parts(parts), have=have / GB)
    if need <= have:
        yield ok(finding)
        return
    change = smallest_change(config, run.model, longest, run.gpu, have)
    if change is None:
        yield fault(Message("model_too_large", estimate=finding))
    else:
        settings = " ".join(f"{name}={value}" for name, value in change.items())
        yield fault(Message("memory_too_small", estimate=finding, settings=settings))


def cannot_begin(run: Run) -> bool:
    """Whether the longest sample alone needs clearly more memory than the card has free.

    Never so without a card: there the system swaps, and the estimate is rougher.
    """
    if run.gpu is None or run.plan is None:
        return False
    alone = replace(run.config, per_device_train_batch_size=1)
    try:
        return needs(alone, run.model, run.plan.longest, run.gpu) > CLEARLY * run.gpu.free_memory
    except KeyError:
        return False


def _memory_parts(parts: dict[str, float]) -> list[Message]:
    named = [
        Message("memory_weights", gb=parts["weights"] / GB),
        Message("memory_adapter", gb=parts["adapter"] / GB),
        Message("memory_activations", gb=parts["activations"] / GB),
        Message("memory_logits", gb=parts["logits"] / GB),
        Message("memory_attention", gb=parts["attention"] / GB),
        Message("memory_runtime", gb=parts["runtime"] / GB),
    ]
    return [part for part in named if part.fields["gb"] >= 0.05]


def check_disk(run: Run) -> Iterator[Finding]:
    """Whether the checkpoints of the whole run have space, and what is made of it after."""
    if run.model is None:
        return
    folder = existing_folder(run.folder)
    free = shutil.disk_usage(folder).free
    checkpoints = checkpoint_bytes(run.config, run.model) * checkpoints_at_once(run.config, run.plan)
    fetched = 0 if run.model.folder else run.model.bytes
    exports = 2 * run.model.bytes
    model = Message("model_takes", gb=fetched / GB) if fetched else ""
    finding = Message(
        "disk_estimate", folder=folder, free=free / GB, model=model, checkpoints=checkpoints / GB, exports=exports / GB
    )
    if free < fetched + checkpoints:
        yield fault(Message("disk_too_small", estimate=finding))
    elif free < fetched + checkpoints + exports:
        yield note(Message("disk_too_small_to_export", estimate=finding))
    else:
        yield ok(finding)


def checkpoints_at_once(config: Config, plan: TrainingPlan | None) -> int:
    """The most checkpoints that are on the disk at one time, the one being written and the final adapter included."""
    saves = plan.count_saves() if plan else 10
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)  # and the best one
    return kept + 2


# ---------------------------------------------------------------------------------------------------------------------

# By the names under which they are printed. The first need nothing heavy.
CHECKS: dict[str, Check] = {
    "python": check_python,
    "processes": check_processes,
    "card": check_card,
    "packages": check_packages,
    "output": check_output,
    "run": check_run,
    "template": check_template,
    "trackers": check_trackers,
    "adapter": check_adapter,
    "model": check_model,
}
CHECKS_WITH_DATA: dict[str, Check] = {
    "batches": check_batches,
    "data": check_data,
    "inputs": check_inputs,
    "plan": check_plan,
    "memory": check_memory,
    "disk": check_disk,
}
