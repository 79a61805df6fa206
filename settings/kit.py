"""Where the kit is, and how its commands are typed."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAVES = Path("saves")
EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"


def python() -> str:
    """How to call this interpreter in a command to type: `python` only where the shell takes it for this one."""
    venv = ROOT / ".venv"
    if not venv.exists() or not os.path.samefile(sys.prefix, venv):
        return "python"
    active = os.environ.get("VIRTUAL_ENV")
    if active and Path(active).exists() and os.path.samefile(active, venv):
        return "python"
    return str((Path() if _in_kit_folder() else ROOT) / ".venv" / "bin" / "python")


def command(script: str, *arguments: object) -> str:
    """A command that runs a script of this kit, as a line for the shell in the working directory."""
    return shlex.join([python(), script if _in_kit_folder() else str(ROOT / script), *map(str, arguments)])


def _in_kit_folder() -> bool:
    return Path.cwd() == ROOT
