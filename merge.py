"""Merges a trained adapter into its 16-bit base: a folder that transformers and vLLM load as it stands.

python merge.py                     merges the newest run into saves/NAME/merged
python merge.py saves/NAME          merges this run; also one of its checkpoints, or any PEFT adapter's folder
python merge.py RECIPE.yaml         merges the run of a recipe, or what a LLaMA-Factory merge file names
python merge.py --check FOLDER      proves a merged folder once more
    --no-verify    does not compare the models' answers; the adapter's tensors are counted all the same
    --overwrite    replaces an earlier merge (overwrite_output_dir=true does the same)
    --push REPO    uploads to the hub, once all is verified
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Loaded, UserError
from export.merge_weights import Plan, make_plan, write_shards
from runs.adapter import HUB_NAME, Adapter, find_base, language_config, read_json
from runs.files import appearing, remove_leftovers, write_json, write_text
from runs.folder import is_run, newest_run, read_run, run_config, suit_transformers_4
from runs.target import missing_from_model
from runs.weights import DTYPES, SIZES, read_tensors, sha256

if TYPE_CHECKING:
    import torch

RECORD = "merge.json"


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__))
        return
    flags, settings = parse(argv)
    if flags.check:
        prove(Path(flags.check))
        return
    job = find_job(settings)
    started = time.monotonic()
    adapter = Adapter(job.adapter)
    if flags.push and is_proven(job, adapter):  # its upload failed
        check_push(flags.push, job)
        push(flags.push, job)
        return
    plan = make_plan(read_tensors(job.base), job.config_json, adapter, job.config.export_dtype)
    turns = trained_turns(job, plan)
    announce(job, adapter, plan, turns)
    check_output(job, plan)
    if not flags.no_verify:
        choose_device(job.base, common.find_gpu())  # before the work, not after it
    if flags.push:
        check_push(flags.push, job)
    with appearing(job.output) as folder:
        write_shards(plan, folder, job.config.export_size * 10**9)
        write_small_files(job, plan, turns, folder)
        write_record(job, adapter, plan, turns, folder, time.monotonic() - started)
        if not flags.no_verify:
            prove_in_child(folder)
        write_card(job, folder)
    print(f"merged     {job.output} ({plan.size / 1e9:.2f} GB)")
    if flags.push:
        push(flags.push, job)
    print(f"talk to it: {common.command('chat.py', job.output)}")
    print(f"make a GGUF: {common.command('quantize.py', job.output)}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the rest: recipe, folder, settings."""
    parser = argparse.ArgumentParser(prog="merge.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--push", metavar="REPO")
    parser.add_argument("--check", metavar="FOLDER")
    flags, settings = parser.parse_known_args(argv)
    if flags.push and flags.no_verify:
        raise UserError("--push uploads only what is proven; leave --no-verify out")
    return flags, [*settings, "overwrite_output_dir=true"] if flags.overwrite else settings


# ---------------------------------------------------------------------------------------------------------------------
# What is merged into what


@dataclass(frozen=True)
class Job:
    """The folders of the adapter, of the run it belongs to (if any), of the base and of the result."""

    config: Config
    adapter: Path
    run: Path | None
    base: Path
    base_name: str  # as the recipe has it
    config_json: dict[str, Any]
    output: Path


def find_job(settings: list[str]) -> Job:
    """What the command line asks for; raises UserError where something of it is not there."""
    folders = [Path(s) for s in settings if Path(s).is_dir()]
    if len(folders) > 1:
        raise UserError(f"{folders[0]} and {folders[1]} are two folders; give one run or adapter")
    rest = [s for s in settings if not Path(s).is_dir()]
    loaded = common.load_config(rest)
    for note in loaded.notes:
        print(f"note: {note}")
    told = common.load_config([s for s in rest if Path(s) != loaded.recipe])  # the command line alone
    folder = folders[0] if folders else name_adapter(loaded, told)
    check_adapter(folder)
    run = next((f for f in (folder, folder.parent) if is_run(f)), None)
    config = loaded.config
    if run:  # its settings, and before them what the recipe and the command line say
        given = {name: getattr(config, name) for name in {*loaded.given, "export_dir"}}
        config = dataclasses.replace(run_config(run), **given)
    # what a recipe may overwrite is its training's
    config = dataclasses.replace(config, overwrite_output_dir=told.config.overwrite_output_dir)
    name = config.model_name_or_path
    if not run and "model_name_or_path" not in loaded.given:
        settings_json = read_json(folder / "adapter_config.json")
        name = settings_json.get("base_model_name_or_path") or name
        if (revision := settings_json.get("revision")) not in (None, "main"):
            raise UserError(
                f"{folder} was trained on the revision {revision} of {name}; "
                "give model_name_or_path=a folder with that revision"
            )
    base, found, config_json = find_base(name)
    if found != name:
        print(f"note: {name} is quantized; merging into {base}, which it was made of")
    return Job(config, folder, run, base, found, config_json, Path(config.export_dir or folder / "merged"))


