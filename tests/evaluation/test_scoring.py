"""How likely answers are to models, in batches; preference accuracy and perplexity from that."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import save_adapter

from evaluation import metrics, scoring, tasks
from evaluation.scoring import Loss, Sample
from evaluation.tasks import Documents, EvalDataset, Item, Pairs
from inference.request import Settings


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
    pairs = [(answer(10), answer(30)), (answer(40), answer(15, 15)), (answer(20, 20), answer(30))]
    pairs.append((answer(5), answer(5)))
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


# ---------------------------------------------------------------------------------------------------------------------
# Models of transformers


def check_choices(model: Any, scorer: Any, prompts: list[list[int]], answers: list[list[list[int]]]) -> None:
    """Against a forward pass of transformers, one prompt and one answer at a time."""
    import torch

    for prompt, tokens_of, row in zip(prompts, answers, scorer.choices(prompts, answers), strict=True):
        for tokens, value in zip(tokens_of, row, strict=True):
            with torch.inference_mode():
                known = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected = sum(float(known[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
            assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_several_tokens_padding_and_greedy_text(tiny_model: Path, tmp_path: Path) -> None:
    """Answers of several tokens, one the beginning of another, in batches: as one by one, and as the engine streams."""
    import torch

    from inference.load import load

    model = load(str(save_adapter(tiny_model, tmp_path / "adapter")), ("infer_dtype=float32",))
    scorer = scoring.scorer_for(model)
    talks = [[{"role": "user", "content": text}] for text in ("hi", "a longer one than that", "你好吗")]
    prompts = [model.prompt_ids(talk) for talk in talks]
    end = model.tokenizer.eos_token_id
    answers = [[[5, end], [5, 6, 7, end], [8, end]]] * 3
    check_choices(model.model, scorer, prompts, answers)
    samples = [{"input_ids": [*p, 5, 6], "labels": [-100] * len(p) + [5, 6]} for p in prompts]
    for (nats, count), sample in zip(scorer.losses(samples), samples, strict=True):
        inputs = {key: torch.tensor([value]) for key, value in sample.items()}
        assert count == 2 and nats / 2 == pytest.approx(float(model.model(**inputs).loss), abs=1e-5)
    greedy = Settings(temperature=0.0, max_new_tokens=16)
    assert scorer.replies(prompts, 16) == ["".join(model.stream(talk, greedy)) for talk in talks]


def test_batches_hold_every_row_once_and_grow_shorter() -> None:
    lengths = [5, 100, 7, 3, 50, 51]
    made = scoring.batches(lengths, tokens=110)
    assert sorted(row for batch in made for row in batch) == list(range(6))
    assert all(max(lengths[row] for row in batch) * len(batch) <= 110 for batch in made)
    assert lengths[made[0][0]] == 100


def scorer_of(model: object) -> scoring.TransformersScorer:
    engine = SimpleNamespace(model=model, set_adapter=lambda: None, last_logits_only=True)
    return scoring.TransformersScorer(engine)


@pytest.mark.slow
def test_logits_too_large_for_the_memory_are_made_in_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    scorer = scorer_of(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    samples = [
        {"input_ids": list(range(5, 25)), "labels": [-100] * n + list(range(5 + n, 25))} for n in (3, 9, 0, 5, 12)
    ]
    whole, sizes, made = scorer.losses(samples), [], scorer._logits
    assert [count for _, count in whole] == [17, 11, 19, 15, 8]

    def measured(*arguments: object, **kept: int) -> torch.Tensor:
        logits = made(*arguments, **kept)
        sizes.append(4 * logits.numel())
        return logits

    monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * 4 * 21 * scorer.vocabulary)
    monkeypatch.setattr(scorer, "_logits", measured)
    assert scorer.losses(samples) == whole
    assert len(sizes) > 2 and max(sizes) <= scoring.MAX_LOGITS


@pytest.mark.slow
def test_labels_of_several_tokens_on_a_model_with_convolutions() -> None:
    """LFM2's convolutions have a state that cannot be cropped."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "vocab_size": 64, "pad_token_id": 0}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **kinds)).eval()
    prompts, answers = [[1, 2, 3, 4, 5, 6], [7, 8, 9]], [[5, 6], [5, 7, 8], [9]]
    check_choices(model, scorer_of(model), prompts, [answers] * 2)
