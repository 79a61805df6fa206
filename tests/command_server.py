"""Runs commands of the kit as forks of one process that has imported their packages already.

    python tests/command_server.py SOCKET unsloth

Importing Unsloth takes longer than a small training. The server imports packages only, none of the kit's modules: each
fork runs its script from the first line on, as `python SCRIPT` does. A client sends one JSON line
{"argv": [...], "cwd": ..., "env": {...}} with its stdin, stdout and stderr, and gets the exit status as a line.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class CommandServer:
    """A server process, started at the first command and ended with this one."""

    def __init__(self, packages: str, folder: Path) -> None:
        self.socket, self.packages = folder / f"{packages}.socket", packages
        self.environment: dict[str, str] = {}
        self.process: subprocess.Popen | None = None

    def run(self, argv: list[str], cwd: Path, env: dict[str, str], streams: list[int]) -> int:
        """The exit status (negative: a signal) of a script with its arguments; `streams`: stdin, stdout, stderr."""
        if self.process is None:
            self._start()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            asked = json.dumps({"argv": argv, "cwd": str(cwd), "env": env}).encode() + b"\n"
            socket.send_fds(connection, [asked[:1]], streams)
            connection.sendall(asked[1:])
            return int(connection.makefile().readline())

    def _start(self) -> None:
        command = [sys.executable, __file__, str(self.socket), self.packages]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while not self.socket.exists():
            assert self.process.poll() is None, "tests/command_server.py has ended"
            time.sleep(0.1)

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()  # the server ends when it can no longer read
            self.process.wait()


def import_packages(packages: str) -> None:
    """What the commands import, by the kit's own way of doing so; then forgets the kit's modules."""
    sys.path.insert(0, str(ROOT))
    import common

    common.configure_openmp()
    if packages == "unsloth":
        from training.model import import_unsloth

        import_unsloth()
    else:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name != "__main__" and file.startswith(f"{ROOT}/") and "/.venv/" not in file:
            del sys.modules[name]
    sys.path.remove(str(ROOT))


def become(asked: dict, streams: list[int]) -> None:
    """Runs the script in this process, which then ends as Python does."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = asked["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve(listener: socket.socket) -> None:
    """Until stdin is closed."""
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        first, streams, _, _ = socket.recv_fds(connection, 1, 3)
        asked = json.loads(first + connection.makefile("rb").readline())
        child = os.fork()
        if not child:
            listener.close()
            become(asked, streams)
            return
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)


if __name__ == "__main__":
    import_packages(sys.argv[2])
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        serve(listener)
