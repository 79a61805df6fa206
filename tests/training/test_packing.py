"""Flat batches: whole samples, nothing lost, and no sample sees another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import save_random_model

from common import Message
from runs.configuration import load_config
from training import packing, splitting


def test_best_fit_takes_the_fullest_row_that_fits():
    # 6 opens a row (4 left), 5 opens one (5 left), 4 fits the first exactly, 3 the second, 2 fills that
    assert packing.pack(np.array([4, 2, 6, 3, 5]), 10) == [[2, 0], [4, 3, 1]]


def test_packing_loses_nothing_and_keeps_to_the_capacity():
    lengths = np.random.default_rng(0).integers(1, 400, 5000)
    rows = packing.pack(lengths, 1024)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= 1024
    assert filled.mean() > 0.99 * 1024


def test_a_sample_beyond_the_capacity_has_a_row_of_its_own():
    assert packing.pack(np.array([3, 12, 3]), 10) == [[1], [0, 2]]


def test_a_capacity_beyond_all_samples_takes_no_memory():
    assert packing.pack(np.array([4, 2]), 1 << 40) == [[0, 1]]


SAMPLES = [
    {"input_ids": [1, 2, 3], "labels": [1, -100, 3]},
    {"input_ids": [4, 5], "labels": [4, 5]},
]


def test_a_flat_batch_to_the_last_number():
    batch = {key: value.tolist() for key, value in packing.collate(SAMPLES).items()}
    assert batch == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, -100, 3, -100, 5]],  # the first token of a sample is never a target
        "position_ids": [[0, 1, 2, 0, 1]],
        "packed_seq_lengths": [3, 2],
    }


def test_packed_rows_give_the_same_batch():
    import datasets

    packed = packing.packed(datasets.Dataset.from_list(SAMPLES), packing.pack(np.array([3, 2]), 5))
    assert len(packed) == 1
    from_rows = packing.collate([packed[0]])
    for key, value in packing.collate(SAMPLES).items():
        assert from_rows[key].tolist() == value.tolist(), key


def test_micro_batches_are_filled_with_whole_samples():
    lengths = [3, 5, 2, 4]
    batch = packing.collate([{"input_ids": [n] * n, "labels": [10 * n] * n} for n in lengths])

    def found(limit: int) -> list[list[int]]:
        parts = splitting.pieces(batch, limit)
        for part in parts:
            samples = part["packed_seq_lengths"].tolist()
            ids = [{"input_ids": [n] * n, "labels": [10 * n] * n} for n in samples]
            for name, tensor in packing.collate(ids).items():
                assert part[name].tolist() == tensor.tolist(), name
        return [part["packed_seq_lengths"].tolist() for part in parts]

    assert found(7) == [[5, 2], [4, 3]]
    assert found(0) == [[5], [4], [3], [2]]
    assert found(14) == [lengths]


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (["per_device_train_batch_size=2"], 120),
        (["per_device_train_batch_size=2", "packing=true", "cutoff_len=256"], 512),
    ],
)
def test_a_forward_pass_has_the_tokens_of_the_longest_samples_that_the_batch_size_counts(tiny_model, settings, tokens):
    config = load_config([f"model_name_or_path={tiny_model}", *settings]).config
    assert packing.micro_batch_tokens(config, longest=60) == tokens


def flat_model(folder, **config):
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.cpu import register_sample_attention

    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=AutoConfig.from_pretrained(folder, **config),
        attn_implementation=register_sample_attention(),
        dtype="float32",
    )


def random_samples(lengths):
    import torch

    torch.manual_seed(1)
    ids = [torch.randint(0, 256, (n,)).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 3) + row[len(row) // 3 :]} for row in ids]


def test_no_sample_sees_another(tiny_model):
    import torch

    model, samples = flat_model(tiny_model), random_samples([7, 30, 1, 12])
    with torch.no_grad():
        together = model(**packing.collate(samples)).logits[0]
        alone = [model(input_ids=torch.tensor([s["input_ids"]])).logits[0] for s in samples]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)
        samples[0]["input_ids"][3] ^= 1  # another word in the first sample changes nothing in the others
        changed = model(**packing.collate(samples)).logits[0]
    assert not torch.equal(changed[:7], together[:7])
    assert torch.equal(changed[7:], together[7:])


def test_a_sliding_window_is_kept():
    """Against transformers' own mask for one sample alone, on a model with a window of 5."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from training.cpu import register_sample_attention

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    reference = MistralForCausalLM(config).eval()
    samples = random_samples([20, 3])
    with torch.no_grad():
        alone = torch.cat([reference(input_ids=torch.tensor([s["input_ids"]])).logits[0] for s in samples])
        reference.set_attn_implementation(register_sample_attention())
        together = reference(**packing.collate(samples)).logits[0]
    assert torch.allclose(together, alone, atol=1e-5)


