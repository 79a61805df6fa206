"""Damaged and random inputs. Each must end in correct work or in a clear error: no other exception, and no hang.

A kind of input is a class: `Kind(folder, model)` prepares what all cases share, `case(draw, folder)` makes one input
from the random numbers of `draw` and gives it to the kit, with `folder` as the working directory.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from conftest import CHATML, ROOT, save_adapter

import common
from common import OPTIONS, Config, Message, UserError
from inference.api.errors import ApiError
from preprocessing.faults import Fault

# A case that takes longer hangs. Time on the clock says little on a busy machine, but a case that waits uses none else.
CPU_SECONDS, SECONDS = 10, 60
LOST = ROOT / ".cache" / "torture"  # inputs that the kit did not survive

ATOMS: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, 1e400, "", " ", "a", "q", "{{name}}", "\ud83d", "\ufdd0", "<|im_end|>", "你好",
    "\0", [], {}, ["a"], {"a": 1}, [[]], [None], "[", "{", "null", '{"name":"f","arguments":{}}', '[{"name":"f"}]',
    10**30, "a" * 300, "../../etc/passwd", "/dev/null", "nan", "1e-4", "~", "${HOME}",
]  # fmt: skip
KEYS = [
    "instruction", "input", "output", "history", "system", "tools", "messages", "conversations", "prompt",
    "completion", "question", "answer", "chosen", "rejected", "kto_tag", "images", "label", "from", "value", "role",
    "content", "weight", "loss", "tool_calls", "type", "text", "function", "name", "arguments", "reasoning_content",
    "Instruction",
]  # fmt: skip
INSERTED = [
    b'"',
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\0",
    b"\\",
    b"- ",
    b"&a ",
    b"*a",
]


class Hang(BaseException):
    """A case took longer than CPU_SECONDS of computing, or SECONDS in all."""


@dataclass
class Tally:
    """What became of the cases of one kind. `lost` says for each case that was not survived what happened."""

    what: str
    tried: int = 0
    worked: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)


def mutated(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with parts exchanged, lost, added or cut."""
    if draw.random() < 0.1:
        return draw.choice(ATOMS)
    if isinstance(value, dict):
        value = {key: mutated(one, draw) if draw.random() < 0.4 else one for key, one in value.items()}
        if value and draw.random() < 0.2:
            value.pop(draw.choice(list(value)))
        if draw.random() < 0.2:
            value[draw.choice(KEYS)] = draw.choice(ATOMS)
        return value
    if isinstance(value, list):
        value = [mutated(one, draw) if draw.random() < 0.4 else one for one in value]
        if value and draw.random() < 0.2:
            value.pop(draw.randrange(len(value)))
        if draw.random() < 0.2:
            value.insert(draw.randrange(len(value) + 1), draw.choice(ATOMS))
        return value
    return value[: len(value) // 2] if isinstance(value, str) and draw.random() < 0.3 else value


def damaged(content: bytes, draw: random.Random) -> bytes:
    """`content` with bytes changed, lost, added or repeated; half of the time as it is."""
    changed = bytearray(content)
    for _ in range(draw.choice([0, 0, 0, 1, 1, 3])):
        if not changed:
            break
        place, kind = draw.randrange(len(changed)), draw.random()
        if kind < 0.3:
            changed[place] = draw.randrange(256)
        elif kind < 0.5:
            del changed[place : place + draw.randrange(1, 20)]
        elif kind < 0.75:
            changed[place:place] = draw.choice(INSERTED)
        elif kind < 0.85:
            del changed[place:]
        else:
            changed[place:place] = changed[: draw.randrange(1, 50)]
    return bytes(changed)


def encoded(value: Any, **options: Any) -> bytes:
    return json.dumps(value, **options).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# Data files and registries

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ROWS: list[dict[str, Any]] = [
    {"instruction": "q", "input": "", "output": "a", "history": [["a", "b"]], "system": "s"},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "weight": 1},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name":"f","arguments":{}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name":"f"}]',
        "system": "s",
    },
    {"prompt": "q", "completion": "a"},
]


