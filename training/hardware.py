"""The card, the driver and the memory of this machine, without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

from common import Gpu, Message

# The oldest Linux driver for each CUDA version that torch is built with (NVIDIA's CUDA release notes). Within a major
# version a newer CUDA runs on the driver of its first release; 13 needs 580.
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
PINNED_DRIVER = OLDEST_DRIVER[12]  # for the torch of requirements-gpu.txt


def gpu_fault(gpu: Gpu) -> Message | None:
    """What keeps a training from this card, and what to do; None where nothing does.

    Unsloth refuses a card that torch cannot use, so such a machine trains only with the card hidden.
    """
    if gpu.compute < (7, 0):
        compute = _dotted(gpu.compute)
        return Message("{name} has compute capability {compute}; Unsloth needs 7.0", name=gpu.name, compute=compute)
    built_for = torch_cuda()
    if built_for is None:
        return Message("torch is built without CUDA, but there is a GPU: delete .venv and run make setup")
    cuda = _dotted(built_for)
    if built_for[0] >= 13 and gpu.compute < (7, 5):
        return Message(
            "torch for CUDA {cuda} no longer supports {name}; run rm -r .venv && make setup", cuda=cuda, name=gpu.name
        )
    driver, needed = int(gpu.driver.split(".")[0]), OLDEST_DRIVER.get(built_for[0], 580)
    if driver < needed:
        pinned = Message(", or install the torch of requirements-gpu.txt (CUDA 12): rm -r .venv && make setup")
        return Message(
            "torch is built for CUDA {cuda}, which needs driver {needed}, but this is {driver}: update the driver "
            "(apt install nvidia-driver-{needed}), or rent a machine with a newer one{other}",
            cuda=cuda,
            needed=needed,
            driver=gpu.driver,
            other=pinned if driver >= PINNED_DRIVER else "",
        )
    if missing := missing_for_triton():
        python = _dotted(sys.version_info[:2])
        return Message("Triton needs {missing}: apt install gcc python{python}-dev", missing=missing, python=python)
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def missing_for_triton() -> list[str]:
    """What Triton compiles with and does not find here: a C compiler (CC, gcc or clang) and Python's header."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    missing = [] if any(map(shutil.which, compilers)) else [" / ".join(compilers)]
    # as in triton/runtime/build.py: Debian's own scheme names a folder that its packages do not fill
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    return missing if header.is_file() else [*missing, str(header)]


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA version that the installed torch is built for, without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'(\d+)\.(\d+)'", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def free_memory() -> int:
    """Bytes of main memory that a new process can have."""
    import psutil

    return psutil.virtual_memory().available


def on_card() -> bool:
    """Whether this process trains on a card. tests/training/cuda_on_cpu.py replaces it."""
    import torch

    return torch.cuda.is_available()


def peak_memory() -> int:
    """Most memory used so far, in bytes: the card's where there is one, else this process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
