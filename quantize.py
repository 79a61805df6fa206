"""Turns a run into GGUF files for llama.cpp and Ollama, and proves that they answer as the trained model does.

python quantize.py --type q4_k_m                        quantizes the newest run into saves/NAME/gguf/
python quantize.py saves/NAME --type q4_k_m,q8_0        several types share the conversion; merges first if needed
python quantize.py FOLDER --type q8_0                   a merged folder, or any model; dataset= what to prove it on
    --type TYPES         {types}
    --max-divergence X   accepts a mean KL divergence up to X nats instead of what is usual for the type
    --no-verify          leaves the proof out
    --overwrite          replaces files that are there (overwrite_output_dir=true does the same)
    --push REPO          uploads the files to the hub, once all are verified
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import common
from common import Config, UserError
from runs import files
from runs.adapter import find_base, language_config, read_json
from runs.files import write_json, write_text
from runs.folder import is_run, newest_run, run_config
from runs.process import is_alive
from runs.weights import sha256

RECORD = "gguf.json"


@dataclass(frozen=True)
class Type:
    """A GGUF type: llama.cpp's number for it, bits a weight in a large model, and how much divergence is usual.

    `limits` are mean KL divergences in nats, three times those measured: on Llama 3 8B by llama.cpp's authors
    (tools/perplexity/README.md of the pinned source), and on the embedded model of 135 M weights with this script.
    A small model suffers more, and one whose rows do not divide by 256 gets coarser types; a broken file is off by
    several nats.
    """

    number: int
    bits: float
    limits: tuple[float, float]
    needs_matrix: bool = False


TYPES = {
    "f32": Type(0, 32, (0.002, 0.001)),
    "f16": Type(1, 16, (0.002, 0.001)),
    "bf16": Type(32, 16, (0.002, 0.002)),
    "q8_0": Type(7, 8.5, (0.005, 0.025)),
    "q6_k": Type(18, 6.6, (0.017, 0.08)),
    "q5_k_m": Type(17, 5.7, (0.033, 0.6)),
    "q5_0": Type(8, 5.6, (0.067, 0.6)),
    "q4_k_m": Type(15, 4.9, (0.1, 0.35)),
    "q4_0": Type(2, 4.7, (0.22, 2.0)),
    "q3_k_m": Type(12, 4.0, (0.31, 0.9)),
    "q2_k": Type(10, 3.2, (1.4, 2.2)),
    "iq4_nl": Type(25, 4.7, (0.11, 0.7), True),
    "iq4_xs": Type(30, 4.5, (0.11, 0.7), True),
    "iq3_m": Type(27, 3.8, (0.31, 0.9), True),
    "iq3_s": Type(26, 3.7, (0.34, 1.0), True),
    "iq3_xxs": Type(23, 3.3, (0.56, 1.4), True),
    "iq2_m": Type(29, 2.9, (1.0, 1.9), True),
    "iq2_xs": Type(20, 2.6, (1.7, 2.4), True),
    "iq2_xxs": Type(19, 2.4, (2.5, 2.8), True),
}
# Mean KL divergence of the embedded model computed in this type from the same weights computed in float32.
NOISE = {"float32": 0.0, "float16": 0.00004, "bfloat16": 0.0022}
LARGE = 10**9  # weights from which on the limits of the 8B model hold
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # the converter writes these itself: no compiler is needed

PROOF_TOKENS, PROOF_LENGTH = 1024, 256  # tokens of all proof samples, of one at most
MATRIX_TOKENS, MATRIX_LENGTH = 16384, 512


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__.format(types=", ".join(TYPES))))
        return
    flags, settings = parse(argv)
    logging.disable(logging.WARNING)  # what transformers says on import is not about this
    job = find_job(flags.type, settings)
    proving = not flags.no_verify and can_prove(job)
    if flags.push:
        check_push(flags.push, job, proving)
        if are_proven(job):  # their upload failed
            push(flags.push, job)
            return
    check_output(job)
    check_disk(job)
    merge_first(job, proving)
    if proving or needs_matrix(job):
        print(f"data       {len(job.samples[0])} samples, of which {PROOF_TOKENS} tokens prove it")
    results: dict[str, dict[str, Any]] = {}
    with workspace(job.output) as work:
        start = convert(job, first_type(job, weights_of(job.model)[1]), work)
        matrix = importance_matrix(job, start, work)
        for kind in sorted(job.types, key=lambda kind: kind == start.stem):  # what the others are made of goes last
            file = make(job, kind, start, matrix, work)
            results[kind] = {"bytes": file.stat().st_size, "adapter_sha256": merge_record(job).get("adapter_sha256")}
            if proving:
                results[kind] |= verify(job, kind, file, work, flags.max_divergence)
            keep(job, kind, file, results[kind])
    print(table(job, results))
    if flags.push:
        push(flags.push, job)
    first = job.types[0]
    print(f"talk to it: {common.command('chat.py', job.file(first))}")
    print(f"in Ollama:  {shlex.join(['ollama', 'create', job.name, '-f', str(job.modelfile(first))])}")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the rest: folder or recipe, settings."""
    parser = argparse.ArgumentParser(prog="quantize.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--max-divergence", type=float)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--push", metavar="REPO")
    flags, settings = parser.parse_known_args(argv)
    return flags, [*settings, "overwrite_output_dir=true"] if flags.overwrite else settings


