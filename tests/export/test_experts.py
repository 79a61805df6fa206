"""Adapters of experts (peft's target_parameters): merged as peft does, for each way in which experts are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_random_model, user_error
from test_merge import distance, load, logits, merged, peft_logits, train_adapter, values

import merge
from runs.files import write_json

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


ARCHITECTURES = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "Qwen3Moe": {"intermediate_size": 64, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    # as many columns as rows in down_proj, as the real one has
    "GptOss": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_moe(architecture: str, tokenizer: Path, folder: Path) -> Path:
    """A tiny random model with experts."""
    sizes = {"hidden_size": 32, "head_dim": 16, "tie_word_embeddings": False, "initializer_range": 0.2}
    return save_random_model(folder, tokenizer, architecture, **sizes, **ARCHITECTURES[architecture])


KINDS = {
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "one of them": {"target_modules": ["o_proj"], "target_parameters": EXPERTS[1:]},
    "ranks": {
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.gate_up_proj": 2},
        "alpha_pattern": {"experts.down_proj": 3},
    },
    "attention": {"target_modules": ["q_proj", "v_proj"]},
}


SQUARE = ("GptOss", "one of them")  # see the next test


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "kind"), [(a, k) for a in ARCHITECTURES for k in KINDS if (a, k) != SQUARE])
def test_experts_are_merged_as_by_peft(architecture: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base = make_moe(architecture, tiny_model, tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", **KINDS[kind])
    apart, _ = peft_logits(base, folder)
    assert distance(logits(load(base)), apart) > 0.02, "the adapter has to do something"
    assert distance(logits(load(merged(folder))), apart) < 5e-5
    record = json.loads((folder / "merged" / "merge.json").read_text())
    assert record["adapter_tensors"] == len(values(folder))


@pytest.mark.filterwarnings("ignore")
def test_square_experts_alone_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = make_moe("GptOss", tiny_model, tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", **KINDS["one of them"])
    with user_error("are square"):
        merge.main([str(folder), "--no-verify"])


@pytest.mark.filterwarnings("ignore")
def test_a_saved_router_has_another_name_on_the_disk(tiny_model: Path, tmp_path: Path) -> None:
    base = make_moe("Mixtral", tiny_model, tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    apart, _ = peft_logits(base, folder)
    assert distance(logits(load(merged(folder))), apart) < 5e-5


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_rank_of_experts_is_told(tiny_model: Path, tmp_path: Path) -> None:
    base = make_moe("Qwen3Moe", tiny_model, tmp_path / "base")
    folder = train_adapter(base, tmp_path / "adapter", **KINDS["experts"])
    settings = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**settings, "rank_pattern": {"experts.down_proj": 3}})
    with user_error("trained on shape"):
        merge.main([str(folder), "--no-verify"])
