"""The registry of datasets, dataset_info.json as LLaMA-Factory defines it: names → where the rows are, and their form.

A name that is not in the registry may be the path of a file or folder.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import Config, Message, UserError, nearest_path, nearest_word
from preprocessing.faults import Fault, json_problem, no_key_twice

REGISTRY = "dataset_info.json"
TEXT_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
MEDIA = ("images", "videos", "audios")
PAIRS = ("chosen", "rejected")
COLUMNS = (*TEXT_COLUMNS, "messages", *MEDIA, *PAIRS, "kto_tag")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url")
PLACES = ("file_name", *HUBS, "script_url", "cloud_file_name")
TEXTS = (*PLACES, "formatting", "subset", "split", "folder")
MOST_SAMPLES = 10**8  # of num_samples
KEYS = (*TEXTS, "ranking", "num_samples", "columns", "tags")
EXTENSIONS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "txt"}
# What stands beside the rows in folders that `datasets` writes, and in a folder with a registry.
NO_ROWS = (REGISTRY, "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Entry:
    """One dataset that a run uses."""

    name: str
    stage: str  # what is made of the rows: conversations (sft), documents (pt), pairs (dpo), judged answers (kto), ...
    files: tuple[Path, ...] = ()  # where it is on the disk; else:
    hub: str = ""  # "hf" or "ms"
    repository: str = ""  # its name there
    formatting: str | None = None  # alpaca, sharegpt, openai; None: decided by the rows
    columns: dict[str, str | None] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    registered: bool = True
    notes: tuple[Message, ...] = ()


def entries_of(config: Config) -> list[Entry]:
    """The entries of a configuration's dataset, then those of its eval_dataset."""
    return find_entries((*config.dataset, *config.eval_dataset), config.dataset_dir, config.stage)


def find_entries(names: Iterable[str], dataset_dir: str, stage: str = "sft") -> list[Entry]:
    """The entries of `names`, each a name of the registry or a path; raises UserError with all that is wrong."""
    folder = Path(dataset_dir)
    if dataset_dir.upper().startswith(("ONLINE", "REMOTE:")) and not folder.exists():
        raise UserError(
            "dataset_dir={dataset_dir} is not supported; write the datasets of a hub into data/dataset_info.json:\n"
            '"NAME": {{"hf_hub_url": "ORG/NAME"}}, and use dataset_dir=data dataset=NAME',
            dataset_dir=dataset_dir,
        )
    registry = read_registry(folder / REGISTRY)
    entries, faults = [], []
    for name in names:
        try:
            if name in registry:
                entries.append(_registered_entry(name, registry[name], folder, stage))
            else:
                path = _existing_path(name, folder)
                entries.append(_at_path(Entry(name, stage, registered=False), path))
        except FileNotFoundError:
            faults.append(_unknown_name(name, registry, folder))
        except OSError as error:  # a name that is too long, a folder that may not be read
            faults.append(Message("{path} cannot be used: {problem}", path=error.filename, problem=error.strerror))
        except Fault as fault:
            faults.append(Message("dataset '{name}' {reason}", name=name, reason=fault.message))
    if faults:
        raise UserError(
            "{faults:lines}\ncorrect dataset_info.json, or name other datasets with dataset=...", faults=faults
        )
    return entries


