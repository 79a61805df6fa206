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
import logging
import shlex

import common
from common import Message, print_notes
from export import gguf_files, merged_model
from export.gguf_files import TYPES, GgufFile, GgufJob
from export.verify import DTYPE_DIVERGENCE, PROOF_TOKENS, GgufProof
from preprocessing.data_report import format_table, table_head
from runs.configuration import run_command
from runs.files import check_free_space
from runs.target import read_arguments


def main(argv: list[str]) -> None:
    flags, target, settings = parse(argv)
    logging.disable(logging.WARNING)  # what transformers says on import is not about this
    job = gguf_files.find_job(flags.type, target, settings)
    print_notes(job.notes)
    proving = not flags.no_verify and gguf_files.can_prove(job)
    if flags.push:
        gguf_files.check_push(flags.push, job, proving)
    if not (flags.push and gguf_files.are_proven(job)):  # else only their upload failed
        make(job, proving, flags.max_divergence)
    if flags.push:
        gguf_files.push(flags.push, job)
    first = job.types[0]
    print(Message("talk to it: {command}", command=common.command("chat.py", job.file(first))))
    ollama = shlex.join(["ollama", "create", job.name, "-f", str(job.modelfile(first))])
    print(Message("in Ollama:  {command}", command=ollama))


def parse(argv: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
    """The flags, what is quantized, and the settings."""
    parser = argparse.ArgumentParser(prog="quantize.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--max-divergence", type=float)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--push", metavar="REPO")
    flags, rest = parser.parse_known_args(argv)
    target, settings = read_arguments(rest)
    return flags, target, [*settings, "overwrite_output_dir=true"] if flags.overwrite else settings


def make(job: GgufJob, proving: bool, max_divergence: float | None) -> None:
    """Makes the files that are not there yet, the merged model first, and prints what was measured."""
    job = dataclasses.replace(job, types=gguf_files.types_to_make(job, proving))
    gguf_files.remove_leftovers(job)
    needed, _ = gguf_files.space_needed(job)
    check_free_space(job.output, needed)
    if job.merge:
        print(Message("merging first"), flush=True)
        merged_model.report(job.merge, merged_model.merge(job.merge, proving))
    gguf_files.check_merge(job)
    if proving:
        samples = len(job.samples)
        print(Message("data       {samples} samples, at most {tokens} tokens", samples=samples, tokens=PROOF_TOKENS))
    print(table(job, gguf_files.make_files(job, proving, max_divergence, needed)))


def table(job: GgufJob, made: list[GgufFile]) -> str:
    """The proofs as aligned text: one line a type, the 16-bit model first."""
    count, own = gguf_files.weights_of(job.model)
    head = Message("type|MB|bits/weight|KL divergence|same first choice|perplexity|tokens/s|prompt tokens/s")
    lines = [table_head(head)]
    proofs = [file.proof for file in made if file.proof]
    if proofs:
        name, bits = Message("16-bit model, in {dtype}", dtype=proofs[0].reference_dtype), TYPES[own].bits
        perplexity = f"{proofs[0].reference_perplexity:.4f}"
        lines.append([str(name), f"{count * bits / 8e6:.0f}", f"{bits:.2f}", "", "", perplexity, "", ""])
    for file in made:
        size = [file.kind, f"{file.bytes / 1e6:.0f}", f"{8 * file.bytes / count:.2f}"]
        lines.append(size + (figures(file.proof) if file.proof else [str(Message("not verified")), "", "", "", ""]))
    text = format_table(lines)
    if noise := max((DTYPE_DIVERGENCE[proof.reference_dtype] for proof in proofs), default=0):
        note = Message(
            "({dtype} alone makes a divergence of about {divergence:g}; three times that is allowed on top)",
            dtype=proofs[0].reference_dtype,
            divergence=noise,
        )
        text += f"\n{note}"
    return text


def figures(proof: GgufProof) -> list[str]:
    """What was measured of one file."""
    speeds = [f"{proof.tokens_per_second:.1f}", f"{proof.prompt_tokens_per_second:.0f}"]
    return [f"{proof.kl_divergence:.6f}", f"{proof.top1_agreement:.2%}", f"{proof.perplexity:.4f}", *speeds]


if __name__ == "__main__":
    run_command(main, __doc__.format(types=", ".join(TYPES)))
