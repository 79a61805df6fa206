"""A run as the board sees it: its name, its folder, its state; and how runs are started, paused, continued, aborted."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock

import common
from common import Config, Message, UserError
from runs import files
from runs import folder as folders
from runs.configuration import defaults_of
from runs.files import write_text
from runs.folder import left_by_training, run_folders
from web import chat_model, jobs

BOARD = ".web"  # the board's folder within a run folder, and within saves/
STATUSES = ("running", "finished", "interrupted", "failed")  # what train.py writes into run.json
MAX_NAME_BYTES = 200  # of a part of a run's name: file systems take 255, and a GGUF's name is the run's and more


# ---------------------------------------------------------------------------------------------------------------------
# Names and folders


def is_valid_name(name: str) -> bool:
    """Whether a run may be called so: its folder must stay below saves/, also through links, and not be hidden."""
    parts = Path(name.strip()).parts
    unfit = any(p in ("/", "uploads") or p[0] == "." or len(p.encode()) > MAX_NAME_BYTES for p in parts)
    if not parts or unfit or "\\" in name or not name.strip().isprintable():
        return False
    return is_below(common.SAVES.joinpath(*parts), common.SAVES)


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder when all symbolic links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def run_folder(name: str) -> Path:
    """The folder of a run; raises UserError for what cannot be the name of one."""
    if not is_valid_name(name):
        raise UserError("{name} cannot be a run's name; use letters, digits, - and _ (200 bytes)", name=repr(name))
    return common.SAVES.joinpath(*Path(name.strip()).parts)


def name_of(folder: Path) -> str:
    return folder.relative_to(common.SAVES).as_posix()


def job_folder(folder: Path, kind: str = "train") -> Path:
    return folder / BOARD / kind


def run_names() -> list[str]:
    """The runs below saves/, with those that the board has only just started, newest first."""
    begun = [(folder / "run.json", folder) for folder in run_folders()]
    begun += [(path, path.parents[2]) for path in common.SAVES.rglob(f"{BOARD}/train/job.json")]
    newest: dict[str, float] = {}
    for file, folder in begun:
        newest[name_of(folder)] = max(newest.get(name_of(folder), 0.0), file.stat().st_mtime)
    return sorted(filter(is_valid_name, newest), key=newest.__getitem__, reverse=True)


def choose_trained(name: str | None) -> tuple[list[str], str | None]:
    """The runs that have an adapter, newest first, and the one that is looked at: `name`, or the newest."""
    adapter = ("adapter_config.json", "adapter_model.safetensors")
    names = [run for run in run_names() if all((run_folder(run) / file).is_file() for file in adapter)]
    return names, name if name in names else next(iter(names), None)


def exists(name: str) -> bool:
    """Whether there is a run of that name, or what another program has left of one, which a new one would replace."""
    return is_valid_name(name) and bool(left_by_training(run_folder(name)))


def read_json(path: Path) -> dict[str, Any]:
    """A record that a command has left, or nothing where there is none yet or it is broken."""
    try:
        found = files.read_json(path, {})
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# States


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder, or None where there is none that train.py has written."""
    try:
        run = folders.read_run(folder)
        datetime.fromisoformat(run["started"])
        return run if run["status"] in STATUSES else None
    except (UserError, KeyError, TypeError, ValueError):
        return None


def is_training(run: dict[str, Any] | None) -> bool:
    """Whether the process that run.json names is at work; another program that has its number by now is not it."""
    return bool(run and run["status"] == "running" and jobs.is_alive(run.get("pid", 0), run.get("created", 0)))


def run_state(folder: Path) -> str:
    """`running`, `starting`, `finished`, `interrupted`, `failed`, `killed`, `aborted`, or `none`: never started."""
    run, job = read_run(folder), jobs.find(job_folder(folder))
    if is_training(run):
        return "running"
    if jobs.is_running(job):  # it has written how it ended and is about to end, or is not as far as its run.json
        return (
            "running" if run and datetime.fromisoformat(run["started"]).timestamp() >= job.created - 2 else "starting"
        )
    if run:
        state = "killed" if run["status"] == "running" else run["status"]
    else:
        state = {"stopped": "interrupted", "done": "none"}.get(ended := jobs.state(job), ended) if job else "none"
    return "aborted" if state == "killed" and was_aborted(folder) else state


def was_aborted(folder: Path) -> bool:
    """Whether the last training that was started in a run folder was ended by `abort`."""
    try:
        asked = (job_folder(folder) / jobs.ABORTED).stat().st_mtime
    except FileNotFoundError:
        return False
    run = read_run(folder)  # which a terminal may have started since
    return not run or asked >= datetime.fromisoformat(run["started"]).timestamp()


