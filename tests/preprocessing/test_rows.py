"""rows.py: rows of every format to conversations, and what is wrong with rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, refused, run, says, user_error, write_jsonl
from example_rows import GOOD, TALK, config, conversations, faulty, notes, prepare, register

from common import Message
from preprocessing import dataset
from runs.configuration import load_config

pytestmark = pytest.mark.usefixtures("cache")


def message(*turns: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


# ---------------------------------------------------------------------------------------------------------------------
# Faulty rows

# What stands in the file, and the fault of its first row, unless the fields say which.
FAULTS: list[tuple[str, str, dict[str, Any]]] = [
    (
        '{"instruction": "q", "output": "a"',
        says("broken JSON at line {line}, column {column}: {problem}"),
        {"line": 1, "column": 35},
    ),
    (
        '\n{"instruction": "q" "output": "a"}',
        says("broken JSON at line {line}, column {column}: {problem}"),
        {"row": 2, "line": 2, "column": 21, "problem": "Expecting ',' delimiter"},
    ),
    ('{"instruction": "q", "output": null}', says("{where} is null"), {"where": "output"}),
    ('{"instruction": "q", "output": 5}', says('text; write "'), {"where": "output", "value": "5"}),
    ('{"instruction": "q", "output": true}', says('text; write "'), {"where": "output", "value": "true"}),
    ('{"instruction": "q", "output": " "}', says("{where} is empty"), {"where": "output"}),
    ('{"instruction": "q", "output": ["a"]}', says("list, not text"), {"where": "output"}),
    ('{"instruction": "q", "output": {"a": 1}}', says("an object, not"), {"where": "output"}),
    ('{"instruction": 3, "output": "a"}', says('text; write "'), {"where": "instruction", "value": "3"}),
    ('{"instruction": "", "input": "", "output": "a"}', says("the question is"), {"columns": ["instruction", "input"]}),
    (
        json.dumps(GOOD) + '\n{"instruction": "q", "ouput": "a"}',
        says("has no column '{column}'{near:suggestion}; it has {columns}"),
        {"row": 2, "column": "output", "near": "ouput", "columns": ["instruction", "ouput"]},
    ),
    (json.dumps({**GOOD, "history": [["a", "b", "c"]]}), says("be [question"), {"item": 1}),
    (json.dumps({**GOOD, "history": [["a", "b"], "c"]}), says("be [question"), {"item": 2}),
    (json.dumps({**GOOD, "history": {"a": "b"}}), says("of [question"), {}),
    (
        json.dumps({**GOOD, "history": [["a", None]]}),
        says("{where} is null"),
        {"where": Message("the answer in item {item} of history", item=1)},
    ),
    (json.dumps({**GOOD, "output": "\ud83d"}), says("holds half a"), {"character": "\\ud83d"}),
    (json.dumps(GOOD) + "\n[1]", says("with columns"), {"row": 2, "value": "[1]"}),
    (json.dumps(GOOD) + "\n\ufeff" + json.dumps(GOOD), says("a byte-order"), {"row": 2, "line": 2}),
    (message(), says("conversation is"), {}),
    ('{"messages": null}', says("{where} is null"), {"where": "messages"}),
    ('{"messages": {"role": "user"}}', says("list of messages"), {"column": "messages"}),
    (message(("user", "q")), says("role order: the"), {"role": "user"}),
    (message(("assistant", "a")), says("message 1 has"), {"role": "assistant"}),
    (
        message(("user", "q"), ("user", "q"), ("assistant", "a")),
        says("follows one of"),
        {"number": 2, "role": "user", "before": "user"},
    ),
    (
        message(("user", "q"), ("assistant", "a"), ("system", "s")),
        says("follows one of"),
        {"number": 3, "role": "system", "before": "assistant"},
    ),
    (message(("system", "s")), says("conversation is"), {}),
    (message(("usr", "q"), ("assistant", "a")), says("unknown role"), {"number": 1, "role": "usr"}),
    (
        message(("user", "q"), ("assistant", None)),
        says("{where} is null"),
        {"where": Message("the answer (message {number})", number=2)},
    ),
    (
        message(("user", "q"), ("assistant", 0)),
        says('text; write "'),
        {"where": Message("the answer (message {number})", number=2), "value": "0"},
    ),
    (
        '{"messages": [{"role": "user", "contnt": "q"}]}',
        says("message {number} has no '{key}'{near:suggestion}"),
        {"number": 1, "key": "content", "near": "contnt"},
    ),
    ('{"messages": ["hello"]}', says("object with a"), {"number": 1}),
    (
        message(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "a")),
        says("part of type"),
        {"number": 1, "type": "image_url"},
    ),
    (
        '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{x"}]}',
        says("is broken JSON"),
        {"where": Message("the tool call (message {number})", number=2)},
    ),
    ('{"instruction": "q", "output": "a", "tools": "[{]"}', says("is broken JSON"), {"where": "tools", "column": 3}),
    ('{"instruction": "q", "output": "a", "tools": "[3]"}', says("tools is not"), {}),
    ('{"instruction": "q", "output": "a", "tools": "[{}]"}', says("tools has one"), {}),
    ('{"instruction": "q", "output": "bad", "kto_tag": false}', says("data (answers"), {}),
    ('{"prompt": "q", "completion": "bad", "label": false}', says("data (answers"), {}),
    ('{"instruction": "q", "output": "a", "chosen": "a", "rejected": "b"}', says("data (chosen"), {}),
    (
        (
            '{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, '
            '"rejected": {"from": "gpt", "value": "b"}}'
        ),
        says("data (chosen"),
        {},
    ),
    (
        '{"instruction": "q", "output": "a", "images": ["a.png"]}',
        says("has {kind}; this kit trains on text"),
        {"kind": "images"},
    ),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}',
        says("0 (read only"),
        {"number": 2, "key": "weight", "value": "0.5"},
    ),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": false}]}',
        says("the weight 0"),
        {},
    ),
]


@pytest.mark.parametrize(("content", "code", "fields"), FAULTS)
def test_a_faulty_row_is_named_with_file_row_and_reason(
    tmp_path: Path, content: str, code: str, fields: dict[str, Any]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with faulty(code, **{"row": 1, "file": path, **fields}):
        dataset.check(config(path))


def test_pairs_without_another_column_are_named_too(tmp_path: Path) -> None:
    for row, code in (
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, says("data (chosen")),
        ({"chosen_messages": [], "rejected_messages": []}, says("data (chosen")),
        ({"caption": "a", "images": ["a.png"]}, says("has {kind}; this kit trains on text")),
    ):
        with user_error("dataset '{name}' {reason}") as raised:
            dataset.check(config(write_jsonl(tmp_path / "rows.jsonl", [row])))
        assert raised.value.fields["reason"].sentence == code


def test_a_fault_that_repeats_is_told_once_with_its_count_and_first_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD] + [{"instruction": "q", "output": None}] * 25)
    with user_error("with on_bad_rows=skip", count=25) as raised:
        dataset.check(config(path))
    reason = Message("{where} is null", where="output")
    assert raised.value.fields["faults"] == [
        Message(
            "{file}, row {row}: {reason} (also {more:,} more row{more:plural}: {rows})",
            file=str(path),
            row=2,
            reason=reason,
            more=24,
            rows=["3", "4", "5", "6", "..."],
        )
    ]
    assert str(raised.value).splitlines() == [
        "25 faulty rows:",
        f"  {path}, row 2: output is null (also 24 more rows: 3, 4, 5, 6, ...)",
        "correct them, or skip them with on_bad_rows=skip",
    ]


def test_the_first_twenty_kinds_of_faults_are_listed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(25):
        write_jsonl(tmp_path / "parts" / f"{number:02}.jsonl", [GOOD, {"instruction": "q", "output": None}])
    with user_error("with on_bad_rows=skip", count=25) as raised:
        dataset.check(config(tmp_path / "parts"))
    faults = raised.value.fields["faults"]
    assert len(faults) == 21 and faults[20] == Message("... and {count:,} row{count:plural} with other faults", count=5)
    assert faults[19].fields["file"].endswith("19.jsonl")


def test_faults_are_told_in_time_and_before_heavy_imports(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "output": None}])
    code = (
        "import sys, common\nfrom preprocessing import dataset\n"
        f"try: dataset.check(common.Config(dataset=({str(path)!r},)))\n"
        "except common.UserError: print({'numpy', 'pyarrow', 'datasets', 'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    done = run("preview.py", str(path))
    refused(done, "with on_bad_rows=skip")
    assert done.stderr.splitlines() == [
        "error: 1 faulty row:",
        f"  {path}, row 1: output is null",
        "correct them, or skip them with on_bad_rows=skip",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Formats and columns


def test_columns_that_the_registry_does_not_name_are_used_and_noted(tmp_path: Path, tiny_tokenizer) -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "b"]], "id": 1}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    some = {"prompt": "instruction", "response": "output"}
    folder = register(
        tmp_path,
        some={"file_name": "rows.jsonl", "columns": some},
        none={"file_name": "rows.jsonl", "columns": {**some, "query": None, "system": None, "history": None}},
        bare={"file_name": "rows.jsonl"},
    )
    whole = [("system", "s"), ("user", "h"), ("assistant", "b"), ("user", "q\ni"), ("assistant", "a")]
    for name, expected in (("some", whole), ("bare", whole), ("none", [("user", "q"), ("assistant", "a")])):
        (talk,) = conversations(name, dataset_dir=folder)
        assert [(m["role"], m["content"]) for m in talk["messages"]] == expected
    found = notes(prepare(tiny_tokenizer, "some", dataset_dir=folder))
    assert [note.fields["kind"] for note in found if note.sentence == says("' is used as")] == [
        "history",
        "query",
        "system",
    ]
    assert Message("columns that are not used: {columns}", columns=["id"]) in found


def test_a_column_that_another_name_takes_is_not_read_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"input": "q", "target": "a"}])
    folder = register(tmp_path, rows={"file_name": "rows.jsonl", "columns": {"prompt": "input", "response": "target"}})
    assert conversations("rows", dataset_dir=folder)[0]["messages"][0]["content"] == "q"


def test_a_misspelt_column_of_the_registry_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "inputs": "i", "output": "a"}])
    folder = register(tmp_path, rows={"file_name": "rows.jsonl", "columns": {"query": "inptus"}})
    with user_error("of dataset_info.json{near:suggestion}", column="inptus", near="inputs"):
        conversations("rows", dataset_dir=folder)


def test_missing_system_tag_loses_nothing_and_openai_gets_no_system_prompt(tmp_path: Path, tiny_tokenizer) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", [{"talk": [{"r": "system", "c": "s"}, {"r": "me", "c": "q"}, {"r": "bot", "c": "a"}]}]
    )
    write_jsonl(tmp_path / "open.jsonl", [{"messages": TALK}])
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "me", "assistant_tag": "bot"}
    folder = register(
        tmp_path,
        rows={"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        open={"file_name": "open.jsonl", "formatting": "openai"},
    )
    talks = conversations("rows", "open", dataset_dir=folder)
    assert [[m["role"] for m in t["messages"]] for t in talks] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]
    made = prepare(tiny_tokenizer, "rows", "open", dataset_dir=folder)
    assert notes(made) == [
        Message("tags name no system_tag; messages of the role 'system' are read (LLaMA-Factory drops their rows)")
    ]
    assert notes(made, number=1) == [
        Message("no 'detailed thinking off' is put into the system message (LLaMA-Factory does for openai data)")
    ]


def test_tool_calls_of_sharegpt_and_openai_are_the_same_conversation(tmp_path: Path, tiny_tokenizer) -> None:
    function = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "add", "arguments": {"x": 1}}
    openai = {**call, "arguments": json.dumps(call["arguments"])}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ],
        "tools": json.dumps([function]),
    }
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": openai}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2.", "tool_calls": None},
    ]
    write_jsonl(tmp_path / "a.jsonl", [sharegpt])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": messages, "tools": [{"type": "function", "function": function}]}])
    (first,), (second,) = conversations(tmp_path / "a.jsonl"), conversations(tmp_path / "b.jsonl")
    assert first == second
    assert first["messages"][1]["tool_calls"] == [{"type": "function", "function": call}]
    assert first["tools"] == [{"type": "function", "function": function}]

    from preprocessing.template import load_template

    qwen = load_template("qwen", tiny_tokenizer)
    made = dataset.prepare(config(tmp_path / "a.jsonl", cutoff_len=4096), tiny_tokenizer, qwen)
    shown = tiny_tokenizer.decode(made.train[0]["input_ids"])
    assert '"name": "add", "description": "adds"' in shown and "<tool_call>\n" in shown and '{"x": 1}' in shown


def test_the_format_of_llamafactory_v1(tmp_path: Path) -> None:
    """Contents are parts with a value, thoughts and calls are parts too; loss_weight 0 masks an answer."""

    def text(value: str) -> list[dict]:
        return [{"type": "text", "value": value}]

    call = {"name": "add", "arguments": {"x": 1}}
    row = {
        "messages": [
            {"role": "system", "content": text("S"), "loss_weight": 0.0},
            {"role": "user", "content": text("1 + 1?"), "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(call)}], "loss_weight": 0.0},
            {"role": "tool", "content": text("2"), "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [{"type": "reasoning", "value": "Easy."}, *text("2.")],
                "loss_weight": 1.0,
            },
        ],
        "tools": json.dumps([{"name": "add"}]),
    }
    (read,) = conversations(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert read["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
            "learned": False,
        },
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2.", "reasoning_content": "Easy."},
    ]
    assert read["tools"] == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss": False}, {"loss_weight": 0.0}])
def test_an_answer_of_weight_0_is_masked(tmp_path: Path, tiny_tokenizer, weight: dict) -> None:
    turns = [("user", "q1", {}), ("assistant", "wrong", weight), ("user", "q2", {}), ("assistant", "right", {})]
    row = {"messages": [{"role": role, "content": content, **more} for role, content, more in turns]}
    made = prepare(tiny_tokenizer, write_jsonl(tmp_path / "rows.jsonl", [row]))
    (sample,) = made.train
    text = tiny_tokenizer.decode(sample["input_ids"])
    learned = [i for i, label in enumerate(sample["labels"]) if label != -100]
    assert "wrong<|im_end|>" in text
    assert tiny_tokenizer.decode([sample["input_ids"][i] for i in learned]) == "right<|im_end|>"
    assert all(sample["labels"][i] == sample["input_ids"][i] for i in learned)
    assert notes(made) == [Message("{count:,} answer{count:plural} of weight 0: read, not learned", count=1)]


def test_nulls_that_arrow_puts_into_objects_are_not_trained(tmp_path: Path) -> None:
    """Arrow gives each object of a column the keys of all; a null answer is a fault all the same."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {key: {"type": "string"}}}}}
        for name, key in (("f", "x"), ("g", "y"))
    ]
    calling = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}],
    }
    result = {"role": "tool", "content": "2", "tool_call_id": "1"}
    rows = [
        {"messages": [TALK[0], calling, result, TALK[1]], "tools": tools},
        {"messages": TALK, "tools": [{"type": "function", "function": {"name": "h", "strict": True}}]},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert conversations(tmp_path / "rows.parquet") == conversations(tmp_path / "rows.jsonl")
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": None}]}, {"messages": TALK}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "null.parquet")
    pyarrow.parquet.write_table(pa.Table.from_pylist([GOOD, {**GOOD, "output": None}]), tmp_path / "output.parquet")
    with faulty(says("message {number} has no '{key}'{near:suggestion}"), row=1, number=2, key="content"):
        conversations(tmp_path / "null.parquet")
    with faulty(says("{where} is null"), row=2, where="output"):
        conversations(tmp_path / "output.parquet")


def test_function_is_an_older_name_of_the_role_tool(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    talk = [TALK[0], calling, {"role": "function", "name": "f", "content": "2"}, TALK[1]]
    (read,) = conversations(write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]))
    assert read["messages"][2] == {"role": "tool", "name": "f", "content": "2"}


