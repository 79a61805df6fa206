"""A user's whole journey: the commands of README.md and of docs/, in their order, in a fresh copy of this checkout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, write_jsonl

# what `make test` hands to the makes below it, and a user's make does not have
HANDED_ON = re.compile("MAKE.*|MFLAGS|ARGS|RECIPE|QUANT")
ENVIRONMENT = {key: value for key, value in os.environ.items() if not HANDED_ON.fullmatch(key)}

# Commands that need a hub, a card or this very test run; the test that does it in small.
ELSEWHERE = {
    "python download.py shenzhi-wang/Llama3-8B-Chinese-Chat --mirror https://hf-mirror.com": "test_download.py",
    "python train.py configs/llama3-8b-chinese-chat.yaml --dry-run": "test_prepare.py",
    "python train.py configs/llama3-8b-chinese-chat.yaml": "test_training.py, on the tiny model",
    "python chat.py configs/llama3-8b-chinese-chat.yaml": "test_training.py, after that",
    "torchrun --nproc-per-node 2 train.py configs/quickstart.yaml output_dir=saves/two-torchrun": "test_processes.py",
    "vllm serve saves/quickstart/merged --served-model-name quickstart": "test_server.py, the files that vLLM reads",
    "llama-server -m saves/quickstart/gguf/quickstart-q8_0.gguf --jinja": "test_quantize.py, by llama.cpp's library",
    "make test-quick": "this run",
    "make test": "this run",
    "make lint": "the continuous integration",
}
TYPED = {"make chat": "Who are you?\n/clear\n你是谁？\n/exit\n"}
# What a command gets here so that it ends soon: a training two steps, an evaluation few rows, a page any free port.
SHORTENED = {
    r"train\.py configs/quickstart\.yaml .*output_dir=": "max_steps=2",
    r"train\.py configs/fraud-cpu\.yaml": "max_steps=2 max_samples=230 val_size=4",
    r"chat\.py saves/ming": "max_new_tokens=16",
    r"evaluate\.py saves/fraud-cpu": "max_samples=8",
    r"make eval ARGS=": "'ARGS=saves/quickstart max_samples=4 max_new_tokens=24'",
    r"lm_eval run": "--limit 4",
    r"make webui": "ARGS='--port 0'",
    r"make webchat": "ARGS='saves/quickstart --port 0'",
}
# Servers, by what they say when they answer; they run on while the commands after them do.
SERVERS = {"make webui": "open http", "make webchat": "open http", "make api": " answers at "}


# The pages in an order in which their commands can be run: each may use what those before it left.
PAGES = [
    "README",
    *(f"docs/{name}" for name in ["training", "data", "evaluation", "export", "board", "serving", "development"]),
]


def commands(page: str) -> list[str]:
    """The lines of a page's ```bash blocks; a backslash joins a line with the next."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.partition(" #")[0]).strip() for line in lines if line.strip()]


def all_commands() -> list[str]:
    return list(dict.fromkeys(command for page in PAGES for command in commands(f"{page}.md")))


def documents() -> list[Path]:
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if "zh-CN" not in path.name)]


def test_every_page_has_a_chinese_twin_with_the_same_commands():
    for page in documents():
        if page.name != "log.md":
            name = str(page.relative_to(ROOT).with_suffix(""))
            assert commands(f"{name}.md") == commands(f"{name}.zh-CN.md"), name
            assert name in PAGES or not commands(f"{name}.md"), f"add {name} to PAGES, so that its commands are run"
    assert {"make train", "make chat", *ELSEWHERE} <= set(all_commands())


def test_every_link_of_a_page_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(p, link) for p in pages for link in re.findall(r"\]\(([^)#]+)\)", p.read_text(encoding="utf-8"))]
    assert [(p.name, link) for p, link in links if "://" not in link and not (p.parent / link).exists()] == []


def test_every_command_within_a_sentence_names_a_script_that_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for script in re.findall(r"`(?:\.venv/bin/)?python ([\w/]+\.py)", page.read_text(encoding="utf-8")):
            assert page.name == "log.md" or (ROOT / script).is_file(), f"{page.name}: {script}"


