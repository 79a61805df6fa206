"""Merges a trained adapter into its 16-bit base: a folder that transformers and vLLM load directly.

python merge.py                     merges the newest run into saves/NAME/merged
python merge.py saves/NAME          merges this run; also one of its checkpoints, or any PEFT adapter's folder
python merge.py RECIPE.yaml         merges the run of a recipe, or what a LLaMA-Factory merge file names
python merge.py --check FOLDER      verifies a merged folder once more
    --no-verify    leaves the proof out: logits are not compared with base + adapter
    --overwrite    replaces an earlier merge (overwrite_output_dir=true does the same)
    --push REPO    uploads to the hub, once the result is verified
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
from common import Message, UserError, print_notes
from export import hub, merged_model, verify
from runs.configuration import run_command
from runs.target import find_target, read_arguments


def main(argv: list[str]) -> None:
    flags, name, settings = parse(argv)
    if flags.check:
        print(verify.verify_merged(Path(flags.check)))
        return
    target = find_target(name, settings, "merge")
    print_notes(target.notes)
    job = merged_model.make_job(target)
    if flags.push and merged_model.is_verified(job):  # its upload failed
        hub.check_access(flags.push, job.config.overwrite_output_dir)
    else:
        merged_model.report(job, merged_model.merge(job, not flags.no_verify, flags.push))
    if flags.push:
        merged_model.push(flags.push, job)
    print(Message("talk to it: {command}", command=common.command("chat.py", job.output)))
    print(Message("make a GGUF: {command}", command=common.command("quantize.py", job.output)))


def parse(argv: list[str]) -> tuple[argparse.Namespace, str | None, list[str]]:
    """The flags, what is merged, and the settings."""
    parser = argparse.ArgumentParser(prog="merge.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--push", metavar="REPO")
    parser.add_argument("--check", metavar="FOLDER")
    flags, rest = parser.parse_known_args(argv)
    if flags.push and flags.no_verify:
        raise UserError("--push uploads only verified files; leave --no-verify out")
    name, settings = read_arguments(rest)
    return flags, name, [*settings, "overwrite_output_dir=true"] if flags.overwrite else settings


if __name__ == "__main__":
    run_command(main, __doc__)
