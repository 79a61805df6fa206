"""Preparing a training: what train.py, its dry run, preview.py and the board know before a model is loaded.

look      settings → `Start`: the machine, the run folder, the model's files, the rows; in under a second
prepare   `Start` → `Prepared`: the data tokenized, and the plan
"""

from __future__ import annotations

import dataclasses
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Gpu, Message
from runs.configuration import Loaded
from runs.embedded_model import make_embedded
from runs.target import missing_from_model
from training import checks, packing
from training.findings import Fact, Finding, Findings, Note, Problem
from training.memory import EMBEDDED_SHAPE, ModelSize, model_like, read_model
from training.plan import TrainingPlan, check_plan, describe_data, describe_evaluations, describe_steps, make_plan
from training.processes import Processes
from training.resume import Inputs, ResumePlan, check_steps_left, describe_inputs, plan_resume
from training.rewards import Reward, find_rewards, with_labels

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate


@dataclass(frozen=True)
class Start:
    """What is known of a training before anything heavy is imported."""

    loaded: Loaded
    processes: Processes
    gpu: Gpu | None
    resume: ResumePlan
    model: ModelSize | None = None  # None where nothing is known of it
    rewards: Sequence[Reward] = ()  # of stage grpo

    @property
    def folder(self) -> Path:
        return Path(self.loaded.config.output_dir)

    @property
    def has_model(self) -> bool:
        return self.model is not None and self.model.folder is not None


@dataclass(frozen=True)
class Prepared:
    """A training with all that it needs but the model itself."""

    start: Start
    config: Config  # with batches that the model can take
    tokenizer: Any
    template: ChatTemplate
    data: TrainingData
    inputs: Inputs
    plan: TrainingPlan
    rewards: list[Reward]  # with the answers they compare replies with


def look(loaded: Loaded, processes: Processes, found: Findings, *, online: bool = False) -> Start:
    """Looks at what needs no heavy imports; what there is to say is added to `found`.

    `online`: a model that is not on the disk is looked up on the hub. Of a finished run no more is looked at.
    """
    from preprocessing import dataset
    from preprocessing.template import check_name

    config, folder = loaded.config, Path(loaded.config.output_dir)
    gpu = common.find_gpu()
    found.add("python", checks.check_python())
    found.add("processes", checks.check_processes(config, processes))
    found.add("card", checks.check_card(config, gpu))
    found.add("packages", checks.check_packages(gpu))
    found.add("output", checks.check_output(folder))
    resume = found.attempt("run", plan_resume, loaded, folder, processes.count) or ResumePlan()
    found.add("run", resume.notes)
    start = Start(loaded, processes, gpu, resume)
    if resume.finished:
        return start
    if config.template is not None:
        found.attempt("template", check_name, config.template)
    found.add("trackers", checks.check_trackers(config))
    found.add("adapter", checks.check_adapter(loaded))
    model = found.attempt("model", find_model_size, config)
    asked, model = ask_hub(config) if online and model is None else (None, model)
    found.add("model", checks.check_model(config, model))
    found.add("model", [asked] if asked else [])
    rewards = (found.attempt("rewards", find_rewards, config) if config.stage == "grpo" else None) or []
    found.add("rewards", checks.check_rewards(config, rewards))
    found.attempt("data", dataset.check, config)
    return dataclasses.replace(start, model=model, rewards=rewards)


def find_model_size(config: Config) -> ModelSize | None:
    """The size of the model on the disk, or of the embedded one that is not made yet; None for a missing one."""
    path = Path(config.model_name_or_path).expanduser()
    if not missing_from_model(path):
        return read_model(path)
    return model_like(EMBEDDED_SHAPE) if checks.is_embedded_missing(config) else None


