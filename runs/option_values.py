"""From the text of a recipe or a command line to the type of an option."""

from __future__ import annotations

import contextlib
import math
import os
import re
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from common import OPTIONS, TYPES, UserError, load_yaml, nearest_word

MAY_BE_EMPTY = {"name", "author"}  # then {{name}} and {{author}} in the data stay as they are
LONGEST_NAME = 255  # bytes of a file's or folder's name


def is_unset(value: Any) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))


def as_text(value: Any) -> str:
    """A value as the command line would have it."""
    return str(value).strip().lower() if isinstance(value, bool | str) else str(value)


def is_left_empty(name: str, value: Any) -> bool:
    """Whether a value leaves an option at its default, as `cutoff_len:` does."""
    may_be_unset = type(None) in typing.get_args(TYPES[name]) or name in {*MAY_BE_EMPTY, "dataset"}
    return is_unset(value) and not may_be_unset and as_text(value) not in OPTIONS[name].metadata["choices"]


def coerce(name: str, value: Any) -> Any:
    """`value` as the type of the option `name`; raises UserError with what is allowed."""
    kind, meta = TYPES[name], OPTIONS[name].metadata
    if name in MAY_BE_EMPTY and isinstance(value, str):
        return value.strip()
    if type(None) in typing.get_args(kind):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if is_unset(value) or (kind in (int, float) and as_text(value) == "false"):
            return None
    elif is_unset(value) and as_text(value) not in meta["choices"]:
        return ()  # dataset
    if meta["choices"]:
        value = _as_choice(value, meta["choices"])
    if typing.get_origin(kind) is Mapping:
        return _mapping(value)
    if typing.get_origin(kind) is tuple:
        listed = value if isinstance(value, list | tuple) else re.findall(meta["item"], str(value))
        items = map(_as_pair, listed)
        element = typing.get_args(kind)[0]
        found = tuple(_scalar(element, item) for item in items if str(item).strip())
        return tuple(map(expand_path, found)) if meta["path"] else found
    found = _scalar(kind, value[0] if isinstance(value, list) and len(value) == 1 else value)
    _check_limits(found, meta)
    return expand_path(found) if meta["path"] else found


def _as_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    """The choice that is meant, in any case; YAML reads a bare no as false, and true may be typed as 1."""
    text = as_text(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if text in ("false", "off") and {"no", "none"} & set(choices):
        return "no" if "no" in choices else "none"
    if text in ("yes", "on", "1") and "true" in choices:
        return "true"
    return next((choice for choice in choices if str(choice).lower() == text.lower()), value)


def _check_limits(value: Any, meta: Mapping[str, Any]) -> None:
    choices = meta["choices"]
    if choices and value not in choices:
        if choices == ("lora",):
            raise UserError("is not supported: LoRA adapters are trained here; to learn more, raise lora_rank")
        if value == "rm":
            raise UserError("is not supported: no reward models are trained here; use stage: dpo on the same pairs")
        if value == "ppo":
            raise UserError("is not supported: PPO needs a reward model and a value model; use stage: grpo or dpo")
        near = nearest_word(str(value), map(str, choices))
        raise UserError("must be one of {choices}{near:suggestion}", choices=choices, near=near)
    if meta["minimum"] is not None and value < meta["minimum"]:
        raise UserError("must be at least {minimum:g}", minimum=meta["minimum"])
    if meta["maximum"] is not None and value > meta["maximum"]:
        raise UserError("must be at most {maximum:g}", maximum=meta["maximum"])


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping, or the text of one in JSON or YAML; numbers that YAML takes for text (1e-7) become numbers."""
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            value = load_yaml(value)
    if not isinstance(value, dict):
        raise UserError("must be names with their values, as YAML or JSON has them")
    return {str(key): _number_of(one) for key, one in value.items()}


def _number_of(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _as_pair(item: Any) -> Any:
    """`regex: ^[01]$` in a list, which is an object in YAML, as the text that was written."""
    return ": ".join(map(str, *item.items())) if isinstance(item, dict) and len(item) == 1 else item


def _scalar(kind: type, value: Any) -> Any:
    if isinstance(value, dict | list | tuple) and kind is str:
        raise UserError("must be a single value")
    if kind is str:
        return as_text(value) if isinstance(value, bool) else str(value).strip()
    if kind is bool:
        is_true = as_text(value) in ("true", "yes", "on", "1")
        if not is_true and as_text(value) not in ("false", "no", "off", "0"):
            raise UserError("must be true or false")
        return is_true
    try:  # PyYAML reads 1e-4 as a string
        number = math.nan if isinstance(value, bool) else float(str(value).strip())
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError("must be a finite number")
    if kind is int and number != int(number):
        raise UserError("must be a whole number")
    return kind(number)


def expand_path(path: str) -> str:
    """A path or name with `~`, `${VARIABLE}` and Windows' backslashes resolved.

    Raises UserError where a variable is not set, or a name is longer than file systems have.
    """
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.split("/")):
        raise UserError("has a name longer than the {most} bytes that file systems allow", most=LONGEST_NAME)
    if missing := [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]:
        raise UserError("names the environment variable {variable}, which is not set", variable=missing[0])
    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda found: os.environ[found[1]], path))
    return path.replace("\\", "/") if "\\" in path and not os.path.exists(path) else path
