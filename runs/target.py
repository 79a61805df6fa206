"""What a path or name on the command line means, and where a model lies on the disk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common
from common import ROOT, SAVES, Config, Message, UserError, nearest_path
from runs.configuration import Loaded, asks_for_training, load_config
from runs.files import read_object
from runs.folder import is_run, newest_run, read_run, run_config
from runs.weights import read_header, weight_files

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-(4|8)bit$|-(4|8)bit$", re.IGNORECASE)
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")


# ---------------------------------------------------------------------------------------------------------------------
# What the command line means


@dataclass(frozen=True)
class Target:
    """What the command line names. Nothing is loaded, and an adapter's base is not looked for yet.

    `config` is that of the run; what the recipe says comes before it, and the command line before both. Its
    `export_dir` and `overwrite_output_dir` are never the run's: those were about the training.
    """

    kind: Literal["adapter", "model", "gguf"]
    path: Path  # the adapter's or model's folder, or its name on the hub, or the GGUF file
    config: Config
    loaded: Loaded  # the recipe and the command line alone
    run: Path | None = None  # the run folder that an adapter belongs to
    base: str | None = None  # the name of an adapter's base; None where nothing names one

    @property
    def template(self) -> str | None:
        """The chat template that was asked for; None: the one saved with the model or adapter."""
        asked = self.loaded.typed if self.run else self.loaded.given
        return self.config.template if "template" in asked else None

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer that an adapter was trained with; None: its base's."""
        folders = [self.path, *([self.run] if self.run else [])]
        return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


def find_target(target: str | None, settings: Sequence[str], wants: Literal["any", "adapter"] = "any") -> Target:
    """Reads a target (None: the newest run) and settings, `key=value`.

    A path may be a run, a checkpoint, an adapter, a model's folder, a hub name, a GGUF or a recipe. `wants="adapter"`
    is for merging: a model, which has none, is an error. Raises UserError where it is not there or not complete.
    """
    path = Path(target).expanduser() if target else None
    is_recipe = path is not None and path.suffix in RECIPE_SUFFIXES and not path.is_dir()
    loaded = load_config([*([str(path)] if is_recipe else []), *settings])
    if is_recipe:
        path = _named_by_recipe(loaded, wants)
    elif path is None and loaded.config.adapter_name_or_path:
        path = Path(loaded.config.adapter_name_or_path)
    elif path is None and "model_name_or_path" in loaded.given and wants == "any":
        path = Path(loaded.config.model_name_or_path)
    path = path or newest_run()
    if path.suffix == ".gguf" and not path.is_dir():
        check_gguf(path)
        return Target("gguf", path, config_of_run(None, loaded), loaded)
    if is_run(path) or is_adapter(path):
        return _adapter_target(path, loaded)
    if wants == "adapter":
        _refuse_without_adapter(path)
    return Target("model", path, config_of_run(None, loaded), loaded)


def _named_by_recipe(loaded: Loaded, wants: str) -> Path:
    """The run of a recipe; the adapter that it names, where it merges, evaluates, or the command line names one."""
    config, output = loaded.config, Path(loaded.config.output_dir)
    is_merge_file = config.export_dir and "export_dir" not in loaded.typed  # else training began with the adapter
    trains = asks_for_training(config)  # else output_dir is where the results of the evaluation are wanted
    named = config.adapter_name_or_path and (is_merge_file or not trains or "adapter_name_or_path" in loaded.typed)
    if not named and (is_adapter(output) or is_run(output)):
        return output
    if config.adapter_name_or_path:
        return Path(config.adapter_name_or_path)
    if wants == "adapter" or (trains and loaded.given & {"dataset", "output_dir"}):
        train = common.command("train.py", loaded.recipe)
        raise UserError(
            "{recipe} has not been trained yet: {folder} has no adapter; train it: {command}, or set "
            "adapter_name_or_path",
            recipe=loaded.recipe,
            folder=output,
            command=train,
        )
    return Path(config.model_name_or_path)


def _adapter_target(folder: Path, loaded: Loaded) -> Target:
    if not is_adapter(folder):
        _refuse_unfinished(folder)
    run = next((f for f in (folder, folder.parent) if (f / "config.yaml").is_file() and is_run(f)), None)
    config = config_of_run(run, loaded)
    asked = loaded.typed if run else loaded.given
    settings = adapter_settings(folder)
    if "model_name_or_path" in asked:
        base = config.model_name_or_path
    else:
        # a recipe may have been trained on another base than it names: model_name_or_path=... on the command line
        base = run_config(run).model_name_or_path if run else settings.get("base_model_name_or_path") or None
        if (revision := settings.get("revision")) not in (None, "main"):
            raise UserError(
                "{folder} was trained on the revision {revision} of {base}; give model_name_or_path=a folder with "
                "that revision",
                folder=folder,
                revision=revision,
                base=base,
            )
    return Target("adapter", folder, config, loaded, run, base)


