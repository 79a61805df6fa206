"""What a path or name on the command line means."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import ROOT, Config, UserError
from runs.folder import is_run, newest_run, read_run


def find_model(name: str) -> Path | None:
    """The folder of a model: as named, below the kit or models/, or in the hub's cache; None where it is nowhere."""
    for folder in (Path(name).expanduser(), ROOT / name, Path("models") / Path(name).name):
        if (folder / "config.json").is_file():
            return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("models/"):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def missing_from_model(folder: Path) -> list[str]:
    """What `folder` lacks as a model that transformers can load; empty: it is whole.

    Reads names, sizes and the headers of the weights (8 bytes of length, then JSON), never the weights.
    """
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((folder / name).is_file() for name in tokenizers):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    if index.is_file() and not (folder / weights[0]).is_file():
        try:
            weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError):
            weights = [index.name]
    return missing + [name for name in weights if not _whole_safetensors(folder / name)]


def _whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, OverflowError, MemoryError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


@dataclass(frozen=True)
class Source:
    """What will be loaded: all of it is on the disk."""

    name: str  # for people
    config: Config
    model: str  # folder or GGUF file
    adapter: Path | None = None
    tokenizer: Path | str = ""  # folder
    template: str | None = None  # a file of templates/; None: the one saved with the model
    notes: tuple[str, ...] = ()


def find(target: str | None = None, settings: Sequence[str] = ()) -> Source:
    """What `target` means: a run, an adapter, a model's folder or hub name, a GGUF, a recipe; None: the newest run.

    `settings` are `key=value`. Raises UserError, without loading anything, where something of it is missing.
    """
    source = _find(target, settings)
    if source.config.quantization_bit and not source.model.endswith(".gguf") and common.find_gpu() is None:
        note = "quantization_bit needs a GPU; the model answers in 16 bit"
        return dataclasses.replace(source, notes=(*source.notes, note))
    return source


def _find(target: str | None, settings: Sequence[str]) -> Source:
    path = Path(target).expanduser() if target else None
    loaded = common.load_config([*([target] if path and path.suffix in (".yaml", ".yml", ".json") else []), *settings])
    config, given = loaded.config, loaded.given
    if loaded.recipe:
        output = Path(config.output_dir)
        if _is_adapter(output) or is_run(output):
            path = output
        elif config.adapter_name_or_path:
            path = Path(config.adapter_name_or_path)
        elif given & {"dataset", "output_dir"} and common.asks_for_training(config):
            train = common.command("train.py", loaded.recipe)
            raise UserError(f"{loaded.recipe} has not been trained yet; train it: {train}")
        else:
            path = Path(config.model_name_or_path)
    elif path is None and given & {"model_name_or_path", "adapter_name_or_path"}:
        path = Path(config.adapter_name_or_path or config.model_name_or_path)
    path = path or newest_run()
    if path.suffix == ".gguf":
        return _find_gguf(path, loaded)
    if is_run(path) or _is_adapter(path):
        return _find_adapter(path, settings, loaded)
    folder = whole_model(str(path))
    template = config.template if "template" in given else None
    return Source(str(path), config, str(folder), tokenizer=folder, template=template, notes=tuple(loaded.notes))


def _find_gguf(path: Path, loaded: common.Loaded) -> Source:
    if not path.is_file():
        raise UserError(f"there is no file {path}; make one: python quantize.py saves/NAME")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                f"{path} is not a GGUF file (it does not begin with GGUF); make it again: python quantize.py"
            )
    notes = list(loaded.notes)
    if "template" in loaded.given:
        notes.append("template: a GGUF answers with the chat template in its file; this one is not used")
    return Source(str(path), loaded.config, str(path), notes=tuple(notes))


def _find_adapter(folder: Path, settings: Sequence[str], loaded: common.Loaded) -> Source:
    """A run or a bare adapter on its base."""
    if not _is_adapter(folder):
        status = (read_run(folder) or {}).get("status")
        whole = [path for path in folder.glob("checkpoint-*") if _is_adapter(path)]
        newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
        hint = f"name its checkpoint: {newest}" if newest else "train it to its end"
        raise UserError(f"{folder} holds no trained adapter (its training is {status}); {hint}")
    run = next((f for f in (folder, folder.parent) if (f / "config.yaml").is_file() and is_run(f)), None)
    config, template = loaded.config, loaded.config.template
    if run:  # its own settings, and those of the command line before them; its template stands beside the adapter
        own = common.load_config([str(run / "config.yaml"), *settings])
        config = own.config if loaded.recipe is None else config
        template = config.template if any(s.lstrip("-").startswith("template=") for s in settings) else None
    elif "template" not in loaded.given:
        template = None
    moved = any(s.lstrip("-").startswith("model_name_or_path=") for s in settings)
    named = adapter_settings(folder).get("base_model_name_or_path") or config.model_name_or_path
    if moved or (loaded.recipe and not run):
        named = config.model_name_or_path
    base = whole_model(named, f"the base model of {folder}, ")
    tokenizer = folder if (folder / "tokenizer_config.json").is_file() else run or base
    return Source(str(folder), config, str(base), folder, tokenizer, template, tuple(loaded.notes))


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a whole adapter."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} lacks adapter_model.safetensors; copy the whole folder, or train it again")
    return read_json(folder / "adapter_config.json")


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is broken ({error}); copy its folder, or make it, again") from None


def whole_model(name: str, whose: str = "") -> Path:
    """The folder of a model that is on the disk: as named, below the kit or models/, or in the hub's cache."""
    if folder := find_model(name):
        if missing := missing_from_model(folder):
            raise UserError(f"{whose}{folder}, is not whole: it lacks {', '.join(missing)}; fetch or make it again")
        return folder
    ggufs = sorted(Path(name).glob("*.gguf"))
    if ggufs:
        chat = common.command("chat.py", ggufs[0])
        raise UserError(f"{name} holds {', '.join(path.name for path in ggufs)}; name one: {chat}")
    if Path(name).is_dir():
        raise UserError(f"{whose}{name} is neither a run, an adapter nor a model (it has no config.json); name another")
    fetch = f"python download.py {name}" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else "python download.py ORG/NAME"
    place = "say where it is now: model_name_or_path=FOLDER" if whose else f"fetch it ({fetch}), or name its folder"
    raise UserError(f"{whose}{name}, is not on this disk; {place}" if whose else f"there is no model {name}; {place}")


def read_arguments(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The target (None: the newest run) and the settings, `key=value`, of a command line. Raises UserError for two."""
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    targets = [word for word in words if word not in settings]
    if len(targets) > 1:
        raise UserError(f"{targets[0]} and {targets[1]} are two targets; give one, and settings as key=value")
    return (targets[0] if targets else None), settings