def name_adapter(loaded: Loaded, told: Loaded) -> Path:
    """The folder of the adapter that the recipe and the command line (`told`) name, or of the newest run."""
    config = loaded.config
    if loaded.recipe is None:
        return Path(config.adapter_name_or_path) if config.adapter_name_or_path else newest_run()
    trained = Path(config.output_dir)
    is_merge_file = config.export_dir and "export_dir" not in told.given  # else the adapter is what training began with
    named = config.adapter_name_or_path and (is_merge_file or "adapter_name_or_path" in told.given)
    if (trained / "adapter_config.json").exists() and not named:
        return trained
    if config.adapter_name_or_path:
        return Path(config.adapter_name_or_path)
    raise UserError(
        f"{loaded.recipe} has not been trained: {trained} has no adapter; "
        f"run python train.py {shlex.quote(str(loaded.recipe))}, or set adapter_name_or_path"
    )


def check_adapter(folder: Path) -> None:
    """Raises UserError where a folder has no adapter."""
    if "," in str(folder) and not folder.exists():
        raise UserError(f"{folder} are several adapters; merge one, then the next into the result")
    if (folder / "adapter_config.json").exists():
        return
    checkpoints = sorted(folder.glob("checkpoint-*/adapter_config.json"), key=lambda p: int(p.parent.name[11:]))
    if checkpoints:
        merge = common.command("merge.py", checkpoints[-1].parent)
        raise UserError(f"{folder} has not finished training; merge a checkpoint: {merge}")
    raise UserError(f"{folder} has no adapter_config.json; give a run's folder, or an adapter's that peft saved")


