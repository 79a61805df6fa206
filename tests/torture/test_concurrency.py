"""Two commands on one folder at the same time: each works, or says why it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, make_run, user_error, write_jsonl

from common import UserError
from runs.files import write_json
from runs.folder import locked


@pytest.fixture
def training(tiny_model: Path, tmp_path: Path):
    """A run folder that another training holds: its record says running, its lock is taken, no adapter stands there."""
    import psutil

    folder = make_run(tiny_model, tmp_path / "saves" / "run")
    weights = (folder / "adapter_model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    created = psutil.Process().create_time()
    write_json(folder / "run.json", {"status": "running", "pid": os.getpid(), "created": created})
    with locked(folder):
        yield folder
    weights.unlink()


def test_chat_from_a_run_without_an_adapter_yet_is_one_sentence(training: Path) -> None:
    from runs.target import find_target, read_arguments

    with pytest.raises(UserError):
        find_target(*read_arguments([str(training)]))


def test_merging_a_run_that_is_still_training_is_one_sentence(training: Path) -> None:
    import merge

    with pytest.raises(UserError):
        merge.main([str(training)])
    assert not (training / "merged").exists()


def test_a_second_holder_of_a_run_folder_is_refused(training: Path) -> None:
    with user_error("being trained", process=str(os.getpid())), locked(training):
        pass


@pytest.mark.slow
def test_a_cache_written_by_two_processes_at_once_is_whole(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": f"number {i} " * 20} for i in range(300)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, str(ROOT / "preview.py"), str(data), f"model_name_or_path={tiny_model}"]
    cache = tmp_path / "cache"
    environment = os.environ | {"ONECARD_CACHE": str(cache)}
    several = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120) for process in several]
    assert [process.returncode for process in several] == [0, 0], printed
    assert len({out for out, _ in printed}) == 1
    (folder,) = (cache / "data").iterdir()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(cache)
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
