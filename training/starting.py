"""Where a run begins: what an earlier one left in its folder, and all faults that can be told before anything heavy."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Config, Loaded, UserError
from preprocessing import dataset
from preprocessing.chat_template import check_name
from runs.folder import left_by_training, read_run
from runs.process import is_alive
from runs.target import find_model, missing_from_model
from training import preflight

# What a run may be continued with although it was begun with another value: none of it changes the result.
HARMLESS = {
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "overwrite_cache",
    "preprocessing_num_workers",
    "output_dir",
    "plot_loss",
    "save_total_limit",
    "report_to",
    "logging_steps",
    "logging_first_step",
    "save_steps",
    *list(common.OPTIONS)[list(common.OPTIONS).index("do_sample") :],  # chat and export
}


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what is said of it."""

    says: str = ""  # of a folder that holds no run
    checkpoint: str | None = None  # to go on from
    finished: bool = False  # nothing is left to do
    clears: bool = False  # what the folder holds of an earlier run is deleted


def where_to_start(loaded: Loaded, folder: Path) -> Start:
    """Looks at what an earlier run has left in `folder`, and changes nothing.

    A recipe that says overwrite_output_dir (nearly every file of LLaMA-Factory does) means the runs before this one:
    started again after an interruption it goes on. Only the command line starts an interrupted run over.
    """
    config, typed = loaded.config, "overwrite_output_dir" in loaded.typed
    named = named_checkpoint(config)
    within = named is not None and Path(named).resolve().is_relative_to(folder.resolve())
    refuse_running(folder)
    left = left_by_training(folder)
    goes_on = within or (not typed and named is None and is_interrupted(config, folder))
    if config.overwrite_output_dir and not goes_on:
        over = f"{folder} is started over: what it holds of an earlier run is deleted as soon as this one begins"
        return Start(over if left else "", named, clears=True)
    run = read_run(folder)
    if run is None and left and not within:
        raise UserError(
            f"{folder} holds {left[0].name} but no run.json, so nothing is known of that run; "
            "choose another output_dir, or overwrite_output_dir=true"
        )
    if run is None:
        return Start(f"going on from {named}" if named else "", named)
    if changed := changed_settings(config, folder):
        over = "" if within else ", or overwrite_output_dir=true on the command line"
        raise UserError(
            f"{folder} was begun with other settings ({'; '.join(changed)}); "
            f"give them as they were, or choose another output_dir{over}"
        )
    if run["status"] == "finished":
        again = "to train it again: overwrite_output_dir=true, or another output_dir"
        return Start(f"{folder} is finished; {again}", finished=True)
    checkpoint = named or newest_checkpoint(config, folder)
    kept = " (overwrite_output_dir starts an interrupted run over only on the command line)"
    kept = " (overwrite_output_dir would delete it)" if within else kept
    note = kept if config.overwrite_output_dir else ""
    return Start(f"going on from {checkpoint}{note}" if checkpoint else f"{folder} begins again", checkpoint)


def refuse_running(folder: Path) -> None:
    """Raises UserError where another process trains in `folder`."""
    try:
        run = read_run(folder) or {}
    except UserError:  # a broken run.json, which is looked at where it matters
        return
    if run.get("status") == "running" and is_alive(run.get("pid", 0), run.get("created")):
        raise UserError(f"{folder} is being trained by process {run['pid']}; wait for it, or choose another output_dir")


def changed_settings(config: Config, folder: Path) -> list[str]:
    """The settings, of those that change the result, which the run in `folder` was begun with at another value."""
    begun = locate_model(common.load_config([str(folder / "config.yaml")])).config
    return [
        f"{name}={_shown(getattr(begun, name))} then, {_shown(getattr(config, name))} now"
        for name in common.OPTIONS
        if name not in HARMLESS and getattr(begun, name) != getattr(config, name)
    ]


def is_interrupted(config: Config, folder: Path) -> bool:
    """Whether `folder` holds an interrupted run and a checkpoint of it."""
    try:
        run = read_run(folder)
    except UserError:  # broken: nothing to go on from
        return False
    return run is not None and run["status"] != "finished" and newest_checkpoint(config, folder) is not None


