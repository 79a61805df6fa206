"""GGUF files of a model: which types there are, what is made of what, and how a finished file gets to its place."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import common
from common import SAVES, Config, Message, UserError, print_notes
from export import hub, llamacpp, merged_model
from export.merged_model import MergeJob
from export.modelfile import modelfile
from export.verify import PROOF_LENGTH, PROOF_TOKENS, GgufProof, Reference, own_dtype, spread
from inference import llamacpp_build
from inference.child_process import run_child
from runs import files
from runs.adapter import language_config
from runs.files import existing_folder, on_disk_full, read_json, read_object, sha256, unfinished, write_json, write_text
from runs.target import find_target, is_adapter
from runs.weights import read_tensors

RECORD = "gguf.json"
WORK = "work"  # the folder beside which, in the output's, is what is not whole or not proven yet


@dataclass(frozen=True)
class GgufType:
    """A GGUF type: bits a weight in a large model, and how much divergence is usual.

    `limits` are mean KL divergences in nats, three times those measured: on Llama 3 8B by llama.cpp's authors
    (tools/perplexity/README.md of the pinned source), and on the embedded model of 135 M weights with quantize.py.
    A small model suffers more, and one whose rows do not divide by 256 gets coarser types; a broken file is off by
    several nats. The IQ types that need an importance matrix are not made here: llama.cpp's own tools make them.
    """

    bits: float
    limits: tuple[float, float]


TYPES = {
    "f32": GgufType(32, (0.002, 0.001)),
    "f16": GgufType(16, (0.002, 0.001)),
    "bf16": GgufType(16, (0.002, 0.002)),
    "q8_0": GgufType(8.5, (0.005, 0.025)),
    "q6_k": GgufType(6.6, (0.017, 0.08)),
    "q5_k_m": GgufType(5.7, (0.033, 0.6)),
    "q5_0": GgufType(5.6, (0.067, 0.6)),
    "q4_k_m": GgufType(4.9, (0.1, 0.35)),
    "q4_0": GgufType(4.7, (0.22, 2.0)),
    "q3_k_m": GgufType(4.0, (0.31, 0.9)),
    "q2_k": GgufType(3.2, (1.4, 2.2)),
    "iq4_nl": GgufType(4.7, (0.22, 1.4)),  # without a matrix; measured on the small model only, q4_0's for a large one
    "iq4_xs": GgufType(4.5, (0.22, 1.4)),  # likewise
}
LARGE = 10**9  # weights from which on the limits of the 8B model hold
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # the converter writes these itself: no compiler is needed


# ---------------------------------------------------------------------------------------------------------------------
# What is quantized, and where it goes


@dataclass(frozen=True)
class GgufJob:
    """The 16-bit model's folder, the folder it is named after, the types to make, and the merge that comes first."""

    config: Config
    model: Path
    home: Path
    types: tuple[str, ...]
    merge: MergeJob | None = None
    notes: tuple[Message, ...] = ()

    @property
    def name(self) -> str:
        return self.home.resolve().name

    @property
    def output(self) -> Path:
        return self.home / "gguf"

    def file(self, kind: str) -> Path:
        """The GGUF of a type."""
        return self.output / f"{self.name}-{kind}.gguf"

    def modelfile(self, kind: str) -> Path:
        """Ollama's Modelfile of a type."""
        return self.output / f"{self.name}-{kind}.Modelfile"

    @property
    def merge_record(self) -> dict[str, Any]:
        """merge.json of the model, or an empty record."""
        path = self.model / "merge.json"
        return read_object(path) if path.exists() else {}

    @cached_property
    def tokenizer(self) -> Any:
        from preprocessing.tokenizer import load_tokenizer

        return load_tokenizer(self.model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """The control tokens that end a turn of the trained template."""
        if stop := self.merge_record.get("stop"):
            return tuple(stop)
        from preprocessing.template import load_template

        return tuple(load_template(None, self.tokenizer).stop)

    @cached_property
    def samples(self) -> Any:
        """The run's held-out samples, or those it was trained on."""
        from preprocessing import dataset
        from preprocessing.template import load_template

        prepared = dataset.prepare(
            self.config, self.tokenizer, load_template(self.config.template, self.tokenizer, self.config.stage)
        )
        return prepared.train if prepared.eval is None else prepared.eval

    def reference(self, work: Path) -> Reference:
        samples = spread(self.samples, PROOF_TOKENS, PROOF_LENGTH)
        return Reference(self.model, self.tokenizer, self.stop, samples, self.config.trust_remote_code, work)


def parse_types(wanted: str) -> tuple[str, ...]:
    """The types named with commas; raises UserError for an unknown one."""
    types = tuple(dict.fromkeys(kind.strip().lower() for kind in wanted.split(",") if kind.strip()))
    for kind in types or ("",):
        if kind not in TYPES:
            raise UserError(
                "--type {type}{near:suggestion} is not known; use {known}",
                type=kind,
                near=common.nearest_word(kind, TYPES),
                known=[*TYPES],
            )
    return types


def find_job(wanted: str, name: str | None, settings: list[str]) -> GgufJob:
    """What the command line asks for; raises UserError where something of it is not there."""
    types = parse_types(wanted)
    target = find_target(name, settings, "quantize")
    config, model = target.config, Path(target.model)
    if target.is_gguf:
        raise UserError("{file} is a GGUF already; give the run or the 16-bit model that it was made of", file=model)
    if target.adapter:
        home = Path(config.export_dir) if target.recipe and config.export_dir else target.adapter
        merge = None if target.merged.exists() else merged_model.make_job(target)
        return GgufJob(config, target.merged, home, types, merge, target.notes)
    home = next((f for f in (model, model.parent) if is_adapter(f)), model)
    home = home if Path(target.name).is_dir() else SAVES / model.name  # not into the hub's cache
    return GgufJob(config, model, home, types, notes=target.notes)


def can_prove(job: GgufJob) -> bool:
    """Whether there is llama.cpp's library, or it can be built; raises UserError where a type cannot be without it."""
    missing = llamacpp_build.missing()
    if missing and not set(job.types) <= set(CONVERTED) and not llamacpp_build.quantizer():
        raise UserError.from_message(missing)
    if missing:
        print_notes([Message("the files will not be verified: {reason}", reason=missing)])
    return not missing


def check_merge(job: GgufJob) -> None:
    """Raises UserError where the model was merged from an earlier state of its adapter."""
    record = job.merge_record
    weights = Path(record.get("adapter", "")) / "adapter_model.safetensors"
    if weights.exists() and record["adapter_sha256"] != sha256(weights):
        command = common.command("merge.py", record["adapter"], "--overwrite")
        raise UserError(
            "{model} was merged from an earlier adapter; merge again: {command}", model=job.model, command=command
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is there already, and whether there is space for the rest


def is_made(job: GgufJob, kind: str, proving: bool) -> bool:
    """Whether the file of a type is there as it would be made again."""
    entry = read_record(job).get("files", {}).get(job.file(kind).name, {})
    whole = job.file(kind).exists() and job.file(kind).stat().st_size == entry.get("bytes")
    same = entry.get("adapter_sha256") == job.merge_record.get("adapter_sha256")
    return whole and same and (not proving or bool(entry.get("verified")))


def are_proven(job: GgufJob) -> bool:
    """Whether all files are there as they would be made again, with their proofs."""
    if job.config.overwrite_output_dir or not job.model.exists():
        return False
    check_merge(job)
    return all(is_made(job, kind, proving=True) for kind in job.types)


def types_to_make(job: GgufJob, proving: bool) -> tuple[str, ...]:
    """The types that a killed call has not made yet; raises UserError for files that may not be replaced."""
    if job.config.overwrite_output_dir:
        return job.types
    there = [kind for kind in job.types if job.file(kind).exists()]
    made = [kind for kind in there if job.model.exists() and is_made(job, kind, proving)]
    if there and (len(made) == len(job.types) or len(made) < len(there)):
        raise UserError("{files} exists; add --overwrite to replace it", files=[job.file(kind) for kind in there])
    for kind in made:
        note = Message("{file} already exists and is up to date; it is kept", file=job.file(kind))
        print_notes([note])
    return tuple(kind for kind in job.types if kind not in made)


def weights_of(folder: Path) -> tuple[int, str]:
    """Count of a model's weights, and the GGUF type that holds most of them as they are; reads headers only."""
    tensors = list(read_tensors(folder).values())
    if not any(tensor.dtype in ("F32", "F16", "BF16") for tensor in tensors):
        raise UserError("{folder} has no 16-bit weights; quantize a merged model: python merge.py", folder=folder)
    types = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    return sum(tensor.count for tensor in tensors), types[own_dtype(tensors)]


def space_needed(job: GgufJob) -> tuple[int, dict[str, int]]:
    """Bytes needed for the files and what is made on the way, a merge too; and those of each type.

    What a type takes beyond its bits a weight (TYPES) is much in a small model only.
    """
    model = job.merge.base if job.merge else job.model
    count, own = weights_of(model)

    def size(kind: str) -> int:
        bits = TYPES[kind].bits
        return int(count * min(bits + 0.5 if count >= LARGE else bits * 1.4 + 2, max(bits, 16)) / 8)

    sizes = {kind: size(kind) for kind in (*job.types, first_type(job, own))}
    vocabulary = language_config(read_object(model / "config.json")).get("vocab_size", 1 << 18)
    needed = sum(sizes.values()) + 4 * PROOF_TOKENS * vocabulary
    if job.merge and existing_folder(job.output).stat().st_dev == existing_folder(job.model).stat().st_dev:
        needed += size(own)
    sizes = {kind: sizes[kind] for kind in job.types}
    parts = [f"{kind} {size / 1e9:.2f} GB" for kind, size in sizes.items()]
    print(
        Message(
            "model      {model} ({millions:.0f} M weights, {dtype})\noutput     {output} (at most {sizes})",
            model=job.model,
            millions=count / 1e6,
            dtype=own,
            output=job.output,
            sizes=parts,
        )
    )
    return needed, sizes


def remove_leftovers(job: GgufJob) -> None:
    """Removes what killed processes left: they take space."""
    for place in (job.model, job.output / WORK):
        files.remove_leftovers(place)


# ---------------------------------------------------------------------------------------------------------------------
# Making the files


@dataclass(frozen=True)
class GgufFile:
    """A file that was made: its type, its bytes, and its proof."""

    kind: str
    bytes: int
    proof: GgufProof | None


def make_files(job: GgufJob, proving: bool, max_divergence: float | None, needed: int) -> list[GgufFile]:
    """Makes, proves and keeps a file of each type. `needed`: bytes of disk."""
    made = []
    count, own = weights_of(job.model)
    with unfinished(job.output / WORK) as work, on_disk_full(job.output, needed):
        reference = job.reference(work) if proving else None
        start = convert(job, first_type(job, own), work)
        for kind in sorted(job.types, key=lambda kind: kind == start.stem):  # what the others are made of goes last
            file = make(job, kind, start, work)
            usual = TYPES[kind].limits[count < LARGE]
            proof = reference.verify(kind, file, max_divergence, usual) if reference else None
            made.append(GgufFile(kind, file.stat().st_size, proof))
            keep(job, file, made[-1])
    return made


def first_type(job: GgufJob, own: str) -> str:
    """What the converter writes first: the only type asked for, else the model's own, which the others come from."""
    return job.types[0] if len(job.types) == 1 and job.types[0] in CONVERTED else own


def convert(job: GgufJob, kind: str, work: Path) -> Path:
    """A GGUF by llama.cpp's converter, in the workspace."""
    target = work / f"{kind}.gguf"
    end = job.tokenizer.convert_tokens_to_ids(job.stop[0])
    arguments = {"folder": job.model.resolve(), "target": target, "kind": kind, "card": card(job), "name": job.name}
    llamacpp.call(llamacpp.convert, f"converting to {kind}", end=end, **arguments)
    return target


def card(job: GgufJob) -> dict[str, Any]:
    """The head of the model's card, as the converter reads it; the base's name from the merge."""
    name = job.merge_record.get("base_name")
    base = {"base_model": Path(name).name} if name else {}
    return base | hub.card_head(job.model)


def make(job: GgufJob, kind: str, start: Path, work: Path) -> Path:
    """The file of one type, in the workspace."""
    target = work / f"{kind}.gguf"
    if target == start:
        return target
    doing = f"quantizing to {kind}"
    if tool := llamacpp_build.quantizer():
        run_child([tool, str(start), str(target), kind.upper()], doing)
    elif llamacpp_build.missing():
        return convert(job, kind, work)
    else:
        llamacpp.call(llamacpp.quantize, doing, source=start, target=target, kind=kind)
    return target


def keep(job: GgufJob, file: Path, made: GgufFile) -> None:
    """Moves a file that is whole (and proven) to its place: last, after its line in gguf.json and its Modelfile."""
    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    entry: dict[str, Any] = {"type": made.kind, "bytes": made.bytes}
    entry["adapter_sha256"] = job.merge_record.get("adapter_sha256")
    if made.proof:
        entry |= asdict(made.proof) | {"tokens_equal": True, "verified": True}
    record = read_record(job)
    record |= {"model": str(job.model.resolve()), "llama-cpp-python": llamacpp_build.VERSION}
    place = job.file(made.kind)
    record.setdefault("files", {})[place.name] = entry
    text = modelfile(place.name, job.name, job.tokenizer, job.stop, bool(made.proof and made.proof.adds_bos))
    write_text(job.modelfile(made.kind), text)
    write_json(job.output / RECORD, record)
    os.replace(file, place)


def read_record(job: GgufJob) -> dict[str, Any]:
    """gguf.json, or an empty record."""
    return read_json(job.output / RECORD, {})


# ---------------------------------------------------------------------------------------------------------------------
# After it


def check_push(repo: str, job: GgufJob, proving: bool) -> None:
    """Raises UserError where the hub would refuse the files, or they will not be proven."""
    if not proving:
        raise UserError("--push uploads only verified files; leave --no-verify out")
    hub.check_access(repo, job.config.overwrite_output_dir)


def push(repo: str, job: GgufJob) -> None:
    """Uploads the files just made, and nothing else of their folder."""
    names = [path.name for kind in job.types for path in (job.file(kind), job.modelfile(kind))]
    address = hub.upload(job.output, repo, ignore=[p.name for p in job.output.iterdir() if p.name not in names])
    print(Message("uploaded   {address}", address=address))