def test_text_without_answers_is_told_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "once upon"}, {"text": "a time"}])
    folder = register(tmp_path, c4={"file_name": "rows.jsonl", "columns": {"prompt": "text"}})
    with user_error("text without", name="c4"):
        dataset.check(config("c4", dataset_dir=folder))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": ""}, *TALK]},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": ""}]}, *TALK]},
        {
            "conversations": [
                {"from": "system", "value": " "},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"instruction": "q", "output": "a", "system": ""},
    ],
)
def test_an_empty_system_message_is_none(tmp_path: Path, row: dict) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    (found,) = conversations(path)
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    (found,) = conversations(path, default_system="Be brief.")
    assert found["messages"][0] == {"role": "system", "content": "Be brief."}


def test_name_author_and_default_system_are_filled_in(tmp_path: Path, tiny_tokenizer) -> None:
    row = {"instruction": "Who is {{name}}?", "output": "{{name}} by {{author}}, {{other}}"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "system": "own"}])
    first, second = conversations(path, name="Ada", author="Bo", default_system="Be {{name}}.")
    assert [m["content"] for m in first["messages"]] == ["Be Ada.", "Who is Ada?", "Ada by Bo, {{other}}"]
    assert second["messages"][0]["content"] == "own"
    assert Message(
        "{mark} becomes '{value}' in {rows:,} row{rows:plural} (unless {setting}: \"\")",
        mark="{{name}}",
        setting="name",
        value="Ada",
        rows=2,
    ) in notes(prepare(tiny_tokenizer, path, name="Ada"))
    alone = conversations(path, name="", author="Bo")[0]["messages"]
    assert [m["content"] for m in alone] == ["Who is {{name}}?", "{{name}} by Bo, {{other}}"]
    assert load_config(["name=", "author="]).config.name == ""


def test_answers_of_which_the_template_leaves_out_a_part_are_counted(tmp_path: Path, tiny_tokenizer) -> None:
    thinking = {"messages": [TALK[0], {**TALK[1], "reasoning_content": "Who am I?"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [thinking, {"messages": TALK}, thinking])
    assert notes(prepare(tiny_tokenizer, path)) == [
        Message("template {name} leaves out the thoughts of {count:,} answer{count:plural}", name="chatml", count=2)
    ]


def test_format_is_decided_by_the_first_row_that_has_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q"}, GOOD])
    with faulty(
        says("has no column '{column}'{near:suggestion}; it has {columns}"),
        row=1,
        column="output",
        columns=["instruction"],
    ):
        dataset.check(config(path))


def test_csv_keeps_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a, b\nc",0\n')
    assert [m["content"] for m in conversations(path)[0]["messages"]] == ["a, b\nc", "0"]
