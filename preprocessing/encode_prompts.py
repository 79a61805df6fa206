"""Prompts to which a model is to reply → token ids: what chat.py would give it, and what training learns after."""

from __future__ import annotations

import json
from typing import Any

from common import Config, Message, UserError
from preprocessing.faults import TooLong
from preprocessing.prompts import prompt_ids
from preprocessing.rendering import Conversation
from preprocessing.template import ChatTemplate


def encode_prompt(
    prompt: Conversation, template: ChatTemplate, tokenizer: Any, config: Config
) -> dict[str, Any] | Message:
    """{"prompt_ids", "row", "truncated", "whole_length"} of a prompt of rewarded.py, or why there are none.

    `row` is JSON: {"prompt": messages, "answer", and the columns of the row}. cutoff_len counts the reply, too. Of a
    prompt that is longer the oldest turns are left out; a last turn that is too long by itself is not cut, as the
    rewards are about all of it.
    """

    def ids(messages: list[dict[str, Any]]) -> list[int]:
        return prompt_ids(
            messages,
            tokenizer,
            template_text=template.text,
            tools=prompt.get("tools"),
            enable_thinking=config.enable_thinking,
        )

    messages, limit = prompt["messages"], config.cutoff_len - config.max_completion_length
    head = int(messages[0]["role"] == "system")
    if not template.has_tools and prompt.get("tools"):
        return Message("it has tools, and the chat template has none")
    try:
        found = whole = ids(messages)
        turns = [i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user"]
        while len(found) > limit and config.overlong == "truncate" and turns:
            found = ids(messages[:head] + messages[turns.pop(0) :])
    except UserError as error:
        return error.message
    if len(found) > limit:
        return TooLong(
            "it has {tokens:,} tokens, more than cutoff_len={cutoff_len}", tokens=len(whole), cutoff_len=limit
        )
    row = {**prompt["columns"], "prompt": messages, "answer": prompt["answer"]}
    facts = {"truncated": len(found) < len(whole), "whole_length": len(whole)}
    return {"prompt_ids": found, "row": json.dumps(row, ensure_ascii=False), **facts}