def _shown(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def named_checkpoint(config: Config) -> str | None:
    """The checkpoint that the configuration names; raises UserError where it is none."""
    wanted = config.resume_from_checkpoint
    if wanted in (None, "true", "false"):
        return None
    if not (Path(wanted) / "trainer_state.json").exists():
        raise UserError(f"resume_from_checkpoint: {wanted} is not a checkpoint; name a checkpoint-N folder of a run")
    return wanted


def newest_checkpoint(config: Config, folder: Path) -> str | None:
    """The run's newest checkpoint, unless none is wanted; every one there is whole."""
    if config.resume_from_checkpoint == "false":
        return None
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    newest = max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return str(newest) if newest is not None else None


def check_checkpoint(start: Start, folder: Path, steps: int) -> None:
    """Raises UserError where another run's checkpoint leaves nothing of `steps` to train."""
    if start.checkpoint is None or Path(start.checkpoint).resolve().is_relative_to(folder.resolve()):
        return
    state = json.loads((Path(start.checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] >= steps:
        raise UserError(
            f"resume_from_checkpoint: {start.checkpoint} stands at step {state['global_step']} of {steps}, so nothing "
            "is left to train; raise num_train_epochs, or start from its weights with adapter_name_or_path"
        )


def make_room(start: Start, folder: Path) -> None:
    """Deletes what the run takes the place of."""
    refuse_running(folder)  # loading took a while
    if start.clears:
        clear(folder)
    shutil.rmtree(folder / ".saving", ignore_errors=True)  # a checkpoint that a kill has cut short


def clear(folder: Path) -> None:
    """Deletes what an earlier run left in `folder`, and nothing else."""
    for path in left_by_training(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at before anything heavy


def check(loaded: Loaded, folder: Path) -> Start:
    """Where the run begins; raises UserError with all that can be told to be wrong before anything heavy."""
    config, name = loaded.config, loaded.config.model_name_or_path
    looks = checks(loaded, folder) | {"data": lambda: dataset.check(config)}
    is_made_first = name == common.EMBEDDED_MODEL and not Path(name).exists()
    if not is_made_first:
        looks["model"] = lambda: check_model(config)
    found, faults = {}, []
    for what, look in looks.items():
        try:
            found[what] = look()
        except UserError as error:
            faults.append(str(error))
        if what == "run" and not faults and found[what].finished:
            return found[what]
    if faults:
        raise UserError(faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n" + "\n".join(faults))
    if is_made_first:
        make_embedded_model()
        check_model(config)
    return found["run"]


def checks(loaded: Loaded, folder: Path) -> dict[str, Callable[[], Any]]:
    """By what they look at, checks of a run that each raise UserError; `--dry-run` makes them, too."""
    config = loaded.config
    return {
        "run": lambda: where_to_start(loaded, folder),
        "template": lambda: config.template is None or check_name(config.template),
        "settings": lambda: check_environment(config),
    }


def locate_model(loaded: Loaded) -> Loaded:
    """With the folder of the model in place of another name of it: that is what is read, and recorded."""
    folder = find_model(loaded.config.model_name_or_path)
    if folder is None:
        return loaded
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, model_name_or_path=str(folder)))


def adapter_notes(loaded: Loaded) -> list[str]:
    """A note where settings of the adapter are given that the adapter to go on with does not follow."""
    config = loaded.config
    try:
        own = json.loads((Path(config.adapter_name_or_path or "") / "adapter_config.json").read_text(encoding="utf-8"))
        has = {
            "lora_rank": (own["r"], config.lora_rank),
            "lora_alpha": (own["lora_alpha"], config.alpha),
            "lora_target": (set(own["target_modules"]), set(config.lora_target)),
        }
    except (OSError, ValueError, KeyError, TypeError):  # no adapter, or not a whole one, which check_environment tells
        return []
    if has["lora_target"][1] == {"all"}:
        has.pop("lora_target")
    other = [name for name, (its, ours) in has.items() if its != ours and name in loaded.given]
    if not other:
        return []
    return [f"{', '.join(other)}: {config.adapter_name_or_path} is trained further as it is, of rank {own['r']}"]


def make_embedded_model() -> None:
    """Makes the embedded model, which is asked for the first time."""
    status = subprocess.run([sys.executable, str(common.ROOT / "download.py")]).returncode
    if status:
        sys.exit(status)


def check_model(config: Config) -> None:
    """Raises UserError where the base model is not on the disk, not whole, or not fit for the settings."""
    path = Path(config.model_name_or_path).expanduser()
    missing = missing_from_model(path)
    if missing and not path.exists():
        fetch = common.command("download.py", preflight.hub_name(config.model_name_or_path) or "ORG/NAME")
        raise UserError(f"there is no model at {path}; fetch it ({fetch}) or set model_name_or_path")
    if missing:
        raise UserError(f"{path} is not a whole model, it lacks {', '.join(missing)}; fetch it again")
    if faults := preflight.model_faults(config, preflight.read_model(path)):
        raise UserError("\n".join(faults))


def check_environment(config: Config) -> None:
    """Raises UserError for what the device or the installation cannot do, before anything heavy."""
    gpu = common.find_gpu()
    if config.quantization_bit == 8 and gpu is None:
        raise UserError("quantization_bit: 8 needs a GPU; take it out, or use 4")
    if gpu is not None and (fault := preflight.gpu_fault(gpu)):
        raise UserError(f"{fault}; {preflight.HIDE_THE_CARD}")
    if config.adapter_name_or_path is not None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(config.adapter_name_or_path) / name).is_file():
                raise UserError(f"adapter_name_or_path: {config.adapter_name_or_path} has no {name}; name a run folder")
    for package in config.report_to:
        if package != "none" and importlib.util.find_spec(package) is None:
            raise UserError(f"report_to: {package} is not installed; {sys.executable} -m pip install {package}")