def training_now() -> str | None:
    """The name of the run that is training now."""
    return next((n for n in run_names() if run_state(run_folder(n)) in ("running", "starting")), None)


def device_user() -> Message | None:
    """What uses the device's memory now: a training, also one of a terminal, or a command that a page started."""
    started = (jobs.find(path.parent) for path in common.SAVES.rglob(f"{BOARD}/*/job.json"))
    for job in started:
        if jobs.is_running(job) and job.folder.name != "train":
            return jobs.still_running(job)
    if name := training_now():
        return Message("{name} is training; one run at a time: wait for it, pause it or abort it", name=name)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Starting and ending


@contextlib.contextmanager
def _device() -> Iterator[None]:
    """Keeps the device free while a command is started; raises UserError where something uses its memory.

    One board at a time may look and start (there may be two on one folder), and the chat's model gives its memory back.
    """
    (common.SAVES / BOARD).mkdir(parents=True, exist_ok=True)
    with FileLock(common.SAVES / BOARD / "lock"):
        if user := device_user():
            raise UserError.from_message(user)
        chat_model.stop_and_free()
        yield


def start_command(folder: Path, command: list[str], language: str) -> jobs.Job:
    """Starts a command that needs all of the device's memory; see jobs.start.

    Raises UserError where another such command is at work.
    """
    with _device():
        return jobs.start(folder, command, language)


def differing(config: Config) -> dict[str, Any]:
    """The options that differ from the defaults of their stage, as a recipe has them."""
    defaults = defaults_of(config.stage).items()
    chosen = {name: getattr(config, name) for name, default in defaults if getattr(config, name) != default}
    return {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in chosen.items()}


def recipe_text(config: Config) -> str:
    return yaml.safe_dump(differing(config), sort_keys=False, allow_unicode=True, width=120)


def train_command(config: Config) -> list[str]:
    """The command that trains this configuration without a recipe."""
    texts = {name: str(v).lower() if isinstance(v, bool) else v for name, v in differing(config).items()}
    return ["train.py", *(f"{name}={text}" for name, text in texts.items())]


def start_run(config: Config, overwrite: bool, language: str) -> Path:
    """Writes the recipe into the run folder and starts train.py with it; raises UserError where it cannot be."""
    folder = Path(config.output_dir)
    if left_by_training(folder) and not overwrite:
        raise UserError("{folder} holds a run; choose another name, resume it, or tick start over", folder=folder)
    with _device():
        recipe = folder / BOARD / "recipe.yaml"  # in the board's own folder: saves/NAME/recipe.yaml may be the user's
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_text(recipe, recipe_text(config))
        again = ["overwrite_output_dir=true"] if overwrite else []
        jobs.start(job_folder(folder), ["train.py", str(recipe), *again], language)
    return folder


def go_on(folder: Path, language: str) -> None:
    """Starts an interrupted run again, which goes on from its newest checkpoint."""
    recipe = next((folder / n for n in ("config.yaml", f"{BOARD}/recipe.yaml") if (folder / n).exists()), None)
    if recipe is None:
        raise UserError("{folder} has no recipe to resume with; start a new run", folder=folder)
    start_command(job_folder(folder), ["train.py", str(recipe), "overwrite_output_dir=false"], language)


def pause(folder: Path) -> None:
    """What Ctrl-C does: a checkpoint after the step, then the end. Also for a run that a terminal has started."""
    _send_signal(folder, signal.SIGINT)


def abort(folder: Path) -> None:
    """Ends a run at once; its newest checkpoint stays. A file in the folder says that it was asked for."""
    if run_state(folder) in ("running", "starting"):
        job_folder(folder).mkdir(parents=True, exist_ok=True)
        (job_folder(folder) / jobs.ABORTED).touch()
    _send_signal(folder, signal.SIGKILL)


def _send_signal(folder: Path, number: signal.Signals) -> None:
    run, job = read_run(folder), jobs.find(job_folder(folder))
    if jobs.is_running(job):
        jobs.send_signal(job, number)
    elif is_training(run):
        psutil.Process(run["pid"]).send_signal(number)


def newest_job(name: str | None, kinds: Sequence[str]) -> jobs.Job | None:
    """The command of `kinds` that was started last for a run."""
    if not name:
        return None
    found = [job for kind in kinds if (job := jobs.find(job_folder(run_folder(name), kind)))]
    return max(found, key=lambda job: job.created, default=None)


def stop_newest(name: str | None, kinds: Sequence[str]) -> None:
    """Interrupts the command of `kinds` that was started last for a run."""
    if job := newest_job(name, kinds):
        jobs.send_signal(job)