# ---------------------------------------------------------------------------------------------------------------------
# What is quantized, and where it goes


@dataclass(frozen=True)
class Job:
    """The 16-bit model's folder, the folder it is named after, the types to make.

    Where there is no model yet: what merge.py is told first, and the base it merges into.
    """

    config: Config
    model: Path
    home: Path
    types: tuple[str, ...]
    merge: tuple[str, ...] = ()
    base: str = ""

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

    @cached_property
    def tokenizer(self) -> Any:
        from preprocessing.tokenizer import load_tokenizer

        return load_tokenizer(self.model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """The control tokens that end a turn of the trained template."""
        from preprocessing.chat_template import load_template

        return load_template(None, self.tokenizer).stop

    @cached_property
    def samples(self) -> Any:
        """Token ids of the run's data: (held-out samples, or those trained on; those trained on)."""
        from preprocessing import dataset
        from preprocessing.chat_template import load_template

        prepared = dataset.prepare(self.config, self.tokenizer, load_template(self.config.template, self.tokenizer))
        return prepared.train if prepared.eval is None else prepared.eval, prepared.train


def find_job(wanted: str, settings: list[str]) -> Job:
    """What the command line asks for; raises UserError where something of it is not there."""
    types = tuple(dict.fromkeys(kind.strip().lower() for kind in wanted.split(",") if kind.strip()))
    for kind in types or ("",):
        if kind not in TYPES:
            raise UserError(f"--type {kind}{common.nearest(kind, TYPES)} is not known; use {', '.join(TYPES)}")
    folders = [Path(setting) for setting in settings if Path(setting).is_dir()]
    if len(folders) > 1:
        raise UserError(f"{folders[0]} and {folders[1]} are two folders; give one run or model")
    rest = [setting for setting in settings if not Path(setting).is_dir()]
    loaded = common.load_config(rest)
    config = loaded.config
    told = common.load_config([setting for setting in rest if Path(setting) != loaded.recipe])  # the command line alone
    merge: tuple[str, ...] = ()
    if not folders and loaded.recipe and config.export_dir:  # merge.py reads it
        is_merge_file = config.adapter_name_or_path and "export_dir" not in told.given
        adapter = Path(config.adapter_name_or_path if is_merge_file else config.output_dir)
        model = home = Path(config.export_dir)
        merge = tuple(rest)
    else:
        model = folders[0] if folders else Path(config.output_dir) if loaded.recipe else newest_run()
        adapter = find_adapter(model)
        home = adapter or model
        if model == adapter:
            model, merge = Path(config.export_dir or adapter / "merged"), (str(adapter), *rest)
    run = find_run(adapter, model)
    if run:  # its settings, and before them what the recipe and the command line say
        given = {name: getattr(config, name) for name in {*loaded.given, "export_dir"}}
        config = dataclasses.replace(run_config(run), **given)
    # what a recipe may overwrite is its training's
    config = dataclasses.replace(config, overwrite_output_dir=told.config.overwrite_output_dir)
    base = config.model_name_or_path
    if not run and "model_name_or_path" not in loaded.given and adapter and (adapter / "adapter_config.json").exists():
        base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or base
    return Job(config, model, home, types, merge, base)


def find_adapter(folder: Path) -> Path | None:
    """The adapter that a folder is, or whose merged model it is; raises UserError where it is no model either."""
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds neither a finished run nor a model; give saves/NAME, or a model's folder")
    return next((f for f in (folder, folder.parent) if (f / "adapter_config.json").exists()), None)


def find_run(adapter: Path | None, model: Path) -> Path | None:
    """The run that an adapter belongs to, or that the record of a merged folder names."""
    places = [adapter, adapter.parent] if adapter else []
    if (model / "merge.json").exists() and (named := read_json(model / "merge.json").get("run")):
        places.append(Path(named))
    return next((folder for folder in places if is_run(folder)), None)


def check_output(job: Job) -> None:
    """Raises UserError where a file is there already and may not be replaced."""
    there = [str(job.file(kind)) for kind in job.types if job.file(kind).exists()]
    if there and not job.config.overwrite_output_dir:
        raise UserError(f"{', '.join(there)} is there already; add --overwrite to replace it")


def can_prove(job: Job) -> bool:
    """Whether there is llama.cpp's library, or it can be built; raises UserError where a type cannot be without it."""
    from inference import llamacpp_library

    missing = llamacpp_library.missing()
    by_library = not set(job.types) <= set(CONVERTED) and not llamacpp_library.quantizer()
    if missing and (by_library or needs_matrix(job)):
        raise UserError.from_message(missing)
    if missing:
        print(f"note: nothing will be proven: {missing}")
    return not missing


def check_push(repo: str, job: Job, proving: bool) -> None:
    """Raises UserError where the hub would refuse the files, or they will not be proven."""
    from export import hub

    if not proving:
        raise UserError("--push uploads only what is proven; leave --no-verify out")
    hub.check_access(repo, job.config.overwrite_output_dir)


def push(repo: str, job: Job) -> None:
    """Uploads the files just made, and nothing else of their folder."""
    from export import hub

    files = [path.name for kind in job.types for path in (job.file(kind), job.modelfile(kind))]
    address = hub.upload(job.output, repo, ignore=[p.name for p in job.output.iterdir() if p.name not in files])
    print(f"uploaded   {address}")


def merge_first(job: Job, proving: bool) -> None:
    """Runs merge.py where there is no merged model yet; one of an earlier state of the adapter is an error."""
    if job.merge and not job.model.exists():
        print("merging first", flush=True)
        script = str(Path(__file__).with_name("merge.py"))
        flags = [] if proving else ["--no-verify"]
        if status := subprocess.run([sys.executable, script, *job.merge, *flags]).returncode:
            raise UserError(f"merge.py ended with status {status}, see above; nothing was quantized")
    record = merge_record(job)
    weights = Path(record.get("adapter", "")) / "adapter_model.safetensors"
    if weights.exists() and record["adapter_sha256"] != sha256(weights):
        raise UserError(
            f"{job.model} was merged from another state of its adapter; "
            f"merge again first: python merge.py {shlex.quote(record['adapter'])} --overwrite"
        )


def merge_record(job: Job) -> dict[str, Any]:
    """merge.json of the model, or an empty record."""
    path = job.model / "merge.json"
    return read_json(path) if path.exists() else {}


def are_proven(job: Job) -> bool:
    """Whether all files are there as they would be made again, with their proofs."""
    if job.config.overwrite_output_dir or not job.model.exists():
        return False
    merge_first(job, proving=True)  # only looks whether the merge is of the adapter's present state
    entries, merged = read_record(job).get("files", {}), merge_record(job).get("adapter_sha256")
    for kind in job.types:
        entry = entries.get(job.file(kind).name, {})
        whole = job.file(kind).exists() and job.file(kind).stat().st_size == entry.get("bytes")
        if not (whole and entry.get("verified") and entry.get("adapter_sha256") == merged):
            return False
    return True


def weights_of(folder: Path) -> tuple[int, str]:
    """Count of a model's weights, and the GGUF type that holds most of them as they are; reads headers only."""
    counts: dict[str, int] = {}
    for path in folder.glob("model*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + size
    stored = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
    if not counts or not counts.keys() & stored.keys():
        raise UserError(f"{folder} has no 16-bit or 32-bit safetensors; quantize the merged model: python merge.py")
    return sum(counts.values()), stored.get(max(counts, key=lambda dtype: counts[dtype]), "f32")


def check_disk(job: Job) -> None:
    """Raises UserError where the disk has no room for the files and what is made on the way, a merge too.

    What a type takes beyond its bits a weight (TYPES) is much in a small model only.
    """
    remove_leftovers(job.output)  # they take room
    files.remove_leftovers(job.model)
    merging = job.merge and not job.model.exists()
    model = find_base(job.base)[0] if merging else job.model
    count, own = weights_of(model)

    def size(kind: str) -> int:
        bits = TYPES[kind].bits
        return int(count * min(bits + 0.5 if count >= LARGE else bits * 1.4 + 2, max(bits, 16)) / 8)

    first = first_type(job, own)
    sizes = {kind: size(kind) for kind in (*job.types, first)}
    vocabulary = language_config(read_json(model / "config.json")).get("vocab_size", 1 << 18)
    needed = sum(sizes.values()) + 4 * PROOF_TOKENS * vocabulary
    there, merged = (
        next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        for path in (job.output, job.model)
    )
    if merging and there.stat().st_dev == merged.stat().st_dev:
        needed += size(own)
    free = shutil.disk_usage(there).free
    parts = ", ".join(f"{kind} {sizes[kind] / 1e9:.2f} GB" for kind in job.types)
    print(f"model      {job.model} ({count / 1e6:.0f} M weights, {own})\noutput     {job.output} (at most {parts})")
    if free < needed:
        way = needed - sum(sizes[kind] for kind in job.types)
        raise UserError(
            f"{there} has {free / 1e9:.2f} GB of free disk space, {needed / 1e9:.2f} are needed ({parts}, and "
            f"{way / 1e9:.2f} GB on the way); free some, or take fewer types"
        )


def remove_leftovers(output: Path) -> None:
    """Removes what killed processes left in a folder."""
    for path in output.glob(".work-*"):
        if not is_alive(int(path.name.split("-")[1])):
            shutil.rmtree(path)


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder for what is not whole or not proven yet, inside the output's, removed at the end."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=f".work-{os.getpid()}-") as folder:
        yield Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Making the files


def first_type(job: Job, own: str) -> str:
    """What the converter writes first: the only type asked for, else the model's own, which the others come from."""
    return job.types[0] if len(job.types) == 1 and job.types[0] in CONVERTED else own


def convert(job: Job, kind: str, work: Path) -> Path:
    """A GGUF by llama.cpp's converter, in the workspace."""
    from export import llamacpp

    target = work / f"{kind}.gguf"
    end = job.tokenizer.convert_tokens_to_ids(job.stop[0])
    arguments = {"folder": job.model.resolve(), "target": target, "kind": kind, "card": card(job), "name": job.name}
    llamacpp.call(llamacpp.convert, f"converting to {kind}", end=end, **arguments)
    return target


def card(job: Job) -> dict[str, Any]:
    """The head of the model's card (licence, base model), as the converter reads it; the base's name from the run."""
    import yaml

    path = job.model / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    head = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    known = yaml.safe_load(head[1]) if head else {}
    base = {"base_model": Path(job.config.model_name_or_path).name} if (job.model / "merge.json").exists() else {}
    return base | (known if isinstance(known, dict) else {})


def needs_matrix(job: Job) -> bool:
    """Whether a type weighs its rounding errors by an importance matrix."""
    return any(TYPES[kind].needs_matrix for kind in job.types)


def importance_matrix(job: Job, start: Path, work: Path) -> Path | None:
    """The importance matrix of the training data, where a type needs it."""
    if not needs_matrix(job):
        return None
    from export import llamacpp

    target = work / "imatrix.gguf"
    samples = spread(job.samples[1], MATRIX_TOKENS, MATRIX_LENGTH)
    tokens = sum(map(len, samples))
    llamacpp.call(
        llamacpp.importance, f"importance of the weights on {tokens} tokens", file=start, samples=samples, target=target
    )
    return target


def make(job: Job, kind: str, start: Path, matrix: Path | None, work: Path) -> Path:
    """The file of one type, in the workspace."""
    from export import llamacpp
    from inference import llamacpp_library

    target = work / f"{kind}.gguf"
    if target == start:
        return target
    used = str(matrix) if matrix and TYPES[kind].needs_matrix else None
    doing = f"quantizing to {kind}"
    from inference.child_process import run_child

    if tool := llamacpp_library.quantizer():
        run_child([tool, *(["--imatrix", used] if used else []), str(start), str(target), kind.upper()], doing)
    elif llamacpp_library.missing():
        return convert(job, kind, work)
    else:
        number = TYPES[kind].number
        llamacpp.call(llamacpp.quantize, doing, source=start, target=target, ftype=number, matrix=used)
    return target


def keep(job: Job, kind: str, file: Path, result: dict[str, Any]) -> None:
    """Moves a file that is whole (and proven) to its place, with its Modelfile and its line in gguf.json."""
    from export.modelfile import modelfile
    from inference import llamacpp_library

    with open(file, "rb+") as written:
        os.fsync(written.fileno())
    record = read_record(job)
    record |= {"model": str(job.model.resolve()), "llama-cpp-python": llamacpp_library.VERSION}
    record.setdefault("files", {})[job.file(kind).name] = {"type": kind, **result}
    text = modelfile(job.file(kind).name, job.name, job.tokenizer, job.stop, result.get("adds_bos", False))
    write_text(job.modelfile(kind), text)
    os.rename(file, job.file(kind))
    write_json(job.output / RECORD, record)


def read_record(job: Job) -> dict[str, Any]:
    """gguf.json, or an empty record."""
    path = job.output / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# ---------------------------------------------------------------------------------------------------------------------
# The proof: llama.cpp reads the tokens as the tokenizer writes them, and predicts what the 16-bit model predicts

TEXTS = (
    "Hello, world! It's 12:30, isn't it? I've 3.14159 reasons.",
    "你好，世界！今天是2026年11月23日，星期一。",
    "1234567890 007 3,141.59 １２３ ⅷ ½",
    "emoji 😀👍🏽 👩‍👩‍👧 🇫🇷 é é ñ",
    "def f(x):\n\treturn {'a': x ** 2}  # twice\n\n\n    if x != 0:\r\n        pass\n",
    "  leading, trailing and   inner spaces  \t \n \n\n",
    "Straße naïve Привет мир שלום עולם مرحبا สวัสดี こんにちは 안녕하세요",
    "zero\u200bwidth \u00a0 nbsp \ufeff \u3000 ideographic",
)


def verify(job: Job, kind: str, file: Path, work: Path, limit: float | None) -> dict[str, Any]:
    """Measures a file against the 16-bit model; raises UserError where it is not what it should be."""
    from export import llamacpp

    seen = check_contents(job, kind, file)
    samples = spread(job.samples[0], PROOF_TOKENS, PROOF_LENGTH)
    reference, computed_in = reference_logits(job, samples, work)
    measured = llamacpp.call(llamacpp.measure, f"comparing {kind}", file=file, samples=samples, reference=reference)
    if limit is None:
        limit = TYPES[kind].limits[weights_of(job.model)[0] < LARGE] + 3 * NOISE[computed_in]
    if not measured["kl_divergence"] <= limit:
        raise UserError(
            f"{kind} answers differently from the 16-bit model: mean KL divergence {measured['kl_divergence']:.4f}, "
            f"{kind} usually stays below {limit:g}; take a larger type, or accept it: --max-divergence X"
        )
    return {**measured, **seen, "reference_dtype": computed_in, "verified": True}


def check_contents(job: Job, kind: str, file: Path) -> dict[str, Any]:
    """Token ids, end of turn, template and metadata as llama.cpp reads them; raises UserError where one is wrong."""
    from export import llamacpp

    tokenizer = job.tokenizer
    controls = "".join(tokenizer.all_special_tokens)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, TEXTS, strict=True)]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    data = [tokenizer.decode(ids) for ids in spread(job.samples[0], PROOF_TOKENS, PROOF_LENGTH)]
    texts = [*TEXTS, controls, f"a{controls} b", rendered, *data]
    seen = llamacpp.call(llamacpp.inspect, f"reading {kind}", file=file, texts=texts)
    for text, ids in zip(texts, seen.pop("ids"), strict=True):
        if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"llama.cpp cuts {text[:60]!r} into other tokens than the model's tokenizer; "
                "the file would answer wrongly and was not kept. Try a newer llama.cpp: LLAMA_CPP_DIR=folder"
            )
    ends = tokenizer.convert_tokens_to_ids(list(job.stop))
    if seen["eos"] != ends[0] or seen["eot"] != ends[0] or not set(ends) <= set(seen.pop("end")):
        raise UserError(f"llama.cpp would not stop at {' '.join(job.stop)}; nothing was kept. Please report it")
    if seen.pop("template") != tokenizer.chat_template:
        raise UserError("the file does not hold the trained chat template; nothing was kept. Please report it")
    return {"tokens_equal": True, "texts": len(texts), **seen}


