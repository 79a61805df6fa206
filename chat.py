"""Talks to a trained model in the terminal.

python chat.py                    the newest run
python chat.py saves/NAME         a run, an adapter, a merged or plain model folder, a hub name, a FILE.gguf,
                                  or the recipe of a run
    -p TEXT    answers once and ends; piped input is appended to TEXT (git diff | python chat.py -p "Explain this:"),
               or takes the place of -p -. It is read to its end: in a loop over lines, give each call < /dev/null
    --base     also answers with the model before training

In a conversation /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import sys
import time

from common import Message, UserError
from inference.load import load
from inference.request import Settings
from inference.terminal import Speaker, TerminalChat, tell
from runs.configuration import run_command
from runs.target import find_target, read_arguments


def main(argv: list[str]) -> None:
    args, settings = parse(argv)
    if sys.stdout is None:
        raise UserError("standard output is closed, so no reply can be shown; open it, or send it to a file (> FILE)")
    if sys.stdin is None and (not args.prompt or "-" in args.prompt):
        raise UserError("standard input is closed, so no message can be read; give the message with -p TEXT")
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")
    prompt = make_prompt(args.prompt) if args.prompt else None
    target = find_target(args.target, settings)
    for note in target.notes:
        tell(Message("note: {text}", text=note))
    tell(Message("loading {name} ...", name=target.name))
    started = time.monotonic()
    model = load(target, with_base=args.base)
    tell(Message("loaded in {seconds:.1f} s", seconds=time.monotonic() - started))
    speakers = [Speaker(model)]
    if model.base is not None:
        speakers = [Speaker(model.base, Message("before training")), Speaker(model, Message("trained"))]
    chat = TerminalChat(speakers, Settings.of(target.config))
    if prompt is None:
        chat.run()
    elif not chat.say(prompt):
        raise KeyboardInterrupt


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags and the target; and the settings, `key=value`."""
    parser = argparse.ArgumentParser(prog="chat.py", add_help=False, allow_abbrev=False)
    parser.add_argument("-p", dest="prompt", metavar="TEXT", action="append", default=[])
    parser.add_argument("--base", action="store_true")
    parser.add_argument("rest", nargs="*")
    args, unknown = parser.parse_known_args(argv)
    args.target, settings = read_arguments(args.rest)
    return args, unknown + settings


def make_prompt(texts: list[str]) -> str:
    """The texts of -p, and what is piped in where `-` stands, else after them."""
    wanted = "-" in texts or (sys.stdin is not None and not sys.stdin.isatty())
    piped = sys.stdin.read().strip("\n") if wanted else ""
    parts = [piped if text == "-" else text for text in texts] + ([] if "-" in texts else [piped])
    prompt = "\n\n".join(part for part in parts if part)
    if not prompt:
        raise UserError("-p has no text and nothing is piped in; write the message after -p")
    return prompt


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "chat"))
