"""Space on the disk: looked at before the work, and told in one sentence where it runs out all the same."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import UserError


def existing_folder(path: Path) -> Path:
    """The nearest folder of a path that exists: the disk that the path will be on."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_free_space(path: Path, needed: int) -> None:
    """Raises UserError where the disk of `path` has not `needed` bytes free."""
    if _free_space(path) < needed:
        raise _disk_full(path, needed)


class ChildFailed(UserError):
    """A program that was started has failed; its disk may be full."""


def _free_space(path: Path) -> int:
    return shutil.disk_usage(existing_folder(path)).free


def _disk_full(path: Path, needed: int) -> UserError:
    text = "{folder} has {free:.2f} GB of free disk space, {needed:.2f} GB are needed; free some, or use another disk"
    return UserError(text, folder=existing_folder(path), needed=needed / 1e9, free=_free_space(path) / 1e9)


@contextmanager
def on_disk_full(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left on device" within the block into a UserError with the needed and the free bytes."""
    from safetensors import SafetensorError

    try:
        yield
    except (ChildFailed, RuntimeError, SafetensorError):  # a child's failure; words of torch and safetensors
        if _free_space(path) > min(needed // 10, 1 << 26):
            raise
        raise _disk_full(path, needed) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(path, needed) from None
