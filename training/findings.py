"""What a check before a training is: findings, and what the checks find out about the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Gpu, Message
from runs.configuration import Loaded
from training.memory import ModelSize
from training.plan import TrainingPlan
from training.processes import ALONE, Processes
from training.resume import ResumePlan
from training.rewards import Reward

if TYPE_CHECKING:
    from preprocessing.dataset import TrainingData
    from preprocessing.template import ChatTemplate


@dataclass(frozen=True)
class Finding:
    """What a check has found: `level` is "ok", "note" or "fault"."""

    level: str
    message: Message


def ok(message: Message) -> Finding:
    return Finding("ok", message)


def note(message: Message) -> Finding:
    return Finding("note", message)


def fault(message: Message) -> Finding:
    return Finding("fault", message)


@dataclass
class Run:
    """A training that is to be, and what the checks have found out about it so far."""

    loaded: Loaded
    folder: Path
    config: Config  # with batches that the model can take
    processes: Processes = ALONE
    gpu: Gpu | None = None
    model: ModelSize | None = None
    ask_hub: bool = False  # about a model that is not on the disk
    resume: ResumePlan = field(default_factory=ResumePlan)
    template_exists: bool = True
    tokenizer: Any = None
    template: ChatTemplate | None = None
    data: TrainingData | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # as run.json records them
    plan: TrainingPlan | None = None
    rewards: list[Reward] = field(default_factory=list)  # of stage grpo

    @classmethod
    def of(cls, loaded: Loaded, processes: Processes = ALONE) -> Run:
        return cls(loaded, Path(loaded.config.output_dir), loaded.config, processes)

    @property
    def can_tokenize(self) -> bool:
        return self.model is not None and self.model.folder is not None and self.template_exists


Check = Callable[[Run], Iterable[Finding]]
