"""What each stage trains on → samples: the columns of token ids that its trainer takes.

sft, pt   {"input_ids", "labels"}: -100 where nothing is learned
dpo       {"prompt_ids", "chosen_ids", "rejected_ids"}: what TRL's DPOTrainer takes
kto       {"prompt_ids", "completion_ids", "label" (bool)}: what TRL's KTOTrainer takes
grpo      {"prompt_ids", "row"}: the latter is JSON, {"prompt": messages, "answer", and the columns of the row}

A sample also has "truncated" and "whole_length" (tokens before it was cut).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from common import Config, Message, UserError
from preprocessing.encode import Sample, encode, too_long
from preprocessing.encode_pairs import encode_pair
from preprocessing.faults import Fault
from preprocessing.prompts import prompt_ids
from preprocessing.rendering import Conversation
from preprocessing.template import ChatTemplate
from preprocessing.tokens import encoder_of

COLUMNS = {
    "sft": ("input_ids", "labels"),
    "pt": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids", "label"),
    "grpo": ("prompt_ids", "row"),
}


def encode_batch(
    stage: str, conversations: list[Conversation], config: Config, template: ChatTemplate, tokenizer: Any
) -> list[list[Sample] | Message]:
    """For each conversation (document, pair) its samples, or the reason why there are none."""
    if stage == "pt":
        return encode_documents([document["text"] for document in conversations], tokenizer, config.cutoff_len)
    if stage == "dpo":
        found = [encode_pair(pair, template, tokenizer, config) for pair in conversations]
    elif stage == "kto":
        last_answer = dataclasses.replace(config, mask_history=True, train_on_prompt=False)
        found = encode(conversations, template, tokenizer, last_answer)
        found = [_judged(sample, conversation) for sample, conversation in zip(found, conversations, strict=True)]
    elif stage == "grpo":
        found = [encode_prompt(prompt, template, tokenizer, config) for prompt in conversations]
    else:
        found = encode(conversations, template, tokenizer, config)
    return [sample if isinstance(sample, Message) else [sample] for sample in found]


def encode_documents(texts: list[str], tokenizer: Any, cutoff_len: int) -> list[list[Sample] | Message]:
    """For each raw text its samples, or the reason why there are none: every token is learned.

    An end of sequence follows each document, and the tokenizer's start of sequence precedes it where the tokenizer
    itself puts one. What looks like a control token stays text. A document of more than `cutoff_len` tokens becomes
    several samples of about equal length. Raises UserError where the tokenizer has no end of sequence.
    """
    encoder = encoder_of(tokenizer, "")
    if tokenizer.eos_token_id is None:
        raise UserError(
            "this model's tokenizer has no end-of-sequence token (eos_token in tokenizer_config.json), which has to "
            "follow each document"
        )
    begin = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    results: list[list[Sample] | Message] = []
    for text in texts:
        try:
            ids = [*begin, *encoder.text_ids(text), tokenizer.eos_token_id]
        except Fault as fault:
            results.append(fault.message)
            continue
        size = -(-len(ids) // -(-len(ids) // cutoff_len))
        pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
        results.append(
            [
                {"input_ids": piece, "labels": list(piece), "truncated": False, "whole_length": len(piece)}
                for piece in pieces
            ]
        )
    return results


def _judged(sample: Sample | Message, conversation: Conversation) -> Sample | Message:
    """A sample of which the last answer is learned, as prompt and answer; what is cut off an answer is not learned."""
    if isinstance(sample, Message):
        return sample
    ids, labels = sample["input_ids"], sample["labels"]
    learned = [i for i, label in enumerate(labels) if label != -100]
    first, end = learned[0], learned[-1] + 1
    facts = {"truncated": sample["truncated"], "whole_length": sample["whole_length"]}
    return {"prompt_ids": ids[:first], "completion_ids": ids[first:end], "label": conversation["good"], **facts}


def encode_prompt(prompt: Conversation, template: ChatTemplate, tokenizer: Any, config: Config) -> Sample | Message:
    """The sample of a prompt to which a model is to reply, or why there is none.

    cutoff_len counts the reply, too. Of a prompt that is longer the oldest turns are left out; a last turn that is too
    long by itself is not cut, as the rewards are about all of it.
    """
    messages, tools, thinking = prompt["messages"], prompt.get("tools"), config.enable_thinking
    head = int(messages[0]["role"] == "system")
    limit = config.cutoff_len - config.max_completion_length
    if not template.has_tools and tools:
        return Message("it has tools, and the chat template has none")

    def ids(some: list[dict[str, Any]]) -> list[int]:
        return prompt_ids(some, tokenizer, template_text=template.text, tools=tools, enable_thinking=thinking)

    try:
        found = whole = ids(messages)
        turns = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
        while len(found) > limit and config.overlong == "truncate" and turns:
            found = ids(messages[:head] + messages[turns.pop(0) :])
    except UserError as error:
        return error.message
    if len(found) > limit:
        return too_long(len(whole), limit)
    row = json.dumps({**prompt["columns"], "prompt": messages, "answer": prompt["answer"]}, ensure_ascii=False)
    return {"prompt_ids": found, "row": row, "truncated": len(found) < len(whole), "whole_length": len(whole)}


def sequence_of(sample: Sample) -> list[int]:
    """The token ids of a sample, of a pair those with the chosen answer."""
    answer = sample.get("chosen_ids", sample.get("completion_ids", []))
    return sample["input_ids"] if "input_ids" in sample else [*sample["prompt_ids"], *answer]
