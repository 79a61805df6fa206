"""What quick_imports changes is as it was after the block."""

from __future__ import annotations

import gc
import importlib.metadata

import pytest

from runs.process import quick_imports


@pytest.mark.parametrize("enabled", [True, False])
def test_quick_imports_leave_nothing_behind(enabled: bool) -> None:
    was, distributions = gc.isenabled(), importlib.metadata.packages_distributions
    try:
        (gc.enable if enabled else gc.disable)()
        with quick_imports():
            assert not gc.isenabled()
            assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
        assert gc.isenabled() is enabled and importlib.metadata.packages_distributions is distributions
    finally:
        (gc.enable if was else gc.disable)()
