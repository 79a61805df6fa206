"""Stage grpo: TRL's GRPOTrainer on the kit's own token ids. To be imported after Unsloth.

Private members of it that are overridden or read: `_get_train_sampler`, whose order a run that goes on must have;
`_generate_and_score_completions`, `_tokenize_prompts` and `_generate_single_turn`, which would tokenize, and sample in
evaluations; `_logs`, which has the last replies.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from common import UserError
from runs.files import append_lines
from runs.folder import SAMPLES
from training.rewards import text_of
from training.trainer import MeansTrainer

SAMPLE_PROMPTS = 2  # prompts of a logged step whose replies are written to samples.jsonl
UNREWARDED = 64  # replies without any reward, after which a training is stopped


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, drawn anew from seed and epoch: a run that goes on in a later epoch has the same one."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class GrpoTrainer(MeansTrainer, GRPOTrainer):
    """GRPOTrainer whose prompts are token ids; evaluations take one greedy reply to each prompt."""

    def __init__(self, prepared: Any, model: Any, precision: Any) -> None:
        self.prompt_ids: list[list[int]] = []  # of the batch that is being generated
        end_replies_at(model, prepared.tokenizer.convert_tokens_to_ids(list(prepared.template.stop)))
        super().__init__(prepared, model, precision, reward_funcs=list(prepared.rewards))
        self.silent, self.replies = set(self.reward_func_names), 0  # rewards that were None for all replies so far
        self.reward_weights = torch.tensor([reward.weight for reward in prepared.rewards])
        if not self.use_vllm:
            self.sampling = self.generation_config
            self.greedy = copy.deepcopy(self.sampling)
            self.greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)

    def rows(self, dataset: Any) -> Any:
        return with_columns(dataset)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        theirs = super()._get_train_sampler(dataset)
        return EpochSampler(
            theirs.data_source, theirs.mini_repeat_count, theirs.batch_size, theirs.repeat_count, seed=theirs.seed
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.prompt_ids = [row["prompt_ids"] for row in inputs]
        with self.accelerator.autocast():
            found = super()._generate_and_score_completions(inputs)
        self.replies += len(inputs)
        self.silent -= {name for name, given in self._logs["rewards"].items() if any(map(math.isfinite, given))}
        self.check_rewarded(UNREWARDED)
        return found

    def train_from(self, checkpoint: Path | None) -> None:
        super().train_from(checkpoint)
        self.check_rewarded(1)

    def check_rewarded(self, enough: int) -> None:
        """Raises UserError where `enough` replies got None of every reward function."""
        if self.silent == set(self.reward_func_names) and self.replies >= enough:
            text = (
                "{names}: None for all of {count} replies, so nothing is learned; return a number for each that counts"
            )
            raise UserError(text, names=sorted(self.silent), count=self.replies)

    def _tokenize_prompts(self, _: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.prompt_ids, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.generation_config = self.sampling if self.model.training else self.greedy
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._logs["prompt"]:
            append_lines(Path(self.args.output_dir) / SAMPLES, self.samples())
        super().log(logs, *args, **kwargs)

    def samples(self) -> list[dict[str, Any]]:
        """What samples.jsonl says of the last generated replies: all of the first SAMPLE_PROMPTS prompts."""
        count = min(SAMPLE_PROMPTS * self.num_generations, len(self._logs["prompt"]))
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        lines = []
        for i in range(count):
            found = {name: values[i] for name, values in self._logs["rewards"].items()}
            found = {name: None if value != value else round(value, 6) for name, value in found.items()}
            lines.append(
                {
                    "step": self.state.global_step,
                    "prompt": self._logs["prompt"][i][-1]["content"],
                    "reply": text_of(self._logs["completion"][i]),
                    "rewards": found,
                    "reward": round(sum(weights[name] * (value or 0) for name, value in found.items()), 6),
                    "advantage": round(self._logs["advantages"][i], 6),
                }
            )
        return lines


def end_replies_at(model: Any, stop: list[int]) -> None:
    """Lets these tokens end a reply, also where the model's own settings lack them."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else own
    model.generation_config.eos_token_id = sorted({*own, *stop})


def with_columns(dataset: Any) -> Any:
    """Tokenized prompts as TRL takes them: `prompt`, `prompt_ids`, `answer` and the columns of all rows."""
    names = sorted({name for text in dataset["row"] for name in json.loads(text)})

    def read(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [json.loads(text) for text in batch["row"]]
        return {name: [row.get(name) for row in rows] for name in names} | {"prompt_ids": batch["prompt_ids"]}

    return dataset.with_transform(read)
