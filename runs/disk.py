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
    folder = existing_folder(path)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise disk_full(folder, needed, free)


class ChildFailed(UserError):
    """A program that was started has failed; its disk may be full."""


def disk_full(folder: Path, needed: int, free: int) -> UserError:
    return UserError(
        "{folder} has {free:.2f} GB of free disk space, {needed:.2f} GB are needed; free some, or name a folder on "
        "another disk",
        folder=folder,
        needed=needed / 1e9,
        free=free / 1e9,
    )


@contextmanager
def on_disk_full(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space left on device" within the block into a UserError with the needed and the free bytes."""
    from safetensors import SafetensorError

    try:
        yield
    except (UserError, RuntimeError, SafetensorError) as error:
        # a child's full disk comes as its failure; torch and safetensors have words of their own for it
        folder = existing_folder(path)
        free = shutil.disk_usage(folder).free
        other = isinstance(error, UserError) and not isinstance(error, ChildFailed)
        if other or free > min(needed // 10, 1 << 26):
            raise
        raise disk_full(folder, needed, free) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = existing_folder(path)
        raise disk_full(folder, needed, shutil.disk_usage(folder).free) from None
