"""What every command needs: errors as messages, the configuration, the frame of a command line, the device.

The first three are made in settings/. Nothing here imports torch or transformers: `--help` and every error of a
configuration answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

try:
    import yaml  # noqa: F401
except ModuleNotFoundError:  # `python chat.py` outside .venv
    print(f"error: {sys.executable} lacks this kit's packages; run make setup, then .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from settings.compatibility import compatibility
from settings.kit import EMBEDDED_MODEL, ROOT, SAVES, command, python
from settings.load import (
    Loaded,
    asks_for_training,
    check_training_asked_for,
    find_dataset_dir,
    load_config,
)
from settings.messages import (
    LANGUAGES,
    Message,
    UserError,
    nearest,
    nearest_word,
    sentences,
    user_language,
)
from settings.options import OPTIONS, Config, dump_config, help_text
from settings.recipe import join_settings, read_recipe
from settings.values import expand_path

__all__ = [
    "CACHE",
    "EMBEDDED_MODEL",
    "LANGUAGES",
    "OPTIONS",
    "ROOT",
    "SAVES",
    "Config",
    "Gpu",
    "Loaded",
    "Message",
    "UserError",
    "asks_for_training",
    "check_training_asked_for",
    "command",
    "compatibility",
    "dump_config",
    "expand_path",
    "find_dataset_dir",
    "find_gpu",
    "help_text",
    "join_settings",
    "load_config",
    "nearest",
    "nearest_word",
    "python",
    "read_recipe",
    "run_script",
    "sentences",
    "user_language",
]


def _say_what_is_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Instead of a traceback: which Python has the kit's packages, where this one lacks one."""
    package = str(getattr(error, "name", "")).partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or (ROOT / package).exists() or (ROOT / f"{package}.py").exists():
        sys.__excepthook__(kind, error, trace)
        return
    print(
        Message("error_line", error=Message("package_missing", python=sys.executable, package=package)), file=sys.stderr
    )
    sys.exit(2)


sys.excepthook = _say_what_is_missing  # from the first line on: commands import some packages before they run

CACHE = Path(os.environ.get("ONECARD_CACHE", ROOT / ".cache"))


def run_script(main: Callable[[list[str]], None], *, takes_settings: bool = True) -> None:
    """Runs a script's `main(argv)`; a UserError becomes its sentence on stderr and exit status 2, Ctrl-C status 130.

    `takes_settings`: the script's arguments may be settings, in the forms of `join_settings`.
    """
    # A shell starts what runs in the background (`nohup make webui &`) with SIGINT ignored; nothing could be paused.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    configure_openmp()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # else TRL tells the hub of every training
    # They warn of kernels for devices or packages that nothing here uses.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        main(_without_command_word(join_settings(sys.argv[1:])) if takes_settings else sys.argv[1:])
    except UserError as error:
        if file := os.environ.get("ONECARD_ERROR_FILE"):  # for a program that started this one
            Path(file).write_text(json.dumps(error.message.to_json(), ensure_ascii=False), encoding="utf-8")
        print(Message("error_line", error=error), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Message('stopped')}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python chat.py ... | head`: the reader went away, which is no fault
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _without_command_word(arguments: list[str]) -> list[str]:
    """Arguments without the command that LLaMA-Factory's users type first: `train.py train RECIPE`."""
    words = {"train": ("train",), "chat": ("chat",), "evaluate": ("eval",), "merge": ("export",), "api": ("api",)}
    is_word = arguments[1:] and arguments[0] in words.get(Path(sys.argv[0]).stem, ())
    return arguments[1:] if is_word and not Path(arguments[0]).exists() else arguments


def configure_openmp() -> None:
    """Sets how long OpenMP's threads spin while they wait for each other; call it before torch is imported.

    Spinning is fastest on free cores, and six times slower than sleeping where other work shares them (docs/log.md).
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = "2000"


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of the first card; memory in bytes, `driver` like '580.65', `compute` like (8, 9)."""

    name: str
    driver: str
    cuda: tuple[int, int]
    compute: tuple[int, int]
    total_memory: int
    free_memory: int


def find_gpu() -> Gpu | None:
    """The card this kit would use (honours CUDA_VISIBLE_DEVICES), or None; needs no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or (visible is not None and visible.split(",")[0] in ("", "-1")):
        return None
    card = visible.split(",")[0] if visible else "0"
    query = "name,driver_version,compute_cap,memory.total,memory.free"
    command = ["nvidia-smi", "-i", card, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        row = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        banner = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, driver, compute, total, free = (part.strip() for part in row.splitlines()[0].split(","))
    cuda = banner.partition("CUDA Version:")[2].split()[0] if "CUDA Version:" in banner else "0.0"
    mib = 1 << 20
    try:
        memory = (int(float(total)) * mib, int(float(free)) * mib)
    except ValueError:  # "[N/A]" of a chip that shares the main memory
        import psutil

        memory = (psutil.virtual_memory().total, psutil.virtual_memory().available)
    return Gpu(name, driver, _version(cuda), _version(compute), *memory)


def _version(text: str) -> tuple[int, int]:
    found = re.match(r"(\d+)(?:\.(\d+))?", text)  # not of "[N/A]"
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
