"""A merged model's folder: what is merged into what, and everything in it beside the weights."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError, print_notes
from export import hub, verify
from export.merge import Plan, make_plan, write_shards
from runs.adapter import Adapter, language_config
from runs.files import (
    appearing,
    check_free_space,
    on_disk_full,
    read_object,
    remove_leftovers,
    sha256,
    write_json,
    write_text,
)
from runs.folder import for_transformers_4, read_run, run_config
from runs.target import HUB_NAME, Target, missing_from_model
from runs.weights import DTYPES, read_tensors

RECORD = "merge.json"


@dataclass(frozen=True)
class MergeJob:
    """What is merged into what: the target, the folder of its 16-bit base and its config.json, and the result's."""

    target: Target
    adapter: Path
    base: Path
    base_config: dict[str, Any]
    output: Path

    @property
    def config(self) -> Config:
        return self.target.config

    @property
    def run(self) -> Path | None:
        """The run that the adapter belongs to."""
        return self.target.run


def make_job(target: Target) -> MergeJob:
    """The merge of a target whose `model` is its 16-bit base; raises UserError where its output leads nowhere."""
    base, output = Path(target.model), target.merged
    if output.is_symlink():
        if not output.exists():
            raise UserError(
                "{output} is a symbolic link to a missing folder; remove it, or set another export_dir", output=output
            )
        output = output.resolve()  # what it leads to is replaced, not the link
    return MergeJob(target, target.adapter, base, read_object(base / "config.json"), output)


def merge(job: MergeJob, verifying: bool, repo: str | None = None) -> verify.MergeProof | None:
    """Merges, and verifies the result before it takes its place; `repo`, of the hub, is asked for access before."""
    started = time.monotonic()
    adapter = Adapter(job.adapter)
    plan = make_plan(read_tensors(job.base), job.base_config, adapter, job.config.export_dtype)
    template = trained_template(job, plan)
    announce(job, adapter, plan, template)
    check_output(job, plan)
    if verifying:
        verify.choose_device(job.base)  # before the work, not after it
    if repo:
        hub.check_access(repo, job.config.overwrite_output_dir)
    with on_disk_full(job.output, plan.size), appearing(job.output) as folder:
        share = write_shards(plan, folder, job.config.export_size * 10**9).share
        write_small_files(job, plan, template, folder)
        record = make_record(job, adapter, plan, template, share)
        write_json(folder / RECORD, record | {"seconds": round(time.monotonic() - started, 2)})
        if share is not None:
            dtype = record["dtype"]
            print(
                Message("rounding   {share:.1%} of the adapter's product remains in {dtype}", share=share, dtype=dtype)
            )
        proof = verify.verify_merged(folder) if verifying else None
        write_card(job, folder)
    return proof


def report(job: MergeJob, proof: verify.MergeProof | None) -> None:
    """Prints what was merged, and its proof."""
    record = read_object(job.output / RECORD)
    if proof:
        print(proof)
        if proof.adapter_effect < proof.rounding:
            text = Message(
                "the adapter changes less than {dtype} can show; try export_dtype=float32", dtype=record["dtype"]
            )
            print_notes([text])
        if proof.trained_bits:
            text = "from the {bits}-bit base of its training the merged model differs by a mean KL of {kl:.2g}"
            print_notes([Message(text, bits=proof.trained_bits, kl=proof.trained_kl)])
    print(Message("merged     {output} ({gb:.2f} GB)", output=job.output, gb=record["bytes"] / 1e9))


def check_output(job: MergeJob, plan: Plan) -> None:
    """Raises UserError where the output may not be replaced, or the disk has not enough space for it."""
    for folder in filter(None, (job.base, job.adapter, job.run)):
        if folder.resolve().is_relative_to(job.output.resolve()):
            raise UserError("{output} holds {source}; set another export_dir", output=job.output, source=folder)
    if job.output.is_file() or (job.output.is_dir() and any(job.output.iterdir())):
        if not (job.output / RECORD).exists():
            raise UserError("{output} exists and is not an earlier merge; set another export_dir", output=job.output)
        if not job.config.overwrite_output_dir:
            raise UserError("{output} exists; add --overwrite, or set another export_dir", output=job.output)
    remove_leftovers(job.output)  # they take space
    check_free_space(job.output, plan.size + 10**8)


