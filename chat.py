"""Talks to a trained model in the terminal.

python chat.py                    the newest run
python chat.py saves/NAME         a run, an adapter, a merged or plain model folder, a hub name, a FILE.gguf,
                                  or the recipe of a run
    -p TEXT    answers once and ends; what is piped in is put after TEXT; `-p -` takes all of it from there
    --base     answers with the model before training, too

In a conversation /help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
from common import UserError
from inference.engine import ChatMessage, Engine, Reply, Settings
from inference.load import load
from runs.files import write_json
from runs.target import find, read_arguments

COMMANDS = {
    "/help": "lists the commands",
    "/clear": "starts a new conversation; the system message stays",
    "/system TEXT": "sets the system message; without TEXT shows it, with - takes it out",
    "/retry": "answers the last message again",
    "/undo": "takes the last message and its answer back",
    "/history": "shows the conversation",
    "/save [FILE]": "writes the conversation as training data (openai form); unset: chat-DATE.json",
    "/set NAME VALUE": "changes a setting: /set temperature 0.2; alone: shows them",
    "/exit": "ends, as Ctrl-D does",
}


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        print(common.help_text(__doc__, ("model", "chat")))
        return
    args, settings = parse(argv)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    source = find(args.target, settings)
    for note in source.notes:
        tell(f"note: {note}")
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    tell(f"loading {source.name} ...")
    started = time.monotonic()
    model = load(source, with_base=args.base, only_replies=True)
    tell(f"loaded in {time.monotonic() - started:.1f} s")
    voices = [Voice(model)] if model.base is None else [Voice(model.base, "before training"), Voice(model, "trained")]
    chat = Chat(voices, Settings.of(source.config))
    if prompt is None:
        chat.run()
    elif not chat.say(prompt):
        raise KeyboardInterrupt


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags and the target; and the settings, `key=value`."""
    parser = argparse.ArgumentParser(prog="chat.py", add_help=False, allow_abbrev=False)
    parser.add_argument("-p", dest="prompt", metavar="TEXT")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("rest", nargs="*")
    args, unknown = parser.parse_known_args(argv)
    args.target, settings = read_arguments(args.rest)
    return args, unknown + settings


def read_prompt(text: str) -> str:
    """The text of -p, and after it what is piped in."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip("\n")
    prompt = "\n\n".join(part for part in ("" if text == "-" else text, piped) if part)
    if not prompt:
        raise UserError("-p has no words and nothing is piped in; write the message after -p")
    return prompt


def tell(text: str) -> None:
    """A line about the program, not the model's: dim, and on stderr."""
    print(dim(text, sys.stderr), file=sys.stderr, flush=True)


def dim(text: str, stream: object = sys.stdout) -> str:
    return f"\033[2m{text}\033[0m" if stream.isatty() else text


@dataclasses.dataclass
class Voice:
    """An engine and its own side of the conversation."""

    engine: Engine
    label: str = ""
    messages: list[ChatMessage] = dataclasses.field(default_factory=list)


