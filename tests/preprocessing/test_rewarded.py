"""Prompts of stage grpo: what is made of rows, and that their ids are those of the same rows in stage sft."""

from __future__ import annotations

import json

import pytest
from conftest import says, write_jsonl
from example_rows import conversations

import common
from preprocessing.encode import encode
from preprocessing.encode_stages import encode_prompt
from preprocessing.template import load_template

USER = {"role": "user", "content": "two?"}


def prompts_of(tmp_path, *rows: dict, **settings) -> list[dict]:
    """The conversations of rows without registry."""
    return conversations(write_jsonl(tmp_path / "rows.jsonl", list(rows)), stage="grpo", val_size=0, **settings)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"instruction": "two?", "output": "2"}, "2"),
        ({"prompt": "two?", "completion": "2"}, "2"),
        ({"question": "two?", "answer": "2"}, "2"),
        ({"prompt": "two?"}, None),
        ({"instruction": "two?", "solution": 2}, "2"),
        ({"prompt": [USER], "answer": "2"}, "2"),
        ({"messages": [USER, {"role": "assistant", "content": "2"}]}, "2"),
        ({"messages": [USER]}, None),
        ({"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": "2"}]}, "2"),
    ],
)
def test_rows_of_every_form_are_a_prompt_with_or_without_answer(tmp_path, row, answer):
    (found,) = prompts_of(tmp_path, row)
    assert found["messages"] == [USER] and found["answer"] == answer
    assert found["columns"] == {name: value for name, value in row.items() if name != "prompt"}


def test_the_first_row_may_lack_the_answer_that_others_have(tmp_path):
    found = prompts_of(tmp_path, {"prompt": "two?"}, {"prompt": "three?", "answer": "3"})
    assert [prompt["answer"] for prompt in found] == [None, "3"]


def test_the_default_system_message_stands_before_a_prompt(tmp_path):
    (found,) = prompts_of(tmp_path, {"prompt": "two?", "level": 3}, default_system="Be brief.")
    assert [message["role"] for message in found["messages"]] == ["system", "user"]
    assert found["columns"] == {"level": 3}


@pytest.mark.parametrize("template", [None, "chatml", "llama3"])
def test_prompts_have_the_ids_that_sft_has_before_the_answer(tiny_tokenizer, template):
    template = load_template(template, tiny_tokenizer)
    turns = [USER, {"role": "assistant", "content": "2 <|im_end|>"}, {"role": "user", "content": "你好 <|im_start|>?"}]
    for messages in (turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
        answered = {"messages": [*messages, {"role": "assistant", "content": "yes"}]}
        config = common.Config(cutoff_len=500, mask_history=True)
        (sample,) = encode([answered], template, tiny_tokenizer, config)
        first = next(i for i, label in enumerate(sample["labels"]) if label != -100)
        found = encode_prompt(
            {"messages": messages, "answer": "yes", "columns": {"a": 1}}, template, tiny_tokenizer, config
        )
        assert found["prompt_ids"] == sample["input_ids"][:first]
        assert json.loads(found["row"]) == {"a": 1, "prompt": messages, "answer": "yes"}


def test_of_a_long_prompt_the_oldest_turns_are_left_out(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    turns = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y"}, USER]
    config = common.Config(cutoff_len=100, max_completion_length=40)
    prompt = {"messages": turns, "answer": None, "columns": {}}
    found = encode_prompt(prompt, template, tiny_tokenizer, config)
    alone = encode_prompt({**prompt, "messages": [USER]}, template, tiny_tokenizer, config)
    assert found["prompt_ids"] == alone["prompt_ids"] and found["truncated"] and not alone["truncated"]
    too_long = encode_prompt({**prompt, "messages": turns[:1]}, template, tiny_tokenizer, config)
    assert too_long.sentence == says("tokens, more") and too_long.fields["cutoff_len"] == 60