def is_verified(job: MergeJob) -> bool:
    """Whether the output is there as this merge would make it, with its proof."""
    if job.config.overwrite_output_dir or not (job.output / RECORD).exists():
        return False
    record, adapter = read_object(job.output / RECORD), Adapter(job.adapter)
    same = record["adapter_sha256"] == sha256(adapter.file) and record["base"] == str(job.base.resolve())
    same = same and job.config.export_dtype in (None, record["dtype"])
    return same and "proof" in record and not missing_from_model(job.output)


def push(repo: str, job: MergeJob) -> None:
    """Uploads the merged model, in place of the weights that the repository may hold."""
    weights = ["model*.safetensors", "model.safetensors.index.json"]
    print(Message("uploaded   {address}", address=hub.upload(job.output, repo, ignore=[RECORD], delete=weights)))


def announce(job: MergeJob, adapter: Adapter, plan: Plan, template: TrainedTemplate | None) -> None:
    changed = sum(tensor.update is not None for tensor in plan.tensors)
    dtypes = sorted({tensor.dtype for tensor in plan.tensors if tensor.dtype in DTYPES.values()})
    print(Message("base       {base} ({tensors} tensors)", base=job.base, tensors=len(plan.tensors)))
    print(
        Message(
            "adapter    {adapter} ({kind}, {tensors} tensors, for {changed} of the base's)",
            adapter=job.adapter,
            kind=kind(adapter),
            tensors=len(adapter.tensors),
            changed=changed,
        )
    )
    print(Message("output     {output} ({gb:.2f} GB, {dtypes})", output=job.output, gb=plan.size / 1e9, dtypes=dtypes))
    notes = []
    if template:
        print(Message("template   {name}, ends a turn with {stop}", name=template.name, stop=" ".join(template.stop)))
    else:
        notes.append(Message("neither the settings nor the tokenizer name a chat template; set template="))
    if plan.untied:
        notes.append(Message("the embedding and the output layer are no longer tied: each gets its own tensor"))
    if dtypes == ["F32"]:
        notes.append(Message("the base is in float32; export_dtype=bfloat16 makes the result half as large"))
    print_notes(notes)


def kind(adapter: Adapter) -> str:
    """LoRA, rsLoRA or DoRA, with the ranks."""
    settings = adapter.settings
    name = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    ranks = sorted({settings["r"], *(settings.get("rank_pattern") or {}).values()})
    return f"{name} of rank {', '.join(map(str, ranks))}"


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and chat template

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
TOKENIZER += ("*.tiktoken", "chat_template.jinja", "additional_chat_templates")
FROM_BASE = ("*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")  # code for trust_remote_code; what a licence asks to pass on


@dataclass(frozen=True)
class TrainedTemplate:
    """The chat template as it is saved, and the control tokens that end a turn."""

    name: str | Message
    text: str
    stop: list[str]
    stop_ids: list[int]


def trained_template(job: MergeJob, plan: Plan) -> TrainedTemplate | None:
    """The chat template the adapter was trained with; None where none is named and the tokenizer has none.

    Raises UserError where the tokenizer has more tokens than the merged embedding has rows.
    """
    from preprocessing.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job.target.tokenizer, trust_remote_code=job.config.trust_remote_code)
    known = len(tokenizer)
    if plan.vocabulary and known > plan.vocabulary:
        raise UserError(
            "{folder}: the tokenizer has {tokens} tokens, the embedding {rows} rows; "
            "train the embedding of the new tokens (modules_to_save)",
            folder=job.target.tokenizer,
            tokens=known,
            rows=plan.vocabulary,
        )
    run = read_run(job.run) if job.run else None
    jinja = (job.run or job.adapter) / "chat_template.jinja"
    if run and run.get("stop") and jinja.exists() and job.config.template == run_config(job.run).template:
        name, text, stop = Message("the run's"), jinja.read_text(encoding="utf-8"), run["stop"]
    elif job.config.template is None and not tokenizer.chat_template:
        return None
    else:
        from preprocessing.template import OWN, load_template

        template = load_template(job.config.template, tokenizer, job.config.stage)
        name = Message("the tokenizer's own") if template.name == OWN else template.name
        text, stop = template.saved, template.stop
    return TrainedTemplate(name, text, list(stop), tokenizer.convert_tokens_to_ids(list(stop)))


