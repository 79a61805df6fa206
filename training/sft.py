"""Stages sft and pt: TRL's SFTTrainer on flat batches. To be imported after Unsloth, which replaces trl's class."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import transformers
from trl import SFTTrainer

from common import UserError
from training import packing
from training.memory import is_own
from training.splitting import Splitter, pieces, whole
from training.trainer import RunTrainer


class Trainer(RunTrainer, SFTTrainer):
    """SFTTrainer with micro-batches of equal size, and an exact mean of the evaluation loss.

    One process has a whole optimizer step in one flat batch, which it cuts itself. Each of several has micro-batches of
    `per_device_train_batch_size` samples: DistributedDataParallel needs as many forward passes of each.
    """

    share: float = 1.0  # weight of this piece in the batch's mean loss

    def __init__(self, prepared: Any, model: Any, precision: Any) -> None:
        super().__init__(prepared, model, precision, data_collator=packing.collate)
        config, plan = self.config, self.plan
        # else Unsloth goes through the held-out samples, to cut those beyond it: all are cut already
        self.args.max_length = self.args.max_seq_length = None
        alone = self.args.world_size == 1
        apart = model.keeps_samples_apart
        shares_batches = config.per_device_train_batch_size > 1 or plan.packed_rows is not None
        if shares_batches and not (apart or alone):
            raise UserError(
                "this model's layers mix the samples of a batch; set per_device_train_batch_size: 1, packing: false"
            )
        limit = packing.micro_batch_tokens(config, plan.longest) if apart else 0  # tokens; 0: each sample alone
        self.size_kept_layers(1, max(limit, plan.longest))
        self.train_splitter = Splitter(self.smaller_settings, pieces if alone else whole, limit)
        self.eval_splitter = Splitter(self.smaller_settings, pieces, None if apart else 0)
        self.uses_own_loss = not (is_own(config, model.config.to_dict()) or self.has_exact_loss())
        self.noise = EmbeddingNoise(model, config.neftune_noise_alpha) if config.neftune_noise_alpha else None
        if plan.eval_samples:
            learned = sum(label != packing.IGNORED for row in self.eval_dataset["labels"] for label in row[1:])
            self.learned_a_batch = learned / math.ceil(plan.eval_samples / config.per_device_eval_batch_size)

    def has_exact_loss(self) -> bool:
        """Whether TRL's loss of a loaded model, from its hidden states and its output layer, is that of its logits.

        TRL does not know what some models have between the two, nor where all have their layers.
        """
        sample, _ = packing.probe_samples(self.model)
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.model(input_ids=sample, use_cache=False).logits[0, :-1].float()
            expected = torch.nn.functional.cross_entropy(logits, sample[0, 1:])
            try:
                count = torch.tensor(sample.shape[1] - 1, device=sample.device)
                loss = super().compute_loss(self.model, packing.probe_batch([sample]), num_items_in_batch=count)
            except (AttributeError, ValueError, TypeError, RuntimeError):
                return False
        return math.isclose(loss.item(), expected.item(), rel_tol=1e-2)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        train, learned = super().training_step, count_learned(inputs)

        def step(piece: dict[str, Any]) -> Any:
            # the loss of a model that takes no count is the piece's mean
            self.share = 1.0 if num_items_in_batch is not None else count_learned(piece) / max(learned, 1)
            return train(model, piece, num_items_in_batch)

        return self.train_in_pieces(inputs, step)

    def summands(self, losses: torch.Tensor) -> torch.Tensor:
        """Every batch is one summand of the mean: prediction_step weights it."""
        return losses[:1]

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        """Weights a batch's loss by its learned tokens: the mean over batches is then that over all tokens.

        TRL's own leaves out how many they are.
        """

        def step(piece: dict[str, Any]) -> Any:
            learned = count_learned(piece)
            if not learned:
                return torch.zeros((), device=self.args.device)
            self.share, items = learned / self.learned_a_batch, None
            if self.model_accepts_loss_kwargs:
                items = torch.tensor(learned, device=self.args.device)
                self.share /= self.args.world_size  # which compute_loss multiplies by
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(model, piece, num_items_in_batch=items).detach()

        return self.eval_splitter.run(inputs, step), None, None  # prediction_loss_only

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.noise:
            self.noise.lengths = inputs["packed_seq_lengths"]
        compute = partial(transformers.Trainer.compute_loss, self) if self.uses_own_loss else super().compute_loss
        return compute(model, inputs, *args, **kwargs) * self.share


def count_learned(batch: dict[str, Any]) -> int:
    return int((batch["labels"] != packing.IGNORED).sum())


class EmbeddingNoise:
    """NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings of a model that trains.

    transformers' own takes a flat batch for one sample, and makes its noise too small. Here each token's noise is that
    of its sample: uniform, of at most alpha / sqrt(tokens x width). `lengths` are those of the next batch.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None  # tokens of each sample, `packed_seq_lengths`
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """`output` (1 x T x width) with noise, or as it is outside of training."""
        if not module.training:
            return output
        tokens = self.lengths.to(output.device)
        largest = self.alpha / (tokens * output.shape[-1]).sqrt()
        largest = largest.repeat_interleave(tokens)[None, :, None].to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1, 1) * largest
