"""Runs a program (llama.cpp's build, converter, quantizer) with a progress bar; what goes wrong becomes a UserError."""

from __future__ import annotations

import os
import re
import subprocess
from collections import deque

from common import Message
from runs.files import ChildFailed
from runs.process import end_with_parent

RESULT = "RESULT "  # begins the line in which a child prints its result
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]|\[?\s*(\d+)%")
_TELLING = re.compile(r"error|assert|abort|failed|not supported|unknown|invalid|unable|cannot", re.IGNORECASE)


def run_child(
    command: list[str], doing: Message | str, environment: dict[str, str] | None = None, stdin: str = ""
) -> str:
    """Runs a program with a progress bar that is read off its output; returns its RESULT line, or "".

    Raises ChildFailed with the most telling line of its output when it fails or dies by a signal.
    """
    from tqdm import tqdm

    lines: deque[str] = deque(maxlen=2000)
    result = ""
    child = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        preexec_fn=end_with_parent,
    )
    try:
        child.stdin.write(stdin)
        child.stdin.close()
        with tqdm(desc=str(doing), total=100, bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}") as bar:
            for line in child.stdout:  # a carriage return ends a line here too: the children's own bars come through
                if line.startswith(RESULT):
                    result = line.removeprefix(RESULT)
                elif match := _PROGRESS.search(line):
                    done, total, percent = match.groups()
                    bar.update(max(0, (100 * int(done) / int(total) if done else int(percent)) - bar.n))
                else:
                    lines.append(line.strip())
            if child.wait() == 0:
                bar.update(100 - bar.n)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        reason = _explain(list(filter(None, lines)), child.returncode)
        raise ChildFailed("{doing} failed: {reason}", doing=doing, reason=reason)
    return result


def _explain(lines: list[str], status: int) -> Message:
    """Why a program failed, from its output and exit status (negative: a signal)."""
    if any("pre-tokenizer was not recognized" in line for line in lines):
        return Message(
            "llama.cpp does not know this model's tokenizer (its pre-tokenizer is in no list of its converter); "
            "train a base model that llama.cpp supports, or name a newer llama.cpp: LLAMA_CPP_DIR=folder"
        )
    telling = [line for line in lines if _TELLING.search(line)] or lines or [""]
    if status < 0:
        return Message(
            "llama.cpp was killed by signal {signal}; its last message: {line}", line=telling[-1][:400], signal=-status
        )
    return Message(
        "llama.cpp ended with exit status {status}; its last message: {line}", line=telling[-1][:400], status=status
    )