def spread(samples: Any, tokens: int, longest: int) -> list[list[int]]:
    """Token ids of samples spread evenly over the data, each cut to `longest`, `tokens` in all at most."""
    order = sorted(range(len(samples)), key=lambda i: (i * 2654435761) % 2**32)  # a fixed shuffle
    chosen, left = [], tokens
    for i in order:
        ids = [int(token) for token in samples[i]["input_ids"][: min(longest, left)]]
        if len(ids) > 1:
            chosen.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return chosen


def reference_logits(job: Job, samples: list[list[int]], work: Path) -> tuple[Path, str]:
    """Logits of the 16-bit model by transformers, float32 (tokens × vocabulary) in a .npy file; computed once.

    Computed in float32 where memory allows it, on the card or the CPU, else in the model's own type; the type's name
    is the second result.
    """
    if found := next(work.glob("reference-*.npy"), None):
        return found, found.stem.removeprefix("reference-")
    import numpy as np
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device, dtype = choose_device(job)
    name = str(dtype).removeprefix("torch.")
    target = work / f"reference-{name}.npy"
    code = job.config.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, trust_remote_code=code).to(device).eval()
    logits, start = None, 0
    with torch.inference_mode():
        for ids in tqdm(samples, desc="16-bit model", bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}"):
            rows = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu().numpy()
            if logits is None:
                shape = (sum(map(len, samples)), rows.shape[1])
                logits = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=shape)
            logits[start : start + len(ids)] = rows
            start += len(ids)
    logits.flush()
    return target, name


