"""The seconds from the start of a terminal chat to its first token: chat.py and LLaMA-Factory's, in turns.

    python bench/first_token.py [ROUNDS] [--cold]       3 rounds by default; --cold drops the page cache first (root)

Both answer "Hi" with the embedded model on the CPU. What counts is the first character of the reply.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merge_speed import llamafactory_python
from tokenize_speed import MODEL, ROOT

CHAT = "import sys; sys.modules['torchao'] = None; from llamafactory.cli import main; sys.argv[1:1] = ['chat']; main()"


def kit() -> list[str]:
    return [sys.executable, str(ROOT / "chat.py"), str(MODEL), "-p", "Hi", "max_new_tokens=8"]


def llama_factory(folder: Path) -> list[str]:
    recipe = folder / "chat.yaml"
    settings = {"model_name_or_path": str(MODEL), "template": "chatml", "infer_backend": "huggingface"}
    recipe.write_text(json.dumps(settings | {"max_new_tokens": 8}), encoding="utf-8")  # JSON is YAML
    return [llamafactory_python(Path(tempfile.gettempdir()) / "lf-merge-venv"), "-c", CHAT, str(recipe)]


def first_token(command: list[str], before: bytes) -> tuple[float, float]:
    """Seconds to the first character that is printed after `before`, and CPU seconds to the end of the process."""
    begin, printed = time.time(), b""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"},
    )
    os.write(process.stdin.fileno(), b"Hi\nexit\n")
    process.stdin.close()
    while before not in printed or not printed[printed.index(before) + len(before) :].strip():
        part = os.read(process.stdout.fileno(), 4096)
        if not part:
            sys.exit(f"no reply: {printed.decode()}")
        printed += part
    seconds = time.time() - begin
    process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    return seconds, usage.ru_utime + usage.ru_stime


def main(argv: list[str]) -> None:
    numbers = [int(word) for word in argv if word.isdecimal()]
    print("| | to the first token, s | CPU s in all |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        programs = {"chat.py": (kit(), b""), "LLaMA-Factory": (llama_factory(Path(temporary)), b"Assistant:")}
        for _ in range(numbers[0] if numbers else 3):
            for name, (command, before) in programs.items():
                if "--cold" in argv:
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
                seconds, cpu = first_token(command, before)
                print(f"| {name} | {seconds:.1f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
