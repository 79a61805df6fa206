"""What the tests of the data share: rows, files, registries, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import says

from common import Config, Message, UserError
from preprocessing import dataset

GOOD = {"instruction": "Who are you?", "input": "", "output": "A kit."}
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A kit."}]


def config(*paths: Path | str, **settings: Any) -> Config:
    return Config(dataset=tuple(map(str, paths)), **{"dataset_dir": "none", "cutoff_len": 256, **settings})


def conversations(*paths: Path | str, **settings: Any) -> list[dict]:
    return dataset.read_conversations(config(*paths, **settings))[0]


def register(folder: Path, **entries: dict) -> str:
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return str(folder)


def prepare(tokenizer: Any, *paths: Path | str, **settings: Any) -> dataset.TrainingData:
    from preprocessing.template import load_template

    return dataset.prepare(config(*paths, **settings), tokenizer, load_template("chatml", tokenizer))


def notes(made: dataset.TrainingData, part: str = "datasets", number: int = 0) -> list[Message]:
    """The notes on one dataset of a report."""
    return [Message.from_json(note) for note in made.report[part][number]["notes"]]


def questions(count: int) -> list[dict]:
    return [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(count)]


@contextmanager
def faulty(code: str, *, row: int | None = None, file: Path | None = None, **fields: Any) -> Iterator[None]:
    """Expects that the first fault of the rows, or else the error, has this code and at least these fields."""
    with pytest.raises(UserError) as raised:
        yield
    found = raised.value.message
    if found.sentence in (says("with on_bad_rows=skip"), says("the file; it")):
        first = found.fields["faults"][0]
        assert row is None or first.fields["row"] == row, first
        assert file is None or first.fields["file"] == str(file), first
        found = first.fields["reason"]
    expected, known = Message(code, **fields).to_json(), found.to_json()
    assert found.sentence == code, found
    assert {name: known["fields"].get(name) for name in expected["fields"]} == expected["fields"]
