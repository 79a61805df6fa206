"""Whether a process that a file names still runs, how this one ends when it is asked to, and quicker imports."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any


def is_alive(process: int, created: float | None = None) -> bool:
    """Whether a process of that number runs; a zombie (ended, but not yet waited for) does not.

    `created`, its start in seconds, tells it from a later process with the same number, which is usual in containers.
    Without it, a process of another user counts as a later one.
    """
    import psutil

    try:
        if created is None:
            os.kill(process, 0)
        found = psutil.Process(process)
        return found.status() != psutil.STATUS_ZOMBIE and (created is None or abs(found.create_time() - created) < 2)
    except (ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        return False


def end_with_parent() -> None:
    """For Popen's `preexec_fn`: ends the child when its parent dies, however that was killed. Linux has this alone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside with KeyboardInterrupt, though libraries catch it with a bare `except:`.

    Unsloth has more than a hundred of these, also while it is imported. So it is raised once a second until it arrives.
    """
    asked = False

    def interrupt(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    earlier = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """While the block imports libraries, garbage is not collected and the installed packages are listed once.

    Imports make a million objects that stay: looking for garbage among them takes a fifth of the time. The list of
    packages needs the metadata of each one, and several libraries ask for it.
    """
    enabled, distributions = gc.isenabled(), importlib.metadata.packages_distributions
    gc.disable()
    importlib.metadata.packages_distributions = functools.cache(distributions)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = distributions
        if enabled:
            gc.enable()