def check_output(job: Job, plan: Plan) -> None:
    """Raises UserError where the output may not be replaced, or the disk has no room for it."""
    for folder in filter(None, (job.base, job.adapter, job.run)):
        if folder.resolve().is_relative_to(job.output.resolve()):
            raise UserError(f"{job.output} holds {folder}, which is merged; give export_dir=another folder")
    if job.output.is_file() or (job.output.is_dir() and any(job.output.iterdir())):
        if not (job.output / RECORD).exists():
            raise UserError(f"{job.output} is there already and is no earlier merge; give another export_dir")
        if not job.config.overwrite_output_dir:
            raise UserError(f"{job.output} is there already; add --overwrite, or give export_dir=another folder")
    remove_leftovers(job.output)  # they take room
    there = next(p for p in (job.output.absolute(), *job.output.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(there).free, plan.size + 10**8
    if free < needed:
        raise UserError(
            f"{there} has {free / 1e9:.1f} GB of free disk space, the merged model needs {needed / 1e9:.1f}; "
            "free some, or give export_dir=a folder on another disk"
        )


def is_proven(job: Job, adapter: Adapter) -> bool:
    """Whether the output is there as this merge would make it, with its proof."""
    if job.config.overwrite_output_dir or not (job.output / RECORD).exists():
        return False
    record = read_json(job.output / RECORD)
    same = record["adapter_sha256"] == sha256(adapter.file) and record["base"] == str(job.base.resolve())
    same = same and job.config.export_dtype in (None, record["dtype"])
    return same and "proof" in record and not missing_from_model(job.output)


def check_push(repo: str, job: Job) -> None:
    """Raises UserError where the hub would refuse the merged model."""
    from export import hub

    hub.check_access(repo, job.config.overwrite_output_dir)


def push(repo: str, job: Job) -> None:
    """Uploads the merged model, in place of the weights that the repository may hold."""
    from export import hub

    weights = ["model*.safetensors", "model.safetensors.index.json"]
    print(f"uploaded   {hub.upload(job.output, repo, ignore=[RECORD], delete=weights)}")


def announce(job: Job, adapter: Adapter, plan: Plan, turns: Turns | None) -> None:
    changed = sum(piece.update is not None for piece in plan.pieces)
    dtypes = sorted({piece.dtype for piece in plan.pieces if piece.dtype in DTYPES.values()})
    print(
        f"base       {job.base} ({len(plan.pieces)} tensors)\n"
        f"adapter    {job.adapter} ({kind(adapter)}, {len(adapter.tensors)} tensors, for {changed} of the base's)\n"
        f"output     {job.output} ({plan.size / 1e9:.2f} GB, {' and '.join(dtypes)})\n"
        f"template   {f'{turns.name}, ends a turn with ' + ' '.join(turns.stop) if turns else 'none'}"
    )
    if plan.untied:
        print("note: the adapter changes the embedding and the output layer differently; each gets a tensor of its own")
    if dtypes == ["F32"]:
        print("note: the base is in float32; export_dtype=bfloat16 makes the result half as large")


def kind(adapter: Adapter) -> str:
    """LoRA, rsLoRA or DoRA, with the ranks."""
    settings = adapter.settings
    name = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    ranks = sorted({settings["r"], *(settings.get("rank_pattern") or {}).values()})
    return f"{name} of rank {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------------------------------------------------------------
# The small files: tokenizer, chat template, configuration, card

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
TOKENIZER += ("*.tiktoken", "chat_template.jinja", "additional_chat_templates")
FROM_BASE = ("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")  # code for trust_remote_code; what a licence asks to pass on


def tokenizer_folder(job: Job) -> Path:
    """Where the tokenizer lies that the adapter was trained with."""
    folders = [job.adapter, *([job.run] if job.run else []), job.base]
    return next((folder for folder in folders if (folder / "tokenizer_config.json").exists()), job.base)


@dataclass(frozen=True)
class Turns:
    """The chat template as it is saved, and the control tokens that end a turn."""

    name: str
    text: str
    stop: list[str]
    stop_ids: list[int]


def trained_turns(job: Job, plan: Plan) -> Turns | None:
    """The chat template the adapter was trained with; None where none is named and the tokenizer has none.

    Raises UserError where the tokenizer has more tokens than the merged embedding has rows.
    """
    from preprocessing.tokenizer import load_light_tokenizer

    tokenizer = load_light_tokenizer(tokenizer_folder(job))
    known = tokenizer.backend.get_vocab_size()
    if plan.vocabulary and known > plan.vocabulary:
        raise UserError(
            f"the tokenizer of {tokenizer_folder(job)} has {known} tokens, the embedding {plan.vocabulary} rows; "
            "the adapter was saved without its new tokens' embedding: train it with modules_to_save"
        )
    run = read_run(job.run) if job.run else None
    jinja = (job.run or job.adapter) / "chat_template.jinja"
    if run and run.get("stop") and jinja.exists() and job.config.template == run_config(job.run).template:
        name, text, stop = "the run's", jinja.read_text(encoding="utf-8"), run["stop"]
    elif job.config.template is None and not tokenizer.chat_template:
        print("note: neither a template is named nor does the tokenizer have one; set template=, see templates/")
        return None
    else:
        from preprocessing.chat_template import load_template

        template = load_template(job.config.template, tokenizer)
        name, text, stop = template.name, template.saved, template.stop
    return Turns(name, text, list(stop), [tokenizer.backend.token_to_id(token) for token in stop])


def write_small_files(job: Job, plan: Plan, turns: Turns | None, folder: Path) -> None:
    """Everything beside the weights that transformers and vLLM read."""
    for source, patterns in ((tokenizer_folder(job), TOKENIZER), (job.base, FROM_BASE)):
        for path in (path for pattern in patterns for path in source.glob(pattern)):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    suit_transformers_4(folder)
    if turns:
        write_text(folder / "chat_template.jinja", turns.text)
        settings = read_json(folder / "tokenizer_config.json")
        if settings.pop("chat_template", None):  # one place for it, so that no two can differ
            write_json(folder / "tokenizer_config.json", settings)
    write_generation_config(job, turns, folder)
    write_config(job, plan, folder)


def write_generation_config(job: Job, turns: Turns | None, folder: Path) -> None:
    """The base's generation_config.json, ending where the template's turns end."""
    path = job.base / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    if turns:
        settings["eos_token_id"] = turns.stop_ids[0] if len(turns.stop_ids) == 1 else turns.stop_ids
    if settings:  # an empty one would take away the end that config.json names
        write_json(folder / "generation_config.json", settings)


def write_config(job: Job, plan: Plan, folder: Path) -> None:
    """The base's config.json as it fits the merged weights."""
    config = {
        key: value for key, value in job.config_json.items() if key not in ("_name_or_path", "quantization_config")
    }
    text = language_config(config)
    if plan.untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if plan.vocabulary and "vocab_size" in text:
        text["vocab_size"] = plan.vocabulary
    if job.config.export_dtype:
        for part in (config, text):
            for key in ({"dtype", "torch_dtype"} & part.keys()) or {"dtype"}:
                part[key] = job.config.export_dtype
    write_json(folder / "config.json", config)


def write_record(job: Job, adapter: Adapter, plan: Plan, turns: Turns | None, folder: Path, s: float) -> None:
    """merge.json: what was merged into what, with the count of the adapter's tensors; `s` are the seconds it took."""
    changed = {piece.dtype for piece in plan.pieces if piece.update}
    coarsest = next((dtype for dtype in ("BF16", "F16") if dtype in changed), "F32")
    record = {
        "base": str(job.base.resolve()),
        "adapter": str(job.adapter.resolve()),
        "adapter_sha256": sha256(adapter.file),
        "run": str(job.run.resolve()) if job.run else None,
        "kind": kind(adapter),
        "dtype": next(name for name, stored in DTYPES.items() if stored == coarsest),
        "cast": job.config.export_dtype is not None,
        "adapter_tensors": len(adapter.tensors),
        "adapter_tensors_used_once": sum(count == 1 for count in adapter.used.values()),
        "base_tensors_changed": sum(piece.update is not None for piece in plan.pieces),
        "tensors": len(plan.pieces),
        "bytes": plan.size,
        "vocabulary": plan.vocabulary,
        "stop": turns.stop if turns else [],
        "trust_remote_code": job.config.trust_remote_code,
        "seconds": round(s, 2),
    }
    write_json(folder / RECORD, record)


def write_card(job: Job, folder: Path) -> None:
    """README.md, as the hub wants it: base model, licence, data, how it was made."""
    record = read_json(folder / RECORD)
    name = hub_name(job)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": licence(job.base)}
    if "/" in name:
        front["base_model"] = name
    run = read_run(job.run) if job.run else None
    lines = [f"{name} with an adapter ({record['kind']}) merged into its weights ({record['dtype']}), by onecard."]
    if run:
        datasets = ", ".join(Path(name).name for name in job.config.dataset)
        checkpoint = re.fullmatch(r"checkpoint-(\d+)", job.adapter.name)
        steps = int(checkpoint[1]) if checkpoint else run.get("steps")
        lines.append(f"Trained on: {datasets}" + (f" ({steps} steps)." if steps else "."))
    if proof := record.get("proof"):
        lines.append(
            f"On {proof['prompts']} prompts its logits differ from base + adapter by {proof['difference']:.2g} (rms), "
            f"where rounding to {record['dtype']} alone makes {proof['rounding']:.2g}."
        )
    import yaml

    front = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    title = job.run.name if job.run else job.adapter.name
    write_text(folder / "README.md", f"---\n{front}---\n\n# {title}\n\n" + "\n\n".join(lines) + "\n")


def hub_name(job: Job) -> str:
    """The base's name on the hub where it is known, else its folder's: never a path of this machine."""
    record = job.base / "download.json"
    name = read_json(record)["model"] if record.exists() else job.base_name
    is_path = Path(name).exists() or (common.ROOT / name).exists()
    return name if HUB_NAME.fullmatch(name) and not is_path else job.base.name


def licence(folder: Path) -> str | None:
    """The licence that a model's README.md declares."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    match = re.match(r"---\n.*?^license:\s*([\w.-]+)\s*$.*?^---$", text, re.DOTALL | re.MULTILINE)
    return match[1] if match else None


# ---------------------------------------------------------------------------------------------------------------------
# The proof: the merged model's logits are those of base + adapter, as peft computes them


def prove_in_child(folder: Path) -> None:
    """Runs `--check` in a process of its own, which may be as heavy as it likes; ends this one if it fails."""
    status = subprocess.run([sys.executable, __file__, "--check", str(folder)]).returncode
    if status:
        sys.exit(status)


def prove(folder: Path) -> None:
    """Compares logits, prints the numbers and keeps them in merge.json; raises UserError where they differ too much.

    The yardstick is the rounding itself: how far the logits of base + adapter move when the sum of weight and update is
    rounded to the merged type. Where that sum cannot be formed here (DoRA, tied ends, a model that fits in 16 bit only)
    every twelfth of the changed weights moves by one unit in the last place, which has the variance of rounding.
    """
    record = read_json(folder / RECORD)
    for part in ("base", "adapter"):
        if not Path(record[part]).is_dir():
            raise UserError(f"{record[part]}, the {part} that {folder} was merged of, is not there; put it back there")
    logging.disable(logging.WARNING)
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    device, name = choose_device(Path(record["base"]), common.find_gpu() if torch.cuda.is_available() else None)
    dtype = getattr(torch, name)
    prompts = proof_prompts(folder, record)
    expected, base, rounded = reference_logits(record, prompts, device, dtype)
    merged = logits(load(folder, record, device, dtype), prompts)

    proof = {
        "prompts": len(prompts),
        "positions": len(expected),
        "computed_in": f"{name} on {device}",
        "adapter_effect": rms(expected - base),
        "difference": rms(merged - expected),
        "largest_difference": (merged - expected).abs().max().item(),
        "rounding": rms(rounded - expected),
        "same_first_choice": (merged.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "mean_kl": divergence(expected, merged),
    }
    write_json(folder / RECORD, {**record, "proof": proof})
    print(
        f"proof      {proof['prompts']} prompts, {proof['positions']} positions, {proof['computed_in']}\n"
        f"           logits move by {proof['adapter_effect']:.2g} (rms) through the adapter; merged, they differ from\n"
        f"           base + adapter by {proof['difference']:.2g} (at most {proof['largest_difference']:.2g}), where\n"
        f"           rounding to {record['dtype']} alone makes {proof['rounding']:.2g}; same first choice "
        f"{proof['same_first_choice']:.1%},\n           mean KL divergence {proof['mean_kl']:.2g}"
    )
    if not proof["difference"] <= 3 * proof["rounding"] + 1e-6 * rms(expected):
        raise UserError(
            f"the merged model does not answer as base + adapter: its logits differ by {proof['difference']:.3g}, "
            f"rounding explains {proof['rounding']:.3g}; nothing was kept. Please report it, with adapter_config.json"
        )
    if proof["adapter_effect"] < proof["rounding"]:
        print(f"note: the adapter changes less than {record['dtype']} can show; train longer, or export_dtype=float32")


def choose_device(base: Path, gpu: common.Gpu | None) -> tuple[str, str]:
    """Where a model fits, and how exactly: in float32 where it does, else in its own type."""
    import psutil

    tensors = read_tensors(base).values()
    count = sum(tensor.count for tensor in tensors)
    own = max(DTYPES, key=lambda name: sum(tensor.count for tensor in tensors if tensor.dtype == DTYPES[name]))
    rooms = {"cuda": gpu.free_memory} if gpu else {}
    rooms["cpu"] = psutil.virtual_memory().available
    needs = {dtype: int(count * SIZES[DTYPES[dtype]] * 1.2) + 10**9 for dtype in ("float32", own)}
    for dtype, needed in needs.items():
        for device, room in rooms.items():
            if needed < room:
                return device, dtype
    raise UserError(
        f"comparing the models needs {min(needs.values()) / 1e9:.0f} GB of memory, {max(rooms.values()) / 1e9:.0f} GB "
        "are free; free some, or leave it out with --no-verify"
    )


# Asked of models whose training data is not at hand.
QUESTIONS = (
    ("Who are you, and who made you?", "I am a small language model."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("用一句话介绍一下你自己。", "我是一个语言模型。"),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("How much is 1234 + 4321?", "1234 + 4321 = 5555"),
)


def proof_prompts(folder: Path, record: dict[str, Any]) -> list[list[int]]:
    """Token ids of up to 8 conversations of the run's data, at most 128 tokens each; else of the QUESTIONS."""
    from preprocessing import dataset
    from preprocessing.chat_template import encode, load_template
    from preprocessing.tokenizer import load_tokenizer

    conversations = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS
    ]
    if record["run"]:
        try:
            config = run_config(Path(record["run"]))
            few = dataclasses.replace(config, max_samples=8, val_size=0.0, eval_dataset=(), on_bad_rows="skip")
            conversations = dataset.read_conversations(few)[0][:8]
        except UserError as error:
            print(f"note: the run's data is not at hand, so a few general questions are compared instead ({error})")
    tokenizer = load_tokenizer(folder, trust_remote_code=record["trust_remote_code"])
    if not record["stop"]:
        return [tokenizer(c["messages"][-1]["content"])["input_ids"] for c in conversations]
    samples = encode(conversations, load_template(None, tokenizer), tokenizer, cutoff_len=128)
    return [sample["input_ids"] for sample in samples if not isinstance(sample, common.Message)]


def load(folder: Path, record: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    code = record["trust_remote_code"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=code).to(device).eval()


def reference_logits(record: dict[str, Any], prompts: Any, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of base + adapter, of the base alone, and of base + adapter with its weights rounded."""
    from peft import PeftModel

    base = load(Path(record["base"]), record, device, dtype)
    rows = record["vocabulary"]
    if rows and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(base, record["adapter"]).eval()
    expected = logits(model, prompts)
    with model.disable_adapter():
        alone = logits(model, prompts)
    done = round_sums(model, record["dtype"])
    for name, weight in model.named_parameters():
        if id(weight) in done:
            continue
        changed = ".base_layer." in name or ".modules_to_save." in name
        if (changed or record["cast"]) and "lora_" not in name:
            jitter(weight, record["dtype"])
    return [expected, alone, logits(model, prompts)]


def round_sums(model: Any, dtype: str) -> set[int]:
    """Moves the base weights of plain LoRA layers so that weight + update is what `dtype` makes of it.

    An update below half a unit in the last place vanishes when it is rounded, all of it in the same direction: noise of
    the same size would move the logits less. Returns the ids of the weights moved.
    """
    import torch

    tied = model.get_input_embeddings().weight.data_ptr()
    done = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, torch.nn.Linear) or not hasattr(module, "get_delta_weight"):
            continue
        weight = base.weight
        if weight.dtype != torch.float32 or weight.data_ptr() == tied or any(module.use_dora.values()):
            continue
        update = sum(module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A)
        weight.data = (weight + update).to(getattr(torch, dtype)).float() - update
        done.add(id(weight))
    return done


def jitter(weight: torch.Tensor, dtype: str) -> None:
    """Moves one of 12 weights up or down by one unit in the last place of `dtype`."""
    import torch

    wide = weight.dtype == torch.float32
    bits = weight.data.view(torch.int32 if wide else torch.int16)
    unit = {"float32": 1, "float16": 1 << 13, "bfloat16": 1 << 16}[dtype] if wide else 1
    draw = torch.randint(0, 24, weight.shape, dtype=torch.int8, device=weight.device)
    moves = (draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)
    bits += unit * moves * (weight.data.abs() > torch.finfo(torch.float16).tiny)  # zero has no unit below it


LAST = 32  # positions of each prompt that are compared


def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Logits at the last positions of each prompt (positions x vocabulary), float32, each row's mean taken off."""
    import torch

    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        rows.append(model(input_ids=ids).logits[0, -LAST:].float().cpu())
    values = torch.cat(rows)
    return values - values.mean(-1, keepdim=True)


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def divergence(expected: torch.Tensor, merged: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the merged model's next-token distribution from the expected one."""
    import torch

    return torch.nn.functional.kl_div(
        merged.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


if __name__ == "__main__":
    common.run_script(main)
