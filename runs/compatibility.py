"""The keys of LLaMA-Factory and transformers that are not options of this kit: configs/compat/llamafactory.yaml."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from common import ROOT, load_yaml
from runs.option_values import as_text, is_unset


@dataclass(frozen=True)
class Compatibility:
    """The keys of LLaMA-Factory and transformers that are not options here: configs/compat/llamafactory.yaml.

    `means`: key → value (as text) → options; `noted` and `refused`: key → its defaults and the code of the reason.
    `push`: the keys that ask for an upload, and those that name where to.
    """

    renamed: dict[str, str]
    means: dict[str, dict[str, dict[str, Any]]]
    no_effect: dict[str, Any]
    noted: dict[str, tuple[list[Any], str]]
    refused: dict[str, tuple[list[Any], str]]
    push: dict[str, list[str]]

    def knows(self, key: str) -> bool:
        return any(key in keys for keys in (self.renamed, self.means, self.no_effect, self.noted, self.refused))


@functools.cache
def compatibility() -> Compatibility:
    content = load_yaml((ROOT / "configs/compat/llamafactory.yaml").read_text(encoding="utf-8"))
    for part in ("noted", "refused"):
        content[part] = {
            key: (default if isinstance(default, list) else [default], code)
            for code, keys in content[part].items()
            for key, default in keys.items()
        }
    return Compatibility(**content)


def is_default(value: Any, defaults: list[Any]) -> bool:
    """Whether a value that may be text is one of `defaults`; off (false, 0) is the same as unset."""
    off = ("false", "no", "off", "0", "0.0", "[]", "{}")
    for default in defaults:
        if default in (None, False) and (is_unset(value) or as_text(value) in off):
            return True
        try:
            if not isinstance(default, bool) and float(value) == float(default):
                return True
        except (TypeError, ValueError):
            pass
        if value == default or as_text(value) == as_text(default):
            return True
    return is_unset(value)
