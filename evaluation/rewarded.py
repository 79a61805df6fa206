"""Replies to held-out prompts, and what the reward functions of a run of stage grpo give for them."""

from __future__ import annotations

from typing import Any

from common import Config
from evaluation import metrics
from evaluation.data import EvalDataset
from evaluation.encode import Encoded, encode_single


def encode_prompts(data: EvalDataset, config: Config, tokenizer: Any, template: Any, reply_limit: int) -> Encoded:
    """The prompts of a dataset as training renders them."""
    kept, samples = encode_single("grpo", data, config, tokenizer, template)
    answers = [data.rows[i]["answer"] or "" for i in kept]
    return Encoded(kept, [sample["prompt_ids"] for sample in samples], [], [], answers, reply_limit)


def score_prompts(_: EvalDataset, rows: Encoded, positions: list[int], scorer: Any) -> list[dict[str, Any]]:
    """What predictions.jsonl says of prompts: the greedy reply."""
    replies = scorer.replies([rows.prompts[i] for i in positions], rows.reply_limit)
    return [{"prediction": reply} for reply in replies]


def measure_rewards(
    config: Config, data: EvalDataset, predictions: dict[str, list[dict[str, Any]]], tokenizer: Any
) -> dict[str, Any]:
    """The mean reward of every model, in all and by function, and how each differs from the base on the same prompts.

    Raises UserError where a reward function is wrong.
    """
    from training.rewards import find_rewards, with_labels

    rewards = with_labels(config, find_rewards(config), [row["answer"] for row in data.rows])
    values: dict[str, dict[str, list[float]]] = {}
    for label, lines in predictions.items():
        columns = reward_columns(
            [data.rows[line["row"]] for line in lines], lines, tokenizer, config.max_completion_length
        )
        by_name = {reward.name: [value or 0.0 for value in reward(**columns)] for reward in rewards}
        weighted = [[reward.weight * value for value in by_name[reward.name]] for reward in rewards]
        values[label] = {"reward": list(map(sum, zip(*weighted, strict=True)))}
        values[label] |= {f"reward_{name}": found for name, found in by_name.items()}
    models = {
        label: {"rows": len(found["reward"])} | {k: v for name in found for k, v in metrics.mean(name, found[name])}
        for label, found in values.items()
    }
    paired = metrics.against_base(
        values, lambda base, found: {name: metrics.paired_means(base[name], found[name]) for name in found}
    )
    return {"models": models, "rewards": paired}


def reward_columns(
    rows: list[dict[str, Any]], lines: list[dict[str, Any]], tokenizer: Any, longest: int
) -> dict[str, list[Any]]:
    """What a reward function is called with, for one reply to each of these rows.

    The replies' ids are those of their texts, with an end of at most `longest` tokens in all.
    """
    names = sorted({name for row in rows for name in row["columns"]})
    texts = [line["prediction"] for line in lines]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    return {name: [row["columns"].get(name) for row in rows] for name in names} | {
        "prompts": [row["messages"] for row in rows],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "completion_ids": [reply[:longest] for reply in ids],
        "answer": [row["answer"] for row in rows],
    }
