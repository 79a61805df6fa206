"""Checks before a training: the base model, and the adapter to go on with."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import common
from common import Config, Message
from runs.adapter import Adapter
from runs.base_tensors import check_fits
from runs.target import missing_from_model
from training import whole_modules
from training.findings import Finding, Run, fault, note, ok
from training.memory import (
    EMBEDDED_SHAPE,
    EXPERTS,
    GB,
    ModelSize,
    adapted_weights,
    has_experts,
    linear_modules,
    model_like,
    read_model,
)


def check_model(run: Run) -> Iterator[Finding]:
    """Keeps the model's size: all of it where it is on the disk; else what config.json says, where that can be had."""
    name = run.config.model_name_or_path
    path = Path(name).expanduser()
    missing = missing_from_model(path)
    if not missing:
        run.model = read_model(path)
        yield ok(Message("{folder} is whole, {gb:.2f} GB", folder=path, gb=run.model.bytes / GB))
    elif name == common.EMBEDDED_MODEL and not path.exists():
        run.model = model_like(EMBEDDED_SHAPE)
        yield note(Message("{folder} will be made from its package by the first run", folder=path))
    elif path.exists():
        yield fault(
            Message("{model} is not complete: it lacks {missing}; fetch or make it again", model=path, missing=missing)
        )
    else:
        yield from _missing_model(run, path)
    if run.model:
        yield from _model_faults(run.config, run.model)


def _missing_model(run: Run, path: Path) -> Iterator[Finding]:
    name = hub_name(run.config.model_name_or_path)
    fetch = common.command("download.py", name or f"ORG/{path.name}")
    yield fault(
        Message(
            "there is no model at {folder}; fetch it ({command}) or set model_name_or_path", folder=path, command=fetch
        )
    )
    if name and run.ask_hub:
        yield from _ask_hub(run, name)


def _ask_hub(run: Run, name: str) -> Iterator[Finding]:
    """What can be told of a model before it is fetched."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not is_reachable(hub):
        yield note(Message("{hub} cannot be reached; set HF_ENDPOINT to a mirror", hub=hub))
        return
    yield note(Message("{hub} can be reached", hub=hub))
    if settings := hub_config(hub, name):
        run.model = model_like(settings)


def hub_name(name: str) -> str | None:
    """A model's ORG/NAME on the hub, where `name` is one or the folder of a model that a shipped recipe fetches."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if is_hub_name and not name.startswith("models/") and not Path(name).parent.exists():
        return name
    fetched = {
        found.partition("/")[2]: found
        for recipe in sorted((common.ROOT / "configs").glob("*.yaml"))
        for found in re.findall(r"download\.py (\S+/\S+)", recipe.read_text(encoding="utf-8"))
    }
    return fetched.get(Path(name).name) if Path(name).parent == Path("models") else None


def hub_config(hub: str, name: str) -> dict[str, Any] | None:
    """config.json of a model on the hub; None where it cannot be had."""
    try:
        with urllib.request.urlopen(f"{hub}/{name}/resolve/main/config.json", timeout=5) as answer:
            return json.load(answer)
    except (OSError, ValueError):  # offline, gated, or no hub
        return None


def is_reachable(address: str) -> bool:
    """Whether a server accepts a connection at `address` within three seconds."""
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


def _model_faults(config: Config, model: ModelSize) -> Iterator[Finding]:
    """What of the settings the model cannot follow."""
    context = model.settings.get("max_position_embeddings")
    if context and config.cutoff_len > context:
        name = config.model_name_or_path
        yield fault(
            Message(
                "cutoff_len is {cutoff_len}, but {model} reads at most {context} tokens; lower it",
                cutoff_len=config.cutoff_len,
                model=name,
                context=context,
            )
        )
    if model.folder is None:  # the names of its modules are a guess
        return
    method = quantization_method(model.folder)
    if method not in (None, "bitsandbytes"):
        yield fault(
            Message(
                "{folder} is quantized ({method}), on which no adapter is trained here; name the 16-bit model, with "
                "quantization_bit: 4 to load it in 4 bit",
                folder=model.folder,
                method=method,
            )
        )
        return
    if config.adapter_name_or_path is None:
        yield from _target_faults(config, model)