# ---------------------------------------------------------------------------------------------------------------------
# The small files


def write_small_files(job: MergeJob, plan: Plan, template: TrainedTemplate | None, folder: Path) -> None:
    """Everything beside the weights that transformers and vLLM read."""
    for source, patterns in ((job.target.tokenizer, TOKENIZER), (job.base, FROM_BASE)):
        for path in (path for pattern in patterns for path in source.glob(pattern)):
            check_links(path)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
    for_transformers_4(folder)
    if template:
        write_text(folder / "chat_template.jinja", template.text)
        settings = read_object(folder / "tokenizer_config.json")
        if settings.pop("chat_template", None):  # one place for it, so that no two can differ
            write_json(folder / "tokenizer_config.json", settings)
    write_generation_config(job, template, folder)
    write_config(job, plan, folder)


def check_links(path: Path) -> None:
    """Raises UserError for a link to a file of another name and folder, which --push would publish.

    The hub's cache links into its blobs/; a link to a file of the same name elsewhere is a way to save space.
    """
    for file in (path, *(path.rglob("*") if path.is_dir() else ())):
        real = file.resolve()
        inside = real.parent.is_relative_to(path.parent.resolve()) or real.parent.name == "blobs"
        if file.is_symlink() and not inside and real.name != file.name:
            raise UserError("{link} is a symbolic link to {target}; put a copy there", link=file, target=real)


def write_generation_config(job: MergeJob, template: TrainedTemplate | None, folder: Path) -> None:
    """The base's generation_config.json, ending where the template's turns end."""
    path = job.base / "generation_config.json"
    settings = read_object(path) if path.exists() else {}
    if template:
        settings["eos_token_id"] = template.stop_ids[0] if len(template.stop_ids) == 1 else template.stop_ids
    if settings:  # an empty one would take away the end that config.json names
        write_json(folder / "generation_config.json", settings)


def write_config(job: MergeJob, plan: Plan, folder: Path) -> None:
    """The base's config.json as it fits the merged weights."""
    config = {
        key: value for key, value in job.base_config.items() if key not in ("_name_or_path", "quantization_config")
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


def make_record(
    job: MergeJob, adapter: Adapter, plan: Plan, template: TrainedTemplate | None, share: float | None
) -> dict[str, Any]:
    """merge.json: what was merged into what, and what of it quantize.py goes on with."""
    changed = {tensor.dtype for tensor in plan.tensors if tensor.update}
    coarsest = next((dtype for dtype in ("BF16", "F16") if dtype in changed), "F32")
    return {
        "base": str(job.base.resolve()),
        "base_name": hub_name(job),
        "adapter": str(job.adapter.resolve()),
        "adapter_sha256": sha256(adapter.file),
        "run": str(job.run.resolve()) if job.run else None,
        "kind": kind(adapter),
        "dtype": next(name for name, stored in DTYPES.items() if stored == coarsest),
        "cast": job.config.export_dtype is not None,
        "adapter_tensors": len(adapter.tensors),
        "adapter_share": None if share is None else round(share, 4),
        "bytes": plan.size,
        "stop": template.stop if template else [],
        "trust_remote_code": job.config.trust_remote_code,
    }


def write_card(job: MergeJob, folder: Path) -> None:
    """README.md, as the hub wants it: base model, licence, data, how it was made."""
    import yaml

    record = read_object(folder / RECORD)
    name = record["base_name"]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": hub.card_head(job.base).get("license"),
    }
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
    front = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    title = job.run.name if job.run else job.adapter.name
    write_text(folder / "README.md", f"---\n{front}---\n\n# {title}\n\n" + "\n\n".join(lines) + "\n")


def hub_name(job: MergeJob) -> str:
    """The base's name on the hub where it is known, else its folder's: never a path of this machine."""
    record = job.base / "download.json"
    name = read_object(record)["model"] if record.exists() else job.target.base
    is_path = Path(name).exists() or (common.ROOT / name).exists()
    return name if HUB_NAME.fullmatch(name) and not is_path else job.base.name
