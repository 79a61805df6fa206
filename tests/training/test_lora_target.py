"""`lora_target: all` is every linear layer of the model but the output layer, whatever they are called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, model_that_sees, ok, user_error

from runs.configuration import load_config
from training import memory
from training import model as training

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES = (
    "Llama", "Mistral", "Qwen3", "Phi3", "Phi", "Gemma2", "GPT2", "GPTNeoX", "Glm4", "Starcoder2", "Falcon", "Bloom",
)  # fmt: skip


def make(name: str):
    import transformers

    more = {"head_dim": 8} if name in ("Qwen3", "Gemma2", "Glm4") else {}
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SHAPE, **more))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_is_what_peft_takes_for_all_linear(name: str, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    make(name).save_pretrained(tmp_path)
    found = {}
    for targets in ("all-linear", training.find_linear(make(name))):
        model = get_peft_model(make(name), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        found[str(targets)] = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    theirs, ours = found.values()
    assert ours == theirs and ours
    config = load_config(["lora_rank=4"]).config
    assert memory.adapter_parameters(config, memory.tensor_shapes(tmp_path)) == sum(ours.values())


WITH_UNSLOTH = """
import json, sys
from training import model as training
from training.arguments import choose_precision
from runs.configuration import load_config
training.import_unsloth()
found = {}
for folder in sys.argv[1:]:
    config = load_config([f"model_name_or_path={folder}", "cutoff_len=64", "lora_rank=4"]).config
    model = training.load_model(config, choose_precision(config))
    found[folder] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_unsloth_adapts_them_all(tmp_path: Path):
    """Of Llama, which it has code of its own for, of Phi-3 with fused projections, and of a model it does not know."""
    from conftest import make_tiny_model

    folders = []
    for name in ("Llama", "Phi3", "GPTNeoX"):
        folders.append(make_tiny_model(tmp_path / name))
        model = make(name)
        (tmp_path / name / "config.json").unlink()
        model.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", WITH_UNSLOTH, *map(str, folders)]
    result = ok(subprocess.run(command, capture_output=True, text=True, cwd=ROOT))
    config = load_config(["lora_rank=4"]).config
    for folder, trained in json.loads(result.stdout.splitlines()[-1]).items():
        assert trained == memory.adapter_parameters(config, memory.tensor_shapes(Path(folder))), folder


def test_weights_that_were_not_quantized_are_told(tmp_path: Path):
    import torch

    model = torch.nn.Linear(2, 2)
    training.check_quantized(model, None, tmp_path / "loading.log")
    for bits, name in ((4, "Params4bit"), (8, "Int8Params")):
        with user_error("does not work here", log=tmp_path / "loading.log"):
            training.check_quantized(model, bits, tmp_path / "loading.log")
        quantized = torch.nn.Module()
        quantized.weight = type(name, (torch.nn.Parameter,), {})(torch.zeros(2))
        training.check_quantized(quantized, bits, tmp_path / "loading.log")


def test_what_is_printed_while_loading_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "loading.log"
    with training.quietly(log):
        print("Unsloth: bitsandbytes is not supported here")
    assert "not supported here" in log.read_text() and not capsys.readouterr().out
    with training.quietly(tmp_path / "no-folder" / "loading.log"):
        print("lost")


def tiny(config: str, **more):
    """A tiny random model of a class whose language model is not all that it has."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **more}
    sizes = {"vocab_size": 320, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, **sizes}
    if config == "Mistral3Config":
        return model_that_sees(sizes)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))


PLAIN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("config", "more", "targets"),
    [
        ("MixtralConfig", FEW_EXPERTS, PLAIN),  # without its router
        ("GptOssConfig", FEW_EXPERTS, PLAIN),
        ("Llama4TextConfig", {**FEW_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}, PLAIN),
        # without in_proj and out_proj of its Mamba
        ("FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8, "mamba_d_head": 16}, PLAIN),
        (
            "Mistral3Config",  # by whole names, for its vision tower has the same last ones
            {},
            sorted(
                f"model.language_model.layers.{layer}.{part}.{name}"
                for layer in range(2)
                for name in PLAIN
                for part in ["self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"]
            ),
        ),
    ],
)
def test_all_is_attention_and_feed_forward_of_the_language_model(config: str, more: dict, targets: list[str]):
    assert training.find_linear(tiny(config, **more)) == targets
