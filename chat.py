"""Talks to a trained model in the terminal.

python chat.py                    the newest run
python chat.py saves/NAME         a run, an adapter, a merged or plain model folder, a hub name, a FILE.gguf,
                                  or the recipe of a run
    -p TEXT    answers once and ends; what is piped in stands after TEXT (git diff | python chat.py -p "Explain this:").
               Waits for a pipe only while the model loads, and leaves alone the input of a script that calls it.
               -p - stands for that input and waits for its end, alone or after -p TEXT
    --base     answers with the model before training, too

In a conversation /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
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
    source = find_target(args.target, settings)
    for note in source.notes:
        tell(Message("note: {text}", text=note))
    piped = PipedText(waits="-" in args.prompt) if args.prompt else None
    if piped and (piped.waits or not piped.reads):
        make_prompt(args.prompt, piped.text())  # an empty one is an error before the model is loaded
    tell(Message("loading {name} ...", name=source.name))
    started = time.monotonic()
    model = load(source, with_base=args.base)
    tell(Message("loaded in {seconds:.1f} s", seconds=time.monotonic() - started))
    speakers = [Speaker(model)]
    if model.base is not None:
        speakers = [Speaker(model.base, Message("before training")), Speaker(model, Message("trained"))]
    chat = TerminalChat(speakers, Settings.of(source.config))
    if piped is None:
        chat.run()
    elif not chat.say(make_prompt(args.prompt, piped.text())):
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


class PipedText:
    """What is piped in beside -p, read while the model loads.

    With `waits` it is read to its end. Else only what is this command's own input counts: that of the script or of the
    `while read` loop which runs it is left alone, and a pipe that has given nothing so far is not waited for.
    """

    def __init__(self, waits: bool) -> None:
        self.waits, self._parts = waits, []
        self.reads = waits or (sys.stdin is not None and not sys.stdin.isatty() and not is_shared_with_parent(0))
        self._thread = threading.Thread(target=self._read, daemon=True)
        if self.reads:
            self._thread.start()

    def _read(self) -> None:
        while part := os.read(0, 1 << 16):
            self._parts.append(part)

    def text(self) -> str:
        """All of it; "" where there is none."""
        if not self.reads:
            return ""
        if not self.waits:
            self._thread.join(timeout=0.2)
        if self.waits or self._parts:
            self._thread.join()
        elif self._thread.is_alive():
            tell(
                Message(
                    "note: standard input is open, but nothing has come; answering without it (-p - waits for its end)"
                )
            )
        return b"".join(self._parts).decode("utf-8", "replace").strip("\n")


def is_shared_with_parent(descriptor: int) -> bool:
    """Whether the program that started this one has the same file or pipe there; False where that cannot be seen."""
    try:
        own, other = os.fstat(descriptor), os.stat(f"/proc/{os.getppid()}/fd/{descriptor}")
    except OSError:
        return False
    return (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)


def make_prompt(texts: list[str], piped: str) -> str:
    """The texts of -p, and what is piped in where `-` stands, else after them."""
    parts = [piped if text == "-" else text for text in texts] + ([] if "-" in texts else [piped])
    prompt = "\n\n".join(part for part in parts if part)
    if not prompt:
        raise UserError("-p has no text and nothing is piped in; write the message after -p")
    return prompt


if __name__ == "__main__":
    run_command(main, __doc__, ("model", "chat"))