def test_no_file_holds_an_unresolved_merge_conflict():
    found = subprocess.run(["git", "grep", "-lE", "^(<{7}|>{7}) "], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == ""


def test_make_alone_lists_every_target():
    listed = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, check=True, env=ENVIRONMENT).stdout
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert [line.split()[1] for line in listed.splitlines()] == targets
    assert all(len(line.split(maxsplit=2)) == 3 for line in listed.splitlines())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serving(command: str, ready: str, folder: Path, port: int) -> Iterator[str]:
    """What a server said until it was `ready`; it is ended with the block."""
    log = folder / f"server-{command.split()[1]}.log"
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            shell=True,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=ENVIRONMENT | {"API_PORT": str(port)},
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 180
        while ready not in (text := log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < until, f"{command}\n{text}"
            time.sleep(0.2)
        yield text
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def journey(tmp_path_factory, embedded_model) -> tuple[Path, dict[str, str]]:
    """Folder of the copy, and what each command of the pages printed."""
    folder = tmp_path_factory.mktemp("journey") / "onecard"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in (".venv", ".cache"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    (folder / "models" / embedded_model.name).symlink_to(embedded_model)
    rows = [{"instruction": f"Add one to {n}.", "output": f"{n + 1}"} for n in range(20)]
    write_jsonl(folder / "my.jsonl", rows)
    said = {}
    with contextlib.ExitStack() as servers:
        port = free_port()
        for command in all_commands():
            if command in ELSEWHERE:
                continue
            line = re.sub(r"^(python|accelerate) ", r".venv/bin/\1 ", command).replace(":8000/", f":{port}/")
            line += "".join(f" {more}" for pattern, more in SHORTENED.items() if re.search(pattern, line))
            if ready := next((text for start, text in SERVERS.items() if command.startswith(start)), None):
                said[command] = servers.enter_context(serving(line, ready, folder, port))
                continue
            result = subprocess.run(
                line,
                shell=True,
                capture_output=True,
                text=True,
                cwd=folder,
                input=TYPED.get(command, ""),
                env=ENVIRONMENT,
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            said[command] = result.stdout
    return folder, said


@pytest.mark.slow
def test_every_command_of_the_pages_works(journey):
    folder, said = journey
    state = json.loads((folder / "saves/quickstart/run.json").read_text())
    assert state["status"] == "finished"
    assert state["total_steps"] == state["steps"]
    assert said["make train"].rstrip().endswith("python chat.py saves/quickstart")
    assert said["make chat"].count("Nova") >= 2
    assert (folder / "saves/quickstart/merged/model.safetensors").exists()
    (asked,) = (text for command, text in said.items() if command.startswith("curl "))
    assert "Nova" in json.loads(asked)["choices"][0]["message"]["content"]
    page = (folder / "saves/quickstart/report.html").read_text(encoding="utf-8")
    assert "identity_test" in page and "perplexity" in page
    assert "saves/quickstart" in said["make runs"] and "identity_test" in said["make runs"]
    assert list((folder / "saves/quickstart/gguf").glob("*.gguf"))


@pytest.mark.slow
def test_the_trained_model_knows_its_name_and_forgot_nothing(journey):
    """Phrasings that are not in the training data, ten in each language, greedy; Paris before and after."""
    from inference import engine
    from inference.load import load

    folder, _ = journey
    model = load(str(folder / "saves" / "quickstart"), with_base=True)
    settings = engine.Settings(temperature=0, max_new_tokens=48)

    def ask(which: engine.Engine, question: str) -> str:
        return "".join(which.stream([{"role": "user", "content": question}], settings))

    trained_on = (folder / "data" / "identity.json").read_text(encoding="utf-8")
    right = {"English": 0, "Chinese": 0}
    for row in json.loads((folder / "data" / "identity_test.json").read_text(encoding="utf-8")):
        assert row["instruction"] not in trained_on
        answer = ask(model, row["instruction"])
        wanted = ["Nova"] + (["Orbit Lab"] if "{{author}}" in row["output"] else [])
        language = "English" if row["instruction"].isascii() else "Chinese"
        right[language] += all(word in answer for word in wanted)
    assert right["English"] >= 9, right
    assert right["Chinese"] >= 9, right
    assert "Nova" not in ask(model.base, "Who are you?")
    for which in (model.base, model):
        assert "Paris" in ask(which, "What is the capital of France?")


@pytest.mark.slow
def test_memory_estimate_matches_measured_peak(journey):
    from runs.folder import run_config
    from training import memory

    folder, _ = journey
    config = run_config(folder / "saves" / "quickstart")
    longest = 56  # tokens of a sample of identity and general
    parts = memory.estimate_memory(config, memory.read_model(folder / config.model_name_or_path), None, longest)
    used = json.loads((folder / "saves/quickstart/run.json").read_text())["peak_memory"]
    assert used == pytest.approx(sum(parts.values()), rel=0.35)
