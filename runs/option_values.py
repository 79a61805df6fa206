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

from common import OPTIONS, TYPES, Message, UserError, load_yaml, nearest_word

LONGEST_NAME = 255  # bytes of a file's or folder's name


def is_unset(value: Any) -> bool:
    return value in (None, [], {}) or (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))


def as_text(value: Any) -> str:
    """A value as the command line would have it."""
    return str(value).strip().lower() if isinstance(value, bool | str) else str(value)


def coerce(name: str, value: Any) -> Any:
    """`value`, which is not unset, as the type of the option `name`; raises UserError with what is allowed."""
    kind, meta = TYPES[name], OPTIONS[name].metadata
    if type(None) in typing.get_args(kind):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    if meta["choices"] and as_text(value) in ("false", "off") and {"no", "none"} & set(meta["choices"]):
        return "no" if "no" in meta["choices"] else "none"  # YAML reads a bare no as false
    if "true" in meta["choices"] and as_text(value) in ("yes", "on", "1"):
        return "true"
    if isinstance(value, list) and len(value) == 1 and typing.get_origin(kind) is not tuple:
        value = value[0]
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else str(value).split(",")
        items = [_as_pair(item) for item in items]
        element = typing.get_args(kind)[0]
        found = tuple(_scalar(element, item) for item in items if str(item).strip())
        return tuple(map(expand_path, found)) if meta["path"] else found
    if typing.get_origin(kind) is Mapping:
        return _mapping(value)
    found = _scalar(kind, value)
    if kind is str and meta["choices"]:
        found = next((choice for choice in meta["choices"] if choice.lower() == found.lower()), found)
    return expand_path(found) if meta["path"] else found


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
    if kind is bool:
        is_true = as_text(value) in ("true", "yes", "on", "1")
        if not is_true and as_text(value) not in ("false", "no", "off", "0"):
            raise UserError("must be true or false")
        return is_true
    if kind in (int, float):
        try:  # PyYAML reads 1e-4 as a string
            number = math.nan if isinstance(value, bool) else float(str(value).strip())
        except ValueError:
            raise UserError("must be a finite number") from None
        if not math.isfinite(number):
            raise UserError("must be a finite number")
        if kind is int and number != int(number):
            raise UserError("must be a whole number")
        return kind(number)
    if isinstance(value, dict | list | tuple):
        raise UserError("must be a single value")
    return as_text(value) if isinstance(value, bool) else str(value).strip()


def expand_path(path: str) -> str:
    """A path or name with `~`, `${VARIABLE}` and Windows' backslashes resolved.

    Raises UserError where a variable is not set, or a name is longer than file systems have.
    """
    if any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.split("/")):
        raise UserError(
            "has a name of more than {most} bytes, the longest that file systems have; write a shorter one",
            most=LONGEST_NAME,
        )
    if missing := [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]:
        raise UserError(
            "names the environment variable {variable}, which is not set; set it, or write the path out",
            variable=missing[0],
        )
    path = os.path.expanduser(re.sub(r"\$\{(\w+)\}", lambda found: os.environ[found[1]], path))
    return path.replace("\\", "/") if "\\" in path and not os.path.exists(path) else path


def check_option(name: str, value: Any) -> Message | None:
    """What is wrong with a coerced value, or None."""
    meta = OPTIONS[name].metadata
    if value is None:
        return None
    if meta["choices"] and value not in meta["choices"]:
        if name == "stage":
            return _unsupported_stage(value)
        if name == "finetuning_type":
            return Message(
                "is not supported: this kit trains LoRA adapters; use finetuning_type: lora, with a larger "
                "lora_rank to learn more"
            )
        near = nearest_word(str(value), map(str, meta["choices"]))
        return Message("must be one of {choices}{near:suggestion}", choices=meta["choices"], near=near)
    if meta["minimum"] is not None and value < meta["minimum"]:
        return Message("must be at least {minimum:g}", minimum=meta["minimum"])
    if meta["maximum"] is not None and value > meta["maximum"]:
        return Message("must be at most {maximum:g}", maximum=meta["maximum"])
    return None


def _unsupported_stage(stage: str) -> Message:
    """Why a stage is not trained here, and what to use instead."""
    if stage == "rm":
        return Message(
            "is not supported: this kit trains no reward models; train on the pairs themselves with stage: dpo, or "
            "on what a function gives for replies with stage: grpo"
        )
    if stage == "ppo":
        return Message(
            "is not supported: PPO needs a reward model and a value model beside the trained one; use stage: grpo, "
            "which needs neither, or stage: dpo for pairs"
        )
    return Message(
        "is not supported: use sft (learn answers), pt (learn raw text), dpo or kto (learn preferences), or grpo "
        "(learn from rewards)"
    )
