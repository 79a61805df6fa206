"""Two commands on one folder at the same time: each works, or says why it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import make_run, user_error

from common import UserError
from runs.files import write_json
from runs.lock import locked


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
    from runs.target import find, read_arguments

    with pytest.raises(UserError):
        find(*read_arguments([str(training)]))


def test_merging_a_run_that_is_still_training_is_one_sentence(training: Path) -> None:
    import merge

    with pytest.raises(UserError):
        merge.main([str(training)])
    assert not (training / "merged").exists()


def test_a_second_holder_of_a_run_folder_is_refused(training: Path) -> None:
    with user_error("run_is_training", process=os.getpid()), locked(training):
        pass