def hybrid_config():
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip


def test_a_model_whose_layers_mix_samples_gets_one_a_pass(tmp_path):
    """The losses of the run's batches are those of its samples alone; two samples in a batch would change them."""
    import torch
    from transformers import Qwen3_5ForCausalLM

    torch.manual_seed(0)
    Qwen3_5ForCausalLM(hybrid_config()).save_pretrained(tmp_path)
    given = load_config([f"model_name_or_path={tmp_path}", "packing=true", "per_device_train_batch_size=3"]).config
    config, note = packing.fit_batches(given)
    assert (config.packing, config.per_device_train_batch_size, config.per_device_eval_batch_size) == (False, 1, 1)
    assert config.gradient_accumulation_steps == 24
    assert packing.micro_batch_tokens(config, longest=60) == 0  # one sample at a time
    changed = ["packing=false", "per_device_train_batch_size=1", "gradient_accumulation_steps=24"]
    assert note == Message(
        "this model's layers would mix the samples of a batch, so they go one by one: {changed}", changed=changed
    )
    model, samples = flat_model(tmp_path), random_samples([7, 30, 12])

    def losses(size):
        rows = [samples[at : at + size] for at in range(0, len(samples), size)]
        with torch.no_grad():
            return sum(model(**batch, num_items_in_batch=1).loss for batch in map(packing.collate, rows))

    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([s["input_ids"]])).logits[0, :-1] for s in samples]
    labels = [torch.tensor(s["labels"])[1:] for s in samples]
    expected = torch.nn.functional.cross_entropy(torch.cat(alone), torch.cat(labels), reduction="sum")
    assert torch.allclose(losses(config.per_device_train_batch_size), expected, rtol=1e-5)
    assert not torch.allclose(losses(given.per_device_train_batch_size), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "mixes"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}, False),
        ({"model_type": "gemma2"}, True),
        ({"layer_types": ["linear_attention", "full_attention"]}, True),
        ({"model_type": "qwen3_5", "text_config": {"layer_types": ["linear_attention", "full_attention"]}}, True),
        ({"model_type": "qwen3_next", "linear_conv_kernel_dim": 4}, True),  # as its vendor writes it
        ({"model_type": "lfm2", "layer_types": ["full_attention"], "conv_L_cache": 3}, True),
        ({"model_type": "falcon_h1", "mamba_d_ssm": 1024}, True),
    ],
)
def test_models_that_mix_samples_are_told_from_their_config(tmp_path, settings, mixes):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert packing.mixes_samples(tmp_path) is mixes


def test_other_models_keep_their_batches(tiny_model):
    config = load_config([f"model_name_or_path={tiny_model}", "packing=true"]).config
    assert packing.fit_batches(config) == (config, None)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        (["num_train_epochs=3"], 100, 21),  # 50 forwards, 7 steps an epoch
        (["num_train_epochs=1", "per_device_train_batch_size=1", "gradient_accumulation_steps=1"], 7, 7),
        (["max_steps=5"], 100, 5),
        (["num_train_epochs=0.5"], 100, 4),
    ],
)
def test_total_steps(settings, rows, steps):
    assert packing.total_steps(load_config(settings).config, rows) == steps


@pytest.mark.parametrize(
    ("name", "settings", "apart", "attention"),
    [
        ("Llama", {}, True, "sample_sdpa"),
        ("Mistral", {"sliding_window": 32}, True, "sample_sdpa"),  # the longer sample of the probe has 40 tokens
        ("StableLm", {}, False, "sdpa"),  # its layers drop what the batch says of its samples
        ("Bloom", {}, False, "eager"),  # no other attention can be set
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}, False, "eager"),
    ],
)
def test_flat_batches_are_used_where_a_probe_of_the_loaded_model_shows_that_samples_are_apart(
    tiny_model, tmp_path, name, settings, apart, attention
):
    from transformers import AutoModelForCausalLM

    from training.cpu import use_sample_attention

    folder = save_random_model(tmp_path, tiny_model, name, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    before = packing.logits_alone(model)
    assert use_sample_attention(model) is apart
    assert model.config._attn_implementation == attention
    assert apart or packing.logits_alone(model).equal(before)  # left as it was
