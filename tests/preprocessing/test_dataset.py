"""formats.py and dataset.py: files and registry to conversations, faults by row, samples, cache, split and mixing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT, run, write_jsonl

import common
from common import Config, UserError
from preprocessing import dataset, formats

GOOD = {"instruction": "Who are you?", "input": "", "output": "A kit."}
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A kit."}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "data"


def config(*paths: Path | str, **settings) -> Config:
    return Config(dataset=tuple(map(str, paths)), **{"dataset_dir": "none", "cutoff_len": 256, **settings})


def conversations(*paths: Path | str, **settings) -> list[dict]:
    return dataset.read_conversations(config(*paths, **settings))[0]


def register(folder: Path, **entries: dict) -> str:
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return str(folder)


def prepare(tokenizer, *paths: Path | str, **settings) -> dataset.Prepared:
    from preprocessing import chat_template

    return dataset.prepare(config(*paths, **settings), tokenizer, chat_template.load_template("chatml", tokenizer))


def questions(count: int) -> list[dict]:
    return [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(count)]


def message(**kwargs) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in kwargs["turns"]]})


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_every_file_type_gives_the_same_conversations(tmp_path: Path) -> None:
    rows, table = [GOOD, GOOD], pa.Table.from_pylist([GOOD, GOOD])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    contents = {
        "a.jsonl": text.encode(),
        "b.json": json.dumps(rows, indent=2).encode(),
        "c.json": text.encode(),  # JSON lines under the other name
        "d.jsonl": json.dumps(rows).encode(),
        "e.txt": text.replace("\n", "\n\n").encode(),
        "f.csv": b"instruction,input,output\nWho are you?,,A kit.\n\nWho are you?,,A kit.\n",
        "g.json": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "h.csv": b"\xef\xbb\xbfinstruction,input,output\r\nWho are you?,,A kit.\r\nWho are you?,,A kit.\r\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(table, tmp_path / "i.parquet")
    for name, opened in (("j.arrow", pa.ipc.new_stream), ("k.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table)
    for path in sorted(tmp_path.glob("*.*")):
        assert conversations(path) == [{"messages": TALK}] * 2, path.name


def test_folder_of_one_type_is_read_in_order_and_of_several_refused(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    write_jsonl(folder / "2.jsonl", [{"instruction": "q2", "output": "a2"}])
    write_jsonl(folder / "1.jsonl", [{"instruction": "q1", "output": "a1"}])
    (folder / "README.md").write_text("no data")
    registry = register(tmp_path, parts={"file_name": "parts"})
    assert [c["messages"][0]["content"] for c in conversations("parts", dataset_dir=registry)] == ["q1", "q2"]
    (folder / "3.csv").write_text("instruction,output\nq,a\n")
    with pytest.raises(UserError, match=r"several types \(csv, json\)"):
        conversations(folder)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_json_list_is_streamed_in_chunks(tmp_path: Path, chunk: int) -> None:
    rows = [{"instruction": 'héllo 你好 😀 \\ " ]},', "n": number, "output": "x" * number} for number in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(rows, ensure_ascii=False, indent=1) + "\n ", encoding="utf-8")
    assert [row for _, row in formats._array_rows(path, chunk)] == rows


@pytest.mark.parametrize("chunk", [3, 1 << 20])
@pytest.mark.parametrize("damage", ['"a\n', "[1,]", "nul", '"open'])
def test_broken_json_list_names_line_and_column_as_python_does(tmp_path: Path, chunk: int, damage: str) -> None:
    text = json.dumps([GOOD] * 3, indent=1).replace('"A kit."', damage, 2).replace(damage, '"A kit."', 1)
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    *good, (number, fault) = formats._array_rows(path, chunk)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    assert good == [(1, GOOD)] and number == 2 and fault.final
    assert f"line {expected.value.lineno}, column {expected.value.colno}" in str(fault)


def test_long_json_list_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with open(path, "w") as file:
        file.write("[" + ",\n".join([json.dumps({"instruction": "q" * 1000, "output": "a" * 1000})] * 5_000) + "]")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    assert sum(1 for _ in formats.read_rows(path)) == 5_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6


# ---------------------------------------------------------------------------------------------------------------------
# Wrong data

FAULTS = [
    ('{"instruction": "q", "output": "a"', "row 1: broken JSON at line 1, column 35"),
    ('\n{"instruction": "q" "output": "a"}', "row 2: broken JSON at line 2, column 21: Expecting ',' delimiter"),
    ('{"instruction": "q", "output": null}', "row 1: output is null"),
    ('{"instruction": "q", "output": 5}', 'row 1: output is a number (5); write "5"'),
    ('{"instruction": "q", "output": true}', 'row 1: output is a truth value (true); write "true"'),
    ('{"instruction": "q", "output": " "}', "row 1: output is empty"),
    ('{"instruction": "q", "output": ["a"]}', "row 1: output is a list, not text"),
    ('{"instruction": 3, "output": "a"}', 'row 1: instruction is a number (3); write "3"'),
    ('{"instruction": "", "input": "", "output": "a"}', "row 1: the question is empty (instruction and input)"),
    (
        json.dumps(GOOD) + '\n{"instruction": "q", "ouput": "a"}',
        "row 2: has no column 'output' (did you mean 'ouput'?)",
    ),
    (
        json.dumps({**GOOD, "history": [["a", "b", "c"]]}),
        "row 1: item 1 of history has 3 items; it must be [question, answer]",
    ),
    (json.dumps({**GOOD, "history": [["a", "b"], "c"]}), "row 1: item 2 of history is no list"),
    (json.dumps({**GOOD, "history": [["a", None]]}), "row 1: the answer in item 1 of history is null"),
    (json.dumps({**GOOD, "output": "\ud83d"}), "row 1: holds half a character"),
    (json.dumps(GOOD) + "\n[1]", "row 2: is a list, not an object with columns"),
    (json.dumps(GOOD) + "\n\ufeff" + json.dumps(GOOD), "row 2: line 2 starts with a byte-order mark (BOM); delete it"),
    (message(turns=[]), "row 1: the conversation is empty"),
    ('{"messages": null}', "row 1: messages is null"),
    (message(turns=[("user", "q")]), "row 1: wrong role order: the last message is of role user"),
    (
        message(turns=[("assistant", "a")]),
        "row 1: wrong role order: message 1 of role assistant starts the conversation",
    ),
    (
        message(turns=[("user", "q"), ("user", "q"), ("assistant", "a")]),
        "message 2 of role user follows one of role user",
    ),
    (message(turns=[("user", "q"), ("assistant", "a"), ("system", "s")]), "message 3 of role system follows one of"),
    (message(turns=[("system", "s")]), "row 1: the conversation is empty"),
    (message(turns=[("usr", "q"), ("assistant", "a")]), "row 1: message 1 has the unknown role 'usr'; known are user,"),
    (message(turns=[("user", "q"), ("assistant", None)]), "row 1: the answer (message 2) is null"),
    (message(turns=[("user", "q"), ("assistant", 0)]), 'row 1: the answer (message 2) is a number (0); write "0"'),
    ('{"messages": [{"role": "user", "contnt": "q"}]}', "message 1 has no 'content' (did you mean 'contnt'?)"),
    ('{"messages": ["hello"]}', "message 1 is not an object with a role and a content"),
    (
        message(turns=[("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "a")]),
        "a part of type 'image_url'",
    ),
    (
        '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{x"}]}',
        "broken JSON at",
    ),
    ('{"instruction": "q", "output": "a", "tools": "[{]"}', "tools is broken JSON at column 3"),
]


@pytest.mark.parametrize(("content", "reason"), FAULTS)
def test_faulty_row_is_named_with_file_row_and_reason(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        dataset.check(config(path))
    assert f"{path}, row " in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", json.dumps([GOOD]).encode("utf-16"), "the file is UTF-16 (its BOM says so); save it as UTF-8"),
        (
            "a.jsonl",
            b'{"instruction": "q", "output": "a"}\n{"instruction": "\xc4\xe3"}',
            "row 2: line 2, byte 18 is not UTF-8",
        ),
        ("a.json", b'[\n{"instruction": "\xc4\xe3", "output": "a"}]', "row 1: line 2, byte 18 is not UTF-8"),
        (
            "a.csv",
            "instruction,output\n你,好\n".encode("gbk"),
            "line 2, byte 1 is not UTF-8; save the file as CSV in UTF-8",
        ),
        ("a.csv", b"instruction,output,output\nq,a,b\n", "the header has the column 'output' more than once"),
        ("a.csv", b"instruction,output\nq\n", "row 1: line 2: 1 values for 2 columns"),
        ("a.csv", b'instruction,output\nq,a\n"q,a\n', "row 2: line 3: broken CSV"),
        ("a.json", b'[{"instruction": "q", "output": "a"},]', "row 2: broken JSON at line 1, column 38"),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a"}',
            "row 2: broken JSON at line 1, column 37: Expecting ',' or ']'",
        ),
        ("a.json", b'[{"instruction": "q", "output": "a"}] x', "text after the end of the list"),
        ("a.json", json.dumps({"data": [GOOD]}, indent=1).encode(), "row 1: an object of the file goes over several"),
        (
            "a.json",
            b'\xef\xbb\xbf\n{"data": [\n' + json.dumps(GOOD).encode() + b"]}",
            "it must be a list [...] of rows",
        ),
        ("a.parquet", b"no parquet", "the file is no Parquet file"),
        ("a.arrow", b"no arrow", "the file is no Arrow file"),
        ("a.txt", b"Once upon a time\n", "plain text has no questions and answers"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        (
            "a.jsonl",
            b'{"text": "hello"}',
            'its rows have the columns text, which is no known format. Known rows:\n  {"instr',
        ),
    ],
)
def test_faulty_file(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        dataset.check(config(tmp_path / name))
    assert reason in str(error.value)


def test_first_twenty_faults_and_the_count(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD] + [{"instruction": "q", "output": None}] * 25)
    with pytest.raises(UserError) as error:
        dataset.check(config(path))
    lines = str(error.value).splitlines()
    assert lines[0] == "25 rows of the data are faulty:"
    assert lines[1] == f"  {path}, row 2: output is null" and lines[20] == f"  {path}, row 21: output is null"
    assert lines[21] == "  ... and 5 more" and "on_bad_rows=skip" in lines[22] and len(lines) == 23


def test_skipped_rows_are_recorded_and_a_broken_list_is_never_skipped(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {"instruction": "q", "output": None}, GOOD])
    made = prepare(tiny_tokenizer, path, on_bad_rows="skip")
    report = made.report["datasets"][0]
    assert len(made.train) == 2 and (report["rows"], report["samples"], report["skipped"]) == (3, 2, 1)
    assert report["faults"] == [f"{path}, row 2: output is null"]
    assert f"skipped: {path}, row 2: output is null" in dataset.format_report(made.report)
    with pytest.raises(UserError, match="row 2: output is null"):  # out of the cache too
        prepare(tiny_tokenizer, path)
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD])[:-10])
    with pytest.raises(UserError, match="nothing after it can be read"):
        prepare(tiny_tokenizer, tmp_path / "rows.json", on_bad_rows="skip")


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
    assert done.returncode == 2 and "row 1: output is null" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Registry and formats


def test_entries_that_are_not_used_are_not_judged(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entries = {
        "rows": {"file_name": "rows.jsonl", "file_sha1": "an old key", "stage": "sft"},
        "pictures": {"file_name": "x.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "sounds": {"file_name": "x.json", "columns": {"audios": "audios"}},
        "films": {"file_name": "x.json", "columns": {"videos": "videos"}},
        "pairs": {"hf_hub_url": "a/b", "subset": "en", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
        "judged": {"hf_hub_url": "a/b", "columns": {"kto_tag": "label"}},
        "scripted": {"script_url": "folder"},
        "cloud": {"cloud_file_name": "s3://bucket/file.json"},
        "gone": {"file_name": "gone.json"},
        "slip": {"file_nam": "rows.jsonl"},
        "misspelt": {"file_name": "rows.jsonl", "columns": {"promt": "instruction"}},
        "broken": "nothing",
    }
    registry = register(tmp_path, **entries)
    assert conversations("rows", dataset_dir=registry) == [{"messages": TALK}]
    reasons = {
        "pictures": "has images; this kit trains text",
        "sounds": "has audio",
        "films": "has videos",
        "pairs": "preference data (chosen and rejected answers)",
        "judged": "preference data (KTO",
        "scripted": "is only at a script_url",
        "cloud": "is only at a cloud_file_name",
        "gone": "does not exist",
        "slip": "unknown key 'file_nam' in dataset_info.json (did you mean 'file_name'?)",
        "misspelt": "unknown column 'promt' in dataset_info.json (did you mean 'prompt'?)",
        "broken": "is not described by an object",
        "rwos": "no such file (did you mean 'rows'?)",
    }
    with pytest.raises(UserError) as error:
        formats.find_entries(reasons, registry)
    for reason in reasons.values():
        assert reason in str(error.value)


def test_columns_that_the_registry_forgets_are_used_and_it_is_said(tmp_path: Path, tiny_tokenizer) -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "b"]], "id": 1}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    some = {"prompt": "instruction", "response": "output"}
    registry = register(
        tmp_path,
        some={"file_name": "rows.jsonl", "columns": some},
        none={"file_name": "rows.jsonl", "columns": {**some, "query": None, "system": None, "history": None}},
        bare={"file_name": "rows.jsonl"},
    )
    whole = [("system", "s"), ("user", "h"), ("assistant", "b"), ("user", "q\ni"), ("assistant", "a")]
    for name, expected in (("some", whole), ("bare", whole), ("none", [("user", "q"), ("assistant", "a")])):
        (talk,) = conversations(name, dataset_dir=registry)
        assert [(m["role"], m["content"]) for m in talk["messages"]] == expected
    notes = prepare(tiny_tokenizer, "some", dataset_dir=registry).report["datasets"][0]["notes"]
    assert sum("dataset_info.json does not name it" in note for note in notes) == 3
    assert "columns that are not used: id" in notes


def test_a_column_that_another_name_takes_is_not_read_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"input": "q", "target": "a"}])
    registry = register(
        tmp_path, rows={"file_name": "rows.jsonl", "columns": {"prompt": "input", "response": "target"}}
    )
    assert conversations("rows", dataset_dir=registry)[0]["messages"][0]["content"] == "q"


def test_a_misspelt_column_of_the_registry_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q", "inputs": "i", "output": "a"}])
    registry = register(tmp_path, rows={"file_name": "rows.jsonl", "columns": {"query": "inptus"}})
    with pytest.raises(UserError, match=r"'inptus', which no row has \(did you mean 'inputs'\?\)"):
        conversations("rows", dataset_dir=registry)


def test_missing_system_tag_loses_nothing_and_openai_gets_no_system_prompt(tmp_path: Path, tiny_tokenizer) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", [{"talk": [{"r": "system", "c": "s"}, {"r": "me", "c": "q"}, {"r": "bot", "c": "a"}]}]
    )
    write_jsonl(tmp_path / "open.jsonl", [{"messages": TALK}])
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "me", "assistant_tag": "bot"}
    registry = register(
        tmp_path,
        rows={"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        open={"file_name": "open.jsonl", "formatting": "openai"},
    )
    talks = conversations("rows", "open", dataset_dir=registry)
    assert [[m["role"] for m in t["messages"]] for t in talks] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],
    ]
    reports = prepare(tiny_tokenizer, "rows", "open", dataset_dir=registry).report["datasets"]
    assert any("no system_tag" in note for note in reports[0]["notes"])
    assert any("detailed thinking off" in note for note in reports[1]["notes"])


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

    from preprocessing import chat_template

    qwen = chat_template.load_template("qwen", tiny_tokenizer)
    made = dataset.prepare(config(tmp_path / "a.jsonl", cutoff_len=4096), tiny_tokenizer, qwen)
    shown = tiny_tokenizer.decode(made.train[0]["input_ids"])
    assert '"name": "add", "description": "adds"' in shown and "<tool_call>\n" in shown and '{"x": 1}' in shown


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
    for name, reason in (("null", "row 1: message 2 has no 'content'"), ("output", "row 2: output is null")):
        with pytest.raises(UserError, match=reason):
            conversations(tmp_path / f"{name}.parquet")


def test_function_is_an_older_name_of_the_role_tool(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    talk = [TALK[0], calling, {"role": "function", "name": "f", "content": "2"}, TALK[1]]
    (read,) = conversations(write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk}]))
    assert read["messages"][2] == {"role": "tool", "name": "f", "content": "2"}


def test_text_without_answers_is_told_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "once upon"}, {"text": "a time"}])
    registry = register(tmp_path, c4={"file_name": "rows.jsonl", "columns": {"prompt": "text"}})
    with pytest.raises(UserError, match=r"'c4' is text without answers \(pre-training\); this kit trains on answers"):
        dataset.check(config("c4", dataset_dir=registry))


def test_name_author_and_default_system_are_filled_in(tmp_path: Path, tiny_tokenizer) -> None:
    row = {"instruction": "Who is {{name}}?", "output": "{{name}} by {{author}}, {{other}}"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "system": "own"}])
    first, second = conversations(path, name="Ada", author="Bo", default_system="Be {{name}}.")
    assert [m["content"] for m in first["messages"]] == ["Be Ada.", "Who is Ada?", "Ada by Bo, {{other}}"]
    assert second["messages"][0]["content"] == "own"
    notes = prepare(tiny_tokenizer, path, name="Ada").report["datasets"][0]["notes"]
    assert "rows in which {{name}} becomes 'Ada' (name: \"\" would leave it): 2" in notes
    alone = conversations(path, name="", author="Bo")[0]["messages"]
    assert [m["content"] for m in alone] == ["Who is {{name}}?", "{{name}} by Bo, {{other}}"]
    assert common.load_config(["name=", "author="]).config.name == ""


def test_answers_of_which_the_template_leaves_out_a_part_are_counted(tmp_path: Path, tiny_tokenizer) -> None:
    thinking = {"messages": [TALK[0], {**TALK[1], "reasoning_content": "Who am I?"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [thinking, {"messages": TALK}, thinking])
    notes = prepare(tiny_tokenizer, path).report["datasets"][0]["notes"]
    assert notes == ["answers whose thoughts the chat template (chatml) leaves out: 2"]


def test_format_is_told_from_the_first_row_that_has_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "q"}, GOOD])
    with pytest.raises(UserError, match=r"row 1: has no column 'output'; it has instruction"):
        dataset.check(config(path))


def test_csv_keeps_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"a, b\nc",0\n')
    assert [m["content"] for m in conversations(path)[0]["messages"]] == ["a, b\nc", "0"]


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_what_the_template_makes_and_the_report_counts_them(tmp_path: Path, tiny_tokenizer) -> None:
    from preprocessing import chat_template

    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(5), {"instruction": "q0", "output": "a0"}])
    made = prepare(tiny_tokenizer, path)
    chatml = chat_template.load_template("chatml", tiny_tokenizer)
    expected = chat_template.encode(conversations(path), chatml, tiny_tokenizer, cutoff_len=256)
    assert [row["input_ids"] for row in made.train] == [sample["input_ids"] for sample in expected]
    assert [row["labels"] for row in made.train] == [sample["labels"] for sample in expected]
    assert str(made.train.features["input_ids"].feature.dtype) == "int32" == made.train.features["labels"].feature.dtype
    lengths = [len(sample["input_ids"]) for sample in expected]
    assert made.train_lengths.tolist() == lengths and made.eval is None and made.eval_lengths is None
    report = made.report["datasets"][0]
    assert (report["rows"], report["conversations"], report["samples"], report["duplicates"]) == (6, 6, 6, 1)
    assert (report["tokens"], report["longest"]) == (sum(lengths), max(lengths))
    assert report["median"] == int(np.median(lengths))
    assert report["learned"] == sum(label != -100 for sample in expected for label in sample["labels"])
    assert len(report["files"][0]["sha256"]) == 64 and json.loads(json.dumps(made.report)) == made.report


def test_cache_is_found_again_and_keyed_by_content_template_and_settings(
    tmp_path: Path, cache: Path, tiny_tokenizer
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    prepare(tiny_tokenizer, path)
    (folder,) = cache.iterdir()
    before = folder.stat().st_ino
    again = prepare(tiny_tokenizer, path, val_size=1, on_bad_rows="skip")  # needs no new tokens
    assert [p.stat().st_ino for p in cache.iterdir()] == [before] and len(again.train) == 2
    prepare(tiny_tokenizer, path, cutoff_len=128)
    prepare(tiny_tokenizer, path, train_on_prompt=True)
    assert len(list(cache.iterdir())) == 3
    write_jsonl(path, questions(4))
    assert len(prepare(tiny_tokenizer, path).train) == 4
    assert len(list(cache.iterdir())) == 4
    prepare(tiny_tokenizer, path, overwrite_cache=True)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("name", ["samples.arrow", "lengths.npy", "contents.npy", "report.json"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_cut_cache_is_made_anew(tmp_path: Path, cache: Path, tiny_tokenizer, name: str, kept: float) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    whole = prepare(tiny_tokenizer, path).train[:]
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # not the file that is mapped
    (folder / name).write_bytes(content[: int(kept * len(content))])
    assert prepare(tiny_tokenizer, path).train[:] == whole
    (folder / name).unlink()
    assert prepare(tiny_tokenizer, path).train[:] == whole


def test_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path, cache: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = cache / f".abc.{dead.pid}.tmp"
    stale.mkdir(parents=True)
    (stale / "samples.arrow").write_bytes(b"half")
    assert len(prepare(tiny_tokenizer, path).train) == 3
    assert not stale.exists() and len(list(cache.iterdir())) == 1


def test_several_threads_make_the_same_samples_in_order(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*questions(2000), {"instruction": "<|im_end|>", "output": "<|im_start|>"}]
    )
    one = prepare(tiny_tokenizer, path)
    monkeypatch.setattr(dataset, "PARALLEL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    several = prepare(tiny_tokenizer, path, overwrite_cache=True)
    assert several.train.data.table.equals(one.train.data.table) and several.report == one.report
    assert os.environ.get("TOKENIZERS_PARALLELISM") != "false"


def test_overlong_rows_are_truncated_dropped_or_faults(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {"instruction": "q" * 500, "output": "a"}])
    cut = prepare(tiny_tokenizer, path)
    assert cut.train_lengths[1] <= 256 and cut.report["datasets"][0]["truncated"] == 1
    dropped = prepare(tiny_tokenizer, path, overlong="drop")
    report = dropped.report["datasets"][0]
    assert len(dropped.train) == 1 and (report["dropped"], report["skipped"], report["samples"]) == (1, 0, 1)
    with pytest.raises(UserError, match=r"row 2: it has \d+ tokens, more than cutoff_len=256"):
        prepare(tiny_tokenizer, path, overlong="error")


def test_tools_are_a_fault_where_the_template_has_none(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**GOOD, "tools": '[{"name": "f"}]'}])
    with pytest.raises(UserError, match="row 1: it has tools"):
        prepare(tiny_tokenizer, path, overlong="drop")


def test_held_out_part_is_drawn_by_content(tmp_path: Path, tiny_tokenizer) -> None:
    rows = questions(100) * 2
    path, turned = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    made = prepare(tiny_tokenizer, path, val_size=0.1)
    texts = [{tuple(row["input_ids"]) for row in part} for part in (made.train, made.eval)]
    assert (len(made.train), len(made.eval)) == (180, 20) and not texts[0] & texts[1]
    assert made.eval_lengths.tolist() == [len(row["input_ids"]) for row in made.eval]
    other = prepare(tiny_tokenizer, turned, val_size=0.1)
    assert {tuple(row["input_ids"]) for row in other.eval} == texts[1]
    assert {tuple(row["input_ids"]) for row in prepare(tiny_tokenizer, path, val_size=20, seed=7).eval} != texts[1]
    train, held_out = dataset.read_conversations(config(path, val_size=0.1))
    asked = {c["messages"][0]["content"] for c in held_out}
    assert len(train) == 180 and all(any(q in tiny_tokenizer.decode(t) for q in asked) for t in texts[1])
    with pytest.raises(UserError, match="leaves nothing to train on"):
        prepare(tiny_tokenizer, path, val_size=200)


def test_eval_dataset_is_held_out_and_what_it_shares_is_said(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(5))
    other = write_jsonl(tmp_path / "b.jsonl", questions(10)[3:])
    made = prepare(tiny_tokenizer, path, eval_dataset=(str(other),))
    assert (len(made.train), len(made.eval)) == (5, 7)
    assert "2 samples of eval_dataset are trained on too" in made.report["eval_datasets"][0]["notes"]


def test_the_first_of_what_is_held_out_is_of_all_labels_and_datasets(tmp_path: Path, tiny_tokenizer) -> None:
    """An evaluation during training may take only the first: rows sorted by label must not make it one of one label."""
    names = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"instruction": f"q{n}{i}", "output": n} for i in range(60)])
        for n in "ab"
    ]
    rows = write_jsonl(tmp_path / "all.jsonl", [json.loads(line) for name in names for line in name.open()])
    other = write_jsonl(tmp_path / "other.jsonl", questions(2))

    def answers(made: dataset.Prepared) -> list[str]:
        assert made.eval_lengths.tolist() == [len(row["input_ids"]) for row in made.eval]
        return [chr(tiny_tokenizer.decode([i for i in row["labels"] if i >= 0]).encode()[0]) for row in made.eval]

    split, several = prepare(tiny_tokenizer, rows, val_size=60), prepare(tiny_tokenizer, *names, val_size=60)
    given = prepare(tiny_tokenizer, other, eval_dataset=tuple(map(str, names)))
    for found in map(answers, (split, several, given)):
        assert 3 <= found[:20].count("a") <= 17
    assert answers(prepare(tiny_tokenizer, rows, val_size=60)) == answers(split)
    assert sorted(split.contents) == sorted(map(formats.fingerprint, conversations(rows, val_size=60)))


def test_mixing(tmp_path: Path, tiny_tokenizer) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", [{"instruction": "few", "output": f"a{n}"} for n in range(4)])
    many = write_jsonl(tmp_path / "many.jsonl", [{"instruction": "many", "output": f"a{n}"} for n in range(12)])

    def order(**settings) -> str:
        made = prepare(tiny_tokenizer, few, many, **settings)
        assert made.train_lengths.tolist() == [len(row["input_ids"]) for row in made.train]
        return "".join("f" if "few" in tiny_tokenizer.decode(row["input_ids"]) else "m" for row in made.train)

    assert order() == "f" * 4 + "m" * 12
    assert order(mix_strategy="interleave_under") == "fm" * 4
    assert order(mix_strategy="interleave_over") == "fm" * 12
    drawn = Counter(order(mix_strategy="interleave_over", interleave_probs=(0.1, 0.9)))
    assert drawn["m"] > 2 * drawn["f"] and drawn["m"] >= 12 and drawn["f"] >= 4


def test_num_samples_draws_and_max_samples_cuts(tmp_path: Path, tiny_tokenizer) -> None:
    write_jsonl(tmp_path / "rows.jsonl", questions(10))
    registry = register(
        tmp_path,
        some={"file_name": "rows.jsonl", "num_samples": 4},
        more={"file_name": "rows.jsonl", "num_samples": 15},
    )
    asked = [c["messages"][0]["content"] for c in conversations("some", dataset_dir=registry)]
    assert len(set(asked)) == 4 and asked != [f"q{n}" for n in range(4)]
    assert asked == [c["messages"][0]["content"] for c in conversations("some", dataset_dir=registry)]
    more = prepare(tiny_tokenizer, "more", dataset_dir=registry)
    assert len(more.train) == 15 and more.report["datasets"][0]["duplicates"] == 5
    cut = prepare(tiny_tokenizer, tmp_path / "rows.jsonl", max_samples=3)
    asked = [row["messages"][0]["content"] for row in conversations(tmp_path / "rows.jsonl", max_samples=3)]
    assert asked == ["q0", "q1", "q2"]
    assert prepare(tiny_tokenizer, tmp_path / "rows.jsonl", max_samples=10).report["datasets"][0]["notes"] == []
    assert len(cut.train) == 3 and "max_samples: only the first 3 rows are used" in cut.report["datasets"][0]["notes"]


# ---------------------------------------------------------------------------------------------------------------------
# What people see, and the hub


def test_sample_is_shown_with_what_is_learned(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    sample = prepare(tiny_tokenizer, write_jsonl(tmp_path / "rows.jsonl", [GOOD])).train[0]
    plain = dataset.show_sample(tiny_tokenizer, sample)
    assert "<|im_start|>assistant\n⟦A kit.<|im_end|>⟧" in plain and "\033" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32mA kit.<|im_end|>\033[0m" in dataset.show_sample(tiny_tokenizer, sample)
    monkeypatch.setenv("NO_COLOR", "1")
    assert dataset.show_sample(tiny_tokenizer, sample) == plain


def test_table_is_aligned_with_chinese_names() -> None:
    first, second = dataset.format_table([["名字", "12"], ["name", "3"]]).splitlines()
    assert first == "名字  12" and second == "name   3"


@pytest.mark.slow
def test_command_line_prints_report_and_samples(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(7), {"instruction": "q", "output": None}])
    environment = {**os.environ, "ONECARD_CACHE": str(tmp_path / "cache")}
    done = run("preview.py", str(path), f"model_name_or_path={tiny_model}", "on_bad_rows=skip", env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["dataset", "rows", "samples", "tokens"] and lines[1].split()[1:3] == ["8", "7"]
    assert done.stdout.count("--- sample") == 3 and "⟦a0<|im_end|>⟧" in done.stdout


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub's API as one dataset of one file needs."""

    file = "".join(json.dumps(row) + "\n" for row in questions(5)).encode()
    commit = "a" * 40

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, status = self.path.partition("?")[0], 200
        self.server.asked.append(path)
        item = {"type": "file", "path": "train.jsonl", "size": len(self.file), "oid": "b" * 40}
        info = {"id": "me/rows", "sha": self.commit, "siblings": [{"rfilename": "train.jsonl"}], "private": False}
        if path.endswith("/train.jsonl"):
            body = self.file
        elif path.startswith(("/api/datasets/me/rows/tree", "/api/datasets/me/rows/paths-info")):
            body = json.dumps([item]).encode()
        elif path.startswith("/api/datasets/me/rows"):
            body = json.dumps(info | {"gated": False, "tags": [], "downloads": 0, "likes": 0}).encode()
        else:
            body, status = b"{}", 404
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "me/rows" in path else "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_dataset_of_the_hub_by_hf_endpoint(tmp_path: Path, tiny_model: Path, hub: ThreadingHTTPServer) -> None:
    registry = register(tmp_path, rows={"hf_hub_url": "me/rows", "num_samples": 3}, gone={"hf_hub_url": "me/gone"})
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "ONECARD_CACHE": str(tmp_path / "cache"),
    }
    settings = [f"dataset_dir={registry}", f"model_name_or_path={tiny_model}"]
    done = run("preview.py", "rows", *settings, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:3] == ["rows", "3", "3"]
    assert f"/datasets/me/rows/resolve/{HubHandler.commit}/train.jsonl" in hub.asked
    done = run("preview.py", "gone", *settings, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "dataset 'gone' (me/gone, split train) could not be fetched from http://127.0.0.1" in done.stderr


def test_modelscope_without_its_package_says_so(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    registry = register(tmp_path, rows={"hf_hub_url": "a/b", "ms_hub_url": "c/d"})
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        prepare(tiny_tokenizer, "rows", dataset_dir=registry)
