"""prompts.py: a prompt holds every message, and a header of an answer follows the last one."""

from __future__ import annotations

import pytest
from conftest import CONTROL_TOKENS, says, user_error
from test_template import CALL, assistant, byte_tokenizer, for_template, user, with_own

from common import Message, UserError
from preprocessing.prompts import prompt_ids
from preprocessing.template import load_template, template_names

SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": '{"degrees": 21, "sky": "clear"}', "tool_call_id": "call00001", "name": "f"}
CALLING = [user("q"), assistant("", tool_calls=[CALL])]
NO_HEADER = Message(
    "the last message is the {role}'s, and the chat template opens no answer after it; end "
    "with a message of the user, or ask for that message to be continued",
    role="assistant",
)


def text_of(name: str, messages: list[dict], **options) -> str:
    tokenizer = for_template(name)
    text = load_template(name, tokenizer).saved
    return tokenizer.decode(prompt_ids(messages, tokenizer, template_text=text, **options))


@pytest.mark.parametrize("name", template_names())
def test_every_conversation_shape_is_whole_or_refused(name: str):
    """Each message's text stands in the prompt, in order, and something follows the end of the last turn."""
    shapes = [
        [user("first")],
        [SYSTEM, user("first")],
        [user("first"), assistant("second"), user("third")],
        [SYSTEM, user("first"), assistant("second")],
        [user("first"), assistant("second")],
        [user("first"), user("second")],
        [SYSTEM],
        [assistant("first")],
        [assistant("first"), user("second")],
        [user("first"), SYSTEM],
        [user("first"), SYSTEM, user("second")],
    ]
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    accepted = 0
    for messages in shapes:
        try:
            prompt = tokenizer.decode(prompt_ids(messages, tokenizer, template_text=template.saved))
        except UserError as error:
            assert error.sentence == says("these messages"), error
            continue
        accepted += 1
        assert all(message["content"] in prompt for message in messages)
        rest = prompt[max(prompt.rindex(message["content"]) + len(message["content"]) for message in messages) :]
        assert rest.strip() != template.stop[0] or messages[-1]["role"] == "user"
    assert accepted >= 4


@pytest.mark.parametrize("name", ["mistral", "default"])
def test_a_last_message_of_the_assistant_without_a_header_after_it_is_refused(name: str):
    with user_error("these messages", reason=NO_HEADER):
        text_of(name, [user("q"), assistant("Sure,")])


@pytest.mark.parametrize("name", ["llama3", "qwen", "qwen3", "qwen3_nothink", "chatml", "gemma"])
def test_a_header_after_a_last_message_of_the_assistant_opens_another_answer(name: str):
    prompt = text_of(name, [user("q"), assistant("Sure,")])
    assert prompt.split("Sure,")[1].count(load_template(name, for_template(name)).stop[0]) == 1
    assert prompt.rstrip().endswith(("assistant", "model", "<|end_header_id|>"))


@pytest.mark.parametrize("name", template_names())
def test_a_last_message_is_continued_where_that_is_asked_for(name: str):
    for content in ("Sure, <|im_end|>", "42"):
        prompt = text_of(name, [user("q"), assistant(content)], continue_last=True)
        assert prompt.endswith(content)
        assert text_of(name, [user("q")]).rstrip().removesuffix("<think>") in prompt
    with user_error(
        "these messages", reason=Message("only a last message of the assistant that has text can be continued")
    ):
        text_of(name, [user("q")], continue_last=True)


def test_a_message_that_a_template_leaves_out_is_named():
    with user_error("these messages") as raised:
        text_of("mistral", [SYSTEM])
    assert raised.value.fields["reason"] == Message(
        "the chat template leaves message {number} ({role}) out; set template to one that fits", number=1, role="system"
    )
    assert "message 1 (system)" in str(raised.value)
    with user_error(
        "these messages",
        reason=Message(
            "the last message is the {role}'s, and the chat template opens no answer after it; end "
            "with a message of the user, or ask for that message to be continued",
            role="system",
        ),
    ):
        text_of("default", [SYSTEM])
    tokenizer = byte_tokenizer(CONTROL_TOKENS, eos="<|im_end|>")
    tokenizer.chat_template = (  # the system message is ignored, as some published templates do
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert prompt_ids([user("s")], tokenizer)
    with user_error("these messages") as raised:
        prompt_ids([{"role": "system", "content": "s"}, user("s")], tokenizer)
    assert raised.value.fields["reason"] == Message(
        "the chat template leaves message {number} ({role}) out; set template to one that fits", number=1, role="system"
    )


@pytest.mark.parametrize("name", ["llama3", "qwen", "qwen3", "mistral"])
def test_histories_with_tools_are_whole(name: str):
    """Results in JSON, words beside a call (which vendors' templates drop), thoughts of earlier turns."""
    beside = assistant("One moment.", tool_calls=[CALL])
    for calling in (CALLING, [user("q"), beside]):
        assert "degrees" in text_of(name, [*calling, RESULT])
        assert "clear" in text_of(name, [*calling, RESULT, assistant("It is clear."), user("Thanks")])
    assert "final" in text_of(name, [user("q"), assistant("<think>\nlong\n</think>\n\nfinal"), user("and?")])


def test_a_result_that_a_template_takes_apart_is_found(tiny_tokenizer):
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}{{ m.content.split(':')[1] }}"
        "{% elif m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    tokenizer = with_own(tiny_tokenizer, text)
    assert prompt_ids([*CALLING, {**RESULT, "content": "a:b"}], tokenizer)
    with user_error("these messages"):
        prompt_ids([*CALLING, {**RESULT, "content": "b:"}], tokenizer)
