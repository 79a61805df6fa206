"""registry.py and sources.py: dataset_info.json, files of all types and hubs; what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ok, run, says, user_error, write_jsonl
from example_rows import GOOD, TALK, config, conversations, faulty, prepare, questions, register
from stand_in import Handler, StandIn, serving

import common
from common import Message
from preprocessing import dataset, sources
from preprocessing.registry import find_entries

pytestmark = pytest.mark.usefixtures("cache")


def fault_of(name: Path | str, dataset_dir: str = "none") -> Message:
    """What is wrong with one dataset of the registry, or one path."""
    with pytest.raises(common.UserError) as raised:
        find_entries([str(name)], dataset_dir)
    assert raised.value.sentence == says("other datasets")
    (fault,) = raised.value.fields["faults"]
    return fault.fields["reason"] if fault.sentence == says("dataset '{name}' {reason}") else fault


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
    assert fault_of(folder) == Message(
        "is the folder {folder}, with files of several types ({types}); name one file",
        folder=folder,
        types=["csv", "json"],
    )


def test_of_a_folder_as_on_the_hub_the_split_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation"):
        write_jsonl(folder / f"{name}.jsonl", [{"instruction": name, "output": "a"}])
    registry = register(tmp_path, train={"file_name": "clone"}, test={"file_name": "clone", "split": "test"})
    for name, expected in (
        ("train", ["train-00000-of-00002", "train-00001-of-00002"]),
        (str(folder), ["train-00000-of-00002", "train-00001-of-00002"]),
        ("test", ["test-00000-of-00001"]),
    ):
        found = conversations(name, dataset_dir=registry)
        assert [c["messages"][0]["content"] for c in found] == expected
    (entry,) = find_entries(["train"], registry)
    others = ["test-00000-of-00001.jsonl", "validation.jsonl"]
    assert entry.notes == (Message(says("split {split} is used"), folder=folder, split="train", others=others),)
    register(tmp_path, part={"file_name": "clone", "split": "train[:10%]"})
    with user_error("other datasets") as raised:
        find_entries(["part"], registry)
    assert raised.value.fields["faults"][0].fields["reason"] == Message(says("of a hub can have"), split="train[:10%]")


def test_a_key_that_stands_twice_in_an_object_is_a_fault(tmp_path: Path) -> None:
    twice, good = '{"instruction": "q", "output": "a", "output": "b"}', json.dumps(GOOD)
    for name, text in (("a.jsonl", f"{good}\n{twice}\n{good}\n"), ("b.json", f"[{good}, {twice}, {good}]")):
        (tmp_path / name).write_text(text)
        rows = [row for _, row in sources.read_rows(tmp_path / name)]
        assert [rows[0], rows[2]] == [GOOD, GOOD]
        assert rows[1].message == Message(says("stands twice"), key="output")
    (tmp_path / "dataset_info.json").write_text('{"a": {"file_name": "a.jsonl"}, "a": {"file_name": "b.json"}}')
    with user_error("{file}: {reason}", reason=Message(says("stands twice"), key="a")):
        find_entries(["a"], str(tmp_path))


def test_a_json_list_is_read_row_by_row(tmp_path: Path) -> None:
    rows = [{"instruction": 'héllo 你好 😀 \\ " ]},', "n": number, "output": "x" * number} for number in range(40)]
    path = tmp_path / "rows.json"
    path.write_text(" \n" + json.dumps(rows, ensure_ascii=False, indent=1) + "\n ", encoding="utf-8")
    assert [row for _, row in sources.read_rows(path)] == rows


@pytest.mark.parametrize("damage", ['"a\n', "[1,]", "nul", '"open'])
def test_broken_json_list_names_line_and_column_as_python_does(tmp_path: Path, damage: str) -> None:
    text = json.dumps([GOOD] * 3, indent=1).replace('"A kit."', damage, 2).replace(damage, '"A kit."', 1)
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    *good, (number, fault) = sources.read_rows(path)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    assert good == [(1, GOOD)] and number == 2 and fault.final
    assert fault.message.sentence == says("broken JSON at line")
    at = fault.message.fields
    assert (at["line"], at["column"]) == (expected.value.lineno, expected.value.colno)


@pytest.mark.parametrize(
    ("name", "content", "code", "fields"),
    [
        ("a.json", json.dumps([GOOD]).encode("utf-16"), says("its byte-order"), {}),
        (
            "a.jsonl",
            b'{"instruction": "q", "output": "a"}\n{"instruction": "\xc4\xe3"}',
            says("file as UTF-8"),
            {"row": 2, "line": 2, "byte": 18},
        ),
        ("a.json", b'[\n{"instruction": "\xc4\xe3", "output": "a"}]', says("file as UTF-8"), {"line": 2, "byte": 18}),
        ("a.csv", "instruction,output\n你,好\n".encode("gbk"), says("file as UTF-8"), {"line": 2, "byte": 1}),
        ("a.csv", b"instruction,output,output\nq,a,b\n", says("once; rename"), {"column": "output"}),
        (
            "a.csv",
            b"instruction,output\nq\n",
            says("line {line}: {values} values"),
            {"line": 2, "values": 1, "columns": 2},
        ),
        (
            "a.csv",
            b'instruction,output\nq,a\n"q,a\n',
            says("line {line}: broken CSV ({problem})"),
            {"row": 2, "line": 3},
        ),
        ("a.csv", b"instruction;output\nq;a\n", says("are separated by"), {"separator": ";"}),
        ("a.csv", b"instruction\toutput\nq\ta\n", says("are separated by"), {"separator": "tab"}),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a"},]',
            says("broken JSON at line"),
            {"row": 2, "line": 1, "column": 38},
        ),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a"}',
            says("broken JSON at line"),
            {"row": 2, "line": 1, "column": 37, "problem": "Expecting ',' or ']'"},
        ),
        (
            "a.json",
            b'[{"instruction": "q", "output": "a"}] x',
            says("broken JSON at line"),
            {"row": 2, "problem": Message("text after the end of the list")},
        ),
        ("a.json", b"[] x", says("broken JSON at line"), {"problem": Message("text after the end of the list")}),
        ("a.json", b"[" + b"1" * 5000 + b"]", says("broken JSON at line"), {"line": 1}),
        ("a.jsonl", b"1" * 5000, says("broken JSON at line {line}, column {column}: {problem}"), {"line": 1}),
        (
            "a.json",
            b"[" + json.dumps(GOOD).encode() + b",\n]",
            says("broken JSON at line"),
            {"row": 2, "problem": Message("a comma too many stands before the closing bracket")},
        ),
        (
            "a.jsonl",
            b'{"instruction": "q", }',
            says("broken JSON at line {line}, column {column}: {problem}"),
            {"problem": Message("a comma too many stands before the closing bracket")},
        ),
        ("a.json", b"[" * 100_000, says("is nested too"), {}),
        ("a.jsonl", b'{"a":' * 100_000, says("is nested too"), {}),
        ("a.json", json.dumps({"data": [GOOD]}, indent=1).encode(), says("over several"), {}),
        ("a.json", b'\xef\xbb\xbf\n{"data": [\n' + json.dumps(GOOD).encode() + b"]}", says("over several"), {}),
        ("a.parquet", b"no parquet", says("file cannot be read as"), {"type": "Parquet"}),
        ("a.arrow", b"no arrow", says("file cannot be read as"), {"type": "Arrow"}),
        ("a.arrow", b"", says("file cannot be read as"), {"type": "Arrow"}),
        ("a.txt", b"Once upon a time\n", says("no questions"), {}),
        ("a.jsonl", b"", says("give it some"), {"row": None}),
        ("a.json", b"[]", says("give it some"), {"row": None}),
        ("a.jsonl", b'{"text": "hello"}', says("known format"), {"row": None, "columns": ["text"]}),
        (
            "a.csv",
            b"Instruction, Output \nq,a\n",
            says("capitals, no"),
            {"row": None, "found": ["Instruction", " Output "], "wanted": ["instruction", "output"]},
        ),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, content: bytes, code: str, fields: dict) -> None:
    (tmp_path / name).write_bytes(content)
    with faulty(code, **{"row": 1, **fields}):
        dataset.check(config(tmp_path / name))


def test_a_damaged_arrow_file_is_a_fault_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    table = pa.table({"instruction": ["q"], "output": ["a"]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = (0).to_bytes(4, "little") + (1).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(offsets) >= 2
    at = content.rindex(offsets)
    path.write_bytes(content[: at + 4] + (1 << 30).to_bytes(4, "little") + content[at + 8 :])
    with faulty(says("file cannot be read as"), row=1, type="Arrow"):
        dataset.check(config(path))


def test_a_pipe_or_a_device_ends_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "null.json").symlink_to("/dev/zero")
    folder = register(tmp_path, pipe={"file_name": "rows.jsonl"})
    for name, path in (("pipe", "rows.jsonl"), (tmp_path / "null.json", "null.json")):
        assert fault_of(name, folder) == Message(
            "is in {file}, a pipe or a device; write its rows into a file first", file=tmp_path / path
        )
    (tmp_path / "dataset_info.json").unlink()
    os.mkfifo(tmp_path / "dataset_info.json")
    with user_error("dataset_dir must"):
        find_entries(["pipe"], folder)


def test_folders_that_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(questions(5))
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": table, "test": table.select([4])}).save_to_disk(tmp_path / "parts")
    folder = register(tmp_path, saved={"file_name": "saved"}, test={"file_name": "parts", "split": "test"})
    asked = [c["messages"][0]["content"] for c in conversations("saved", dataset_dir=folder)]
    assert asked == ["q0", "q1", "q2", "q3", "q4"]
    assert conversations(tmp_path / "parts") == conversations("saved", dataset_dir=folder)
    assert [c["messages"][0]["content"] for c in conversations("test", dataset_dir=folder)] == ["q4"]
    (tmp_path / "saved" / "cache-1.arrow").touch()  # of `map`: no split that is left out
    assert find_entries(["saved"], folder)[0].notes == ()


def test_a_folder_with_metadata_is_read_and_one_with_a_registry_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.json", questions(2))
    (tmp_path / "dataset_info.json").write_text('{"features": {"a": {"dtype": "string"}}, "splits": {}}')
    assert len(conversations(tmp_path)) == 2
    register(tmp_path, rows={"file_name": "rows.json"})
    assert fault_of(tmp_path) == Message(
        "is the folder {folder}, which has a dataset_info.json; use dataset_dir={folder} and one "
        "of its datasets: {names}",
        folder=tmp_path,
        names=["rows"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The registry


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
        "endless": {"file_name": "a" * 256},
    }
    folder = register(tmp_path, **entries)
    assert conversations("rows", dataset_dir=folder) == [{"messages": TALK}]
    reasons = {
        "pictures": Message("has {kind}; this kit trains on text", kind="images"),
        "sounds": Message("has {kind}; this kit trains on text", kind="audios"),
        "films": Message("has {kind}; this kit trains on text", kind="videos"),
        "pairs": Message("is preference data (chosen and rejected answers), which only stage: dpo trains on"),
        "judged": Message("is preference data (answers marked as good or bad), which only stage: kto trains on"),
        "scripted": Message(
            "is only at a {key}, which this kit does not read; download it and name it with file_name",
            key="script_url",
        ),
        "cloud": Message(
            "is only at a {key}, which this kit does not read; download it and name it with file_name",
            key="cloud_file_name",
        ),
        "gone": Message(
            "names the file {file}, which does not exist{near:suggestion}", file=tmp_path / "gone.json", near=None
        ),
        "slip": Message(
            "has the unknown key '{key}' in dataset_info.json{near:suggestion}", key="file_nam", near="file_name"
        ),
        "misspelt": Message(
            "has the unknown key '{key}' in dataset_info.json{near:suggestion}", key="columns: promt", near="prompt"
        ),
        "broken": Message("is not described by an object in dataset_info.json"),
        "endless": Message(
            "{path} cannot be used: {problem}",
            path=str(tmp_path / ("a" * 256)),
            problem=os.strerror(errno.ENAMETOOLONG),
        ),
        "rwos": Message(
            "there is no dataset or file '{name}'{near:suggestion}",
            name="rwos",
            near="rows",
        ),
        str(tmp_path / "rwos.jsonl"): Message(
            "there is no dataset or file '{name}'{near:suggestion}",
            name=str(tmp_path / "rwos.jsonl"),
            near=tmp_path / "rows.jsonl",
        ),
        "rows，a、b": Message(
            "'{name}' has a Chinese comma; separate datasets with ASCII commas: {meant}",
            name="rows，a、b",
            meant="rows,a,b",
        ),
    }
    for name, reason in reasons.items():
        assert fault_of(name, folder) == reason
    with user_error("other datasets") as raised:
        find_entries(reasons, folder)
    assert len(raised.value.fields["faults"]) == len(reasons)


@pytest.mark.parametrize(
    ("description", "key"),
    [
        ({"file_name": ["a.json"]}, "file_name"),
        ({"file_name": 3}, "file_name"),
        ({"file_name": "a.json", "split": ["train"]}, "split"),
        ({"hf_hub_url": {"a": 1}}, "hf_hub_url"),
        ({"file_name": "a.json", "columns": {"prompt": ["a", "b"]}}, "columns: prompt"),
        ({"file_name": "a.json", "columns": {"prompt": True}}, "columns: prompt"),
        ({"file_name": "a.json", "tags": {"role_tag": 1}}, "tags: role_tag"),
        ({"file_name": "a.json", "formatting": ["alpaca"]}, "formatting"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path: Path, description: dict, key: str) -> None:
    fault = fault_of("rows", register(tmp_path, rows=description))
    assert (fault.sentence, fault.fields["key"]) == (says("dataset_info.json; it"), key)


@pytest.mark.parametrize(
    ("description", "code"),
    [
        ({"columns": ["a"]}, says("object; write")),
        ({"tags": "role"}, says("object; write")),
        ({"num_samples": True}, says("has num_samples")),
        ({"num_samples": "5"}, says("has num_samples")),
        ({"num_samples": 10**30}, says("has num_samples")),
        ({"formatting": "vicuna"}, says("formatting '")),
        ({}, says("no file_name")),
    ],
)
def test_other_values_that_are_wrong(tmp_path: Path, description: dict, code: str) -> None:
    assert fault_of("rows", register(tmp_path, rows=description)).sentence == code


def test_a_registry_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "dataset_info.json"
    for content, code in (
        (b"{", says("correct the JSON")),
        (b"[]", says("each dataset")),
        (b'"\xff"', says("UTF-8; save it")),
        (b"[" * 100_000, says("each dataset")),
    ):
        path.write_bytes(content)
        with user_error(code, file=path):
            find_entries(["rows"], str(tmp_path))


def test_columns_and_tags_that_llamafactory_ignores_are_noted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    columns = {"prompt": "instruction", "response": "output", "reward": "score"}
    folder = register(tmp_path, rows={"file_name": "rows.jsonl", "columns": columns, "tags": {"colour": "red"}})
    (entry,) = find_entries(["rows"], folder)
    assert entry.notes == tuple(
        Message("dataset_info.json has '{key}', which is not used", key=key)
        for key in ("columns: reward", "tags: colour")
    )
    assert conversations("rows", dataset_dir=folder) == [{"messages": TALK}]


def test_how_to_name_a_dataset_of_a_hub(tmp_path: Path) -> None:
    folder = register(tmp_path, rows={"file_name": "rows.jsonl"})
    fault = fault_of("me/rows", folder)
    assert fault == Message(
        "there is no file '{name}'; to read a dataset of this name from Hugging Face, add it to {registry}:\n"
        '"NAME": {{"hf_hub_url": "{name}"}}, and use dataset=NAME',
        name="me/rows",
        registry=tmp_path / "dataset_info.json",
    )
    assert '"NAME": {"hf_hub_url": "me/rows"}' in fault.text("en")
    with user_error("the datasets", dataset_dir="ONLINE"):
        find_entries(["me/rows"], "ONLINE")
    assert fault_of("rows", str(tmp_path / "gone")) == Message(
        "dataset '{name}': there is no folder dataset_dir={folder}, and no such file",
        name="rows",
        folder=tmp_path / "gone",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Hubs


class HubHandler(Handler):
    """As much of the hub's API as one dataset of one file needs."""

    file = "".join(json.dumps(row) + "\n" for row in questions(5)).encode()
    commit = "a" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        item = {"type": "file", "path": "train.jsonl", "size": len(self.file), "oid": "b" * 40}
        info = {"id": "me/rows", "sha": self.commit, "siblings": [{"rfilename": "train.jsonl"}], "private": False}
        known = {"X_Repo_Commit": self.commit, "ETag": '"etag"'}
        if path.endswith("/train.jsonl"):
            self.answer(self.file, **known)
        elif path.startswith(("/api/datasets/me/rows/tree", "/api/datasets/me/rows/paths-info")):
            self.answer([item], **known)
        elif path.startswith("/api/datasets/me/rows"):
            self.answer(info | {"gated": False, "tags": [], "downloads": 0, "likes": 0}, **known)
        else:
            self.answer({}, 404, **known, X_Error_Code="EntryNotFound" if "me/rows" in path else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with serving(StandIn(HubHandler)) as server:
        server.asked = []
        yield server


@pytest.mark.slow
def test_dataset_of_the_hub_by_hf_endpoint(tmp_path: Path, tiny_model: Path, hub: StandIn) -> None:
    folder = register(tmp_path, rows={"hf_hub_url": "me/rows", "num_samples": 3}, gone={"hf_hub_url": "me/gone"})
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "ONECARD_CACHE": str(tmp_path / "cache"),
    }
    settings = [f"dataset_dir={folder}", f"model_name_or_path={tiny_model}"]
    done = ok(run("preview.py", "rows", *settings, env=environment))
    assert done.stdout.splitlines()[1].split()[:3] == ["rows", "3", "3"]
    assert f"/datasets/me/rows/resolve/{HubHandler.commit}/train.jsonl" in hub.asked
    done = run("preview.py", "gone", *settings, env=environment)
    assert done.error is not None and done.error.sentence == says("fetched from")
    assert (done.error.fields["repository"], done.error.fields["place"]) == ("me/gone", environment["HF_ENDPOINT"])


def test_modelscope_without_its_package_says_so(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    folder = register(tmp_path, rows={"hf_hub_url": "a/b", "ms_hub_url": "c/d"})
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with user_error("on ModelScope", name="rows"):
        prepare(tiny_tokenizer, "rows", dataset_dir=folder)
