"""TRL's GRPO on the kit's own token ids. To be imported after Unsloth, which replaces trl's class on a card."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from common import Config
from runs.files import append_lines
from runs.folder import SAMPLES
from training.preference_losses import remove_reference
from training.rewards import Reward, text_of
from training.sft_trainer import MeansTrainer

SAMPLE_PROMPTS = 2  # prompts of a logged step whose replies are written to samples.jsonl


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

    def __init__(self, *, config: Config, rewards: Sequence[Reward], **kwargs: Any) -> None:
        self.config = config
        self.prompt_ids: list[list[int]] = []  # of the batch that is being generated
        super().__init__(reward_funcs=[named(reward) for reward in rewards], **kwargs)
        self.reward_weights = torch.tensor([reward.weight for reward in rewards])
        remove_reference(self.model)
        if not self.use_vllm:
            self.sampling = self.generation_config
            self.greedy = copy.deepcopy(self.sampling)
            self.greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        theirs = super()._get_train_sampler(dataset)
        return EpochSampler(
            theirs.data_source, theirs.mini_repeat_count, theirs.batch_size, theirs.repeat_count, seed=theirs.seed
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.prompt_ids = [row["prompt_ids"] for row in inputs]
        with self.accelerator.autocast():
            return super()._generate_and_score_completions(inputs)

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


def named(reward: Reward) -> Any:
    """The reward as a function of its name, under which TRL logs it."""

    def function(**columns: Any) -> list[float | None]:
        return reward(**columns)

    function.__name__ = reward.name
    return function
