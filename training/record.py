"""What a run folder records of a training: config.yaml, run.json, and which conversations were learned."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Message
from runs.files import write_json, write_text
from runs.folder import READ_WITH, TRAINED, Training, last_value, mean_loss, read_log, read_run
from runs.redaction import typed_command
from training.arguments import REWARDS
from training.hardware import peak_memory

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from training.prepare import Prepared

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "unsloth", "unsloth_zoo", "bitsandbytes")


def begin_record(prepared: Prepared, trained: Sequence[Training], is_known: bool) -> None:
    """Writes trained.npy, config.yaml and run.json, in this order (resume.left_by_run), before the first step.

    `trained` are the trainings that this one continues, all of them where `is_known`.
    """
    import psutil

    start, folder, resumed = prepared.start, prepared.start.folder, prepared.start.resume.checkpoint
    earlier = (read_run(folder) or {}) if resumed else {}
    before = [*earlier.get("earlier_inputs", ()), earlier.get("inputs")]
    write_fingerprints(folder, prepared.data, trained)
    read_with = [{name: getattr(training.config, name) for name in READ_WITH} for training in trained]
    write_text(folder / "config.yaml", common.dump_config(repeatable(start.loaded.config)))
    gpu = start.gpu
    run = {
        "status": "running",
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),  # of the process: another may have its number one day
        "host": socket.gethostname(),
        "started": _now(),
        "resumed_from": str(resumed) if resumed else None,
        "recipe": str(start.loaded.recipe) if start.loaded.recipe else None,
        "command": typed_command(),
        "processes": start.processes.count,
        "model": start.loaded.config.model_name_or_path,
        "seed": start.loaded.config.seed,
        "device": dataclasses.asdict(gpu) if gpu else {"name": "cpu", "cores": os.cpu_count()},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "commit": commit(),
        "data": prepared.data.report,
        "inputs": prepared.inputs,
        "trained_before": [one for i, one in enumerate(read_with) if one not in read_with[:i]] if is_known else None,
        "earlier_inputs": [found for found in before if found and found != prepared.inputs],
    }
    write_json(folder / "run.json", run)


def repeatable(config: Config) -> Config:
    """What config.yaml holds: it trains the same again, and deletes nothing."""
    return dataclasses.replace(config, overwrite_output_dir=False, resume_from_checkpoint=None, overwrite_cache=False)


def write_fingerprints(folder: Path, data: TrainingData, before: Sequence[Training]) -> None:
    """Writes the fingerprints of the conversations that are trained on: evaluate.py never measures on them.

    They are kept because data files change, and with them those of the trainings before.
    """
    import numpy as np

    earlier = sorted(set().union(*(training.contents for training in before)))
    contents = np.union1d(np.array(earlier, np.int64), data.contents)
    beside = folder / f".{TRAINED}"
    with open(beside, "wb") as opened:
        np.save(opened, contents)
    os.replace(beside, folder / TRAINED)


def complete_record(folder: Path, status: str, **facts: Any) -> None:
    """Completes run.json at the end: "finished", "interrupted" or "failed", and what came of it."""
    run = read_run(folder) or {}
    run.update(status=status, ended=_now(), **facts)
    write_json(folder / "run.json", run)


def facts_of(trainer: Any, prepared: Prepared, stopped_early: Message | None) -> dict[str, Any]:
    """What run.json says of a training that has ended."""
    state, lines = trainer.state, read_log(prepared.start.folder)
    evaluations = [line for line in state.log_history if "eval_loss" in line]
    best_is_kept = trainer.args.load_best_model_at_end and state.best_global_step
    best = [line for line in evaluations if line["step"] == state.best_global_step] if best_is_kept else []
    kept = (best or evaluations or [{}])[-1]
    return {
        "steps": state.global_step,
        "total_steps": state.max_steps,
        "stopped_early": stopped_early.to_json() if stopped_early else None,
        "best_step": state.best_global_step if best_is_kept else state.global_step,  # whose adapter is kept
        "stop": prepared.template.stop,  # what ends a turn: merge.py and quantize.py read it
        "tokens": int(state.num_input_tokens_seen),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "seconds": lines[-1]["elapsed"] if lines else None,
        "train_loss": mean_loss(lines),
        "first_loss": next((line["loss"] for line in lines if "loss" in line), None),
        "last_loss": last_value(lines, "loss"),
        "eval_loss": kept.get("eval_loss"),
        "eval_reward_accuracy": kept.get(f"eval_{REWARDS['reward_accuracy']}"),
        **(_rewards(lines) if prepared.config.stage == "grpo" else {}),
        "eval_seconds": round(sum(line["eval_runtime"] for line in evaluations), 1),
        "peak_memory": peak_memory(),
    }


def _rewards(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The first and last mean reward of a logged step, and the highest one on what is held out."""
    rewards, held_out = ([line[key] for line in lines if key in line] for key in ("reward", "eval_reward"))
    first, last = (rewards[0], rewards[-1]) if rewards else (None, None)
    return {"first_reward": first, "last_reward": last, "eval_reward": max(held_out, default=None)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of this kit, with a + where files differ from it; None outside git."""
    command = ["git", "-C", str(common.ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
