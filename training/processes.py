"""The processes of one training, a GPU each, as torchrun and `accelerate launch` start them.

accelerate connects them, and transformers' trainer wraps the model in DistributedDataParallel. What is added here: only
the first process writes and speaks, and it goes first where the others find on the disk what it has made.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

from common import Config, UserError

STAGES = ("sft", "pt", "dpo", "kto")  # that several processes can train
PATIENCE = timedelta(days=1)  # of a process for the others: the first one may tokenize for hours


@dataclass(frozen=True)
class Processes:
    """This process, and how many there are."""

    rank: int = 0
    count: int = 1
    here: int = 1  # on this machine

    @classmethod
    def of_launcher(cls) -> Processes:
        """What a launcher says in the environment; accelerate, too, goes by LOCAL_RANK."""
        if "LOCAL_RANK" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def launcher(self) -> tuple[str, ...]:
        """What stands between `python` and the script to start as many processes on this machine."""
        return ("-m", "torch.distributed.run", "--nproc-per-node", str(self.here)) if self.count > 1 else ()

    def as_one(self, config: Config) -> Config:
        """The recipe by which one process would take the optimizer steps that all take together."""
        return replace(config, gradient_accumulation_steps=config.gradient_accumulation_steps * self.count)

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Only the first process is heard, but for an error after all are connected, which may be this one's alone."""
        if self.is_first:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            try:
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    yield
            except UserError:
                distributed = sys.modules.get("torch.distributed")  # not imported for a fault of the recipe
                if distributed is None or not distributed.is_initialized():
                    sys.exit(2)
                raise

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Waits until all processes have come so far, and connects them."""
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        state = PartialState(timeout=PATIENCE)
        yield
        state.destroy_process_group()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes first: what it leaves on the disk the others find there."""
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        with PartialState().main_process_first():
            yield
