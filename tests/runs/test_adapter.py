"""Adapters as other programs save them: understood where only a name or a spelling differs, else refused by cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_adapter, user_error

import merge
from inference.load import load
from runs.adapter import Adapter
from runs.files import write_json

QUIET = ["infer_dtype=float32"]


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    return save_adapter(tiny_model, tmp_path / "adapter")


def change(folder: Path, rename=lambda name: name, value=lambda tensor: tensor, **settings) -> None:
    """Rewrites an adapter's names, tensors and settings."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({rename(name): value(tensor) for name, tensor in load_file(file).items()}, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, **settings})


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits[0]


@pytest.mark.parametrize(
    "prefix",
    [
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
    ],
)
@pytest.mark.parametrize("with_base", [False, True])
def test_prefixes_of_wrappers_are_understood(prefix, with_base: bool, adapter: Path, tiny_model: Path) -> None:
    expected = logits(load(str(adapter), QUIET).model)
    assert (logits(load(str(tiny_model), QUIET).model) - expected).abs().max() > 0.1
    change(adapter, rename=prefix)
    assert (logits(load(str(adapter), QUIET, with_base=with_base).model) - expected).abs().max() < 1e-4
    merge.main([str(adapter), "--no-verify"])
    assert (logits(load(str(adapter / "merged"), QUIET).model) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("with_base", [False, True])
def test_the_kind_may_be_spelt_as_an_enum(with_base: bool, adapter: Path) -> None:
    expected = logits(load(str(adapter), QUIET).model)
    change(adapter, peft_type="PeftType.LORA", task_type="TaskType.CAUSAL_LM")
    assert (logits(load(str(adapter), QUIET, with_base=with_base).model) - expected).abs().max() < 1e-5


def test_empty_tensors_of_zero_3_are_told(adapter: Path) -> None:
    change(adapter, value=lambda tensor: tensor[:0])
    for act in (lambda: merge.main([str(adapter), "--no-verify"]), lambda: load(str(adapter), QUIET)):
        with user_error("as ZeRO-3"):
            act()


@pytest.mark.parametrize("with_base", [False, True])
def test_an_adapter_of_another_base_does_not_answer(with_base: bool, adapter: Path) -> None:
    import torch

    change(adapter, value=lambda tensor: torch.cat([tensor, tensor], 1) if tensor.shape[1] == 64 else tensor)
    with user_error("trained on shape"):
        load(str(adapter), QUIET, with_base=with_base)
    change(adapter, rename=lambda name: name.replace("layers.1.", "layers.7."))
    with user_error("the base lacks"):
        load(str(adapter), QUIET, with_base=with_base)


def test_a_kind_that_only_peft_knows_is_loaded_whole_or_not(tiny_model: Path, tmp_path: Path) -> None:
    """trainable_token_indices: peft loads it; a tensor that has no place is an error here, where peft only warns."""
    folder = save_adapter(tiny_model, tmp_path / "tokens", trainable_token_indices=[5, 6])
    assert Adapter(folder).unsupported
    assert load(str(folder), QUIET).model is not None
    change(folder, rename=lambda name: name.replace("layers.1.", "layers.7."))
    with user_error("not fit the base"):
        load(str(folder), QUIET)


def test_a_bias_without_place_answers_and_does_not_merge(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = save_adapter(tiny_model, tmp_path / "bias", target_modules=["q_proj"], lora_bias=True)
    change(folder, value=lambda tensor: tensor + 0.3 if tensor.dim() == 1 else tensor)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(base, folder).eval())
    assert (logits(load(str(folder), QUIET).model) - expected).abs().max() < 1e-5
    with user_error("train without"):
        merge.main([str(folder), "--no-verify"])


def test_the_embedding_is_as_long_as_the_adapters(tiny_model: Path, tmp_path: Path) -> None:
    """As after a training with resize_vocab, which pads to 64: more rows than the tokenizer has tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.resize_token_embeddings(320, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    folder = tmp_path / "grown"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    engine = load(str(folder), QUIET)
    assert engine.model.get_input_embeddings().num_embeddings == 320
    merge.main([str(folder), "--no-verify"])
    assert json.loads((folder / "merged" / "config.json").read_text())["vocab_size"] == 320
    assert (logits(load(str(folder / "merged"), QUIET).model) - logits(engine.model)).abs().max() < 1e-4
