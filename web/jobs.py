"""Commands that a page starts, each in a session of its own: it outlives the page, the browser and the server.

A job is a folder: `job.json` (command, process, time), `log` (all that the command prints), `error.json` (the message
that ended it, where it says one) and, once it has ended, `status` (its exit status). Whoever reads the folder knows the
state of the job; nothing is kept in memory.
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
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

import common
from common import Message, UserError
from runs.files import write_json
from runs.process import is_alive

# The shell only waits and writes the exit status. Its traps keep it alive through a Ctrl-C meant for the command.
_WAIT = 'trap : INT TERM; "$@"; status=$?; echo $status > "$0.new"; mv "$0.new" "$0"'
# A server that was started by `nohup ... &` ignores Ctrl-C, and its children inherit that; a shell cannot undo it.
_DEFAULT_SIGNALS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "signal.signal(signal.SIGTERM, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
ABORTED = "aborted"  # the file in a job's folder that says that its end was asked for
ERROR = "error.json"  # see ONECARD_ERROR_FILE in common.py
_TAIL = 1 << 17  # bytes of a log that are looked at, from its end
_BAR = re.compile(r"^(?P<what>[^|\r\n]*?):?\s*(?P<percent>\d+)%\|[^|]*\|\s*(?P<rest>[^\r\n]*)$")


@dataclass(frozen=True)
class Job:
    """A command that was started; `process` is the id of its session, `created` that process's start in seconds."""

    folder: Path
    command: tuple[str, ...]
    process: int
    created: float

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def shell_line(self) -> str:
        """The command as one types it."""
        return shell_line(list(self.command))


def shell_line(command: list[str]) -> str:
    """`train.py a=b` as a line for a shell."""
    return shlex.join(["python", *command])


def start(folder: Path, command: list[str], language: str = "en") -> Job:
    """Starts `python SCRIPT ...` in the working directory; it prints in `language`.

    Raises UserError where the folder's job still runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # of two boards on one folder, one starts it
        if is_running(earlier := find(folder)):
            raise UserError.from_message(still_running(earlier))
        status, error = folder / "status", folder / ERROR
        for old in (status, error, folder / ABORTED):
            old.unlink(missing_ok=True)
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "ONECARD_LANG": language}
        environment["ONECARD_ERROR_FILE"] = str(error.absolute())
        script = [sys.executable, str(common.ROOT / command[0]), *command[1:]]
        with open(folder / "log", "wb") as log:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT, str(status.absolute()), sys.executable, "-ISc", _DEFAULT_SIGNALS, *script],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        job = Job(folder, tuple(command), child.pid, psutil.Process(child.pid).create_time())
        write_json(folder / "job.json", {"command": command, "process": job.process, "created": job.created})
    return job


def still_running(job: Job) -> Message:
    return Message("{command} is still running; wait for it, or stop it", command=job.shell_line)


def find(folder: Path) -> Job | None:
    """The job of a folder, or None where none was started."""
    try:
        record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        return Job(folder, tuple(record["command"]), record["process"], record["created"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def state(job: Job) -> str:
    """`running`, `done`, `failed`, `stopped` (by Ctrl-C), or `killed` where it ended without an exit status."""
    try:
        status = int((job.folder / "status").read_text())
    except (FileNotFoundError, ValueError):
        return "running" if is_alive(job.process, job.created) else "killed"
    return {0: "done", 130: "stopped", -signal.SIGINT: "stopped"}.get(status, "failed")


def is_running(job: Job | None) -> bool:
    return job is not None and state(job) == "running"


def send_signal(job: Job, number: signal.Signals = signal.SIGINT) -> None:
    """Sends a job and all its children what Ctrl-C sends in a terminal, or SIGKILL, which ends them at once."""
    if is_running(job):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process, number)


# ---------------------------------------------------------------------------------------------------------------------
# What a command prints


def lines(log: Path) -> list[str]:
    """The last lines of a log as a terminal would show them: of a progress bar, its last state."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    visible = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    kept = visible[1:] if size > _TAIL else visible
    return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in kept]


def tail(log: Path, count: int = 200) -> str:
    """The last `count` lines of a log as text."""
    return "\n".join(lines(log)[-count:]).strip("\n")


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    return next((line for line in reversed(lines(log)) if line.strip()), "")


def progress(log: Path) -> tuple[int, str] | None:
    """Percent and text of the progress bar that the log ends with, or None where it does not end with one."""
    match = _BAR.match(last_line(log))
    return (min(100, int(match["percent"])), f"{match['what']}: {match['rest']}") if match else None


def error(job: Job) -> Message | None:
    """Why a job failed: the command's own message, or one about its end; None where it did not fail."""
    ended = state(job)
    if ended not in ("failed", "killed"):
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Message.from_json(json.loads((job.folder / ERROR).read_text(encoding="utf-8")))
    if ended == "killed":
        return Message("{command} was killed, ran out of memory, or the machine went down", command=job.shell_line)
    printed = [line for line in lines(job.log) if line.strip() and not _BAR.match(line)]
    if not printed:
        return Message("{command} failed and printed nothing", command=job.shell_line)
    return Message("{command} failed: {line}", command=job.shell_line, line=printed[-1])
