"""LLaMA-Factory's and transformers' keys: what they are called here, and those that are no options of this kit."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import OPTIONS, ROOT, TYPES, Message, UserError, load_yaml, nearest_word
from runs.option_values import as_text, is_unset
from runs.redaction import REDACTED, is_secret, redact

OFF = ("false", "no", "off", "0", "0.0", "[]", "{}")


@dataclass(frozen=True)
class Compatibility:
    """configs/compat/llamafactory.yaml.

    `means`: key → value (as text) → options; `noted` and `refused`: key → its defaults and the reason. `push`: the
    keys that ask for an upload, and those that name where to; `synonyms`: what people type for an option → its key.
    """

    renamed: dict[str, str]
    means: dict[str, dict[str, dict[str, Any]]]
    no_effect: dict[str, Any]
    noted: dict[str, tuple[list[Any], str]]
    refused: dict[str, tuple[list[Any], str]]
    push: dict[str, list[str]]
    synonyms: dict[str, str]

    def knows(self, key: str) -> bool:
        parts = (self.renamed, self.means, self.no_effect, self.noted, self.refused, self.synonyms)
        return any(key in keys for keys in parts)

    def flag_values(self, key: str) -> tuple[str, ...]:
        """The values of a key, an option's too, that may be true, so that `--key` alone sets it; else none."""
        if key in OPTIONS:
            choices = OPTIONS[key].metadata["choices"]
            is_flag = "true" in choices or bool in (TYPES[key], *typing.get_args(TYPES[key]))
        else:
            choices, no_effect = (), [self.no_effect.get(key)]
            defaults, _ = self.noted.get(key) or self.refused.get(key) or (no_effect, "")
            is_flag = "true" in self.means.get(key, ()) or isinstance(defaults[0], bool)
        return ("true", "false", "yes", "no", "on", "off", "1", "0", *map(str, choices)) if is_flag else ()


@functools.cache
def compatibility() -> Compatibility:
    content = load_yaml((ROOT / "configs/compat/llamafactory.yaml").read_text(encoding="utf-8"))
    for part in ("noted", "refused"):
        content[part] = {
            key: (default if isinstance(default, list) else [default], reason)
            for reason, keys in content[part].items()
            for key, default in keys.items()
        }
    content["synonyms"] = {word: key for key, words in content["synonyms"].items() for word in words}
    return Compatibility(**content)


@dataclass(frozen=True)
class Setting:
    """A value as it was given: under which key, and where (a recipe, or None for the command line)."""

    key: str
    value: Any
    recipe: Path | None

    def fault(self, problem: Message) -> Message:
        """What is wrong with the setting, without a secret in it."""
        shown = redact(self.value) if isinstance(self.value, str) else self.value
        shown = REDACTED if is_secret(self.key) else shown
        place = place_of(self.recipe)
        return Message("{place}: {key}: {value} {problem}", place=place, key=self.key, value=shown, problem=problem)


def place_of(recipe: Path | None) -> Message | str:
    return Message("command line") if recipe is None else str(recipe)


def rename(given: dict[str, Any], recipe: Path | None, faults: list[Message]) -> dict[str, Setting]:
    """The settings of one origin by the names of options; one that is set twice, under two names, is a fault."""
    known = compatibility()
    found: dict[str, Setting] = {}
    for key, value in given.items():
        meant = known.means.get(key, {}).get(as_text(value), {known.renamed.get(key, key): value})
        for name, one in meant.items():
            if name in found:
                one = _combine(name, found[name].value, one)
            if one is None and name in found:
                text = "{place}: {first} and {second} are the same setting; keep one"
                faults.append(Message(text, place=place_of(recipe), first=found[name].key, second=key))
            else:
                found[name] = Setting(key, one, recipe)
    return found


def _combine(name: str, first: Any, second: Any) -> Any:
    """The value of an option that two keys set, as use_swanlab adds to report_to; None where they contradict."""
    if name == "packing":  # of which neat_packing is a kind
        return as_text(first) in ("true", "1") or as_text(second) in ("true", "1")
    if name == "report_to":
        reporters = [one for value in (first, second) for one in (value if isinstance(value, list) else [value])]
        return [one for one in reporters if not is_unset(one)]
    return first if as_text(first) == as_text(second) else None


def check_foreign(key: str, value: Any) -> list[Message]:
    """Notes on a key that is no option; raises UserError where it is refused or unknown."""
    known = compatibility()
    if key in known.refused:
        defaults, reason = known.refused[key]
        if not _is_default(value, defaults):
            raise UserError("is not supported: {reason}", reason=Message(reason))
        return []
    if key in known.noted:
        defaults, reason = known.noted[key]
        note = Message("{key}: {value}: {reason}", key=key, value=value, reason=Message(reason))
        return [] if _is_default(value, defaults) else [note]
    if key not in known.no_effect and key not in known.means:
        near = known.synonyms.get(key) or nearest_word(key, [*OPTIONS, *known.renamed])
        raise UserError("is not a known key{near:suggestion}", near=near)
    return []


def push_notes(settings: dict[str, Any]) -> list[Message]:
    """How to upload, where hub_model_id or another key asks for it."""
    asked = compatibility().push
    wanted = [key for key in asked["switches"] if not _is_default(settings.get(key), [False, None])]
    names = [settings[key] for key in asked["names"] if not is_unset(settings.get(key))]
    text = "{keys}: nothing is uploaded by itself; after training: merge.py RUN --push {repo} (private if new)"
    note = Message(text, keys=wanted, repo=str((*names, "ORG/NAME")[0]))
    return [note] if wanted else []


def _is_default(value: Any, defaults: list[Any]) -> bool:
    """Whether a value that may be text is one of `defaults`; off (false, 0) is the same as unset."""
    return is_unset(value) or any(_same(value, default) for default in defaults)


def _same(value: Any, default: Any) -> bool:
    if default in (None, False) and as_text(value) in OFF:
        return True
    try:
        if not isinstance(default, bool) and float(value) == float(default):
            return True
    except (TypeError, ValueError):
        pass
    return value == default or as_text(value) == as_text(default)
