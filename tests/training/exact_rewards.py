"""The first loss and gradients of GRPO on replies that were just sampled: by the kit, or by hand with PEFT.

    python tests/training/exact_rewards.py kit MODEL ADAPTER > FOUND
    python tests/training/exact_rewards.py plain MODEL ADAPTER FOUND

In float32 on a CPU. The kit's side samples and prints the replies too, of which the plain side computes advantages,
loss and gradients one reply at a time. test_grpo.py compares the two, each in a process: Unsloth patches transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import kit
from exact_stages import facts

BETA, EACH = 0.3, 4
PROMPTS = ([9, 8, 7, 6, 5], [40, 41, 42], list(range(60, 90)))


def reward(ids: list[int]) -> float:
    """What the replies are rewarded for: a share of even ids."""
    return sum(token % 2 == 0 for token in ids) / len(ids)


def by_kit(model_folder: str, adapter: str) -> dict[str, Any]:
    kit.import_unsloth()
    import common
    from training.rewards import Reward

    row = json.dumps({"prompt": [{"role": "user", "content": "-"}], "answer": None})
    data = kit.table([{"prompt_ids": list(ids), "row": row} for ids in PROMPTS], [9, 9, 9])
    with tempfile.TemporaryDirectory() as folder:
        config = common.Config(
            model_name_or_path=model_folder,
            adapter_name_or_path=adapter,
            output_dir=folder,
            stage="grpo",
            reward_funcs=("even",),
            num_generations=EACH,
            per_device_train_batch_size=EACH * len(PROMPTS),
            gradient_accumulation_steps=1,
            max_completion_length=6,
            cutoff_len=64,
            beta=BETA,
            bf16=False,
        )
        rewards = [Reward("even", 2.0, lambda completion_ids, **_: [reward(ids) for ids in completion_ids])]
        trainer = kit.make(config, data, rewards=rewards, stop=["<|im_end|>"])
        assert list(trainer.model.peft_config) == ["default"], "a copy of the adapter"
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer._prepare_inputs([row for row in trainer.train_dataset for _ in range(EACH)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        seen = [(batch["prompt_ids"], batch["prompt_mask"]), (batch["completion_ids"], batch["completion_mask"])]
        prompts, replies = ([i[m.bool()].tolist() for i, m in zip(*pair, strict=True)] for pair in seen)
        found = {"prompts": prompts, "replies": replies, "advantages": batch["advantages"].tolist()}
        return facts(trainer.model, loss) | found


def by_hand(model_folder: str, adapter: str, found: str) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sampled = json.loads(Path(found).read_text(encoding="utf-8"))
    model, reference = (AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32) for _ in range(2))
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    groups = defaultdict(list)
    for prompt, reply in zip(sampled["prompts"], sampled["replies"], strict=True):
        groups[tuple(prompt)].append(2.0 * reward(reply))
    advantages, losses, tokens = [], [], 0
    for prompt, reply in zip(sampled["prompts"], sampled["replies"], strict=True):
        rewards = torch.tensor(groups[tuple(prompt)])
        advantages.append(float((2.0 * reward(reply) - rewards.mean()) / (rewards.std() + 1e-4)))
        logs = token_logs(model, prompt, reply)
        with torch.no_grad():
            before = token_logs(reference, prompt, reply)
        ratio = (logs - logs.detach()).exp()
        kl = ((before - logs).exp() - (before - logs) - 1) * ratio
        losses.append((-ratio * advantages[-1] + BETA * kl).sum())
        tokens += len(reply)
    loss = torch.stack(losses).sum() / tokens
    loss.backward()
    return facts(model, loss) | {"advantages": advantages}


def token_logs(model: Any, prompt: list[int], reply: list[int]) -> Any:
    """The log-probability of each token of a reply."""
    import torch

    logits = model(input_ids=torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None])[:, 0]


if __name__ == "__main__":
    way = {"kit": by_kit, "plain": by_hand}[sys.argv[1]]
    print(json.dumps(way(*sys.argv[2:])))
