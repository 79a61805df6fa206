"""files.py and folder.py: what is written appears whole, what is read is read or named."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
from conftest import user_error

from common import UserError
from runs.files import appearing, read_json, read_jsonl, sha256, unfinished, write_json, write_jsonl, write_text
from runs.folder import newest_run, read_run


def test_files_appear_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"名": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "名": 1\n}\n'
    write_text(path, "second")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_json_that_says_nothing_is_one_sentence(tmp_path):
    for text in ("{}", "[]", "{"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError):
            read_run(tmp_path)


def test_newest_run_is_the_one_last_written(tmp_path):
    for i, name in enumerate(("old", "nested/new", "unfinished")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"status": "finished"})
        if name != "unfinished":
            (folder / "adapter_config.json").write_text("{}")
        os.utime(folder / "run.json", (i + 1, i + 1))
    assert newest_run(tmp_path) == tmp_path / "nested/new"
    with pytest.raises(UserError, match="make train"):
        newest_run(tmp_path / "nothing")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    left = [tmp_path / f".m[1].new.{os.getpid()}.tmp", tmp_path / ".m[1].12ab.tmp"]  # in a container numbers repeat
    for folder in (*left, tmp_path / ".m1.34cd.tmp"):
        folder.mkdir()
    with unfinished(tmp_path / "m[1]") as others, appearing(tmp_path / "m[1]"):
        assert not any(folder.exists() for folder in left) and others.exists()
    assert {path.name for path in tmp_path.iterdir()} == {".m1.34cd.tmp", "m[1]"}


def test_a_file_appears_whole_and_leaves_nothing(tmp_path):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    (tmp_path / f".a.json.{ended.pid}.tmp").write_text("cut o")
    (tmp_path / ".a.json.mine.tmp").write_text("")
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "\ud800")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".a.json.mine.tmp"}
    assert read_json(tmp_path / "a.json") == 1


def test_json_files_are_read_or_named(tmp_path):
    path = tmp_path / "a.json"
    with user_error("there is no {file}", file=path, folder=tmp_path):
        read_json(path)
    assert read_json(path, default={}) == {}
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path) == [1]
    for broken in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(broken)
        with user_error("read as JSON", file=path):
            read_json(path, default={})


def test_json_lines_without_what_a_kill_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    write_jsonl(path, [{"a": "\u2028"}, {"b": 1}])
    with path.open("ab") as file:
        file.write('{"c": "名'.encode()[:-1])
    assert read_jsonl(path) == [{"a": "\u2028"}, {"b": 1}]


def test_sha256_of_a_part_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    assert sha256(path) == hashlib.sha256(b"abcdef").hexdigest()
    assert sha256(path, 2, 3, "x") == hashlib.sha256(b"xcde").hexdigest()
