"""What each stage trains on → samples: the columns of token ids that its trainer takes.

sft, pt   {"input_ids", "labels"}: -100 where nothing is learned
dpo       {"prompt_ids", "chosen_ids", "rejected_ids"}: what TRL's DPOTrainer takes
kto       {"prompt_ids", "completion_ids", "label" (bool)}: what TRL's KTOTrainer takes
grpo      {"prompt_ids", "row"}: the latter is JSON, {"prompt": messages, "answer", and the columns of the row}
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from common import Config, Message

if TYPE_CHECKING:
    import numpy as np

    from preprocessing.template import ChatTemplate

COLUMNS = {
    "sft": ("input_ids", "labels"),
    "pt": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids", "label"),
    "grpo": ("prompt_ids", "row"),
}
EMPTY = {"label": False, "row": ""}  # what stands for no value where that is no list
NO_IDS = ("labels", "label", "row")  # columns that hold no sequence of tokens to count
Sample = dict[str, Any]  # the columns of its stage, "truncated" and "whole_length" (tokens before it was cut)


def encode_batch(
    stage: str, conversations: list[dict[str, Any]], config: Config, template: ChatTemplate, tokenizer: Any
) -> list[list[Sample] | Message]:
    """For each conversation (document, pair) its samples, or the reason why there are none."""
    from preprocessing.encode import encode
    from preprocessing.encode_pairs import encode_documents, encode_pair
    from preprocessing.encode_prompts import encode_prompt

    if stage == "pt":
        return encode_documents([document["text"] for document in conversations], tokenizer, config.cutoff_len)
    if stage == "dpo":
        found = [encode_pair(pair, template, tokenizer, config) for pair in conversations]
    elif stage == "kto":
        last_answer = dataclasses.replace(config, mask_history=True, train_on_prompt=False)
        found = [
            sample if isinstance(sample, Message) else _split(sample, conversation["good"])
            for sample, conversation in zip(
                encode(conversations, template, tokenizer, last_answer), conversations, strict=True
            )
        ]
    elif stage == "grpo":
        found = [encode_prompt(prompt, template, tokenizer, config) for prompt in conversations]
    else:
        found = encode(conversations, template, tokenizer, config)
    return [sample if isinstance(sample, Message) else [sample] for sample in found]


def _split(sample: Sample, good: bool) -> Sample:
    """A sample of which the last answer is learned, as prompt and answer; what is cut off an answer is not learned."""
    ids, labels = sample["input_ids"], sample["labels"]
    learned = [i for i, label in enumerate(labels) if label != -100]
    first, end = learned[0], learned[-1] + 1
    facts = {"truncated": sample["truncated"], "whole_length": sample["whole_length"]}
    return {"prompt_ids": ids[:first], "completion_ids": ids[first:end], "label": good, **facts}


def sequence_of(sample: Sample) -> list[int]:
    """The token ids of a sample, of a pair those with the chosen answer."""
    answer = sample.get("chosen_ids", sample.get("completion_ids", []))
    return sample["input_ids"] if "input_ids" in sample else [*sample["prompt_ids"], *answer]


def no_sample(stage: str, whole_length: int) -> Sample:
    """What stands for a conversation that was dropped."""
    empty = {name: EMPTY.get(name, []) for name in COLUMNS[stage]}
    return {**empty, "truncated": False, "whole_length": whole_length}


def count_tokens(stage: str, sample: Sample) -> int:
    """Tokens of all sequences of a sample: a pair has two."""
    if stage == "dpo":
        answers = len(sample["chosen_ids"]) + len(sample["rejected_ids"])
        return 2 * len(sample["prompt_ids"]) + answers if answers else 0
    return sum(len(sample[name]) for name in COLUMNS[stage] if name not in NO_IDS)


def count_learned(stage: str, sample: Sample) -> int:
    """Tokens of a sample that the loss is computed on."""
    if stage in ("sft", "pt"):
        return len(sample["labels"]) - sample["labels"].count(-100)
    return sum(len(sample[name]) for name in COLUMNS[stage] if name not in ("prompt_ids", *NO_IDS))


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> Message | None:
    """A warning where one side of the pairs is longer than the other: the model may learn the length instead.

    `chosen`, `rejected`: tokens of each answer. By the mean difference against its standard error, and 20 % at least.
    """
    if len(chosen) < 10:
        return None
    difference = chosen - rejected
    means = float(chosen.mean()), float(rejected.mean())
    error = float(difference.std()) / len(difference) ** 0.5
    if abs(difference.mean()) < 3 * error or max(means) < 1.2 * min(means):
        return None
    return Message(
        "chosen answers have {chosen:.0f} tokens on average, rejected ones {rejected:.0f}: the model may learn the "
        "length rather than what is better",
        chosen=means[0],
        rejected=means[1],
    )