def data_file(folder: Path, draw: random.Random) -> Path:
    """Writes rows, some of them mutated, in any format that the kit reads, and damages the file."""
    rows = [draw.choice(ROWS) for _ in range(draw.choice([0, 1, 2, 5]))]
    rows = [mutated(row, draw) if draw.random() < 0.6 else row for row in rows]
    path = folder / f"d.{draw.choice(['json', 'jsonl', 'csv', 'txt', 'parquet', 'arrow'])}"
    ascii_only = draw.random() < 0.5
    if path.suffix == ".json":
        content = encoded(rows, ensure_ascii=ascii_only, indent=draw.choice([None, 1]))
    elif path.suffix in (".jsonl", ".txt"):
        content = b"\n".join(encoded(row, ensure_ascii=ascii_only) for row in rows)
    elif path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, delimiter=draw.choice(",,,,;\t"))
        writer.writerow(draw.choice([["instruction", "output"], ["question", "answer", "x"], [], ["messages"]]))
        for _ in rows:
            writer.writerow([str(draw.choice(ATOMS)) for _ in range(draw.choice([2, 2, 2, 3]))])
        content = text.getvalue().encode("utf-8", "surrogatepass")
    else:
        content = _columns(path, [row for row in rows if isinstance(row, dict)] or ROWS[:1], draw)
    path.write_bytes(damaged(content, draw))
    return path


