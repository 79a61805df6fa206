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
        raise UserError("recipe_is_data", file=path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        there = (p for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json"))
        raise UserError("recipe_missing", recipe=path, near=nearest_path(path, there)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("recipe_not_text", recipe=path, problem=str(error)) from None
    try:
        twice = _keys_twice(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        content = load_yaml(text)
    except yaml.YAMLError as error:
        if fault := _mistyped_line(text):
            raise UserError("recipe_faults", recipe=path, faults=[fault]) from None
        if getattr(error, "context", None) == "while scanning a quoted scalar":
            fault = Message("quote_not_closed", line=error.context_mark.line + 1)
            raise UserError("recipe_faults", recipe=path, faults=[fault]) from None
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        if mark is None:
            raise UserError("recipe_not_yaml", recipe=path, problem=problem) from None
        fault = Message("yaml_problem", line=mark.line + 1, column=mark.column + 1, problem=problem)
        raise UserError("recipe_faults", recipe=path, faults=[fault]) from None
    if twice:
        raise UserError("recipe_faults", recipe=path, faults=twice)
    if content is None:
        return {}
    is_mapping = isinstance(content, dict)
    if (not is_mapping or any(not str(key).isprintable() for key in content)) and (fault := _mistyped_line(text)):
        raise UserError("recipe_faults", recipe=path, faults=[fault])
    if isinstance(content, list) and content and isinstance(content[0], dict):
        raise UserError("recipe_is_data", file=path)
    if not is_mapping:
        raise UserError("recipe_without_settings", recipe=path)
    return {str(key): value for key, value in content.items()}


def _mistyped_line(text: str) -> Message | None:
    """The first line of a recipe that misses what makes it `key: value` but looks like one."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*[\w.-]+\s*：", line):
            return Message("line_with_wide_colon", line=number, text=line.strip())
        if re.match("[ \t]*[\u00a0\u3000\u200b\ufeff]|[ \t]*[\\w.-]+[ \t]*:[\u00a0\u3000\u200b]", line):
            return Message("line_with_odd_space", line=number, text=line.strip())
        if re.match(r"[A-Za-z_]\w*:[^\s/\\]", line):
            return Message("line_without_space", line=number, text=line.strip())
    return None


def _keys_twice(document: yaml.Node | None) -> list[Message]:
    """The settings that stand twice in a recipe, of which YAML would silently take the last."""
    lines: dict[str, list[int]] = {}
    for key, _ in document.value if isinstance(document, yaml.MappingNode) else ():
        lines.setdefault(str(key.value), []).append(key.start_mark.line + 1)
    return [Message("key_twice", key=key, line=at[-1], first=at[0]) for key, at in lines.items() if len(at) > 1]
