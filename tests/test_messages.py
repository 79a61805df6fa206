"""Every message of the code has its sentence in both languages, with exactly the fields that the code gives."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT, python_files

from common import LANGUAGES, Message, UserError, sentences
from runs.compatibility import compatibility

# What makes a message of a literal code and keyword arguments, and keywords that are not fields of the sentence.
MAKERS: dict[str, set[str]] = {"Message": set(), "UserError": set(), "Fault": {"final"}}


def fields_of(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}


def is_copy(code: ast.expr | None) -> bool:
    """Whether it is another message's code, as in `Message(fault.code, ...)`, or one that was handed over as `code`."""
    return isinstance(code, ast.Attribute) or (isinstance(code, ast.Name) and code.id == "code")


def made_messages() -> Iterator[tuple[str, str, set[str]]]:
    """Where a message is made, its code and its fields."""
    for file in python_files("tests", "bench"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in MAKERS:
                continue
            place = f"{file.relative_to(ROOT)}:{node.lineno}"
            code = node.args[0] if node.args else None
            if not isinstance(code, ast.Constant):
                assert is_copy(code), f"{place}: the code of a message is written out"
                continue
            yield place, code.value, {k.arg or "**" for k in node.keywords} - MAKERS[node.func.id]
    for _, code in {**compatibility().noted, **compatibility().refused}.values():
        yield "configs/compat/llamafactory.yaml", code, set()


@pytest.fixture(scope="module")
def made() -> list[tuple[str, str, set[str]]]:
    return list(made_messages())


def test_the_fields_of_every_message_are_those_of_its_sentence(made: list[tuple[str, str, set[str]]]):
    wrong = []
    for place, code, fields in made:
        known = sentences().get(code)
        if known is None:
            wrong.append(f"{place}: {code!r} stands in no file of messages/")
        else:
            for language, text in known.items():
                if fields_of(text) != fields:
                    wrong.append(f"{place}: {code}: {sorted(fields)}, the {language} sentence has {fields_of(text)}")
    assert wrong == []


def test_no_sentence_is_unused(made: list[tuple[str, str, set[str]]]):
    assert sentences().keys() - {code for _, code, _ in made} == set()


def test_sentences_stand_once_and_in_all_languages():
    seen: list[str] = []
    for file in sorted((ROOT / "messages").glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        seen += content
        for code, texts in content.items():
            assert tuple(sorted(texts)) == LANGUAGES, f"{file.name}: {code}"
    assert sorted(seen) == sorted(set(seen))


def test_a_message_survives_json():
    error = UserError("x", file="a.json", faults=[Message("y", row=3)], near=None)
    again = Message.from_json(error.message.to_json())
    assert (again.code, again.fields["file"], again.fields["faults"], again.fields["near"]) == (
        "x",
        "a.json",
        [Message("y", row=3)],
        None,
    )


@pytest.mark.parametrize(
    ("language", "expected"),
    [("en", "2 rows: a, b (did you mean 'c'?)\n  1\n  2"), ("zh", "2 rows: a、b（是不是 'c'？）\n  1\n  2")],
)
def test_how_fields_are_filled_in(language: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    text = "{n} row{n:plural}: {names}{near:suggestion}\n  {items:lines}"
    monkeypatch.setitem(sentences(), "x", {"en": text, "zh": text})
    assert Message("x", n=2, names=["a", "b"], near="c", items=(1, 2)).text(language) == expected
    assert Message("x", n=1, names=[], near=None, items=[]).text("en") == "1 row: \n  "
