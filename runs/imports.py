"""Quicker imports of transformers and what builds on it: without packages that a process never uses."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

# What transformers, PEFT, TRL and Unsloth import wherever it is installed, and need for nothing on a CPU. Of a model in
# 4 or 8 bit they need QUANTIZING there, too.
UNUSED_ON_CPU = ("torchao", "sklearn", "scipy", "triton", "rich")
QUANTIZING = "bitsandbytes"


@contextlib.contextmanager
def light_imports(unused: Iterable[str]) -> Iterator[None]:
    """While the block imports, these packages are missing, unless they are imported already.

    For a process on a CPU, before its first import of transformers: what that finds missing stays missing for it.
    """
    hidden = [name for name in unused if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    if "transformers.models" not in sys.modules:
        sys.modules["transformers.models"] = _unscanned_models()
    distributions = importlib.metadata.packages_distributions
    # it reads the metadata of every package, and several libraries call it
    importlib.metadata.packages_distributions = functools.cache(distributions)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = distributions
        for name in hidden:
            del sys.modules[name]


def _unscanned_models() -> ModuleType:
    """The package transformers.models without its list of all models, which costs reading every file of them."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    spec = importlib.machinery.ModuleSpec("transformers.models", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return importlib.util.module_from_spec(spec)


@contextlib.contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Imports make a million objects that stay; looking for garbage among them takes a fifth of the start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