def _columns(path: Path, rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    """The rows as a parquet or arrow file; those that have no common columns are left out."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError):
        table = pa.Table.from_pylist(ROWS[:1])
    sink = io.BytesIO()
    try:
        if path.suffix == ".parquet":
            parquet.write_table(table, sink)
        else:
            with draw.choice([pa.ipc.new_stream, pa.ipc.new_file])(sink, table.schema) as writer:
                writer.write_table(table)
    except pa.ArrowException:
        return b""
    return sink.getvalue()


class DataFiles:
    def __init__(self, _: Path, __: Path) -> None:
        from preprocessing import dataset

        self.dataset = dataset

    def case(self, draw: random.Random, folder: Path) -> None:
        self.read((str(data_file(folder, draw)),), draw, folder)

    def read(self, names: tuple[str, ...], draw: random.Random, folder: Path) -> None:
        config = Config(
            dataset=names,
            dataset_dir=str(folder),
            on_bad_rows=draw.choice(["error", "skip"]),
            max_samples=draw.choice([None, 2]),
            val_size=0,
        )
        self.dataset.check(config)
        self.dataset.read_conversations(config)


class Registries(DataFiles):
    ENTRIES: tuple[dict[str, Any], ...] = (
        {
            "file_name": "d.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "system": "system", "tools": "tools"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        {
            "file_name": "d.json",
            "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
            "num_samples": 3,
            "split": "train",
            "subset": "x",
            "ranking": False,
        },
    )

    def case(self, draw: random.Random, folder: Path) -> None:
        rows = [mutated(row, draw) if draw.random() < 0.3 else row for row in draw.choices(ROWS, k=3)]
        (folder / "d.json").write_bytes(encoded(rows))
        registry: Any = {name: mutated(draw.choice(self.ENTRIES), draw) for name in ("a", "b")}
        if draw.random() < 0.2:
            registry = mutated(registry, draw)
        content = encoded(registry)
        (folder / "dataset_info.json").write_bytes(damaged(content, draw) if draw.random() < 0.3 else content)
        self.read(("a", "b")[: draw.choice([1, 2])], draw, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


class Recipes:
    """Mutated copies of the kit's recipes and of a tutorial's, and random settings, through `train.py --dry-run`."""

    def __init__(self, folder: Path, model: Path) -> None:
        from runs.compatibility import compatibility

        files = [*(ROOT / "configs").glob("*.yaml"), *(ROOT / "tests" / "tutorial").glob("*.yaml")]
        self.recipes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
        known = compatibility()
        self.keys = [*OPTIONS, *known.renamed, *known.means]
        self.data = folder / "rows.jsonl"
        self.data.write_text('{"instruction": "q", "input": "", "output": "a"}\n' * 12, encoding="utf-8")
        self.model = model

    def case(self, draw: random.Random, folder: Path) -> None:
        from runs.configuration import check_training_asked_for, load_config
        from training import checks, prepare, resume
        from training.processes import Processes

        recipe = copy.deepcopy(draw.choice(self.recipes))
        small = {"model_name_or_path": str(self.model), "dataset": str(self.data), "output_dir": "out"}
        recipe |= {key: value for key, value in small.items() if draw.random() < 0.9}
        if draw.random() < 0.7:
            recipe.pop("template", None)
        for _ in range(draw.choice([0, 1, 1, 2, 4])):
            recipe[self.key(draw)] = self.value(draw)
        if draw.random() < 0.3:
            recipe = mutated(recipe, draw)
        text = yaml.safe_dump(recipe, allow_unicode=draw.random() < 0.5)
        (folder / "recipe.yaml").write_bytes(damaged(text.encode("utf-8", "surrogatepass"), draw))
        typed = [f"{self.key(draw)}={self.value(draw)}"] if draw.random() < 0.2 else []
        before = sorted(folder.rglob("*"))
        loaded = resume.locate_model(load_config(["recipe.yaml", *typed]))
        check_training_asked_for(loaded)
        no_imports = mock.patch.object(checks, "check_imports", lambda: iter(()))  # Unsloth: takes ten seconds
        with no_imports, contextlib.redirect_stdout(io.StringIO()):
            status = prepare.dry_run(loaded, Processes())
        assert sorted(folder.rglob("*")) == before, "a dry run wrote into the working directory"
        if status:
            raise UserError("{count} faults:\n  {faults:lines}", count=1, faults=[])

    def key(self, draw: random.Random) -> str:
        key = draw.choice(self.keys)
        return key[: draw.randrange(1, len(key) + 1)] if draw.random() < 0.1 else key

    def value(self, draw: random.Random) -> Any:
        if draw.random() < 0.5:
            return draw.choice(ATOMS)
        option = OPTIONS[draw.choice(list(OPTIONS))]
        return draw.choice([*option.metadata.get("choices", ()), option.default, 2, 16, 0.5, 1e-9, 1 << 40])


# ---------------------------------------------------------------------------------------------------------------------
# Requests to api.py


class ChatRequests:
    """Bodies posted to the whole application with a tiny model behind it."""

    def __init__(self, folder: Path, model: Path) -> None:
        from starlette.testclient import TestClient

        from inference.api.options import ServerOptions
        from inference.api.server import ApiServer
        from inference.load import load
        from runs.target import find_target, read_arguments

        short = folder / "short"  # an answer without a limit ends after 256 tokens
        shutil.copytree(model, short)
        config = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
        options = ServerOptions.from_environment({})
        engine = load(find_target(*read_arguments([str(short), "infer_dtype=float32", "max_new_tokens=4"])))
        self.server = ApiServer(engine, options)
        self.client = TestClient(self.server.application(), base_url="http://127.0.0.1", raise_server_exceptions=False)
        self.client.__enter__()  # its life is that of the process

    def close(self) -> None:
        self.client.__exit__(None, None, None)

    def case(self, draw: random.Random, _: Path) -> None:
        path = draw.choice(["/v1/chat/completions"] * 4 + ["/v1/completions", "/v1/responses"])
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        body: dict[str, Any] = {
            "model": self.server.model_name,
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
            "max_tokens": 3,
        }
        if path != "/v1/chat/completions":
            body = {"model": self.server.model_name, "prompt": "hi", "input": "hi", "max_output_tokens": 3}
            body.pop("input" if path == "/v1/completions" else "prompt")
        extras = {
            "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "n": 2, "stream": True, "seed": 1,
            "stop": ["x"], "logprobs": True, "top_logprobs": 3, "logit_bias": {"3": 5},
            "response_format": {"type": "json_object"}, "tools": [tool], "tool_choice": "auto",
            "stream_options": {"include_usage": True}, "user": "u",
            "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "echo": True, "suffix": "s",
        }  # fmt: skip
        body |= {name: extras[name] for name in draw.sample(list(extras), draw.choice([0, 1, 2, 4]))}
        body = mutated(body, draw)
        if isinstance(body, dict):
            body.setdefault("model", self.server.model_name)
        content = damaged(encoded(body, ensure_ascii=draw.random() < 0.5), draw)
        answer = self.client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, f"status {answer.status_code}: {answer.text[:200]}"
        assert "Traceback" not in answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], answer.text
            raise ApiError(answer.status_code, Message("the body is not a JSON object"))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and templates


class Safetensors:
    def __init__(self, folder: Path, model: Path) -> None:
        file = save_adapter(model, folder / "adapter") / "adapter_model.safetensors"
        self.settings = (file.parent / "adapter_config.json").read_bytes()
        self.whole = file.read_bytes()

    def case(self, draw: random.Random, folder: Path) -> None:
        from runs.adapter import Adapter
        from runs.weights import read_tensor

        changed = bytearray(self.whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(2000)] = draw.choice(b'0123456789-,:[]{}"\xff\0')
        (folder / "adapter_config.json").write_bytes(damaged(self.settings, draw))
        (folder / "adapter_model.safetensors").write_bytes(changed)
        for tensor in Adapter(folder).tensors.values():
            read_tensor(tensor)


class GgufHeaders:
    """Loaded by llama.cpp in a child, as quantize.py and chat.py do."""

    def __init__(self, folder: Path, _: Path) -> None:
        from export import llamacpp

        self.llamacpp, self.file = llamacpp, folder / "x.gguf"
        card: dict[str, str] = {}
        model = ROOT / common.EMBEDDED_MODEL
        llamacpp.call(
            llamacpp.convert, "converting", folder=model, target=self.file, kind="q8_0", card=card, name="x", end=2
        )
        with open(self.file, "rb") as opened:
            self.head = opened.read(3000)

    def case(self, draw: random.Random, _: Path) -> None:
        changed = bytearray(self.head)
        for _ in range(draw.randint(1, 6)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        with open(self.file, "rb+") as opened:
            opened.write(changed)
        json.dumps(self.llamacpp.call(self.llamacpp.inspect, "reading", file=self.file, texts=["hello"]))


class Templates:
    """Chat templates that came with a model: mutated ones of the kit, and pieces that loop, grow or raise."""

    PIECES = (
        "{% for i in range(99999) %}", "{% endfor %}", "{% if true %}", "{% endif %}", "{{ messages }}", "{{ x.y.z }}",
        "{{ raise_exception('no') }}", "{{ 'x' * 10**9 }}", "{% set messages = messages[1:] %}", "{{ 1 / 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.__class__ }}", "{{ messages | tojson }}",
        "{% generation %}", "{% endgeneration %}", "{{ strftime_now('%Y') }}", "{{ [1, 2] | join(9) }}", "{#", "{{",
        "{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{{ messages[0].content.format(1) }}", "{{ -x }}",
    )  # fmt: skip

    def __init__(self, _: Path, model: Path) -> None:
        from transformers import AutoTokenizer

        self.texts = [file.read_text(encoding="utf-8") for file in (ROOT / "templates").glob("*.jinja")] + [CHATML] * 9
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def case(self, draw: random.Random, _: Path) -> None:
        from preprocessing.template import encoder_of, load_template, render_conversation

        text = draw.choice(self.texts)
        for _ in range(draw.choice([0, 1, 2])):
            place = draw.choice([0, len(text), draw.randrange(len(text))])
            text = text[:place] + draw.choice(self.PIECES) + text[place:]
        text = damaged(text.encode(), draw).decode(errors="replace")
        self.tokenizer.chat_template = text
        template = load_template(None, self.tokenizer)
        messages = [{"role": "user", "content": "<|im_end|>{{ 1 }}"}, {"role": "assistant", "content": "a"}]
        render_conversation(template, {"messages": messages}, encoder_of(self.tokenizer, text))


KINDS: dict[str, type] = {
    "recipes": Recipes,
    "data files": DataFiles,
    "registries": Registries,
    "chat requests": ChatRequests,
    "safetensors": Safetensors,
    "GGUF headers": GgufHeaders,
    "chat templates": Templates,
}


# ---------------------------------------------------------------------------------------------------------------------
# Running cases


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def ring(number: int, _: object) -> None:
        raise Hang(f"{CPU_SECONDS} s of CPU time" if number == signal.SIGPROF else f"{SECONDS} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, SECONDS))
    before = {number: signal.signal(number, ring) for _, number, _ in timers}
    for timer, _, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def fuzz(name: str, count: int, folder: Path, model: Path, seed: int = 0) -> Tally:
    """Runs `count` cases of a kind below `folder`; what was lost is kept in LOST."""
    kind, tally, here = KINDS[name](folder, model), Tally(name), Path.cwd()
    try:
        for number in range(count):
            place = folder / f"case-{number}"
            place.mkdir()
            os.chdir(place)
            tally.tried += 1
            _run(kind, random.Random(f"{name} {seed} {number}"), place, tally, f"{name} {seed} {number}")
            os.chdir(here)
            shutil.rmtree(place)
    finally:
        os.chdir(here)
        getattr(kind, "close", lambda: None)()
    return tally


def _run(kind: Any, draw: random.Random, place: Path, tally: Tally, label: str) -> None:
    started, used = time.monotonic(), time.process_time()
    try:
        with _time_limit():
            kind.case(draw, place)
        tally.worked += 1
    except (UserError, ApiError, Fault) as error:
        message = error.message
        for language in common.LANGUAGES:  # every error can be said and recorded
            assert message.text(language)
        json.dumps(message.to_json()).encode()
        tally.refused += 1
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever else comes is what is looked for
        where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        took = f"{time.monotonic() - started:.1f} s, {time.process_time() - used:.1f} s of CPU time"
        said = f"{type(error).__name__}: {str(error)[:200]} ({' '.join(where[-4:])}, {took})"
        tally.lost.append(f"{label}: {said}")
        kept = LOST / label.replace(" ", "-")
        shutil.copytree(place, kept, dirs_exist_ok=True)
        (kept / "lost.txt").write_text(f"{said}\n{traceback.format_exc()}", encoding="utf-8")