def _target_faults(config: Config, model: ModelSize) -> Iterator[Finding]:
    """What of `lora_target` the model does not have, or cannot have with other settings."""
    given = {"use_dora": config.use_dora, "lora_dropout": config.lora_dropout, "lora_bias": config.lora_bias == "true"}
    refused = [name for name, value in given.items() if value]
    if refused and has_experts(model) and {"all", *EXPERTS} & set(config.lora_target):
        targets = sorted(linear_modules(model) - EXPERTS)
        yield fault(
            Message(
                "{settings}: PEFT does not offer this for adapters on experts, whose matrices are one parameter; leave "
                "it out, or set lora_target: {targets}",
                settings=refused,
                targets=targets,
            )
        )
    matrices = {name for name, shape in model.shapes.items() if name.endswith(".weight") and len(shape) == 2}
    modules = {name.split(".")[-2] for name in matrices} | {"lm_head"}  # a tied one has no weights of its own
    unknown = [target for target in config.lora_target if target.split(".")[-1] not in modules]
    if config.lora_target != ("all",) and unknown:
        yield fault(
            Message(
                "lora_target: {targets} names no module of this model; it has {modules}",
                targets=unknown,
                modules=sorted(linear_modules(model)),
            )
        )


def check_parts(run: Run) -> Iterator[Finding]:
    """What learns beside the matrices of LoRA."""
    config = run.config
    if run.model and run.model.folder and config.adapter_name_or_path is None:
        shapes = run.model.shapes
        yield from map(fault, whole_modules.find_faults(config, shapes))
        yield from map(note, whole_modules.find_notes(config, shapes, adapted_weights(config, shapes)))


def quantization_method(folder: Path) -> str | None:
    """How the weights of a model on the disk are quantized ("gptq", "awq", "bitsandbytes", ...); None: they are not."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = settings.get("quantization_config")
    return str(quantization.get("quant_method", "?")) if quantization else None


def check_adapter(run: Run) -> Iterator[Finding]:
    """The adapter to go on with: a whole LoRA adapter; settings that it does not follow are noted."""
    named = run.config.adapter_name_or_path
    if named is None:
        return
    folder = Path(named).expanduser()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            yield fault(
                Message("adapter_name_or_path: {folder} has no {file}; name a run folder", folder=folder, file=name)
            )
            return
    try:
        settings = Adapter(folder).settings
        kind, has = settings["peft_type"], (settings["r"], settings["lora_alpha"], set(settings["target_modules"]))
    except (KeyError, TypeError):
        yield fault(
            Message(
                "adapter_name_or_path: {folder}/adapter_config.json does not describe an adapter; name a run folder",
                folder=folder,
            )
        )
        return
    if kind != "LORA":
        yield fault(
            Message(
                "adapter_name_or_path: {folder} is a {kind} adapter, and LoRA is trained here; name another",
                folder=folder,
                kind=kind,
            )
        )
        return
    base = Path(run.config.model_name_or_path).expanduser()
    if not missing_from_model(base):
        check_fits(folder, base)
    given = (run.config.lora_rank, run.config.alpha, set(run.config.lora_target))
    names = ("lora_rank", "lora_alpha", "lora_target")
    whole = set(settings.get("modules_to_save") or ())
    ignored = [
        name
        for name, its, ours in zip(names, has, given, strict=True)
        if its != ours and ours != {"all"} and name in run.loaded.given
    ]
    ignored += ["additional_target"] if not whole >= set(run.config.additional_target) - {"lm_head"} else []
    starts = {"lora_bias": run.config.lora_bias != "none", "pissa_init": run.config.pissa_init}
    ignored += [name for name, asked in starts.items() if asked and name in run.loaded.given]
    if ignored:
        yield note(
            Message(
                "{names}: {folder} is trained further as it is, of rank {rank}",
                names=ignored,
                folder=folder,
                rank=settings["r"],
            )
        )
