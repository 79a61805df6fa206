"""Whether a process that a file names still runs."""

from __future__ import annotations

import os


def has_ended(process: int) -> bool:
    """Whether a process of this user that had this number is gone; another user's may have the number by now."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return True
    return False


def is_alive(process: int, created: float | None = None) -> bool:
    """Whether a process of that number (and start, in seconds) runs; one that has ended but was not yet waited for
    does not. The start tells it from another that has the number by now, as happens in containers."""
    import psutil

    try:
        found = psutil.Process(process)
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        return created is None or abs(found.create_time() - created) < 2
    except psutil.NoSuchProcess:
        return False
