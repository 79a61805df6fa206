"""A short sample of every kind of damaged input; `make torture` runs the long one."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

COUNTS = {
    "recipes": 40,
    "data files": 100,
    "registries": 50,
    "chat requests": 40,
    "safetensors": 20,
    "chat templates": 40,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_input_is_a_clear_error_or_works(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    assert fuzz.fuzz(kind, COUNTS[kind], tmp_path, tiny_model).lost == []
