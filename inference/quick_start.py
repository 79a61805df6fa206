"""A quick start of chat.py and api.py: transformers without what no reply on a CPU needs, weights read directly.

Of the 5 to 6 seconds to the first token of a small model nearly all were imports: torch's compiler and its distributed
tensors (with sympy and triton), scipy, accelerate, PEFT, and transformers' scan of its own 1,000 model files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from runs.imports import QUANTIZING, UNUSED_ON_CPU, light_imports

# Packages that transformers imports wherever they are installed, and no reply needs.
UNUSED = (*UNUSED_ON_CPU, QUANTIZING, "peft", "accelerate", "pandas", "PIL", "torchvision")
_MASK_HELPER = "torch._dynamo._trace_wrapped_higher_order_op"


@contextlib.contextmanager
def reply_imports() -> Iterator[None]:
    """While the block imports transformers, the packages above and torch's compiler and distributed part are missing.

    For a process that only generates, before its first import of transformers: what transformers finds missing then
    stays missing for it (torch.compile, training on several devices).
    """
    import torch

    stand_ins = {} if "torch._dynamo" in sys.modules else _compiler_stand_ins()
    sys.modules.update(stand_ins)
    distributed, distributions = torch.distributed.is_available, importlib.metadata.packages_distributions
    torch.distributed.is_available = lambda: False
    importlib.metadata.packages_distributions = dict  # transformers alone needs none of it
    try:
        with light_imports(UNUSED):
            yield
    finally:
        torch.distributed.is_available, importlib.metadata.packages_distributions = distributed, distributions
        for name in stand_ins:
            del sys.modules[name]
        if stand_ins:
            vars(torch).pop("_dynamo", None)


class _Compiler(ModuleType):
    """Stands for torch._dynamo while modules are imported: its decorators leave functions as they are."""

    __path__: list[str] = []  # noqa: RUF012 - as packages have it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorator


def _decorator(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _decorator


class _MaskHelper:
    """Becomes torch's own TransformGetItemToIndex where a mask needs it after all."""

    def __new__(cls) -> Any:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        return TransformGetItemToIndex()


def _compiler_stand_ins() -> dict[str, ModuleType]:
    import torch

    helper = ModuleType(_MASK_HELPER)
    helper.TransformGetItemToIndex = _MaskHelper
    torch._dynamo = _Compiler("torch._dynamo")
    return {"torch._dynamo": torch._dynamo, _MASK_HELPER: helper}


def read_tensors(folder: Path, dtype: Any) -> dict[str, Any]:
    """The tensors of a model's safetensors files, as `dtype`; {} where there are none, or some are no plain weights.

    Meant for a thread beside the imports: reading and converting release the interpreter.
    """
    from safetensors.torch import load_file

    state = {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}
    if not all(tensor.is_floating_point() for tensor in state.values()):
        return {}
    return {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}  # not a view of the file


def make_model(folder: Path, state: dict[str, Any], dtype: Any) -> Any:
    """The causal language model of a folder on the CPU, or None where only `from_pretrained` loads it rightly.

    `from_pretrained` begins on the meta device, which imports sympy. Here `state` (see `read_tensors`) takes the places
    of the parameters; names or shapes that do not fit, shared weights aside, are left to `from_pretrained`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None or not state or kind._keep_in_fp32_modules or kind._keep_in_fp32_modules_strict:
        return None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    expected = model.state_dict()
    if any(name not in expected or tensor.shape != expected[name].shape for name, tensor in state.items()):
        return None
    missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    model.tie_weights()
    known = {id(model.get_parameter(name)) for name in state if name in dict(model.named_parameters())}
    shared = dict(model.named_parameters(remove_duplicate=False))
    if any(name not in shared or id(shared[name]) not in known for name in missing):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.requires_grad_(False).eval()