def choose_device(job: Job) -> tuple[str, Any]:
    """Where the model fits, and how exactly: float32 where it does, else its own type."""
    import psutil
    import torch

    count, own = weights_of(job.model)
    rooms = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    rooms["cpu"] = psutil.virtual_memory().available
    for dtype in (torch.float32, {"f16": torch.float16, "bf16": torch.bfloat16}.get(own, torch.float32)):
        for device, room in rooms.items():
            if count * dtype.itemsize * 1.2 + 10**9 < room:
                return device, dtype
    raise UserError(
        f"the proof needs {count * 2.4 / 1e9 + 1:.0f} GB of memory for the 16-bit model, "
        f"{max(rooms.values()) / 1e9:.0f} are free; free some, or leave the proof out with --no-verify"
    )


def table(job: Job, results: dict[str, dict[str, Any]]) -> str:
    """The results as aligned text: one line a type, the 16-bit model first."""
    count, own = weights_of(job.model)
    head = (
        "type",
        "MB",
        "bits/weight",
        "KL divergence",
        "same first choice",
        "perplexity",
        "tokens/s",
        "prompt tokens/s",
    )
    lines = [head]
    for kind, result in results.items():
        size = (kind, f"{result['bytes'] / 1e6:.0f}", f"{8 * result['bytes'] / count:.2f}")
        if "verified" not in result:
            lines.append((*size, "not verified", "", "", "", ""))
            continue
        if len(lines) == 1:
            bits = TYPES[own].bits
            perplexity = f"{result['reference_perplexity']:.4f}"
            exact = result["reference_dtype"] == "float32"
            name = "16-bit model" if exact else f"16-bit model, in {result['reference_dtype']}"
            lines.append((name, f"{count * bits / 8e6:.0f}", f"{bits:.2f}", "", "", perplexity, "", ""))
        lines.append(
            (
                *size,
                f"{result['kl_divergence']:.6f}",
                f"{result['top1_agreement']:.2%}",
                f"{result['perplexity']:.4f}",
                f"{result['tokens_per_second']:.1f}",
                f"{result['prompt_tokens_per_second']:.0f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if noise := max(NOISE[result.get("reference_dtype", "float32")] for result in results.values()):
        rows.append(f"(that type alone makes a divergence of about {noise:g}: three times that is allowed on top)")
    return "\n".join(rows)


if __name__ == "__main__":
    common.run_script(main)
