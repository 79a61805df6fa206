"""trainer_log.jsonl of a run: a line for each logging step and each evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs.files import read_jsonl, write_jsonl

LOG = "trainer_log.jsonl"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill has cut off is left out."""
    return read_jsonl(folder / LOG)


def append_line(folder: Path, line: dict[str, Any]) -> None:
    with open(folder / LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def keep_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites a log with the lines that `keep` accepts (a resumed run logs the others again); returns them."""
    lines = [line for line in read_jsonl(file) if keep(line)]
    write_jsonl(file, lines)
    return lines


def mean_loss(lines: list[dict[str, Any]]) -> float | None:
    """The training loss over all steps of a log: each line's loss stands for the steps since the line before."""
    total, seen = 0.0, 0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["step"] - seen)
            seen = line["step"]
    return total / seen if seen else None


def last_value(lines: list[dict[str, Any]], key: str) -> Any:
    """The newest value of `key` in the log; None where no line has it."""
    return next((line[key] for line in reversed(lines) if key in line), None)
