"""What one evaluation does: which models, which data, with which settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError
from evaluation.data import EvalDataset, find_datasets
from evaluation.encode import Encoded, encode_choices, encode_texts
from evaluation.labels import swapped_labels
from evaluation.rewarded import encode_prompts
from evaluation.stages import STAGES, encode_rows
from runs.configuration import load_config
from runs.folder import is_run, run_config
from runs.target import Target, find_target

MIN_REPLY_LIMIT = 64  # tokens that a reply may always have
DATA = {"dataset", "eval_dataset"}
FIXED = {"val_size", "output_dir"}  # what a training has decided
# What a recipe that is the target may say otherwise than the run that it belongs to.
RECIPE_SETTINGS = DATA | {"dataset_dir", "max_samples", "cutoff_len", "labels", "max_new_tokens"}
# What to do: given together by the command line or the recipe, never mixed with the run's own.
ACTIONS = {"do_train", "do_eval", "do_predict", "predict_with_generate"}


@dataclass(frozen=True)
class EvalModel:
    """A model that is evaluated: `label` names it in tables and files."""

    label: str
    source: Target


@dataclass(frozen=True)
class Job:
    """What one call of evaluate.py does."""

    config: Config
    run: Path | None  # the run folder that the target belongs to
    models: list[EvalModel]
    datasets: list[EvalDataset]
    notes: list[Message]
    given: set[str]  # settings that were asked for
    output: Path | None  # where a recipe of LLaMA-Factory wants its results
    encoded: dict[str, Encoded] = dataclasses.field(default_factory=dict)  # by name of the dataset


def find_job(target: str | None, settings: Sequence[str], *, only_base: bool = False, no_base: bool = False) -> Job:
    """Raises UserError, before anything heavy, for what is missing or not fit to be evaluated."""
    keys = {setting: setting.lstrip("-").partition("=")[0].replace("-", "_") for setting in settings}
    if fixed := sorted(FIXED & set(keys.values())):
        raise UserError("{key} cannot be changed after training; name the data instead: dataset=NAME", key=fixed[0])
    # a model does not depend on the data, and a run's val_size would contradict an eval_dataset
    source = find_target(target, [setting for setting in settings if keys[setting] not in DATA])
    run = source.run
    config, given, output = _find_config(source, run, target, settings)
    notes = list(source.notes)
    datasets = find_datasets(config, run, given, Path(source.name), notes)
    return Job(config, run, _find_models(source, run, only_base, no_base), datasets, notes, given, output)


def _find_config(
    source: Target, run: Path | None, target: str | None, settings: Sequence[str]
) -> tuple[Config, set[str], Path | None]:
    """The settings of an evaluation; those among them that were asked for; and a recipe's own folder for results.

    A run's settings, before them what its recipe says of data and evaluation, and before all the command line. The
    datasets of a recipe are asked for where they are others than the run's: a training's recipe is a target, too.
    """
    typed = load_config(list(settings))
    config, given, output = run_config(run) if run else source.config, set(typed.given), None
    values = {key: getattr(typed.config, key) for key in given}
    asks = typed if given & ACTIONS else None
    if target and Path(target).suffix in (".yaml", ".yml", ".json"):
        recipe = load_config([target])
        asked = recipe.given & RECIPE_SETTINGS - (DATA if given & DATA else set())
        asked = {
            key for key in asked if not (run and key in DATA and getattr(recipe.config, key) == getattr(config, key))
        }
        values = {key: getattr(recipe.config, key) for key in asked} | values
        given |= asked
        asks = asks or recipe
        if "output_dir" in recipe.given and not is_run(Path(recipe.config.output_dir)):
            output = Path(recipe.config.output_dir)
    values |= {key: getattr(asks.config, key) for key in ACTIONS} if asks else {}
    return dataclasses.replace(config, **values), given, output


def _find_models(source: Target, run: Path | None, only_base: bool, no_base: bool) -> list[EvalModel]:
    """The base, where it is known and wanted, and the target."""
    settings = dataclasses.replace(source.config, infer_dtype=compute_dtype(source.config))
    source = dataclasses.replace(source, config=settings)
    path = Path(source.name)
    label = path.stem if source.is_gguf else path.name
    label = "trained" if run == path else label if run else "model"
    has_adapter = run is not None and (run / "adapter_config.json").is_file()
    base = source if source.adapter else find_target(str(run)) if label != "trained" and has_adapter else None
    if only_base and base is None:
        raise UserError(
            "the model that {model} was trained from is not known; evaluate the run with --base", model=source.name
        )
    target = [] if only_base else [EvalModel(label, source)]
    if base is None or no_base:
        return target
    base = dataclasses.replace(base, name=base.model, adapter=None, config=settings)
    return [EvalModel("base", base), *target]


def compute_dtype(config: Config) -> str:
    """The type an evaluation computes in: float32 on a CPU, what the engine takes on a card."""
    return config.infer_dtype if config.infer_dtype != "auto" or common.find_gpu() else "float32"


def encoded(job: Job, data: EvalDataset) -> Encoded:
    """The rows of a dataset as training would cut and render them."""
    if data.name not in job.encoded:
        tokenizer, template = tokenizer_of(job)
        if data.task == "classification":
            found = encode_choices(data, job.config, tokenizer, template)
        elif data.task == "rewarded":
            limit = job.config.max_new_tokens if "max_new_tokens" in job.given else job.config.max_completion_length
            found = encode_prompts(data, job.config, tokenizer, template, limit)
        elif data.task in STAGES:
            found = encode_rows(data, job.config, tokenizer, template)
        else:
            found = encode_texts(data, job.config, tokenizer, template)
        if data.task == "text":
            found = dataclasses.replace(found, reply_limit=_reply_limit(job, found))
        job.encoded[data.name] = found
    return job.encoded[data.name]


def _reply_limit(job: Job, found: Encoded) -> int:
    """max_new_tokens where it was asked for; else twice the longest answer: a longer reply is wrong anyway."""
    if "max_new_tokens" in job.given:
        return job.config.max_new_tokens
    longest = max(len(s["input_ids"]) - len(p) for s, p in zip(found.samples, found.prompts, strict=True))
    return min(job.config.max_new_tokens, max(MIN_REPLY_LIMIT, 2 * longest))


def tokenizer_of(job: Job) -> tuple[Any, Any]:
    """The tokenizer and the chat template that the run was trained with, or those of the model."""
    from preprocessing.template import load_template
    from preprocessing.tokenizer import load_tokenizer

    source = job.models[-1].source
    folder = job.run if job.run and (job.run / "tokenizer_config.json").is_file() else source.tokenizer
    if not folder:
        raise UserError(
            "{model} is in no run folder, so its tokenizer is not known; evaluate it in saves/NAME/gguf",
            model=source.name,
        )
    tokenizer = load_tokenizer(folder, trust_remote_code=job.config.trust_remote_code)
    return tokenizer, load_template(job.config.template, tokenizer, job.config.stage)


def describe(job: Job) -> str:
    """What will be done, a line for the models and for each dataset."""
    lines = [Message("models     {models}", models=[f"{model.label} ({model.source.name})" for model in job.models])]
    for data in job.datasets:
        left_out = (
            Message("; {count:,} that were trained on are left out", count=data.left_out) if data.left_out else ""
        )
        task = _describe_task(data)
        lines.append(
            Message(
                "data       {name}: {rows:,} rows, {task}{left_out}",
                name=data.name,
                rows=len(data.rows),
                task=task,
                left_out=left_out,
            )
        )
    return "\n".join(map(str, lines))


def _describe_task(data: EvalDataset) -> Message:
    if data.task == "classification" and len(data.labels) == 2:
        return Message(
            "choose among {labels}; positive is {last} (to swap: {swap})",
            labels=data.labels,
            swap=swapped_labels(data.labels),
            last=data.labels[1],
        )
    return {
        "classification": Message("choose among {labels}", labels=data.labels),
        "text": Message("texts"),
        "pairs": Message("preference accuracy"),
        "judged": Message("likelihood of good and bad answers"),
        "rewarded": Message("rewards of replies"),
    }.get(data.task, Message("perplexity"))
