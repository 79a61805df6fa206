"""The file of a recipe, and the ways to type settings on a command line."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from common import OPTIONS, TYPES, Message, UserError, load_yaml, nearest_path
from runs.compatibility import compatibility
from runs.option_values import as_text


def join_settings(arguments: list[str]) -> list[str]:
    """The arguments of a command line with the usual ways to write settings brought into one form.

    `--key value`, `--key=value` and `--key` (of a boolean) become `key=value`; `--config FILE` becomes `FILE`; the
    underscores of other flags become dashes.
    """
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not argument.startswith("--") or not name:
            joined.append(argument)
        elif key == "config" and (equals or rest):
            joined.append(value if equals else rest.pop(0))
        elif not (key in OPTIONS or compatibility().knows(key)):
            joined.append(f"--{name.replace('_', '-')}{equals}{value}")
        elif equals:
            joined.append(f"{key}={value}")
        elif _is_boolean(key) and not (rest and as_text(rest[0]) in ("true", "false", "yes", "no", "1", "0")):
            joined.append(f"{key}=true")
        elif rest:
            joined.append(f"{key}={rest.pop(0)}")
        else:
            joined.append(argument)
    return joined


def _is_boolean(key: str) -> bool:
    known = compatibility()
    if key in OPTIONS:
        return bool in (TYPES[key], *typing.get_args(TYPES[key]))
    defaults, _ = known.noted.get(key) or known.refused.get(key) or ([known.no_effect.get(key)], "")
    return key in known.means or isinstance(defaults[0], bool)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON recipe; raises UserError when it cannot be read, with line and column."""
    if path.suffix in (".jsonl", ".csv", ".parquet", ".arrow", ".txt") and path.exists():
        raise UserError(
            "{file} holds rows, not settings; give it as dataset={file}, with a recipe of configs/ before it", file=path
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = (p for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json"))
        raise UserError(
            "there is no recipe {recipe}{near:suggestion}; the recipes of this kit are in configs/",
            recipe=path,
            near=nearest_path(path, there),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "{recipe} cannot be read as text ({problem}); a recipe is a YAML file in UTF-8",
            recipe=path,
            problem=str(error),
        ) from None
    try:
        twice = _keys_twice(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        content = load_yaml(text)
    except yaml.YAMLError as error:
        if fault := _mistyped_line(text):
            raise UserError("{recipe}, {faults}", recipe=path, faults=[fault]) from None
        if getattr(error, "context", None) == "while scanning a quoted scalar":
            fault = Message(
                "line {line}: a quotation mark that opens here is not closed", line=error.context_mark.line + 1
            )
            raise UserError("{recipe}, {faults}", recipe=path, faults=[fault]) from None
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        if mark is None:
            raise UserError(
                "{recipe} is not YAML ({problem}); write one `key: value` a line", recipe=path, problem=problem
            ) from None
        fault = Message(
            "line {line}, column {column}: {problem}; write one `key: value` a line",
            line=mark.line + 1,
            column=mark.column + 1,
            problem=problem,
        )
        raise UserError("{recipe}, {faults}", recipe=path, faults=[fault]) from None
    if twice:
        raise UserError("{recipe}, {faults}", recipe=path, faults=twice)
    if content is None:
        return {}
    is_mapping = isinstance(content, dict)
    if (not is_mapping or any(not str(key).isprintable() for key in content)) and (fault := _mistyped_line(text)):
        raise UserError("{recipe}, {faults}", recipe=path, faults=[fault])
    if isinstance(content, list) and content and isinstance(content[0], dict):
        raise UserError(
            "{file} holds rows, not settings; give it as dataset={file}, with a recipe of configs/ before it", file=path
        )
    if not is_mapping:
        raise UserError("{recipe} holds no settings; write one `key: value` a line", recipe=path)
    return {str(key): value for key, value in content.items()}


def _mistyped_line(text: str) -> Message | None:
    """The first line of a recipe that misses what makes it `key: value` but looks like one."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*[\w.-]+\s*：", line):
            return Message(
                "line {line}: `{text}` has the Chinese colon `：`; write `key: value` with an ASCII colon and a "
                "space after it",
                line=number,
                text=line.strip(),
            )
        if re.match("[ \t]*[\u00a0\u3000\u200b\ufeff]|[ \t]*[\\w.-]+[ \t]*:[\u00a0\u3000\u200b]", line):
            return Message(
                "line {line}: `{text}` has a no-break or other special space; delete it and type a normal space",
                line=number,
                text=line.strip(),
            )
        if re.match(r"[A-Za-z_]\w*:[^\s/\\]", line):
            return Message(
                "line {line}: `{text}` lacks the space after the colon; write `key: value`",
                line=number,
                text=line.strip(),
            )
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
