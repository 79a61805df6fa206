"""Tokens stand in no record; nothing unpickles what came from outside."""

from __future__ import annotations

import ast

import pytest
from conftest import python_files, user_error

from runs.configuration import load_config
from runs.redaction import redact, redact_arguments

TOKEN = "hf_" + "aB3" * 11


def test_secrets_on_a_command_line_are_not_recorded() -> None:
    typed = [
        "recipe.yaml",
        f"hf_hub_token={TOKEN}",
        "--swanlab_api_key",
        "k",
        "--push_to_hub_token=x",
        "max_new_tokens=9",
    ]
    shown = [
        "recipe.yaml",
        "hf_hub_token=***",
        "--swanlab_api_key",
        "***",
        "--push_to_hub_token=***",
        "max_new_tokens=9",
    ]
    assert redact_arguments(typed) == shown


@pytest.mark.parametrize("text", [TOKEN, f"name={TOKEN}", "https://me:secret@host/x", "sk-" + "0a" * 20])
def test_a_token_is_known_by_its_form(text: str) -> None:
    assert "***" in redact(text) and TOKEN not in redact(text) and "secret" not in redact(text)


@pytest.mark.parametrize("text", ["hf_", "saves/hf_run", "sk-learn", "https://host/a:b@c", "data/ms-marco.jsonl"])
def test_ordinary_words_stay(text: str) -> None:
    assert redact(text) == text


def test_an_error_does_not_repeat_a_token() -> None:
    with user_error("the configuration") as raised:
        load_config([f"hf_hub_tokn={TOKEN}", "hf_hub_token=abc123def", f"stage={TOKEN}"])
    assert TOKEN not in str(raised.value) and "abc123def" not in str(raised.value)


def test_nothing_of_the_kit_unpickles() -> None:
    """torch.load and numpy's allow_pickle would run code that a file brings; transformers loads with weights_only."""
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "cPickle", "dill", "joblib", "shelve"}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert getattr(node.func.value, "id", "") != "torch", f"{file}:{node.lineno}: torch.load"
                assert getattr(given.get("allow_pickle"), "value", False) is False, f"{file}:{node.lineno}"
