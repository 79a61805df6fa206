"""Quicker imports of transformers and the libraries that build on it."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
from collections.abc import Iterator


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
