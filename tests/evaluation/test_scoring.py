"""Log-probabilities and replies of models, in batches."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_batches_hold_every_row_once_and_grow_shorter() -> None:
    from evaluation import scoring

    lengths = [5, 100, 7, 3, 50, 51]
    made = scoring.batches(lengths, tokens=110)
    assert sorted(row for batch in made for row in batch) == list(range(6))
    assert all(max(lengths[row] for row in batch) * len(batch) <= 110 for batch in made)
    assert lengths[made[0][0]] == 100


def scorer_of(model: object):
    from types import SimpleNamespace

    from evaluation import scoring

    engine = SimpleNamespace(model=model, set_adapter=lambda: None, last_logits_only=True)
    return scoring.TransformersScorer(engine)


@pytest.mark.slow
def test_logits_too_large_for_the_memory_are_made_in_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evaluation import scoring

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
    for prompt, row in zip(prompts, scorer_of(model).choices(prompts, [answers] * 2), strict=True):
        for tokens, value in zip(answers, row, strict=True):
            with torch.inference_mode():
                known = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected = sum(float(known[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
            assert value == pytest.approx(expected, abs=1e-4)
