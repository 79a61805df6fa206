"""One training at a time in a run folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common import UserError

LOCK = ".lock"  # in the run folder, while a process trains there


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder, which is made if needed; raises UserError where another process holds it.

    The lock is the kernel's (flock): a process gives it back however it ends. On NFS the server keeps it, so that it
    holds between machines, too. A file system that knows no locks has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder / LOCK)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # nothing came of the training


def _acquire(path: Path) -> IO[str]:
    import fcntl

    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            process, host = _read_holder(file.read())
            file.close()
            text = "{folder} is being trained by process {process} on {host}; wait for it, or choose another output_dir"
            raise UserError(text, folder=path.parent, process=process, host=host) from None
        except OSError:  # a file system without locks
            return file
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
            return file
        file.close()  # the holder before has just deleted the file


def _read_holder(text: str) -> tuple[object, str]:
    """Process and host that hold the lock."""
    try:
        holder = json.loads(text)
        return holder["pid"], holder["host"]
    except (ValueError, KeyError, TypeError):  # it is only now being written
        return "?", "?"
