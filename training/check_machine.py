"""Checks before a training: this machine, what is installed on it, and the run folder."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import common
from common import Message
from training import hardware, resume
from training.findings import Finding, Run, fault, note, ok
from training.memory import GB
from training.processes import SHARED_STAGES

# Packages without which nothing trains; another one of requirements.txt may be missing.
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo")


def check_python(_: Run) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield ok(Message("{version}", version=found))
    else:
        yield fault(
            Message("{version}; the pinned packages need 3.11 to 3.13: make setup PYTHON=python3.12", version=found)
        )


def check_processes(run: Run) -> Iterator[Finding]:
    """Whether the processes that a launcher (torchrun, accelerate launch) has started can train together."""
    processes = run.processes
    if processes.missing:
        yield fault(
            Message(
                "WORLD_SIZE says that there are {count} processes, but {missing} say nothing: start train.py with "
                "torchrun or accelerate launch, or unset WORLD_SIZE",
                count=processes.count,
                missing=processes.missing,
            )
        )
    elif 0 < processes.cards < processes.here:
        yield fault(
            Message(
                "{count} processes were started on this machine, but it has {cards} card{cards:plural} for them: start "
                "as many processes as cards",
                count=processes.here,
                cards=processes.cards,
            )
        )
    elif processes.count > 1 and run.config.stage not in SHARED_STAGES:
        stages = list(SHARED_STAGES)
        yield fault(
            Message(
                "stage {stage} trains in one process, and {count} were started: python train.py instead of torchrun or "
                "accelerate launch (several processes train {stages})",
                count=processes.count,
                stage=run.config.stage,
                stages=stages,
            )
        )
    elif processes.count > 1:
        yield ok(Message("{count}, each with its part of every step's samples", count=processes.count))


def check_card(run: Run) -> Iterator[Finding]:
    run.gpu = gpu = common.find_gpu()
    if gpu is None:
        yield note(Message("none that nvidia-smi knows of; training runs on the CPU, which suits the embedded model"))
        if run.config.quantization_bit == 8:
            yield fault(Message("quantization_bit: 8 needs a GPU; take it out, or use 4"))
        return
    yield ok(
        Message(
            "{name}, {free:.1f} of {total:.1f} GB free",
            name=gpu.name,
            free=gpu.free_memory / GB,
            total=gpu.total_memory / GB,
        )
    )
    if reason := hardware.gpu_fault(gpu):
        yield fault(
            Message("{reason}; to train on the CPU all the same, hide the card: CUDA_VISIBLE_DEVICES=-1", reason=reason)
        )
    else:
        cuda = ".".join(map(str, gpu.cuda))
        yield ok(
            Message(
                "driver {driver} (CUDA {cuda}), torch is built for {built_for}.x",
                driver=gpu.driver,
                cuda=cuda,
                built_for=hardware.torch_cuda()[0],
            )
        )


def check_packages(run: Run) -> Iterator[Finding]:
    """Compares what is installed with what `make setup` installs for this device."""
    missing, other = [], []
    for name, wanted in pinned_packages("cpu" if run.gpu is None else "gpu").items():
        try:
            found = version(name)
        except PackageNotFoundError:
            if name in NEEDED:
                missing.append(name)
            else:
                other.append(f"{name} - ({wanted})")
            continue
        if found.split("+")[0] != wanted:
            other.append(f"{name} {found} ({wanted})")
    if missing:
        yield fault(Message("{names} not installed: run make setup", names=missing))
    if other:
        yield note(
            Message("other versions than the tested (in brackets): {names}; make setup installs those", names=other)
        )
    if not missing and not other:
        yield ok(
            Message("torch {torch}, unsloth {unsloth}, as pinned", torch=version("torch"), unsloth=version("unsloth"))
        )


def pinned_packages(device: str) -> dict[str, str]:
    """Name → version of the requirements for `device`, "cpu" or "gpu"."""
    names = ("requirements.txt", f"requirements-{device}.txt", "requirements-unsloth.txt")
    lines = "".join((common.ROOT / name).read_text(encoding="utf-8") for name in names)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))


def check_trackers(run: Run) -> Iterator[Finding]:
    for package in run.config.report_to:
        if package != "none" and importlib.util.find_spec(package) is None:
            yield fault(
                Message(
                    "report_to: {package} is not installed; {python} -m pip install {package}",
                    package=package,
                    python=sys.executable,
                )
            )


def check_imports(run: Run) -> Iterator[Finding]:
    """Imports Unsloth as the training will, in a process of its own: it takes seconds and may end the process."""
    quantized = run.config.quantization_bit is not None
    code = f"from training.trainer import import_unsloth; import_unsloth(quantized={quantized})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        yield fault(Message("does not import: {reason}", reason=last))
    else:
        yield ok(Message("imports"))


def check_run(run: Run) -> Iterator[Finding]:
    run.resume = resume.plan_resume(run.loaded, run.folder, run.processes.count)
    for message in (*run.resume.damaged, run.resume.message):
        if message:
            yield note(message)


def check_output(run: Run) -> Iterator[Finding]:
    """Whether the run folder, or the folder in which it will be made, can be written."""
    folder = run.folder
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        yield fault(
            Message(
                "output_dir: {folder} cannot be made, because {path} is not a folder; choose another output_dir",
                folder=run.folder,
                path=folder,
            )
        )
    else:
        try:
            tempfile.TemporaryDirectory(dir=folder).cleanup()
        except OSError as error:
            yield fault(
                Message(
                    "output_dir: {folder} cannot be written: {path}: {reason}; choose another output_dir",
                    folder=run.folder,
                    path=folder,
                    reason=error.strerror,
                )
            )
