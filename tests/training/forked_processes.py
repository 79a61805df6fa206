"""Trainings by several processes, as forks of one process that has imported everything. Prints as JSON what came of it.

    python tests/training/forked_processes.py '[{"count": 2, "arguments": ["output_dir=..."]}, ...]'

Beside `count` (processes) and `arguments` (of train.py) a training may have `signal` and `at`: the last process gets
that signal once the file `at` is there; and `fault`: the last process has too little memory for a sample. Of each
training: `statuses` and `said` (stdout and stderr) by process, and the `error` that was told, or null.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from common import UserError
from runs.configuration import run_command
from training import model, sft


def fail(*_: Any) -> None:
    raise UserError(
        "out of memory: a batch of {tokens:,} tokens, which cannot be split, does not fit into the {total:.1f} "
        "GB of this GPU; try, one after the other: {settings}",
        tokens=1,
        total=0.0,
        settings=[],
    )


def run_one(given: dict[str, Any], environment: dict[str, str], log: Path, is_last: bool) -> None:
    """Runs train.py in this process, which ends with it."""
    os.environ.update(environment)
    told = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(told, 1)
    os.dup2(told, 2)
    if is_last and given.get("fault"):
        sft.Trainer.training_step = fail
    sys.argv = ["train.py", *given["arguments"]]
    run_command(train.main, train.__doc__)


def fork(given: dict[str, Any], environment: dict[str, str], log: Path, is_last: bool) -> int:
    """The number of a new process that runs train.py."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        run_one(given, environment, log, is_last)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001 - the fork must not go on as its parent
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs one training; `folder` is an empty one."""
    count, told = given["count"], folder / "error.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {"ONECARD_ERROR_FILE": str(told)}
        if count > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        processes.append(fork(given, environment, folder / str(rank), rank == count - 1))
    if "signal" in given:
        while not Path(given["at"]).exists() and os.waitpid(processes[-1], os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        os.kill(processes[-1], given["signal"])
    return {
        "statuses": [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes],
        "said": [(folder / str(rank)).read_text(errors="replace") for rank in range(count)],
        "error": json.loads(told.read_text()) if told.exists() else None,
    }


if __name__ == "__main__":
    model.import_unsloth()
    gc.freeze()  # Unsloth collects garbage often; what the imports have made need not be looked at each time
    results = []
    for given in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as folder:
            results.append(run(given, Path(folder)))
    print(json.dumps(results))
    gc.unfreeze()
