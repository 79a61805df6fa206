"""A conversation in the terminal: reads messages and commands, streams the replies, keeps what was said."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import CACHE, Message, UserError, nearest_word
from inference.engine import ChatMessage, Engine
from inference.reply import Reply
from inference.request import Settings
from inference.tools import THINK
from runs.files import write_json

COMMANDS = {
    "/help": Message("lists the commands"),
    "/clear": Message("starts a new conversation; the system message stays"),
    "/system TEXT": Message("sets the system message; without TEXT shows it, with - removes it"),
    "/retry": Message("answers the last message again"),
    "/undo": Message("takes the last message and its answer back"),
    "/history": Message("shows the conversation"),
    "/save [FILE]": Message("writes the conversation as training data (openai form) to a file or into a folder"),
    "/set NAME VALUE": Message("changes a setting: /set temperature 0.2; alone: shows them"),
    "/exit": Message("ends, as Ctrl-D does"),
}
TRIPLE_QUOTE = '"""'  # begins and ends a message of several lines
HIDDEN_SETTINGS = ("logprobs", "logit_bias", "grammar")  # for programs


def tell(message: Message) -> None:
    """A line about the program, not the model's: dim, and on stderr."""
    if sys.stderr is not None:
        print(dim(str(message), sys.stderr), file=sys.stderr, flush=True)


def dim(text: str, stream: object = None) -> str:
    return f"\033[2m{text}\033[0m" if (stream or sys.stdout).isatty() else text


@dataclasses.dataclass
class Speaker:
    """An engine and its own side of the conversation."""

    engine: Engine
    label: Message | None = None
    messages: list[ChatMessage] = dataclasses.field(default_factory=list)


