"""Which processes are alive; children end with their parent; what quick_imports changes is as it was after it."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT

from runs.process import is_alive, quick_imports

PARENT = """
import subprocess, sys
from runs.process import end_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=end_with_parent)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_parent_takes_its_child_with_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not is_alive(child):
            return
        time.sleep(0.05)
    raise AssertionError("the child is left")


def test_a_number_given_to_a_later_process_is_not_the_earlier_one(monkeypatch):
    me = psutil.Process()
    assert is_alive(me.pid)
    assert is_alive(me.pid, me.create_time())
    assert not is_alive(me.pid, me.create_time() - 60)
    zombie = subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=subprocess.DEVNULL)
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_alive(zombie.pid)
    zombie.wait()
    assert not is_alive(zombie.pid)

    def refuse(process: int, _: int) -> None:
        raise PermissionError(process)

    monkeypatch.setattr("os.kill", refuse)
    assert not is_alive(me.pid), "the number belongs to another user now"


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