def ask_hub(config: Config) -> tuple[Finding | None, ModelSize | None]:
    """Whether the hub can be reached, and the size of a model there; None where config.json cannot be had."""
    name = checks.hub_name(config.model_name_or_path)
    if name is None or Path(config.model_name_or_path).expanduser().exists():
        return None, None
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reached = Fact("{hub} can be reached", hub=hub)
    try:
        with urllib.request.urlopen(f"{hub}/{name}/resolve/main/config.json", timeout=5) as answer:
            return reached, model_like(json.load(answer))
    except (urllib.error.HTTPError, ValueError):  # gated, or no hub
        return reached, None
    except OSError:
        return Note("{hub} cannot be reached; set HF_ENDPOINT to a mirror", hub=hub), None


def make_missing_model(start: Start) -> Start:
    """With the embedded model, which is made by the first run that names it."""
    config = start.loaded.config
    if start.has_model:
        return start
    make_embedded(Path(config.model_name_or_path))
    found, model = Findings(), find_model_size(config)
    found.add("model", checks.check_model(config, model))
    found.conclude()
    return dataclasses.replace(start, model=model)


def prepare(start: Start, found: Findings) -> Prepared:
    """Tokenizes the data and plans the training; raises UserError where that cannot be done."""
    config, changed = packing.fit_batches(start.loaded.config)
    found.add("batches", [Note.of(changed)] if changed else [])
    tokenizer, template, data = prepare_data(config)
    plan = make_plan(start.processes.as_one(config), data)
    inputs = describe_inputs(start.model.folder, template, data)
    parts = [part for part in (data.train, data.eval) if part is not None and start.rewards]
    answers = [json.loads(text)["answer"] for part in parts for text in part["row"]]
    found.add("data", [describe_data(plan)])
    found.add("model", checks.check_untrained(config, start.model.folder, tokenizer, data.train))
    found.add("inputs", checks.check_inputs(config, start.resume, inputs))
    found.attempt("plan", check_steps_left, start.resume, start.folder, plan)
    found.add("steps", [describe_steps(config, plan, start.processes.count)])
    found.add("held out", [describe_evaluations(config, plan)])
    found.add("plan", check_plan(config, plan))
    check_room(start, config, plan, found)
    return Prepared(start, config, tokenizer, template, data, inputs, plan, with_labels(config, start.rewards, answers))


def prepare_data(config: Config) -> tuple[Any, ChatTemplate, TrainingData]:
    """The tokenizer, the chat template, and the data as it will be trained; raises UserError with all faulty rows."""
    from preprocessing import dataset
    from preprocessing.template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    tokenizer = load_base_tokenizer(config)
    template = load_template(config.template, tokenizer, config.stage)
    return tokenizer, template, dataset.prepare(config, tokenizer, template)


def check_room(start: Start, config: Config, plan: TrainingPlan | None, found: Findings) -> None:
    """Whether memory and disk suffice, as far as the model is known."""
    if start.model is None:
        found.add("memory", [Note("estimated once the model is there")])
        return
    found.add("memory", checks.check_memory(config, start.model, start.gpu, plan, start.processes.here))
    found.add("disk", checks.check_disk(config, start.model, plan))


def dry_run(loaded: Loaded, processes: Processes) -> int:
    """Makes all checks and prints what they find; returns the exit status, 0 or 2."""
    print(Message("will {recipe} run here?", recipe=loaded.recipe or Message("the default recipe")))
    found = Findings(lambda topic, finding: print(f"  {finding.label:<7}{topic:<10}{finding}"))
    start = look(loaded, processes, found, online=True)
    config = loaded.config
    if not start.resume.finished:
        readable = not found.of(Problem, topic="data") and not found.of(Problem, topic="template")
        prepared = found.attempt("data", prepare, start, found) if start.has_model and readable else None
        if not prepared:
            found.add("data", checks.check_untokenized(config, processes) if readable and not start.has_model else [])
            check_room(start, config, None, found)
        if not found.of(Problem):
            found.add("unsloth", checks.check_imports())  # takes seconds
    faults = found.of(Problem)
    print(Message("no: {count} fault{count:plural}, see above", count=len(faults)) if faults else Message("yes"))
    return 2 if faults else 0