class TerminalChat:
    """A conversation with one speaker, or with two that are asked the same."""

    def __init__(self, speakers: list[Speaker], settings: Settings) -> None:
        self.speakers, self.settings = speakers, settings

    def run(self) -> None:
        """Reads messages and commands until the end of the input."""
        tell(Message("/help lists the commands, Ctrl-C stops a reply, Ctrl-D ends."))
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
                    self.run_command(text) if is_command(text) else self.say(text)
                except UserError as error:
                    tell(Message("error: {error}", error=error))

    def say(self, text: str) -> bool:
        """Puts a message to every speaker and shows the replies; False if they were stopped."""
        for speaker in self.speakers:
            speaker.messages.append({"role": "user", "content": text})
        return self.answer()

    def answer(self) -> bool:
        """Every speaker answers its last message; where that cannot be put to the model it is taken back."""
        try:
            finished = [self.reply(speaker) for speaker in self.speakers]
            return all(finished)
        except UserError:
            for speaker in self.speakers:
                del speaker.messages[last_question(speaker.messages) :]
            raise

    def reply(self, speaker: Speaker) -> bool:
        """Streams one reply; False if Ctrl-C stopped it: what came until then stays."""
        if speaker.label:
            print(dim(f"[{speaker.label}]"))
        reply = speaker.engine.stream(speaker.messages, self.settings)
        text = THINK[0] if reply.request.opened else ""  # the prompt has opened the thought
        print(text, end="", flush=True)
        with stopping(reply):
            for piece in reply:
                text += piece
                print(piece, end="", flush=True)
        print()
        speaker.messages.append({"role": "assistant", "content": text})
        tell(Message("[{parts}]", parts=reply.summary()))
        return reply.finish_reason != "cancelled"

    # -- commands

    def run_command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word not in (command.split()[0] for command in COMMANDS):
            near = nearest_word(word, COMMANDS)
            raise UserError("there is no command {command}{near:suggestion}; /help lists them", command=word, near=near)
        getattr(self, f"do_{word.removeprefix('/')}")(rest.strip())

    def do_help(self, _: str) -> None:
        for command, meaning in COMMANDS.items():
            print(f"  {command:<17}{meaning}")
        print(f"  {TRIPLE_QUOTE:<17}", Message("starts and ends a message of several lines"), sep="")

    def do_clear(self, _: str) -> None:
        for speaker in self.speakers:
            speaker.messages = [message for message in speaker.messages[:1] if message["role"] == "system"]
        tell(Message("a new conversation"))

    def do_system(self, text: str) -> None:
        if not text:
            first = self.speakers[0].messages[:1]
            own = first[0]["content"] if first and first[0]["role"] == "system" else None
            print(own or self.speakers[0].engine.config.default_system or Message("(no system message)"))
            return
        for speaker in self.speakers:
            talk = [message for message in speaker.messages if message["role"] != "system"]
            speaker.messages = talk if text == "-" else [{"role": "system", "content": text}, *talk]

    def do_retry(self, _: str) -> None:
        for speaker in self.speakers:
            del speaker.messages[last_question(speaker.messages) + 1 :]
        self.answer()

    def do_undo(self, _: str) -> None:
        for speaker in self.speakers:
            del speaker.messages[last_question(speaker.messages) :]
        tell(Message("taken back; {count} messages are left", count=len(self.speakers[0].messages)))

    def do_history(self, _: str) -> None:
        for speaker in self.speakers:
            for message in speaker.messages:
                role = message["role"]
                print(dim(f"[{speaker.label or role}]" if role == "assistant" else role))
                print(message["content"])

    def do_save(self, name: str) -> None:
        if not self.speakers[-1].messages:
            raise UserError("nothing has been said yet; write a message first")
        path = save_path(name)
        if path.exists():
            raise UserError("{file} exists already; give another name", file=path)
        try:
            write_json(path, [{"messages": self.speakers[-1].messages}])
        except OSError as error:
            reason = error.strerror
            raise UserError(
                "{file} cannot be written ({reason}); give another name", file=path, reason=reason
            ) from None
        tell(Message("saved {file}; as training data: dataset={file}", file=path))

    def do_set(self, text: str) -> None:
        known = [field.name for field in dataclasses.fields(Settings) if field.name not in HIDDEN_SETTINGS]
        name, _, value = text.partition(" ")
        if not text:
            for key in known:
                print(f"  {key:<20}{json.dumps(getattr(self.settings, key), ensure_ascii=False)}")
            return
        if name not in known:
            near = nearest_word(name, known)
            raise UserError("there is no setting {name}{near:suggestion}; /set lists them", name=name, near=near)
        new = ((value,) if value else ()) if name == "stop" else parse_value(value)
        self.settings = dataclasses.replace(self.settings, **{name: new})
        tell(Message("{name} = {value}", name=name, value=value))


def is_command(text: str) -> bool:
    """Whether a message is a command, or was meant as one; `/root/a.txt says ...` begins with a path."""
    return text.startswith("/") and "/" not in text.split()[0][1:]


def save_path(name: str) -> Path:
    """Where /save writes: in a folder under a name with the time. `.json` is added, which data files need."""
    unnamed = time.strftime("chat-%Y%m%d-%H%M%S.json")
    path = Path(name or unnamed).expanduser()
    if path.is_dir() or name.endswith("/"):
        return path / unnamed
    return path if path.suffix else path.with_name(f"{path.name}.json")


def parse_value(text: str) -> object:
    """A number as such, `none` as None."""
    try:
        return None if text == "none" else float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        raise UserError("{value} is not a number; write it like 0.2", value=repr(text)) from None


def last_question(messages: list[ChatMessage]) -> int:
    """The index of the user's last message."""
    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise UserError("nothing has been said yet; write a message first")
    return places[-1]


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
        try:
            lines.append(input("... " if prompt else ""))
        except EOFError:  # what was piped is a message, closed or not
            if not any(lines):
                raise
            return "\n".join(lines).strip("\n")
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
    file = CACHE / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(1000)
        with contextlib.suppress(OSError):
            CACHE.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
