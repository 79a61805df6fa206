"""The estimate of memory beside what Unsloth's CUDA branch keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, ok

from training import memory


@pytest.mark.slow
def test_what_a_layer_keeps_is_what_is_counted(tmp_path: Path):
    command = [sys.executable, str(ROOT / "tests" / "training" / "count_saved.py"), str(tmp_path)]
    result = ok(subprocess.run(command, capture_output=True, text=True))
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found["counts"]) == 5
    for count in found["counts"]:
        estimated = 2 * found["tokens"] * memory.saved_by_layer(count["shape"])
        assert count["bytes_a_layer"] == pytest.approx(estimated, rel=0.01), count
