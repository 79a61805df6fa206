"""The processes of one training, a card each, as torchrun and `accelerate launch` start them.

Each process is an ordinary training on one card, of the same optimizer steps: transformers, TRL and Unsloth's trainer
see a single process. It takes its part of each step's samples (splitting.share), and what all have is added up once a
step: gradients and the loss, which are normalised by the learned tokens of the whole step already. Only the first
process writes and speaks.

DistributedDataParallel would add up the gradients of every forward pass, of which each process must then have as many.
Here samples are cut into passes by tokens, and into smaller ones where memory runs out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from common import Config, UserError, visible_cards
from training.packing import FLAT_STAGES
from training.preference_losses import PREFERENCES

if TYPE_CHECKING:
    import torch

SHARED_STAGES = (*FLAT_STAGES, *PREFERENCES)  # that several processes can train
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # what a launcher tells each process
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where they meet
PATIENCE = timedelta(days=1)  # of a process for the others: the first one may tokenize for hours


@dataclass(frozen=True)
class Processes:
    """One process and how many there are. With one all methods do nothing, or return what they are given."""

    rank: int = 0
    count: int = 1
    here: int = 1  # on this machine
    cards: int = 0  # of this machine, before each process was left one
    missing: tuple[str, ...] = ()  # what should be in the environment, and is not

    @classmethod
    def of_launcher(cls) -> Processes:
        """What a launcher has said in the environment. From now on this process sees only its own card."""
        count = os.environ.get("WORLD_SIZE", "1")
        if not count.isdigit() or int(count) < 2:
            return cls()
        missing = tuple(name for name in (*LAUNCHER, *ADDRESS) if not os.environ.get(name))
        if missing:
            return cls(count=int(count), missing=missing)
        rank, local, count, here = (int(os.environ[name]) for name in LAUNCHER)
        cards = visible_cards()
        if cards:
            os.environ["CUDA_VISIBLE_DEVICES"] = cards[local % len(cards)]
        return cls(rank, count, here, len(cards))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def launcher(self) -> tuple[str, ...]:
        """What stands between `python` and the script to start as many processes on this machine."""
        return ("-m", "torch.distributed.run", "--nproc-per-node", str(self.here)) if self.count > 1 else ()

    def as_one(self, config: Config) -> Config:
        """The recipe by which one process would take the optimizer steps that all take together."""
        held_out = config.per_device_eval_batch_size * (self.count if config.stage in FLAT_STAGES else 1)
        steps = config.gradient_accumulation_steps * self.count
        return replace(config, gradient_accumulation_steps=steps, per_device_eval_batch_size=held_out)

    # -----------------------------------------------------------------------------------------------------------------
    # Who speaks, and who goes first

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Of several processes only the first is heard, and of the errors that end them only the first error."""
        if self.count == 1:
            yield
            return
        voices = sys.stdout, sys.stderr
        if not self.is_first:
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        try:
            yield
        except UserError:
            if not self._tells_it():
                sys.exit(2)
            raise
        except KeyboardInterrupt:
            if not self.is_first:
                sys.exit(130)
            raise
        finally:
            sys.stdout, sys.stderr = voices

    def _tells_it(self) -> bool:
        """Whether this process is the one to say why all end. Before they are connected all meet the same faults."""
        dist = sys.modules.get("torch.distributed")  # not imported for a fault of the recipe
        if dist is None or not dist.is_initialized():
            return self.is_first
        try:
            return dist.distributed_c10d._get_default_store().add("told", 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Waits until all processes have come so far, and connects them. Needs torch, but nothing of transformers."""
        if self.count == 1:
            yield
            return
        import torch
        import torch.distributed as dist

        # what is on the CPU goes over gloo: it can wait without the card
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with _no_process_lost():
            dist.init_process_group(backend, timeout=PATIENCE)
        for name in LAUNCHER:  # accelerate would wrap the model and cut the batches a second time
            del os.environ[name]
        logging.getLogger("transformers.training_args").setLevel(logging.ERROR)  # it wonders why it is not to
        yield
        dist.destroy_process_group()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes first: what it leaves on the disk the others find there."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(False)

    # -----------------------------------------------------------------------------------------------------------------
    # What all processes have, together

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        if self.count == 1:
            return wish
        import torch

        return bool(self.total(torch.tensor(int(wish))))

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, the same bits in each."""
        if self.count > 1:
            import torch.distributed as dist

            with _no_process_lost():
                dist.all_reduce(tensor)
        return tensor

    def total_gradients(self, parameters: list[Any]) -> None:
        """Gives each parameter the sum of its gradients in all processes. None: that process had no sample for it."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with _no_process_lost():
            for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]:
                work.wait()

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        found = [value] * self.count
        if self.count > 1:
            import torch.distributed as dist

            with _no_process_lost():
                dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def own_random_numbers(self, seed: int, number: int) -> Iterator[None]:
        """Dropout of its own for each process and each `number`, which a resumed run finds again without saved states.

        Outside the random numbers of all processes stay the same.
        """
        if self.count == 1:
            yield
            return
        import torch

        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed + number * self.count + self.rank)
            yield


ALONE = Processes()


@contextlib.contextmanager
def _no_process_lost() -> Iterator[None]:
    """torch raises RuntimeError where another process has gone; what that was it has said itself, or was killed."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "another process of this training has ended, so this one ends, too; the same command goes on from the "
            "last checkpoint ({reason})",
            reason=str(error).strip().splitlines()[0],
        ) from None
