"""What a path or name on the command line means, and where a model lies on the disk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import common
from common import ROOT, SAVES, Config, Message, UserError, nearest_path
from runs.adapter import adapter_settings
from runs.configuration import Loaded, asks_for_training, load_config
from runs.files import read_object
from runs.folder import is_run, newest_run, read_run, run_config, run_of
from runs.weights import read_header, weight_files

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-(4|8)bit$|-(4|8)bit$", re.IGNORECASE)
RECIPE_SUFFIXES = (".yaml", ".yml", ".json")

Use = Literal["answer", "merge", "quantize"]


@dataclass(frozen=True)
class Target:
    """What a command works on. Nothing of it is loaded; what the command needs of it is on the disk.

    `config` is the run's; what the recipe says comes before it, and the command line before both. Its `export_dir` and
    `overwrite_output_dir` are never the run's: those were about the training.
    """

    name: str  # the path or hub name that was given, or found
    config: Config
    model: str  # folder or GGUF file; of an adapter its base, or where it is quantized its merged model
    adapter: Path | None = None
    run: Path | None = None  # the run folder that it belongs to
    base: str | None = None  # the name of the adapter's base, which `model` may replace by its 16-bit original
    tokenizer: Path | None = None  # folder; None: a GGUF holds its own
    template: str | None = None  # a file of templates/; None: the one saved with the model or adapter
    notes: tuple[Message, ...] = ()
    recipe: Path | None = None

    @property
    def is_gguf(self) -> bool:
        return self.model.endswith(".gguf")

    @property
    def merged(self) -> Path:
        """The folder of the merged model of an adapter."""
        return Path(self.config.export_dir or f"{self.name}/merged")


def find_target(name: str | None = None, settings: Sequence[str] = (), use: Use = "answer") -> Target:
    """What `name` means: a run, a checkpoint, an adapter, a model's folder or hub name, a GGUF, a recipe; None: the
    newest run. `settings` are `key=value`.

    An adapter's `model` is, to answer, the base it names, or where that is not on the disk its 16-bit original; to
    merge, the 16-bit base; to quantize, the merged model, or before there is one the 16-bit base. Raises UserError
    where something of it is missing, or there is no adapter to merge.
    """
    path = Path(name).expanduser() if name else None
    is_recipe = path is not None and path.suffix in RECIPE_SUFFIXES and not path.is_dir()
    loaded = load_config([*([str(path)] if is_recipe else []), *settings])
    if is_recipe:
        path = _named_by_recipe(loaded, use)
    elif path is None and loaded.config.adapter_name_or_path:
        path = Path(loaded.config.adapter_name_or_path)
    elif path is None and "model_name_or_path" in loaded.given and use != "merge":
        path = Path(loaded.config.model_name_or_path)
    path = path or newest_run()
    if is_run(path) or is_adapter(path):
        found = _adapter_target(path, loaded, use)
    elif use == "merge":
        _refuse_without_adapter(path)
    else:
        found = _model_target(path, loaded, use)
    if use == "answer" and found.config.quantization_bit and not found.is_gguf and common.find_gpu() is None:
        note = Message("quantized weights are slow without a GPU; quantization_bit=none answers in 16 bit")
        return dataclasses.replace(found, notes=(*found.notes, note))
    return found


def _named_by_recipe(loaded: Loaded, use: Use) -> Path:
    """The run of a recipe; the adapter that it names, where it merges, evaluates, or the command line names one."""
    config, output = loaded.config, Path(loaded.config.output_dir)
    is_merge_file = config.export_dir and "export_dir" not in loaded.typed  # else training began with the adapter
    trains = asks_for_training(config)  # else output_dir is where the results of the evaluation are wanted
    named = config.adapter_name_or_path and (is_merge_file or not trains or "adapter_name_or_path" in loaded.typed)
    if not named and (is_adapter(output) or is_run(output)):
        return output
    if config.adapter_name_or_path:
        return Path(config.adapter_name_or_path)
    if use == "merge" or (trains and loaded.given & {"dataset", "output_dir"}):
        train = common.command("train.py", loaded.recipe)
        text = "{recipe} is not trained yet ({folder} has no adapter); train it ({train}), or set adapter_name_or_path"
        raise UserError(text, recipe=loaded.recipe, folder=output, train=train)
    return Path(config.model_name_or_path)


def _model_target(path: Path, loaded: Loaded, use: Use) -> Target:
    run, notes = run_of(path), tuple(loaded.notes)
    config = _config_of_run(run if use == "quantize" else None, loaded)
    template = config.template if "template" in loaded.given else None
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError("there is no file {path}; make one: python quantize.py saves/NAME", path=path)
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError("{path} is not a GGUF file; make it again: python quantize.py", path=path)
        if template:
            notes += (Message("template: a GGUF answers with the chat template in its file; this one is not used"),)
        return Target(str(path), config, str(path), run=run, notes=notes, recipe=loaded.recipe)
    folder = model_folder(str(path)) if use == "quantize" else _complete(model_folder(str(path)))
    return Target(str(path), config, str(folder), None, run, None, folder, template, notes, loaded.recipe)


def _adapter_target(folder: Path, loaded: Loaded, use: Use) -> Target:
    if not is_adapter(folder):
        _refuse_unfinished(folder)
    run = next((f for f in (folder, folder.parent) if (f / "config.yaml").is_file() and is_run(f)), None)
    config = _config_of_run(run, loaded)
    asked = loaded.typed if run else loaded.given
    template = config.template if "template" in asked else None
    settings = adapter_settings(folder)
    # a recipe may have been trained on another base than it names: model_name_or_path=... on the command line
    base = run_config(run).model_name_or_path if run else settings.get("base_model_name_or_path")
    if "model_name_or_path" in asked:
        base = config.model_name_or_path
    elif (revision := settings.get("revision")) not in (None, "main"):
        text = "{folder} was trained on {base} at {revision}; give model_name_or_path=a folder with that revision"
        raise UserError(text, folder=folder, base=base, revision=revision)
    found = Target(str(folder), config, "", folder, run, base, None, template, tuple(loaded.notes), loaded.recipe)
    if use == "quantize" and found.merged.exists():
        return dataclasses.replace(found, model=str(found.merged), tokenizer=found.merged)
    if not base:
        raise UserError("{folder} does not name its base model; give model_name_or_path=that model", folder=folder)
    model, name, notes = _base_to_answer(folder, base) if use == "answer" else _base_to_merge(folder, base)
    tokenizer = next((f for f in (folder, run) if f and (f / "tokenizer_config.json").is_file()), model)
    notes = (*loaded.notes, *notes)
    return dataclasses.replace(found, model=str(model), base=name, tokenizer=tokenizer, notes=notes)


def _base_to_answer(adapter: Path, base: str) -> tuple[Path, str, list[Message]]:
    """Folder and name of the base, or of its 16-bit original where only that is on the disk; and a note of that."""
    plain = QUANTIZED_NAME.sub("", base)
    if plain == base or find_model(base) or not find_model(plain):
        return _complete(model_folder(base, adapter)), base, []
    folder = _complete(model_folder(plain, adapter))
    text = "{quantized} is not on this disk; answering on its 16-bit original, {base}"
    note = Message(text, quantized=base, base=folder)
    return folder, plain, [note]


def _base_to_merge(adapter: Path, base: str) -> tuple[Path, str, list[Message]]:
    """Folder and name of the base, of one in 4 or 8 bit those of the model it was made of; and a note of that."""
    if base.endswith(".gguf"):
        text = "{base} is a GGUF; merge into its 16-bit original: model_name_or_path=FOLDER"
        raise UserError(text, base=base)
    plain = QUANTIZED_NAME.sub("", base)
    name = base if find_model(base) and not find_model(plain) else plain
    folder = model_folder(name, adapter)
    if quantization := read_object(folder / "config.json").get("quantization_config"):
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else quantization
        text = "{base} is quantized ({method}); merge into its 16-bit original: model_name_or_path={plain}"
        raise UserError(text, base=folder, method=method, plain=plain if plain != base else "FOLDER")
    if name == base:
        return folder, name, []
    note = Message("{quantized} is quantized; merging into {base}, which it was made of", quantized=base, base=folder)
    return folder, name, [note]


def _config_of_run(run: Path | None, loaded: Loaded) -> Config:
    """The settings of a run, and before them what the recipe and the command line say (see Target)."""
    config = loaded.config
    if run:
        given = {name: getattr(config, name) for name in {*loaded.given, "export_dir"}}
        config = dataclasses.replace(run_config(run), **given)
    overwrite = config.overwrite_output_dir and "overwrite_output_dir" in loaded.typed
    return dataclasses.replace(config, overwrite_output_dir=overwrite)


def _refuse_unfinished(folder: Path) -> NoReturn:
    """Raises the UserError for a run without an adapter; it names the newest checkpoint."""
    saved = [path for path in folder.glob("checkpoint-*") if is_adapter(path)]
    if saved:
        newest = max(saved, key=lambda path: int(path.name.rpartition("-")[2]))
        text = "{folder} has not finished training; name its newest checkpoint: {checkpoint}"
        raise UserError(text, folder=folder, checkpoint=newest)
    status = (read_run(folder) or {}).get("status")
    raise UserError("{folder} has no adapter (its training is {status}); train it", folder=folder, status=status)


def _refuse_without_adapter(path: Path) -> NoReturn:
    if not path.exists():
        near = nearest_path(path, _runs_beside(path))
        raise UserError("there is no run, adapter or recipe {path}{near:suggestion}", path=path, near=near)
    if any(path.glob("checkpoint-*/adapter_config.json")):
        _refuse_unfinished(path)
    raise UserError("{folder} has no adapter_config.json; give a run's folder or a PEFT adapter's", folder=path)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that PEFT saved."""
    return (folder / "adapter_config.json").is_file()


