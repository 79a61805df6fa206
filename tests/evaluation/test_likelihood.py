"""Preference accuracy and perplexity from a scorer's losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evaluation import metrics, scoring, tasks
from evaluation.scoring import Loss, Sample
from evaluation.tasks import Documents, EvalDataset, Item, Pairs


class UnigramScorer:
    """A token's -log p is its number in hundredths; two samples of four tokens in a batch."""

    tokens = 8

    def losses(self, samples: list[Sample]) -> list[Loss]:
        assert len(samples) <= 2
        learned = [[label for label in sample["labels"] if label != -100] for sample in samples]
        return [(sum(labels) / 100, len(labels)) for labels in learned]


def answer(*ids: int) -> Sample:
    return {"input_ids": [1, 2, *ids], "labels": [-100, -100, *ids]}


def test_preference_accuracy_of_whole_answers_and_per_token() -> None:
    pairs = [
        (answer(10), answer(30)),
        (answer(40), answer(15, 15)),
        (answer(20, 20), answer(30)),
        (answer(5), answer(5)),
    ]
    lines = Pairs().score([Item(i, samples=list(pair)) for i, pair in enumerate(pairs)], UnigramScorer(), 0)
    assert lines[1] == {"prediction": "rejected", "chosen": (0.4, 1), "rejected": (0.3, 2)}
    assert [line["prediction"] for line in lines] == ["chosen", "rejected", "rejected", "neither"]
    scores = [(line["chosen"], line["rejected"]) for line in lines]
    per_token = [tasks.preferred(pair, per_token=True) for pair in scores]
    assert per_token == ["chosen", "rejected", "chosen", "neither"]
    data = EvalDataset("d", [], Path(), Pairs())
    found = Pairs().measure(data, {"model": lines}, None)["models"]["model"]
    assert (found["rows"], found["preference_accuracy"], found["preference_accuracy_per_token"]) == (4, 0.25, 0.5)
    assert found["preference_accuracy_interval"] == metrics.wilson(1, 4)
    assert found["margin"] == pytest.approx((0.2 - 0.1 - 0.1 + 0.0) / 4)


def test_every_token_of_a_document_but_the_first_counts_once() -> None:
    for size in range(2, 30):
        ids = list(range(100, 100 + size))
        for length in (2, 3, 4, 7, 64):
            windows = tasks.document_windows(ids, length)
            assert [label for window in windows for label in window["labels"] if label != -100] == ids[1:]
            for window in windows:
                assert len(window["input_ids"]) == len(window["labels"]) <= length
                seen = [i for i, label in enumerate(window["labels"]) if label != -100]
                assert all(window["labels"][i] == window["input_ids"][i] for i in seen)
            for window in windows[1:]:  # and with at least half a window before it
                first = next(i for i, label in enumerate(window["labels"]) if label != -100)
                assert first >= length // 2


def measure(scorer: object, documents: list[list[int]], length: int) -> dict:
    """The figures of raw documents as evaluate.py has them."""
    task = Documents()
    items = [Item(i, samples=tasks.document_windows(ids, length)) for i, ids in enumerate(documents)]
    data = EvalDataset("d", [], Path(), task)
    return task.measure(data, {"model": task.score(items, scorer, 0)}, None)["models"]["model"]


def test_perplexity_of_documents() -> None:
    found = measure(UnigramScorer(), [[1, 50, 50, 50, 50, 50], [7, 150]], length=4)
    assert (found["rows"], found["tokens"]) == (2, 6)
    assert found["loss"] == pytest.approx((5 * 0.5 + 1.5) / 6)
    assert found["perplexity"] == pytest.approx(math.exp(4 / 6))
    low, high = found["perplexity_interval"]
    assert low <= found["perplexity"] <= high


@pytest.mark.slow
def test_losses_are_those_of_a_plain_forward_pass(tiny_model: Path) -> None:
    import torch

    from inference.load import load

    engine = load(str(tiny_model), ("infer_dtype=float32",))
    document = torch.randint(0, 200, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    found = measure(scoring.scorer_for(engine), [document, document[::-1]], length=64)
    with torch.inference_mode():
        expected = [
            float(engine.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
            for ids in (document, document[::-1])
        ]
    assert found["loss"] == pytest.approx(sum(expected) / 2, abs=1e-5)