class Chat:
    """A conversation with one voice, or with two that hear the same."""

    def __init__(self, voices: list[Voice], settings: Settings) -> None:
        self.voices, self.settings = voices, settings

    def run(self) -> None:
        """Reads messages and commands until the end of the input."""
        tell("/help lists the commands, Ctrl-C stops a reply, Ctrl-D ends.")
        with line_editing():
            while True:
                try:
                    text = read_message()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    print()
                    continue
                try:
                    if text.partition(" ")[0] == "/exit":
                        return
                    self.obey(text) if is_command(text) else self.say(text)
                except UserError as error:
                    tell(f"error: {error}")

    def say(self, text: str) -> bool:
        """Puts a message to every voice and shows the replies; False if they were stopped."""
        for voice in self.voices:
            voice.messages.append({"role": "user", "content": text})
        return self.answer()

    def answer(self) -> bool:
        """Every voice answers its last message; where that cannot be put to the model it is taken back."""
        try:
            finished = [self.reply(voice) for voice in self.voices]
            return all(finished)
        except UserError:
            for voice in self.voices:
                del voice.messages[last_question(voice.messages) :]
            raise

    def reply(self, voice: Voice) -> bool:
        """Streams one voice's reply; False if Ctrl-C stopped it: what came until then stays."""
        if voice.label:
            print(dim(f"[{voice.label}]"))
        reply, text = voice.engine.stream(voice.messages, self.settings), ""
        if reply.dropped_messages:
            tell(f"note: the oldest {reply.dropped_messages} messages no longer fit and were left out")
        with stopping(reply):
            for piece in reply:
                text += piece
                print(piece, end="", flush=True)
        print()
        voice.messages.append({"role": "assistant", "content": text})
        tell(summary(reply))
        return reply.finish_reason != "cancelled"

    def obey(self, line: str) -> None:
        """Carries out a command."""
        word, _, rest = line.partition(" ")
        name = word.removeprefix("/")
        if word not in (command.split()[0] for command in COMMANDS):
            raise UserError(f"there is no command {word}{common.nearest(word, COMMANDS)}; /help lists them")
        getattr(self, f"do_{name}")(rest.strip())

    def do_help(self, _: str) -> None:
        for command, meaning in COMMANDS.items():
            print(f"  {command:<17}{meaning}")
        print('  """              starts and ends a message of several lines')

    def do_clear(self, _: str) -> None:
        for voice in self.voices:
            voice.messages = [message for message in voice.messages[:1] if message["role"] == "system"]
        tell("a new conversation")

    def do_system(self, text: str) -> None:
        if not text:
            first = self.voices[0].messages[:1]
            own = first[0]["content"] if first and first[0]["role"] == "system" else None
            print(own or self.voices[0].engine.config.default_system or "(no system message)")
            return
        for voice in self.voices:
            talk = [message for message in voice.messages if message["role"] != "system"]
            voice.messages = talk if text == "-" else [{"role": "system", "content": text}, *talk]

    def do_retry(self, _: str) -> None:
        for voice in self.voices:
            del voice.messages[last_question(voice.messages) + 1 :]
        self.answer()

    def do_undo(self, _: str) -> None:
        for voice in self.voices:
            del voice.messages[last_question(voice.messages) :]
        tell(f"taken back; {len(self.voices[0].messages)} messages are left")

    def do_history(self, _: str) -> None:
        for voice in self.voices:
            for message in voice.messages:
                print(dim(f"[{voice.label or message['role']}]" if message["role"] == "assistant" else message["role"]))
                print(message["content"])

    def do_save(self, name: str) -> None:
        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json")).expanduser()
        if not path.suffix:  # by which a file of data is told from a name of dataset_info.json
            path = path.with_name(f"{path.name}.json")
        if path.exists():
            raise UserError(f"{path} is there already; give another name")
        if not self.voices[-1].messages:
            raise UserError("nothing has been said yet; say something first")
        try:
            write_json(path, [{"messages": self.voices[-1].messages}])
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another name") from None
        tell(f"saved {path}; as training data: dataset={path}")

    def do_set(self, text: str) -> None:
        hidden = ("logprobs", "logit_bias", "grammar")  # for programs
        known = [field.name for field in dataclasses.fields(Settings) if field.name not in hidden]
        name, _, value = text.partition(" ")
        if not text:
            for key in known:
                print(f"  {key:<20}{json.dumps(getattr(self.settings, key), ensure_ascii=False)}")
            return
        if name not in known:
            raise UserError(f"there is no setting {name}{common.nearest(name, known)}; /set lists them")
        meant = (value,) if name == "stop" and value else () if name == "stop" else parse_value(value)
        self.settings = dataclasses.replace(self.settings, **{name: meant})
        tell(f"{name} = {value}")


def is_command(text: str) -> bool:
    """Whether a message is a command, or was meant as one; `/root/a.txt says ...` begins with a path."""
    return text.startswith("/") and "/" not in text.split()[0][1:]


def parse_value(text: str) -> object:
    """A number as such, `none` as None."""
    try:
        return None if text == "none" else float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise UserError(f"{text!r} is not a number; write it like 0.2") from None


def last_question(messages: list[ChatMessage]) -> int:
    """Where the last user's message stands."""
    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise UserError("nothing has been said yet; say something first")
    return places[-1]


def summary(reply: Reply) -> str:
    """How fast a reply came, in one line."""
    parts = [f"{reply.completion_tokens} tokens", f"first after {reply.first_token_seconds:.2f} s"]
    if reply.tokens_per_second:
        parts.insert(1, f"{reply.tokens_per_second:.1f} tokens/s")
    if reply.finish_reason != "stop":
        parts.append(
            {"length": "cut: max_new_tokens or the context is full", "cancelled": "stopped"}[reply.finish_reason]
        )
    return f"[{', '.join(parts)}]"


@contextlib.contextmanager
def stopping(reply: Reply) -> Iterator[None]:
    """While the block runs, Ctrl-C ends the reply at its next token; a second one ends at once."""

    def stop(*_: object) -> None:
        if reply.cancelled:
            raise KeyboardInterrupt
        reply.cancel()

    before: Callable | int | None = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def read_message() -> str:
    """The next message or command, empty lines left out; several lines between two `\"\"\"`. Raises EOFError."""
    prompt = "\001\033[1m\002> \001\033[0m\002" if sys.stdin.isatty() and sys.stdout.isatty() else ""
    text = ""
    while not text:
        text = input(prompt).strip()
    if not text.startswith('"""'):
        return text
    lines = [text[3:]]
    while not (len(lines) > 1 or len(lines[0]) >= 3) or not lines[-1].endswith('"""'):
        lines.append(input("... " if prompt else ""))
    return "\n".join(lines)[:-3].strip("\n")


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Arrow keys and a history kept from one conversation to the next, where there is a terminal."""
    try:
        import readline
    except ImportError:  # a Python built without it
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    file = common.CACHE / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            common.CACHE.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


if __name__ == "__main__":
    common.run_script(main)
