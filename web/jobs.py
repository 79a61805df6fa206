"""Scripts that a page starts, each in a session of its own: it outlives the page, the browser and the server.

A job is a folder: `job.json` (command, process, time), `log` (all that the script prints) and, once it has ended,
`status` (its exit status). Whoever reads the folder knows how it went; nothing is kept in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

import common
from common import UserError
from runs.files import write_json
from runs.process import is_alive

# The shell only waits and notes the exit status. Its traps keep it alive through a Ctrl-C that is meant for the script.
_WAIT = 'trap : INT TERM; "$@"; status=$?; echo $status > "$0.new"; mv "$0.new" "$0"'
ABORTED = "aborted"  # the file in a job's folder that tells that its end was asked for
_TAIL = 1 << 17  # bytes of a log that are looked at, from its end
_BAR = re.compile(r"^(?P<what>[^|\r\n]*?):?\s*(?P<percent>\d+)%\|[^|]*\|\s*(?P<rest>[^\r\n]*)$")


@dataclass(frozen=True)
class Job:
    """A script that was started; `process` is the number of its session, `created` that process's start in seconds."""

    folder: Path
    command: tuple[str, ...]
    process: int
    created: float

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def shown(self) -> str:
        """The command as one types it."""
        return shown(list(self.command))


def shown(command: list[str]) -> str:
    """`train.py a=b` as a line for a shell."""
    return shlex.join(["python", *command])


def start(folder: Path, command: list[str], t: Callable[..., str] = str.format) -> Job:
    """Starts `python SCRIPT ...` from the working directory; raises UserError where the folder's job still runs."""
    earlier = find(folder)
    if earlier and state(earlier) == "running":
        raise UserError(t("{script} is still at work; wait for it, or stop it", script=earlier.shown))
    folder.mkdir(parents=True, exist_ok=True)
    status = folder / "status"
    for old in (status, folder / ABORTED):
        old.unlink(missing_ok=True)
    script = [sys.executable, str(common.ROOT / command[0]), *command[1:]]
    with open(folder / "log", "wb") as log:
        child = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT, str(status.absolute()), *script],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    job = Job(folder, tuple(command), child.pid, psutil.Process(child.pid).create_time())
    record = {"command": command, "process": job.process, "created": job.created, "started": time.time()}
    write_json(folder / "job.json", record)
    return job


def find(folder: Path) -> Job | None:
    """The job of a folder, or None where none was started."""
    try:
        record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        return Job(folder, tuple(record["command"]), record["process"], record["created"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def state(job: Job) -> str:
    """`running`, `done`, `failed`, `stopped` (by Ctrl-C), or `killed` where it ended without a word."""
    try:
        status = int((job.folder / "status").read_text())
    except (FileNotFoundError, ValueError):
        return "running" if is_alive(job.process, job.created) else "killed"
    return {0: "done", 130: "stopped", -signal.SIGINT: "stopped"}.get(status, "failed")


def interrupt(job: Job) -> None:
    """What Ctrl-C does in a terminal."""
    _signal(job, signal.SIGINT)


def kill(job: Job) -> None:
    """Ends a job at once, with all its children."""
    _signal(job, signal.SIGKILL)


def _signal(job: Job, number: signal.Signals) -> None:
    if state(job) == "running":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process, number)


# ---------------------------------------------------------------------------------------------------------------------
# What a script says


def lines(log: Path) -> list[str]:
    """The last lines of a log as a terminal would show them: of a bar that was drawn many times, its last state."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    shown_lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    found = shown_lines[1:] if size > _TAIL else shown_lines
    return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in found]


def tail(log: Path, count: int = 200) -> str:
    """The last `count` lines of a log as text."""
    return "\n".join(lines(log)[-count:]).strip("\n")


def progress(log: Path) -> tuple[int, str] | None:
    """Percent and wording of the progress bar that the log ends with, or None where it does not end with one."""
    for line in reversed(lines(log)):
        if line.strip():
            match = _BAR.match(line)
            return (min(100, int(match["percent"])), f"{match['what']}: {match['rest']}") if match else None
    return None


def fault(job: Job, t: Callable[..., str] = str.format) -> str:
    """Why a job failed, in the script's own sentence, or in ours by `t`; empty where it did not fail."""
    if state(job) not in ("failed", "killed"):
        return ""
    said = [line for line in lines(job.log) if line.strip() and not _BAR.match(line)]
    for index in range(len(said) - 1, -1, -1):
        if said[index].startswith("error: "):
            return "\n".join([said[index].removeprefix("error: "), *said[index + 1 :]])
    if state(job) == "killed":
        return t(
            "{script} was ended from outside (killed, out of memory, or the machine was switched off)", script=job.shown
        )
    if not said:
        return t("{script} failed and said nothing", script=job.shown)
    return t("{script} failed: {said}; its log below says more", script=job.shown, said=said[-1])
