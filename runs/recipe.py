"""The file of a recipe: YAML or JSON, read with an error that names the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from common import Message, UserError, load_yaml, nearest_path

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet", ".arrow", ".txt")


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe; raises UserError where it is none."""
    if path.suffix in DATA_SUFFIXES and path.exists():
        raise _holds_rows(path)
    text = _read_text(path)
    try:
        faults = _keys_twice(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        content = load_yaml(text)
    except yaml.YAMLError as error:
        faults, content = [_mistyped_line(text) or _syntax_fault(error)], None
    if isinstance(content, list) and content and isinstance(content[0], dict):
        raise _holds_rows(path)
    is_mapping = isinstance(content, dict)
    if content is not None and not (is_mapping and all(str(key).isprintable() for key in content)):
        faults += filter(None, [_mistyped_line(text)])
    if faults:
        raise UserError("{recipe}, {faults}", recipe=path, faults=faults)
    if content is not None and not is_mapping:
        raise UserError("{recipe} holds no settings; write one `key: value` a line", recipe=path)
    return {str(key): value for key, value in (content or {}).items()}


def _holds_rows(path: Path) -> UserError:
    return UserError("{file} holds rows, not settings; give it as dataset={file}, with a recipe of configs/", file=path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = (p for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json"))
        text = "there is no recipe {recipe}{near:suggestion}; the recipes of this kit are in configs/"
        raise UserError(text, recipe=path, near=nearest_path(path, there)) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
        raise UserError("{recipe} cannot be read as UTF-8 text ({problem})", recipe=path, problem=problem) from None


def _syntax_fault(error: yaml.YAMLError) -> Message:
    if getattr(error, "context", None) == "while scanning a quoted scalar":
        return Message("line {line}: a quotation mark that opens here is not closed", line=error.context_mark.line + 1)
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    if mark is None:  # a character that YAML does not allow
        return Message("not YAML ({problem}); write one `key: value` a line", problem=problem)
    text = "line {line}, column {column}: {problem}; write one `key: value` a line"
    return Message(text, line=mark.line + 1, column=mark.column + 1, problem=problem)


def _mistyped_line(recipe: str) -> Message | None:
    """The first line of a recipe that is nearly `key: value`."""
    for number, line in enumerate(recipe.splitlines(), 1):
        shown = line.strip()
        if re.match(r"\s*[\w.-]+\s*：", line):
            text = "line {line}: `{text}` has the Chinese colon `：`; write `key: value`"
            return Message(text, line=number, text=shown)
        if re.match("[ \t]*[\u00a0\u3000\u200b\ufeff]|[ \t]*[\\w.-]+[ \t]*:[\u00a0\u3000\u200b]", line):
            return Message("line {line}: `{text}` has a no-break space; type a normal space", line=number, text=shown)
        if re.match(r"[A-Za-z_]\w*:[^\s/\\]", line):
            return Message("line {line}: `{text}` lacks the space after the colon", line=number, text=shown)
    return None


def _keys_twice(document: yaml.Node | None) -> list[Message]:
    """The settings that stand twice in a recipe, of which YAML would silently take the last."""
    lines: dict[str, list[int]] = {}
    for key, _ in document.value if isinstance(document, yaml.MappingNode) else ():
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    return [
        Message("line {line}: {key} is already set in line {first}; keep one", key=key, line=at[-1], first=at[0])
        for key, at in lines.items()
        if len(at) > 1
    ]