def read_registry(path: Path) -> dict[str, Any]:
    """The content of dataset_info.json; nothing where there is none. Raises UserError where it is no JSON object."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise UserError("{file} is not a file; dataset_dir must be a folder with a dataset_info.json", file=path)
    return _parsed_registry(path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=4)
def _parsed_registry(path: Path, *_: int) -> dict[str, Any]:
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=no_key_twice)
    except Fault as fault:
        raise UserError("{file}: {reason}", file=path, reason=fault.message) from None
    except json.JSONDecodeError as error:
        raise UserError(
            "{file}, line {line}, column {column}: {problem}; correct the JSON",
            file=path,
            line=error.lineno,
            column=error.colno,
            problem=json_problem(error),
        ) from None
    except UnicodeDecodeError:
        raise UserError("{file} is not UTF-8; save it as UTF-8", file=path) from None
    except RecursionError:
        registry = None
    if not isinstance(registry, dict):
        raise UserError("{file} must hold a JSON object: a name and a description for each dataset", file=path)
    return registry


def _unknown_name(name: str, registry: dict[str, Any], folder: Path) -> Message:
    if not folder.is_dir() and not Path(name).suffix:
        return Message(
            "dataset '{name}': there is no folder dataset_dir={folder}, and no such file", name=name, folder=folder
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and Path(name).suffix.lower() not in EXTENSIONS:
        return Message(
            "there is no file '{name}'; to read a dataset of this name from Hugging Face, add it to {registry}:\n"
            '"NAME": {{"hf_hub_url": "{name}"}}, and use dataset=NAME',
            name=name,
            registry=folder / REGISTRY,
        )
    if re.search("[，、；]", name):
        meant = re.sub("[，、；]", ",", name).replace(" ", "")
        return Message(
            "'{name}' has a Chinese comma; separate datasets with ASCII commas: {meant}", name=name, meant=meant
        )
    near = nearest_word(name, [*registry, *(p.name for p in folder.glob("*") if p.suffix in EXTENSIONS)])
    near = near or nearest_path(Path(name), (p for p in Path(name).parent.glob("*") if p.suffix in EXTENSIONS))
    if near is None and registry:
        return Message("there is no dataset or file '{name}'; registered are {known}", name=name, known=[*registry])
    return Message("there is no dataset or file '{name}'{near:suggestion}", name=name, near=near)


def _registered_entry(name: str, description: Any, folder: Path, stage: str) -> Entry:
    if not isinstance(description, dict):
        raise Fault("is not described by an object in dataset_info.json")
    notes = _check_types(description)
    columns, tags = description.get("columns") or {}, description.get("tags") or {}
    kinds = {kind for kind in COLUMNS if columns.get(kind)}
    refuse_other_data(kinds | (set(PAIRS) if description.get("ranking") else set()), stage)
    entry = Entry(
        name,
        stage,
        formatting=description.get("formatting"),
        columns={kind: column for kind, column in columns.items() if kind in COLUMNS},
        tags={tag: value for tag, value in tags.items() if tag in TAGS},
        subset=description.get("subset"),
        split=description.get("split") or "train",
        folder=description.get("folder"),
        num_samples=description.get("num_samples"),
        notes=notes,
    )
    hf, ms = description.get("hf_hub_url"), description.get("ms_hub_url")
    modelscope = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true", "y")
    if ms and (modelscope or not hf):
        return replace(entry, hub="ms", repository=ms)
    if hf:
        return replace(entry, hub="hf", repository=hf)
    if file_name := description.get("file_name"):
        path = folder / os.path.expanduser(os.path.expandvars(file_name))
        if "[" in entry.split:
            raise Fault("has split {split}, which only datasets of a hub can have; use num_samples", split=entry.split)
        return _at_path(entry, path)
    if other := next((key for key in PLACES if description.get(key)), None):
        raise Fault(
            "is only at a {key}, which this kit does not read; download it and name it with file_name", key=other
        )
    raise Fault("names no file_name in dataset_info.json")


def _check_types(description: dict[str, Any]) -> tuple[Message, ...]:
    """Notes on what is not used; raises Fault for values of the wrong type, and for keys that are probably misspelt."""
    texts = {key: description.get(key) for key in TEXTS}
    unknown = [(key, nearest_word(key, KEYS)) for key in description.keys() - set(KEYS)]  # others may have more keys
    notes = []
    for kind, known in (("columns", COLUMNS), ("tags", TAGS)):
        given = description.get(kind) or {}
        if not isinstance(given, dict):
            raise Fault('has {key} in dataset_info.json that are no object; write {{"...": "..."}}', key=kind)
        texts |= {f"{kind}: {key}": value for key, value in given.items()}
        for key in (key for key in given if key not in known):
            unknown.append((f"{kind}: {key}", nearest_word(key, known)))
            notes.append(Message("dataset_info.json has '{key}', which is not used", key=f"{kind}: {key}"))
    for key, value in texts.items():
        if not isinstance(value, str | None):
            shown = json.dumps(value, ensure_ascii=False)[:60]
            raise Fault("has {key}: {value} in dataset_info.json; it must be text", key=key, value=shown)
    for key, near in unknown:
        if near:
            raise Fault("has the unknown key '{key}' in dataset_info.json{near:suggestion}", key=key, near=near)
    if texts["formatting"] not in (None, "alpaca", "sharegpt", "openai"):
        formatting = texts["formatting"]
        raise Fault("has formatting '{formatting}'; it must be alpaca, sharegpt or openai", formatting=formatting)
    count = description.get("num_samples")
    if count is not None and (type(count) is not int or not 1 <= count <= MOST_SAMPLES):
        raise Fault("has num_samples {value}; it must be a whole number from 1 to 100 million", value=json.dumps(count))
    return tuple(notes)


def refuse_row(row: dict[str, Any], stage: str) -> None:
    """Raises Fault where a row without registry is of a kind that `stage` cannot use."""
    kinds = {kind for kind in MEDIA if row.get(kind)}
    if all(name in row for name in PAIRS) or all(f"{name}_messages" in row for name in PAIRS):
        kinds.update(PAIRS)
    if isinstance(row.get("kto_tag"), bool) or ("completion" in row and isinstance(row.get("label"), bool)):
        kinds.add("kto_tag")
    if kinds:
        refuse_other_data(kinds, stage)


def refuse_other_data(kinds: Iterable[str], stage: str) -> None:
    """Raises Fault where columns of these `kinds` (see COLUMNS) make a dataset one that `stage` cannot use."""
    kinds = set(kinds)
    if media := [kind for kind in MEDIA if kind in kinds]:
        raise Fault("has {kind}; this kit trains on text", kind=media[0])
    if kinds & set(PAIRS) and stage not in ("dpo", "pt"):
        raise Fault("is preference data (chosen and rejected answers), which only stage: dpo trains on")
    if "kto_tag" in kinds and stage not in ("kto", "pt"):
        raise Fault("is preference data (answers marked as good or bad), which only stage: kto trains on")


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders


def _existing_path(name: str, folder: Path) -> Path:
    """The path of a dataset without registry; raises FileNotFoundError where there is none."""
    found = next((path for path in (Path(name).expanduser(), folder / name) if path.exists()), None)
    if found is None:
        raise FileNotFoundError(name)
    return found


def _at_path(entry: Entry, path: Path) -> Entry:
    """The entry with the files of its split at a path, and a note on those of a folder that are of another."""
    files, others = data_files(path, entry.split)
    names = [file.name for file in others]
    note = Message("{folder}: split {split} is used, not {others}", folder=path, split=entry.split, others=names)
    return replace(entry, files=files, notes=(*entry.notes, note) if others else entry.notes)


Files = tuple[Path, ...]


def data_files(path: Path, split: str) -> tuple[Files, Files]:
    """The files of a dataset at `path`, a file or a folder, and those of its other splits.

    Raises Fault where there are none that can be read.
    """
    if path.is_dir():
        return _files_of_folder(path, split)
    if not path.exists():
        near = nearest_word(path.name, (p.name for p in path.parent.glob("*")))
        raise Fault("names the file {file}, which does not exist{near:suggestion}", file=path, near=near)
    if not path.is_file():  # reading it might never end
        raise Fault("is in {file}, a pipe or a device; write its rows into a file first", file=path)
    if path.suffix.lower() not in EXTENSIONS:
        raise Fault("is in {file}, whose type is unknown; known are {known}", file=path, known=list(EXTENSIONS))
    return (path,), ()


def _files_of_folder(folder: Path, split: str) -> tuple[Files, Files]:
    if (folder / "dataset_dict.json").is_file() and (folder / split).is_dir():
        return _files_of_folder(folder / split, split)  # save_to_disk of a DatasetDict
    if (folder / "state.json").is_file() and (saved := _saved_files(folder)):
        return saved, ()
    if names := _registered_names(folder / REGISTRY):
        raise Fault(
            "is the folder {folder}, which has a dataset_info.json; use dataset_dir={folder} and one of its "
            "datasets: {names}",
            folder=folder,
            names=names[:20],
        )
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in EXTENSIONS and path.name[0] != "." and path.name not in NO_ROWS and path.is_file()
    )
    kinds = sorted({EXTENSIONS[path.suffix.lower()] for path in files})
    if not kinds:
        raise Fault(
            "is the folder {folder}, which holds no data files ({known})", folder=folder, known=list(EXTENSIONS)
        )
    if len(kinds) > 1:
        raise Fault(
            "is the folder {folder}, with files of several types ({types}); name one file", folder=folder, types=kinds
        )
    return _files_of_split(files, split)


def _files_of_split(files: list[Path], split: str) -> tuple[Files, Files]:
    """Those of a folder's files that belong to a split, by names as on the hub (train.csv, test-00000-of-00001.csv),
    and the others."""
    splits = {path: re.split(r"[-_.]", path.name)[0] for path in files}
    known = set(splits.values()) & {"train", "test", "validation"}
    if len(known) < 2 or split not in known:
        return tuple(files), ()
    return tuple(p for p in files if splits[p] == split), tuple(p for p in files if splits[p] != split)


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of a folder that `Dataset.save_to_disk` wrote, in order; none where state.json is another's."""
    try:
        names = [item["filename"] for item in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]]
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    if lacking := next((file for file in files if not file.is_file()), None):
        raise Fault("names the file {file}, which does not exist{near:suggestion}", file=lacking, near=None)
    return tuple(files)


def _registered_names(path: Path) -> list[str]:
    """The datasets that a dataset_info.json describes by name; none where it is metadata that `datasets` wrote."""
    try:
        content = read_registry(path)
    except UserError:
        return []
    described = any(isinstance(value, dict) and set(PLACES) & value.keys() for value in content.values())
    return [*content] if described else []
