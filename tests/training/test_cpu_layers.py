"""The layers of a CPU give what transformers' give, with the same gradients; what computes something else stays."""

from __future__ import annotations

import pytest


def with_gradients(module, x):
    """The output, and the gradients of the input and of the module's parameters that learn."""
    import torch

    x = x.clone().requires_grad_()
    learning = [weight for weight in module.parameters() if weight.requires_grad]
    output = module(x)
    gradients = torch.autograd.grad(output, [x, *learning], torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output, *gradients]


def make_norm(name: str):
    import torch
    import transformers

    module = getattr(getattr(transformers.models, name.lower()), f"modeling_{name.lower()}")
    norm = getattr(module, f"{name}RMSNorm")(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight).requires_grad_(False)
    return norm


def make_mlp(activation: str):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    shape = {"hidden_size": 24, "intermediate_size": 56, "num_attention_heads": 2}
    return LlamaMLP(LlamaConfig(**shape, hidden_act=activation))


@pytest.mark.parametrize("make", [lambda: make_norm("Llama"), lambda: make_norm("Qwen3"), lambda: make_mlp("silu")])
def test_output_and_gradients_are_those_of_transformers(make):
    import torch

    from training.cpu_layers import speed_up

    torch.manual_seed(0)
    module, x = make(), torch.randn(1, 7, 24)
    expected = with_gradients(module, x)
    assert speed_up(torch.nn.Sequential(module)) == 1
    for found, wanted in zip(with_gradients(module, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_norm("Gemma"),  # multiplies by 1 + weight
        lambda: make_norm("Llama").requires_grad_(True),  # it learns
        lambda: make_norm("Llama").bfloat16(),
        lambda: make_mlp("gelu"),
    ],
)
def test_other_layers_stay_as_they_are(make):
    import torch

    from training.cpu_layers import speed_up

    module = make()
    assert speed_up(torch.nn.Sequential(module)) == 0
    assert "forward" not in vars(module)


def test_a_norm_keeps_its_input_and_a_gate_its_two():
    import torch

    from training.cpu_layers import RmsNorm, SwiGlu

    def kept(function, *inputs):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            function.apply(*inputs)
        return sorted(sizes)

    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(24)
    assert kept(RmsNorm, x, weight, 1e-5) == [7, 24, 7 * 24]  # the inverse norms, the weight, the input
    assert kept(SwiGlu, x, x * 2) == [7 * 24, 7 * 24]


def test_the_remembered_lists_are_those_of_the_model():
    import torch

    from training.cpu_layers import remember_modules

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout())
    modules, parameters = list(model.modules()), list(model.parameters())
    remember_modules(model)
    assert list(model.modules()) == modules
    assert [id(weight) for weight in model.parameters()] == [id(weight) for weight in parameters]
    assert list(model.parameters(recurse=False)) == []
    assert model.eval() is model
    assert not any(module.training for module in modules)
    for out_of_step in (model, model[1]):  # PEFT leaves an adapter in the mode for evaluation under a training model
        model.train()
        out_of_step.training = False
        assert model.train() is model
        assert all(module.training for module in modules)
    model(torch.ones(2, 3)).sum().backward()
    model.zero_grad()
    assert all(weight.grad is None for weight in parameters)
