"""An adapter's product survives bfloat16, and layers that are not plain LoRA stay PEFT's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, ok, run


def adapted(bias: bool = False, magnitude: float = 1e-4, **lora):
    """A linear layer of 576 → 1536 with an adapter of which B has this standard deviation."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(576, 1536, bias=bias))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0"], **lora))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, magnitude)
    return model


def share_that_arrives(model, x) -> float:
    """How much of the adapter's product is in the output, 1 for all: the projection of the one on the other."""
    import torch

    layer = model.base_model.model[0]
    with torch.no_grad():
        expected = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        weight = layer.base_layer.weight.bfloat16().float()
        base = x.bfloat16().float() @ weight.t()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x).float()
        base = base if layer.base_layer.bias is None else base + layer.base_layer.bias
    return float(((output - base) * expected).sum() / (expected * expected).sum())


@pytest.mark.parametrize("bias", [False, True])
def test_a_young_adapter_arrives_in_bfloat16(bias: bool):
    import torch

    from training.cpu import round_once

    model, x = adapted(bias), torch.randn(700, 576)
    if not bias:
        assert share_that_arrives(model, x) < 0.5  # what this is for: PEFT's own forward
    assert round_once(model) == 1
    assert share_that_arrives(model, x) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_output_and_gradients_are_those_of_peft(bfloat16: bool, dropout: float):
    import torch

    from training.cpu import round_once

    given, found = torch.randn(2, 32, 576), []
    for changed in (False, True):
        model, x = adapted(bias=True, magnitude=0.02, lora_dropout=dropout), given.clone().requires_grad_()
        if changed:
            round_once(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = model(x)
            (output.float() ** 2).mean().backward()
        assert output.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        found.append([output.float(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for own, pefts in zip(*found, strict=True):
        assert float((own - pefts).norm()) <= (0.02 if bfloat16 else 1e-5) * float(pefts.norm())


@pytest.mark.parametrize("case", ["dora", "lora_bias", "learning bias", "disabled", "two adapters"])
def test_what_is_not_one_plain_adapter_is_computed_by_peft(case: str):
    import torch
    from peft import LoraConfig

    from training.cpu import round_once

    lora = {"dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}, "learning bias": {}}
    model, x = adapted("bias" in case, 0.02, **lora.get(case, {})), torch.randn(8, 576)
    layer = model.base_model.model[0]
    if case == "learning bias":
        layer.base_layer.bias.requires_grad_(True)
    if case == "two adapters":
        model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
        layer.lora_B["second"].weight.data.normal_(0, 0.02)
        model.base_model.set_adapter(["default", "second"])
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        changed = round_once(model)
        assert torch.equal(model(x), expected)
    assert changed == (0 if case in lora else 1)


@pytest.mark.slow
def test_training_in_bfloat16_has_the_losses_of_float32(tmp_path: Path, embedded_model: Path):
    """(A CPU without bfloat16 instructions trains in float32 both times.)"""
    settings = [f"model_name_or_path={embedded_model}", f"dataset={ROOT / 'data' / 'identity.json'}", "template=chatml"]
    settings += ["max_steps=6", "learning_rate=1e-3", "logging_steps=1", "gradient_accumulation_steps=1", "val_size=0"]
    losses = []
    for precision in ("true", "false"):
        folder = tmp_path / precision
        ok(run("train.py", *settings, f"bf16={precision}", f"output_dir={folder}", cwd=tmp_path))
        lines = (folder / "trainer_log.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