def read_arguments(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The target (None: the newest run) and the settings, `key=value`, of a command line. Raises UserError for two."""
    settings = [word for word in words if word.startswith("--") or ("=" in word and not Path(word).exists())]
    targets = [word for word in words if word not in settings]
    if len(targets) > 1:
        text = "{first} and {second} are two targets; give one, and settings as key=value"
        raise UserError(text, first=targets[0], second=targets[1])
    return (targets[0] if targets else None), settings


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
        return [*missing, "model.safetensors.index.json"]
    for name in weights:
        try:
            read_header(folder / name)
        except UserError:
            missing.append(name)
    return missing


def _runs_beside(folder: Path) -> list[Path]:
    return [file.parent for file in folder.parent.glob("*/run.json")]


def model_folder(name: str, adapter: Path | None = None) -> Path:
    """The folder of a model that is on the disk (see `find_model`); `adapter`: it is the base of that one."""
    if folder := find_model(name):
        return folder
    if ggufs := sorted(Path(name).glob("*.gguf")):
        text = "{folder} holds {files}; name one: {command}"
        raise UserError(text, folder=name, files=[f.name for f in ggufs], command=common.command("chat.py", ggufs[0]))
    if Path(name).is_dir():
        raise UserError("{folder} is no run, adapter or model (it has no config.json)", folder=name)
    runs = _runs_beside(Path(name)) if "/" in name else []
    if not adapter and (runs or Path(name).parent == SAVES):
        text = "there is no run {folder}{near:suggestion}; python evaluate.py --runs lists them"
        raise UserError(text, folder=name, near=nearest_path(Path(name), runs))
    plain = QUANTIZED_NAME.sub("", name)
    fetch = common.command("download.py", plain if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", plain) else "ORG/NAME")
    if adapter:
        text = "{base}, the base of {adapter}, is not on this disk; fetch it ({command}), or give model_name_or_path="
        raise UserError(text, base=plain, adapter=adapter, command=fetch)
    raise UserError("there is no model {model}; fetch it ({command}), or name its folder", model=name, command=fetch)


def _complete(folder: Path) -> Path:
    """The folder of a model; raises UserError where it lacks something."""
    if missing := missing_from_model(folder):
        text = "{model} is not complete: it lacks {missing}; fetch or make it again"
        raise UserError(text, model=folder, missing=missing)
    return folder