def config_of_run(run: Path | None, loaded: Loaded) -> Config:
    """The settings of a run, and before them what the recipe and the command line say (see Target)."""
    config = loaded.config
    if run:
        given = {name: getattr(config, name) for name in {*loaded.given, "export_dir"}}
        config = dataclasses.replace(run_config(run), **given)
    overwrite = config.overwrite_output_dir and "overwrite_output_dir" in loaded.typed
    return dataclasses.replace(config, overwrite_output_dir=overwrite)


def _refuse_unfinished(folder: Path) -> None:
    """Raises the UserError for a run without an adapter; it names the newest checkpoint."""
    saved = [path for path in folder.glob("checkpoint-*") if is_adapter(path)]
    newest = max(saved, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if newest:
        raise UserError(
            "{folder} has not finished training; name its newest checkpoint: {checkpoint}",
            folder=folder,
            checkpoint=newest,
        )
    status = (read_run(folder) or {}).get("status")
    raise UserError(
        "{folder} has no trained adapter (its training is {status}); train it to its end", folder=folder, status=status
    )


def _refuse_without_adapter(path: Path) -> None:
    if not path.exists():
        raise UserError(
            "there is no run, adapter or recipe {path}{near:suggestion}; give saves/NAME, an adapter's folder or a "
            "recipe",
            path=path,
            near=nearest_path(path, _runs_beside(path)),
        )
    if any(path.glob("checkpoint-*/adapter_config.json")):
        _refuse_unfinished(path)
    raise UserError(
        "{folder} has no adapter_config.json; give a run's folder, or an adapter's that peft saved", folder=path
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that peft saved."""
    return (folder / "adapter_config.json").is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a complete adapter."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            "{folder} lacks adapter_model.safetensors, the only format read here; copy the whole folder, or save "
            "the adapter again with peft",
            folder=folder,
        )
    return read_object(folder / "adapter_config.json")


def check_gguf(path: Path) -> None:
    """Raises UserError where there is no GGUF file at `path`."""
    if not path.is_file():
        raise UserError("there is no file {path}; make one: python quantize.py saves/NAME", path=path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(
                "{path} is not a GGUF file (it does not begin with GGUF); make it again: python quantize.py", path=path
            )


def read_arguments(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The target (None: the newest run) and the settings, `key=value`, of a command line. Raises UserError for two."""
    settings = [word for word in words if word.startswith("--") or ("=" in word and not Path(word).exists())]
    targets = [word for word in words if word not in settings]
    if len(targets) > 1:
        raise UserError(
            "{first} and {second} are two targets; give one, and settings as key=value",
            first=targets[0],
            second=targets[1],
        )
    return (targets[0] if targets else None), settings


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded to answer


@dataclass(frozen=True)
class Source:
    """What will be loaded: all of it is on the disk."""

    name: str  # for people
    config: Config
    model: str  # folder or GGUF file
    adapter: Path | None = None
    tokenizer: Path | str = ""  # folder
    template: str | None = None  # a file of templates/; None: the one saved with the model
    notes: tuple[Message | str, ...] = ()


def find(target: str | None = None, settings: Sequence[str] = ()) -> Source:
    """The files of what the command line names (`find_target`), a base of a 4-bit name by its 16-bit model.

    Raises UserError, without loading anything, where something of it is missing.
    """
    found = find_target(target, settings)
    notes: list[Message | str] = list(found.loaded.notes)
    config, path, model, tokenizer = found.config, found.path, str(found.path), None
    if found.kind == "gguf":
        if "template" in found.loaded.given:
            notes.append(Message("template: a GGUF answers with the chat template in its file; this one is not used"))
        return Source(str(path), config, model, notes=tuple(notes))
    if found.kind == "model":
        tokenizer = folder = complete_model(str(path))
        model = str(folder)
    else:
        folder, name = base_folder(found)
        if name != found.base:
            notes.append(
                Message(
                    "{quantized} is not on this disk; answering on {base}, the 16-bit model that it was made of",
                    quantized=found.base,
                    base=folder,
                )
            )
        model, tokenizer = str(folder), found.tokenizer or folder
    if config.quantization_bit and common.find_gpu() is None:
        notes.append(Message("quantization_bit needs a GPU; the model answers in 16 bit"))
    adapter = path if found.kind == "adapter" else None
    return Source(str(path), config, model, adapter, tokenizer, found.template, tuple(notes))


def base_folder(target: Target) -> tuple[Path, str]:
    """Folder and name of the base that an adapter answers on: the one it names, else the 16-bit model behind that."""
    if target.base is None:
        raise UserError(
            "{folder} does not say which model it was trained on; give model_name_or_path=that model",
            folder=target.path,
        )
    plain = QUANTIZED_NAME.sub("", target.base)
    name = plain if find_model(target.base) is None and find_model(plain) else target.base
    return complete_model(name, target.path), name


# ---------------------------------------------------------------------------------------------------------------------
# Models on the disk


def find_model(name: str) -> Path | None:
    """The folder of a model: as named, below the kit or models/, or in the hub's cache; None where it is nowhere."""
    for folder in (Path(name).expanduser(), ROOT / name, Path("models") / Path(name).name):
        if (folder / "config.json").is_file():
            return folder
    if not HUB_NAME.fullmatch(name) or name.startswith("models/"):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def missing_from_model(folder: Path) -> list[str]:
    """What `folder` lacks as a model that transformers can load; empty: it is complete.

    Reads names, sizes and the headers of the weights, never the weights.
    """
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if not any((folder / name).is_file() for name in tokenizers):
        missing.append("tokenizer.json")
    try:
        weights = weight_files(folder)
    except UserError:
        weights = ["model.safetensors.index.json"]
    return missing + [name for name in weights if not _is_complete(folder / name)]


def _runs_beside(folder: Path) -> list[Path]:
    return [file.parent for file in folder.parent.glob("*/run.json")]


def _is_complete(path: Path) -> bool:
    try:
        read_header(path)
    except UserError:
        return False
    return True


def complete_model(name: str, adapter: Path | None = None) -> Path:
    """The folder of a model that is on the disk (see `find_model`); `adapter`: it is the base of that one."""
    if folder := find_model(name):
        if missing := missing_from_model(folder):
            if adapter:
                raise UserError(
                    "the base model of {adapter}, {base}, is not complete: it lacks {missing}; fetch or make it again",
                    base=folder,
                    adapter=adapter,
                    missing=missing,
                )
            raise UserError(
                "{model} is not complete: it lacks {missing}; fetch or make it again", model=folder, missing=missing
            )
        return folder
    if ggufs := sorted(Path(name).glob("*.gguf")):
        chat = common.command("chat.py", ggufs[0])
        raise UserError(
            "{folder} holds {files}; name one: {command}",
            folder=name,
            files=[path.name for path in ggufs],
            command=chat,
        )
    if Path(name).is_dir():
        raise UserError(
            "{folder} is neither a run, an adapter nor a model (it has no config.json); name another", folder=name
        )
    runs = _runs_beside(Path(name)) if "/" in name else []
    if not adapter and (runs or Path(name).parent == SAVES):
        raise UserError(
            "there is no run {folder}{near:suggestion}; python evaluate.py --runs lists them",
            folder=name,
            near=nearest_path(Path(name), runs),
        )
    plain = QUANTIZED_NAME.sub("", name)
    fetch = common.command("download.py", plain if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plain) else "ORG/NAME")
    if adapter:
        raise UserError(
            "the base model of {adapter}, {base}, is not on this disk; fetch it ({command}), or say where it is: "
            "model_name_or_path=FOLDER",
            base=plain,
            adapter=adapter,
            command=fetch,
        )
    raise UserError("there is no model {model}; fetch it ({command}), or name its folder", model=name, command=fetch)


def find_16_bit_base(target: Target) -> tuple[Path, str, dict[str, Any]]:
    """Folder, name and config.json of the base to merge into: of one in 4 or 8 bit, the model it was made of."""
    name = target.base
    if name is None:
        raise UserError(
            "{folder} does not say which model it was trained on; give model_name_or_path=that model",
            folder=target.path,
        )
    if name.endswith(".gguf"):
        raise UserError(
            "{base} is a GGUF, which is quantized; give model_name_or_path=the 16-bit model it was made of", base=name
        )
    folder = find_model(name)
    plain = QUANTIZED_NAME.sub("", name)
    if plain != name and (original := find_model(plain)):
        folder, name = original, plain
    folder = complete_model(plain, target.path) if folder is None else folder
    config = read_object(folder / "config.json")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else quantization
        raise UserError(
            "{base} is quantized ({method}): merging would keep its rounding errors, and most programs could not "
            "read the result; give model_name_or_path=the 16-bit model it was made of ({plain})",
            base=folder,
            method=method,
            plain=plain,
        )
    return folder, name, config
