"""Documents, pairs and judged answers from the forms in which they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import says, user_error, write_jsonl
from example_rows import config, conversations, prepare, register

from common import Message
from preprocessing import dataset

Q = {"role": "user", "content": "q"}
A, B = ({"role": "assistant", "content": text} for text in ("good", "bad"))
PAIR = {"messages": [Q], "chosen": A, "rejected": B}


def test_documents_of_all_forms(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    assert conversations(write_jsonl(tmp_path / "a.jsonl", rows), stage="pt") == rows
    assert conversations(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "one"}]), stage="pt") == rows[:1]
    (tmp_path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert conversations(tmp_path / "lines.txt", stage="pt") == rows
    (tmp_path / "blocks.txt").write_text("\none\nline\n\n \ntwo", encoding="utf-8")
    assert conversations(tmp_path / "blocks.txt", stage="pt") == [{"text": "one\nline"}, {"text": "two"}]
    folder = register(tmp_path, c4={"file_name": "c.jsonl", "columns": {"prompt": "body"}})
    write_jsonl(tmp_path / "c.jsonl", [{"body": "one", "text": "another"}])
    assert conversations("c4", dataset_dir=folder, stage="pt") == rows[:1]


def test_faults_of_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}])
    with user_error("with on_bad_rows=skip", count=1) as raised:
        dataset.check(config(path, stage="pt"))
    reason = Message("{where} is empty", where="text")
    assert raised.value.message.fields["faults"] == [
        Message("{file}, row {row}: {reason}", file=str(path), row=2, reason=reason)
    ]
    with user_error("its documents must be"):
        dataset.check(config(write_jsonl(tmp_path / "b.jsonl", [{"body": "one"}]), stage="pt"))


def test_samples_of_a_document_are_held_out_together(tmp_path, tiny_tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": letter * 100} for letter in "abcdefgh"])
    settings = {"stage": "pt", "cutoff_len": 40, "val_size": 2}
    made = prepare(tiny_tokenizer, path, **settings)
    held_out = {text["text"][0] for text in dataset.read_conversations(config(path, **settings))[1]}
    assert len(held_out) == 2
    assert {tiny_tokenizer.decode(row["input_ids"])[0] for row in made.eval} == held_out
    assert len(made.eval) == 6 and len(made.train) == 18
    assert all(row["labels"] == row["input_ids"] for row in made.train)
    assert made.report["datasets"][0]["duplicates"] == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"}}
        | {"rejected": {"from": "gpt", "value": "bad"}},
        {"messages": [Q], "chosen": A, "rejected": B},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ],
)
def test_pairs_of_all_forms(tmp_path, row):
    assert conversations(write_jsonl(tmp_path / "a.jsonl", [row]), stage="dpo") == [PAIR]


def test_pairs_of_the_registry(tmp_path):
    alpaca = {"prompt": "a", "query": "b", "chosen": "c", "rejected": "d"}
    talk = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "system": "sys"}
    folder = register(
        tmp_path,
        plain={"file_name": "a.jsonl", "ranking": True, "columns": alpaca},
        talk={"file_name": "b.jsonl", "ranking": True, "formatting": "sharegpt", "columns": talk},
    )
    write_jsonl(tmp_path / "a.jsonl", [{"a": "q", "b": "", "c": "good", "d": "bad"}])
    turn = {"from": "human", "value": "q"}
    answers = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
    write_jsonl(tmp_path / "b.jsonl", [{"conversations": [turn], "sys": "Be brief.", **answers}])
    assert conversations("plain", dataset_dir=folder, stage="dpo") == [PAIR]
    system = {"role": "system", "content": "Be brief."}
    assert conversations("talk", dataset_dir=folder, stage="dpo") == [{**PAIR, "messages": [system, Q]}]


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "grpo"])
def test_rows_of_no_known_form_are_shown_forms_that_the_stage_can_read(tmp_path: Path, stage: str):
    path = write_jsonl(tmp_path / "a.jsonl", [{"wrong": "q", "good": "a", "bad": "b"}])
    with user_error("known format", stage=stage, columns=["wrong", "good", "bad"]) as raised:
        dataset.check(config(path, stage=stage, reward_funcs=("json_valid",)))
    for shape in raised.value.message.fields["shapes"]:
        first, *others = shape.split("...")
        row = json.loads(first + "".join(f"{i}{other}" for i, other in enumerate(others)))
        dataset.check(config(write_jsonl(tmp_path / "b.jsonl", [row]), stage=stage))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, says("the same answer")),
        ({"prompt": "q", "chosen": "good", "rejected": " "}, says("{where} is empty")),
        ({"prompt": "q", "chosen": [Q], "rejected": [B]}, says("is a message of")),
        ({"chosen": [Q, A], "rejected": [{**Q, "content": "other"}, B]}, says("before their")),
        ({"prompt": [Q, A], "chosen": [A], "rejected": [B]}, says("follows one of")),
        ({"instruction": "q", "output": "a"}, says("rejected; it")),
    ],
)
def test_faulty_pairs_are_named_by_row(tmp_path: Path, row: dict, code: str):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}, row])
    if code == says("rejected; it"):
        path = write_jsonl(tmp_path / "a.jsonl", [row])
    with user_error("with on_bad_rows=skip", count=1) as raised:
        dataset.check(config(path, stage="dpo"))
    (fault,) = raised.value.message.fields["faults"]
    assert fault.fields["reason"].sentence == code


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "good", "kto_tag": True},
        {"messages": [Q, A], "kto_tag": True},
        {"prompt": "q", "completion": "good", "label": True},
        {"prompt": [Q], "completion": [A], "label": True},
    ],
)
def test_judged_answers_of_all_forms(tmp_path, row):
    assert conversations(write_jsonl(tmp_path / "a.jsonl", [row]), stage="kto") == [{"messages": [Q, A], "good": True}]


def test_an_answer_that_is_not_judged_is_a_fault(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "a", "kto_tag": "yes"}])
    with user_error("with on_bad_rows=skip", count=1) as raised:
        dataset.check(config(path, stage="kto"))
    (fault,) = raised.value.message.fields["faults"]
    assert fault.fields["reason"] == Message(
        "{column} is {value}; it must be true (a good answer) or false (a bad one)", column="kto_tag", value='"yes"'
    )


def test_samples_of_pairs_and_judged_answers(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "q", "chosen": "longer answer" * (i % 5 + 3), "rejected": str(i)} for i in range(12)]
    made = prepare(tiny_tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), stage="dpo")
    row = made.train[0]
    text = {name: tiny_tokenizer.decode(ids) for name, ids in row.items()}
    assert text["prompt_ids"].endswith("assistant\n") and text["rejected_ids"] == "0<|im_end|>"
    assert made.train_lengths[0] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    report = made.report["datasets"][0]
    assert report["learned"] == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in made.train)
    judged = [
        {"instruction": "q", "output": "good", "kto_tag": True},
        {"instruction": "q", "output": "b", "kto_tag": 0},
    ]
    made = prepare(tiny_tokenizer, write_jsonl(tmp_path / "b.jsonl", judged), stage="kto")
    assert [row["label"] for row in made.train] == [True, False]
    assert tiny_tokenizer.decode(made.train[1]["completion_ids"]) == "b<|im_end|>"
