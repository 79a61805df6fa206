"""The rows of a dataset as token ids, cut and rendered exactly as in training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from common import Config, Message, UserError
from evaluation.data import Conversation, EvalDataset, answer_of
from preprocessing.encode_stages import encode_batch
from preprocessing.faults import TooLong

FORMAT = 2  # of predictions.jsonl and how they are made: another number makes the old ones invalid


@dataclass(frozen=True)
class Encoded:
    """The rows of a dataset that fit into cutoff_len, as token ids; `rows` are their numbers, from 0."""

    rows: list[int]
    prompts: list[list[int]]
    choices: list[list[list[int]]]  # row × label × tokens, for a closed set
    samples: list[dict[str, list[int]]]  # input_ids and labels of prompt and answer, for texts
    answers: list[str]  # the reference answers
    reply_limit: int = 0  # longest reply in tokens; 0: none is wanted

    @property
    def fingerprint(self) -> str:
        facts = [FORMAT, self.rows, self.prompts, self.choices, self.samples, self.reply_limit]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def encode_choices(data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> Encoded:
    """Each row's prompt, and every label as the tokens that would be learned.

    The end of the turn counts only where a label is the beginning of another. A prompt that has to be cut is cut as for
    the longest label, so that it does not depend on the right one.
    """
    by_label = []
    for label in data.labels:
        rows = [
            {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": label}]} for row in data.rows
        ]
        by_label.append(_last_answers(rows, config, tokenizer, template))
    kept = [
        i for i in usable_rows(data, by_label[0]) if not any(isinstance(samples[i], Message) for samples in by_label)
    ]
    prompts, choices = [], []
    for i in kept:
        split = [_split(samples[i]) for samples in by_label]
        prompts.append(max(split, key=lambda pair: len(pair[1]))[0])
        choices.append(without_end([tokens for _, tokens in split]))
    return Encoded(kept, prompts, choices, [], [answer_of(data.rows[i]) for i in kept])


def without_end(choices: list[list[int]]) -> list[list[int]]:
    """The labels' tokens without the end of the turn, unless one is then the beginning of another."""
    words = [tokens[:-1] for tokens in choices]
    begins = any(a == b[: len(a)] for i, a in enumerate(words) for j, b in enumerate(words) if i != j)
    return choices if begins else words


def encode_texts(data: EvalDataset, config: Config, tokenizer: Any, template: Any) -> Encoded:
    """Each row's prompt, and the whole row as it would be learned."""
    from preprocessing.encode import encode

    last = _last_answers(data.rows, config, tokenizer, template)
    kept = usable_rows(data, last)
    samples = encode([data.rows[i] for i in kept], template, tokenizer, replace(config, train_on_prompt=False))
    plain = [{key: sample[key] for key in ("input_ids", "labels")} for sample in samples]
    split = [_split(last[i]) for i in kept]
    answers = [
        tokenizer.decode(learned, skip_special_tokens=True).strip()  # a tool call, as the template writes it
        if data.rows[i]["messages"][-1].get("tool_calls")
        else answer_of(data.rows[i])
        for i, (_, learned) in zip(kept, split, strict=True)
    ]
    return Encoded(kept, [prompt for prompt, _ in split], [], plain, answers)


def _last_answers(rows: list[Conversation], config: Config, tokenizer: Any, template: Any) -> list[Any]:
    """Samples as training makes them, in which the last answer is learned, or the Message why there is none."""
    from preprocessing.encode import encode

    return encode(rows, template, tokenizer, replace(config, mask_history=True, train_on_prompt=False))


def _split(sample: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt and answer of a sample in which only the last answer is learned."""
    labels = sample["labels"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    return sample["input_ids"][:first], [label for label in labels[first:] if label != -100]


def encode_single(
    stage: str, data: EvalDataset, config: Config, tokenizer: Any, template: Any
) -> tuple[list[int], list[Any]]:
    """The numbers of the rows that fit, and these rows as their stage trains them, a sample each."""
    encoded = encode_batch(stage, data.rows, config, template, tokenizer)
    kept = usable_rows(data, encoded)
    return kept, [encoded[i][0] for i in kept]


def usable_rows(data: EvalDataset, samples: list[Any]) -> list[int]:
    """The numbers of the rows that are samples; raises UserError where a row cannot be one."""
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, Message) and not isinstance(sample, TooLong):
            raise UserError(
                "{dataset}, row {row}: {reason}; take the row out", dataset=data.name, row=number, reason=sample
            )
    kept = [i for i, sample in enumerate(samples) if not isinstance(sample, Message)]
    if not kept:
        raise UserError("no row of {dataset} fits into cutoff_len; raise it: cutoff_len=...", dataset=data.name)
    if len(kept) < len(samples):
        print(
            Message(
                "note: {count:,} row{count:plural} of {dataset} longer than cutoff_len left out",
                dataset=data.name,
                count=len(samples) - len(kept),
            )
        )
    return kept
