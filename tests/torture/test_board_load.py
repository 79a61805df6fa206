"""A short load of the board; `python bench/board_load.py` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, ok


@pytest.mark.slow
def test_pages_that_were_closed_leave_nothing_behind() -> None:
    load = [str(ROOT / "bench" / "board_load.py"), "--seconds", "20", "--pages", "6", "--no-train"]
    done = ok(subprocess.run([sys.executable, *load], capture_output=True, text=True))
    assert "; 0 failed" in done.stdout
