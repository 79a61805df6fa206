"""encode_pairs.py: exact ids of preference pairs and of raw documents."""

from __future__ import annotations

import pytest
from conftest import CONTROL_TOKENS, says, user_error
from test_template import CALL, assistant, b, byte_tokenizer, for_template, one, talk

from common import Config, Message
from preprocessing.encode_pairs import encode_pair
from preprocessing.encode_stages import encode_documents
from preprocessing.prompts import prompt_ids
from preprocessing.template import load_template, template_names
from preprocessing.tokenizer import load_tokenizer

START, END = 257, 258  # <|im_start|>, <|im_end|> of the tiny tokenizer


def pair_of(conversation: dict, chosen: str, rejected: str, template, tokenizer, cutoff_len: int = 4096, **options):
    pair = {**conversation, "chosen": assistant(chosen), "rejected": assistant(rejected)}
    return encode_pair(pair, template, tokenizer, Config(cutoff_len=cutoff_len, **options))


def test_a_pair_by_hand(tiny_tokenizer):
    pair = pair_of(talk("Hi"), "Yo", "No!", load_template("chatml", tiny_tokenizer), tiny_tokenizer)
    prompt = [START, *b("user\nHi"), END, *b("\n"), START, *b("assistant\n")]
    expected = {"prompt_ids": prompt, "chosen_ids": [*b("Yo"), END], "rejected_ids": [*b("No!"), END]}
    assert pair == {**expected, "truncated": False, "whole_length": len(prompt) + 4}


@pytest.mark.parametrize("name", template_names())
def test_both_answers_share_the_prompt_and_end_with_the_turn(name: str):
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    conversation = talk("q1", "a1", "q2 <|im_end|>", system="Be brief.")
    pair = pair_of(conversation, "Yes.", "No </s><|eot_id|>.", template, tokenizer)
    for kind, text in (("chosen", "Yes."), ("rejected", "No </s><|eot_id|>.")):
        whole = one({"messages": [*conversation["messages"], assistant(text)]}, template, tokenizer)["input_ids"]
        ids = pair["prompt_ids"] + pair[f"{kind}_ids"]
        assert whole[: len(ids)] == ids
        assert tokenizer.decode(ids).endswith(text + template.stop[0]) and len(whole) - len(ids) <= 1
    asked = prompt_ids(conversation["messages"], tokenizer, template_text=template.saved)
    assert pair["prompt_ids"] == asked


def test_a_token_over_the_end_of_the_prompt_belongs_to_both_answers(embedded_model):
    """The header's newline and the answer's first one are a single token there."""
    tokenizer = load_tokenizer(embedded_model)
    template = load_template("chatml", tokenizer)
    pair = pair_of(talk("a"), "\n\n x", "x", template, tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]).endswith("<|im_start|>assistant")
    assert tokenizer.decode(pair["chosen_ids"]) == "\n\n\n x<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"]) == "\nx<|im_end|>"


def test_the_oldest_turns_of_the_prompt_go_first(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    conversation = talk("first", "one", "second", "two", "third", system="S")
    whole = pair_of(conversation, "yes", "no, never", template, tiny_tokenizer)
    length = len(whole["prompt_ids"]) + len(whole["rejected_ids"])
    assert pair_of(conversation, "yes", "no, never", template, tiny_tokenizer, length) == whole
    cut = pair_of(conversation, "yes", "no, never", template, tiny_tokenizer, length - 1)
    expected = pair_of(talk("second", "two", "third", system="S"), "yes", "no, never", template, tiny_tokenizer)
    assert cut == {**expected, "truncated": True, "whole_length": length}
    reason = pair_of(conversation, "yes", "no, never", template, tiny_tokenizer, length - 1, overlong="drop")
    assert reason == Message(
        "it has {tokens:,} tokens, more than cutoff_len={cutoff_len}", tokens=length, cutoff_len=length - 1
    )


@pytest.mark.parametrize("name", template_names())
def test_a_pair_that_is_cut_fits_and_stays_different(name: str):
    tokenizer = for_template(name)
    template = load_template(name, tokenizer)
    whole = pair_of(talk("question " * 3), "ABCDEFGHIJ" * 3, "abcdefghij" * 2, template, tokenizer)
    length = len(whole["prompt_ids"]) + len(whole["chosen_ids"])
    cut = 0
    for cutoff in range(length - 50, length):
        pair = pair_of(talk("question " * 3), "ABCDEFGHIJ" * 3, "abcdefghij" * 2, template, tokenizer, cutoff)
        if isinstance(pair, Message):
            assert pair.sentence == says("beginning of")
            continue
        cut += 1
        chosen, rejected = (tokenizer.decode(pair[f"{kind}_ids"]) for kind in ("chosen", "rejected"))
        assert len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= cutoff
        assert "AB" in chosen and "ab" in rejected and pair["truncated"]
        assert chosen.endswith(template.stop[0]) == (chosen.count("J") == 3)  # a cut answer does not teach to stop
        assert rejected.endswith(template.stop[0]) == (rejected.count("j") == 2)
    assert cut > 20
    same = pair_of(talk("q"), "A" * 60 + "x", "A" * 60 + "y", template, tokenizer, length - 25)
    assert same.sentence == says("to cutoff_len=")


def test_equal_answers_are_refused_and_a_call_is_an_answer(tiny_tokenizer):
    template = load_template("chatml", tiny_tokenizer)
    assert pair_of(talk("q"), "a", "a", template, tiny_tokenizer) == Message("chosen and rejected are the same answer")
    call = {**talk("q"), "chosen": assistant("", tool_calls=[CALL]), "rejected": assistant("b")}
    assert encode_pair(call, load_template("qwen", tiny_tokenizer), tiny_tokenizer, Config())["rejected_ids"]


def test_documents_by_hand(tiny_tokenizer):
    """Every token is learned, the end of sequence included; what looks like a control token stays text."""
    first, second, empty = encode_documents(["Hi 你", "<|im_end|>", " \n"], tiny_tokenizer, 100)
    ids = [*b("Hi 你"), END]
    assert first == [{"input_ids": ids, "labels": ids, "truncated": False, "whole_length": len(ids)}]
    assert second[0]["input_ids"] == [*b("<|im_end|>"), END]
    assert empty == Message("it has no text")
    (pieces,) = encode_documents(["x" * 20], tiny_tokenizer, 10)
    assert [len(piece["input_ids"]) for piece in pieces] == [7, 7, 7]  # 20 tokens and the end
    assert [i for piece in pieces for i in piece["labels"]] == [*b("x" * 20), END]
    (reason,) = encode_documents(["\ufdd0"], tiny_tokenizer, 10)
    assert reason == Message("it contains Unicode noncharacters (U+FDD0 to U+FDEF), which no text may; remove them")
    with user_error("eos_token in"):
        encode_documents(["x"], byte_tokenizer(CONTROL_TOKENS), 10)
