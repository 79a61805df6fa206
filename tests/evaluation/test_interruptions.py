"""An evaluation that ends at any moment leaves nothing that looks whole and is not; the same command finishes it."""

from __future__ import annotations

import builtins
import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_run, user_error, write_jsonl

import common
from common import Config
from evaluation import metrics, predict, results
from evaluation.job import EvalModel, Evaluation
from evaluation.tasks import Classification, Encoded, EvalDataset, Item, Texts
from runs.files import read_json
from runs.target import Target


class Killed(BaseException):
    """Stands for SIGKILL."""


class Disk:
    """Counts what changes files. After `left` such operations nothing changes any more, as after a kill."""

    def __init__(self, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = left
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))
        opened = builtins.open

        def open_counted(file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            stream = opened(file, mode, *arguments, **more)
            if mode in ("a", "w"):
                stream.write = functools.partial(self.write, stream.write)
            return stream

        monkeypatch.setattr(builtins, "open", open_counted)

    def count(self) -> None:
        if self.left <= 0:
            raise Killed
        self.left -= 1

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            self.count()
            return operation(*arguments, **more)

        return run

    def write(self, write: Callable[[str], Any], text: str) -> None:
        """The last write before the kill reaches the disk in part."""
        if self.left == 1:
            write(text[: len(text) // 2])
        self.count()
        if self.left:
            write(text)


class FakeScorer:
    """Answers that depend on the prompt alone."""

    tokens = 6  # two rows in a batch

    def choices(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> list[list[float]]:
        return [[-1.0 - (7 * sum(prompt) + i) % 5 for i in range(len(answers[0]))] for prompt in prompts]

    def losses(self, samples: list[dict[str, list[int]]]) -> list[tuple[float, int]]:
        return [(float(sum(sample["input_ids"])), 2) for sample in samples]

    def replies(self, prompts: list[list[int]], _: int) -> list[str]:
        return [f"回答 {sum(prompt)}" for prompt in prompts]


def plan(folder: Path, model: Path) -> Evaluation:
    talks = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "0"}] for i in range(5)]
    rows = [{"messages": talk} for talk in talks]
    prompts, answers = [[i, 3, 1] for i in range(5)], ["0", "1", "0", "1", "1"]
    samples = [{"input_ids": [*prompt[:2], 4], "labels": [-100, 2, 4]} for prompt in prompts]
    choices = [Item(i, answers[i], prompts[i], choices=[[1], [2]]) for i in range(5)]
    texts = [Item(i, answers[i], prompts[i], samples=[samples[i]]) for i in range(5)]
    datasets = [
        EvalDataset("labels", rows, folder / "labels", Classification(("0", "1"))),
        EvalDataset("texts", rows, folder / "texts", Texts()),
    ]
    source = Target(str(model), Config(), str(model), tokenizer=model)
    models = [EvalModel("base", source), EvalModel("trained", source)]
    encoded = {"labels": Encoded(choices), "texts": Encoded(texts)}
    return Evaluation(Config(), None, models, datasets, [], set(), None, encoded)


def evaluate(planned: Evaluation) -> None:
    for model in planned.models:
        predict.predict(planned, model)
    for data in planned.datasets:
        results.write_results(planned, data)


def contents(folder: Path) -> dict[str, Any]:
    """All results of an evaluation without what differs each time; raises where a file is not whole."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("[!.]*")):
        if file.name == "metrics.json":
            figures = read_json(file)
            for model in figures["models"].values():
                model.pop("seconds", None)
            found[str(file.relative_to(folder))] = {k: v for k, v in figures.items() if k not in ("date", "command")}
        elif file.suffix == ".jsonl":
            found[str(file.relative_to(folder))] = file.read_text(encoding="utf-8")
        elif file.name == "state.json":
            read_json(file)
    return found


@pytest.mark.slow
def test_a_kill_at_any_write_leaves_nothing_broken(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "load", lambda _: None)
    monkeypatch.setattr(predict.scoring, "scorer_for", lambda _: FakeScorer())
    monkeypatch.setattr(metrics, "RESAMPLES", 2)
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache-undisturbed")
    evaluate(plan(tmp_path / "undisturbed", tiny_model))
    expected = contents(tmp_path / "undisturbed")
    assert {Path(name).name for name in expected} == {"metrics.json", "predictions.jsonl", "predictions.base.jsonl"}
    step = 1 if os.environ.get("ONECARD_TORTURE") else 4
    for operations in range(random.randrange(step), 1000, step):
        folder = tmp_path / str(operations)
        monkeypatch.setattr(common, "CACHE", tmp_path / f"cache-{operations}")
        with monkeypatch.context() as patched:
            Disk(operations, patched)
            try:
                evaluate(plan(folder, tiny_model))
            except Killed:
                killed = True
            else:
                killed = False
        for name, content in contents(folder).items():
            if name.endswith("metrics.json"):  # where it is, it is that of all predictions
                assert content["models"].keys() <= expected[name]["models"].keys()
                assert content["rows"] == 5
        evaluate(plan(folder, tiny_model))
        assert contents(folder) == expected, operations
        if not killed:
            break
    assert 40 < operations < 1000


def test_two_evaluations_into_one_folder_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    planned = plan(tmp_path / "eval", tiny_model)
    running = user_error("is evaluating", folder=tmp_path / "eval", process=str(os.getpid()))
    with predict.only_evaluation(planned), running, predict.only_evaluation(planned):
        raise AssertionError
    with predict.only_evaluation(planned):
        pass


def test_a_full_disk_is_one_sentence_and_the_evaluation_goes_on_later(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "load", lambda _: None)
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    scorer, planned = FakeScorer(), plan(tmp_path / "eval", tiny_model)
    monkeypatch.setattr(predict.scoring, "scorer_for", lambda _: scorer)
    ask, calls = scorer.choices, iter(range(100))

    def full(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return ask(*arguments)

    monkeypatch.setattr(scorer, "choices", full, raising=False)
    with user_error("of free disk", folder=tmp_path / "eval"), predict.only_evaluation(planned):
        predict.predict(planned, planned.models[0])
    assert len(predict.read_predictions(tmp_path / "eval/labels/predictions.base.jsonl")) == 2
    with predict.only_evaluation(planned):
        predict.predict(planned, planned.models[0])
    assert len(predict.read_predictions(tmp_path / "eval/labels/predictions.base.jsonl")) == 5


@pytest.mark.slow
def test_signals_end_an_evaluation_and_it_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}{'!' * (i % 9)}", "output": f"你好 number {i}"} for i in range(40)]
    data = write_jsonl(tmp_path / "say.jsonl", rows)
    run = make_run(tiny_model, tmp_path / "saves" / "r")
    command = [sys.executable, str(ROOT / "evaluate.py"), str(run), f"dataset={data}", "infer_dtype=float32"]
    environment = os.environ | {"ONECARD_CACHE": str(tmp_path / "cache")}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        delay = random.uniform(0.5, 8)
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, (number, delay, errors)
        assert process.returncode in (0, -number, 130), (number, delay)
        contents(run / "eval")
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    lines = (run / "eval/say/predictions.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["row"] for line in lines[:-1]] == list(range(40))
    assert read_json(run / "eval/say/metrics.json")["rows"] == 40 and (run / "report.html").is_file()
