"""Every sentence and page text of the code has its Chinese in zh.yaml, with the same fields, and none is left over."""

from __future__ import annotations

import ast
import dataclasses
import re
import string
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT, python_files

from common import Config, Message, UserError, chinese
from runs.compatibility import compatibility

PAGE_TEXT = {"t"}  # the Translator of a page or a report
NOT_FIELDS = {"final"}  # keywords of Fault


def fields_of(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}


def makers(trees: list[ast.Module]) -> set[str]:
    """Message, UserError, Fault and the classes derived from them."""
    names = {"Message", "UserError", "Fault"}
    for _ in range(2):
        for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if any(isinstance(base, ast.Name) and base.id in names for base in node.bases):
                names.add(node.name)
    return names


def is_sentence_of_another(given: ast.expr | None) -> bool:
    """As in `Message(fault.sentence, ...)`, `Fault(TooLong(...))`, or where a sentence was handed over."""
    return isinstance(given, ast.Attribute | ast.Call) or (
        isinstance(given, ast.Name) and given.id in ("sentence", "reason", "text")
    )


def written_before(tree: ast.Module) -> dict[int, ast.expr]:
    """For calls with a sentence that stands in the line before, `text = "..."`: the sentence, by the call's id."""
    found = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        inside = list(ast.walk(function))
        texts = [n for n in inside if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "text"]
        texts = [n for n in texts if isinstance(n.value, ast.Constant)]
        for call in (
            n for n in inside if isinstance(n, ast.Call) and n.args and getattr(n.args[0], "id", "") == "text"
        ):
            if before := [one for one in texts if one.lineno < call.lineno]:
                found[id(call)] = max(before, key=lambda one: one.lineno).value
    return found


def called(call: ast.Call) -> str | None:
    """The name of what is called: t for `t(...)` and `page.t(...)`."""
    return getattr(call.func, "id", None) or getattr(call.func, "attr", None)


def said() -> Iterator[tuple[str, str, set[str]]]:
    """Where something is said, its English, and its fields."""
    files = {file: ast.parse(file.read_text(encoding="utf-8")) for file in python_files("tests", "bench")}
    known = makers(list(files.values())) | PAGE_TEXT
    for file, tree in files.items():
        before = written_before(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or (name := called(node)) not in known:
                continue
            place = f"{file.relative_to(ROOT)}:{node.lineno}"
            if name in PAGE_TEXT and not node.args:  # tensor.t()
                continue
            given = before.get(id(node), node.args[0] if node.args else None)
            if isinstance(given, ast.Constant):
                yield place, given.value, {k.arg or "**" for k in node.keywords} - NOT_FIELDS
            else:
                assert name not in PAGE_TEXT and is_sentence_of_another(given), f"{place}: the sentence is written out"
    for template in (ROOT / "runs").glob("*.jinja"):
        for text, values in re.findall(
            r'\bt\("((?:[^"\\]|\\.)*)"((?:, \w+=[^,)]+)*)\)', template.read_text(encoding="utf-8")
        ):
            yield template.name, text.replace("\\\\", "\\"), set(re.findall(r", (\w+)=", values))
    for sentence in [s for _, s in {**compatibility().noted, **compatibility().refused}.values()]:
        yield "configs/compat/llamafactory.yaml", sentence, set()
    for field in dataclasses.fields(Config):
        yield f"common.py: {field.name}", field.metadata.get("help") or field.metadata["group"], set()


@pytest.fixture(scope="module")
def sentences() -> list[tuple[str, str, set[str]]]:
    return list(said())


def test_every_sentence_has_its_chinese_with_the_same_fields(sentences: list[tuple[str, str, set[str]]]):
    wrong = []
    for place, english, fields in sentences:
        if english not in chinese():
            wrong.append(f"{place}: zh.yaml lacks {english!r}")
        elif fields and "**" not in fields and not (fields_of(english) == fields_of(chinese()[english]) == fields):
            wrong.append(f"{place}: {sorted(fields)} are given to {english!r} and {chinese()[english]!r}")
    assert wrong == [], "\n".join(wrong)


def test_no_chinese_is_left_over(sentences: list[tuple[str, str, set[str]]]):
    strings = {
        node.value
        for file in python_files("tests", "bench")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert chinese().keys() - {english for _, english, _ in sentences} - strings == set()


def test_zh_yaml_has_a_line_an_entry_and_none_twice():
    lines = [line for line in (ROOT / "zh.yaml").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    keys = [next(iter(yaml.safe_load(line))) for line in lines]
    assert [key for key, count in Counter(keys).items() if count > 1] == []


def test_a_message_survives_json():
    error = UserError("x", file="a.json", faults=[Message("y", row=3)], near=None)
    assert Message.from_json(error.message.to_json()) == error.message


@pytest.mark.parametrize(
    ("language", "expected"),
    [("en", "2 rows: a, b (did you mean 'c'?)\n  1\n  2"), ("zh", "2 rows: a、b（是不是 'c'？）\n  1\n  2")],
)
def test_how_fields_are_filled_in(language: str, expected: str):
    text = "{n} row{n:plural}: {names}{near:suggestion}\n  {items:lines}"
    assert Message(text, n=2, names=["a", "b"], near="c", items=(1, 2)).text(language) == expected
    assert Message(text, n=1, names=[], near=None, items=[]).text("en") == "1 row: \n  "
