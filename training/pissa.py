"""PiSSA (https://arxiv.org/abs/2404.02948): an adapter that starts as the principal components of its weights.

Those are taken out of the base, so that the sum is the same model as before. An adapter that is saved is to fit the
plain base: it is written as a LoRA of twice the rank, B A - B0 A0, which is what peft's conversion writes, too.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError
from runs.files import read_object, write_json

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
Start = dict[str, tuple[Any, Any]]  # lora_A and lora_B of each module as they began, by the names of the adapter's file


def take_components(model: Any, iterations: int, seed: int) -> Start:
    """Moves the principal components of each adapted weight into its adapter; returns how that begins.

    `iterations` are those of the fast SVD; below 0 it is exact. Raises UserError for experts' parameters, which are
    not of linear layers.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    start: Start = {}
    torch.manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = getattr(layer.get_base_layer(), "weight", None)
        if base is None or base.ndim != 2 or not len(layer.lora_A):
            raise UserError("pissa_init: {module} is no linear layer; name linear layers in lora_target", module=name)
        with torch.no_grad():
            start[name] = _take(layer, base, iterations)
    return start


def _take(layer: Any, base: Any, iterations: int) -> tuple[Any, Any]:
    import torch

    (adapter,) = layer.lora_A
    scale, rank = layer.scaling[adapter], layer.r[adapter]
    weight = base.float().T if layer.fan_in_fan_out else base.float()
    if iterations < 0:
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    else:
        left, sizes, columns = torch.svd_lowrank(weight, q=rank, niter=iterations)
        right = columns.T
    root = (sizes / scale).sqrt()
    a, b = (root[:, None] * right).contiguous(), (left * root).contiguous()
    rest = weight - scale * b @ a
    base.copy_(rest.T if layer.fan_in_fan_out else rest)
    layer.lora_A[adapter].weight.copy_(a)
    layer.lora_B[adapter].weight.copy_(b)
    return a, b


def write_as_lora(folder: Path, start: Start) -> None:
    """Turns the adapter that was saved into `folder` into a LoRA of twice the rank on the plain base."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / ADAPTER)
    for name, (a, b) in start.items():
        first, second = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[first] = torch.cat([tensors[first], a.to(tensors[first])], 0)
        tensors[second] = torch.cat([tensors[second], -b.to(tensors[second])], 1)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    settings = read_object(folder / SETTINGS)
    grown = math.sqrt(2) if settings.get("use_rslora") else 2  # keeps the scale
    settings |= {"r": 2 * settings["r"], "lora_alpha": grown * settings["lora_alpha"]}
    write_json(folder / SETTINGS, settings)


@contextlib.contextmanager
def as_trained(folder: Path, start: Start | None) -> Iterator[Path]:
    """A folder with the adapter of a checkpoint as the training has it: without what `write_as_lora` added."""
    if not start:
        yield folder
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / ADAPTER)
    for name, (a, _) in start.items():
        rank = a.shape[0]
        first, second = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[first] = tensors[first][:rank].contiguous()
        tensors[second] = tensors[second][:, :rank].contiguous()
    with tempfile.TemporaryDirectory() as copy:
        save_file(tensors, Path(copy) / ADAPTER, metadata={"format": "pt"})
        shutil.copy(folder / SETTINGS, copy)
        yield Path(copy)
