"""What each stage trains on → samples: the columns of token ids that its trainer takes.

sft, pt   {"input_ids", "labels"}: -100 where nothing is learned
dpo       {"prompt_ids", "chosen_ids", "rejected_ids"}: what TRL's DPOTrainer takes
kto       {"prompt_ids", "completion_ids", "label" (bool)}: what TRL's KTOTrainer takes
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from common import Config, Message

if TYPE_CHECKING:
    from preprocessing.chat_template import ChatTemplate

COLUMNS = {
    "sft": ("input_ids", "labels"),
    "pt": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids", "label"),
}
Sample = dict[str, Any]  # the columns of its stage, "truncated" and "whole_length" (tokens before it was cut)


def encode_batch(
    stage: str, conversations: list[dict[str, Any]], config: Config, template: ChatTemplate, tokenizer: Any
) -> list[list[Sample] | Message]:
    """For each conversation (document, pair) its samples, or the reason why there are none."""
    encoder = {"sft": _conversations, "pt": _documents, "dpo": _pairs, "kto": _judged}[stage]
    return encoder(conversations, config, template, tokenizer)


def _conversations(conversations: list[Any], config: Config, template: ChatTemplate, tokenizer: Any) -> list[Any]:
    samples = _encode(conversations, config, template, tokenizer)
    return [sample if isinstance(sample, Message) else [sample] for sample in samples]


def _encode(conversations: list[Any], config: Config, template: ChatTemplate, tokenizer: Any) -> list[Sample | Message]:
    from preprocessing.encode import encode

    return encode(
        conversations,
        template,
        tokenizer,
        cutoff_len=config.cutoff_len,
        overlong=config.overlong,
        mask_history=config.mask_history,
        train_on_prompt=config.train_on_prompt,
        enable_thinking=config.enable_thinking,
    )


def _documents(documents: list[Any], config: Config, _: ChatTemplate, tokenizer: Any) -> list[Any]:
    from preprocessing.encode_pairs import encode_documents

    found = encode_documents([document["text"] for document in documents], tokenizer, cutoff_len=config.cutoff_len)
    return [
        samples
        if isinstance(samples, Message)
        else [{**sample, "truncated": False, "whole_length": len(sample["input_ids"])} for sample in samples]
        for samples in found
    ]


def _pairs(pairs: list[Any], config: Config, template: ChatTemplate, tokenizer: Any) -> list[Any]:
    from preprocessing.encode_pairs import encode_pair

    found: list[Any] = []
    for pair in pairs:
        prompt = {name: value for name, value in pair.items() if name not in ("chosen", "rejected")}
        sample = encode_pair(
            prompt,
            pair["chosen"],
            pair["rejected"],
            template,
            tokenizer,
            cutoff_len=config.cutoff_len,
            overlong="truncate" if config.overlong == "truncate" else "error",
            enable_thinking=config.enable_thinking,
        )
        found.append(sample if isinstance(sample, Message) else [sample])
    return found


def _judged(conversations: list[Any], config: Config, template: ChatTemplate, tokenizer: Any) -> list[Any]:
    last_answer = dataclasses.replace(config, mask_history=True, train_on_prompt=False)
    samples = _encode(conversations, last_answer, template, tokenizer)
    return [
        sample if isinstance(sample, Message) else [_split(sample, conversation["good"])]
        for sample, conversation in zip(samples, conversations, strict=True)
    ]


def _split(sample: Sample, good: bool) -> Sample:
    """A sample of which the last answer is learned, as prompt and answer; what is cut off an answer is not learned."""
    ids, labels = sample["input_ids"], sample["labels"]
    learned = [i for i, label in enumerate(labels) if label != -100]
    first, end = learned[0], learned[-1] + 1
    facts = {"truncated": sample["truncated"], "whole_length": sample["whole_length"]}
    return {"prompt_ids": ids[:first], "completion_ids": ids[first:end], "label": good, **facts}


def no_sample(stage: str, whole_length: int) -> Sample:
    """What stands for a conversation that was dropped."""
    empty = {name: False if name == "label" else [] for name in COLUMNS[stage]}
    return {**empty, "truncated": False, "whole_length": whole_length}


def count_tokens(stage: str, sample: Sample) -> int:
    """Tokens of all sequences of a sample: a pair has two."""
    if stage == "dpo":
        answers = len(sample["chosen_ids"]) + len(sample["rejected_ids"])
        return 2 * len(sample["prompt_ids"]) + answers if answers else 0
    return sum(len(sample[name]) for name in COLUMNS[stage] if name not in ("labels", "label"))


def count_learned(stage: str, sample: Sample) -> int:
    """Tokens of a sample that the loss is computed on."""
    if stage in ("sft", "pt"):
        return len(sample["labels"]) - sample["labels"].count(-100)
    return sum(len(sample[name]) for name in COLUMNS[stage] if name not in ("prompt_ids", "label"))


def length_bias(chosen: list[int], rejected: list[int]) -> Message | None:
    """A warning where one side of the pairs is longer than the other: the model may learn the length instead.

    `chosen`, `rejected`: tokens of each answer. By the mean difference against its standard error, and 20 % at least.
    """
    import numpy as np

    if len(chosen) < 10:
        return None
    difference = np.array(chosen) - np.array(rejected)
    means = float(np.mean(chosen)), float(np.mean(rejected))
    error = float(difference.std()) / len(difference) ** 0.5
    if abs(difference.mean()) < 3 * error or max(means) < 1.2 * min(means):
        return None
    return Message("pairs_differ_in_length", chosen=means[0], rejected=means[1])
