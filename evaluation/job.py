"""What one evaluation does: which models, which data, with which settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError
from evaluation.data import find_datasets
from evaluation.tasks import Encoded, EvalDataset
from runs.configuration import load_config
from runs.folder import is_run, run_config
from runs.target import Target, find_target

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
class Evaluation:
    """What one call of evaluate.py does."""

    config: Config
    run: Path | None  # the run folder that the target belongs to
    models: list[EvalModel]
    datasets: list[EvalDataset]
    notes: list[Message]
    given: set[str]  # settings that were asked for
    output: Path | None  # where a recipe of LLaMA-Factory wants its results
    _encoded: dict[str, Encoded] = dataclasses.field(default_factory=dict)  # by name of the dataset

    def encoded(self, data: EvalDataset) -> Encoded:
        """The rows of a dataset as training would cut and render them."""
        if data.name not in self._encoded:
            items = data.task.encode(data, self.config, self.tokenizer, self._template)
            limit = data.task.reply_limit(items, self.config, self.given)
            self._encoded[data.name] = Encoded(items, limit)
        return self._encoded[data.name]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """That of the run, or of the model."""
        from preprocessing.tokenizer import load_tokenizer

        source = self.models[-1].source
        folder = self.run if self.run and (self.run / "tokenizer_config.json").is_file() else source.tokenizer
        if not folder:
            raise UserError("{model} has no tokenizer; move it into gguf/ of its run folder", model=source.name)
        return load_tokenizer(folder, trust_remote_code=self.config.trust_remote_code)

    @functools.cached_property
    def _template(self) -> Any:
        from preprocessing.template import load_template

        return load_template(self.config.template, self.tokenizer, self.config.stage)

    def describe(self) -> str:
        """What will be done, a line for the models and for each dataset."""
        models = [f"{model.label} ({model.source.name})" for model in self.models]
        lines = [str(Message("models     {models}", models=models))]
        for data in self.datasets:
            left_out = Message("; {count:,} that were trained on are left out", count=data.left_out)
            facts = {"name": data.name, "rows": len(data.rows), "task": data.task.describe()}
            text = Message("data       {name}: {rows:,} rows, {task}", **facts)
            lines.append(f"{text}{left_out if data.left_out else ''}")
        return "\n".join(lines)


def plan_evaluation(
    target: str | None, settings: Sequence[str], *, only_base: bool = False, no_base: bool = False
) -> Evaluation:
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
    return Evaluation(config, run, _find_models(source, run, only_base, no_base), datasets, notes, given, output)


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
        raise UserError("the base of {model} is not known; evaluate the run with --base", model=source.name)
    target = [] if only_base else [EvalModel(label, source)]
    if base is None or no_base:
        return target
    base = dataclasses.replace(base, name=base.model, adapter=None, config=settings)
    return [EvalModel("base", base), *target]


def compute_dtype(config: Config) -> str:
    """The type an evaluation computes in: float32 on a CPU, what the engine takes on a card."""
    return config.infer_dtype if config.infer_dtype != "auto" or common.find_gpu() else "float32"
