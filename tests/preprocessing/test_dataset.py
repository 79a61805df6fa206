"""dataset.py, cache.py and data_report.py: samples, cache, split and mixing, and what people see of the data."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ok, run, says, user_error, write_jsonl
from example_rows import GOOD, config, conversations, faulty, notes, prepare, questions, register

from common import Message
from preprocessing import data_report, dataset, sources
from preprocessing.rows import fingerprint

pytestmark = pytest.mark.usefixtures("cache")


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_what_the_template_makes_and_the_report_counts_them(tmp_path: Path, tiny_tokenizer) -> None:
    from preprocessing import encode
    from preprocessing.template import load_template

    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(5), {"instruction": "q0", "output": "a0"}])
    made = prepare(tiny_tokenizer, path)
    chatml = load_template("chatml", tiny_tokenizer)
    expected = encode.encode(conversations(path), chatml, tiny_tokenizer, config(path))
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


@pytest.mark.parametrize("name", ["samples.arrow", "facts.npy", "report.json"])
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
    stale = cache / ".abc.12ab.tmp"
    stale.mkdir(parents=True)
    (stale / "samples.arrow").write_bytes(b"half")
    assert len(prepare(tiny_tokenizer, path).train) == 3
    assert not stale.exists() and len(list(cache.iterdir())) == 1


def test_samples_are_overwritten_while_others_read_them(tmp_path: Path, cache: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", questions(3))
    prepared = prepare(tiny_tokenizer, path)
    (folder,) = cache.iterdir()
    expected, files = (
        prepared.train[:],
        {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()},
    )
    assert prepare(tiny_tokenizer, path, overwrite_cache=True).train[:] == expected == prepared.train[:]
    assert [*cache.iterdir()] == [folder]  # each file was replaced within it: at no moment was one missing
    for name, (inode, content) in files.items():
        assert (folder / name).read_bytes() == content and (folder / name).stat().st_ino != inode


def test_several_threads_make_the_same_samples_in_order(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*questions(2000), {"instruction": "<|im_end|>", "output": "<|im_start|>"}]
    )
    one = prepare(tiny_tokenizer, path)
    monkeypatch.setattr("preprocessing.samples.PARALLEL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    several = prepare(tiny_tokenizer, path, overwrite_cache=True)
    assert several.train.data.table.equals(one.train.data.table) and several.report == one.report


def test_overlong_rows_are_truncated_dropped_or_faults(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {"instruction": "q" * 500, "output": "a"}])
    cut = prepare(tiny_tokenizer, path)
    assert cut.train_lengths[1] <= 256 and cut.report["datasets"][0]["truncated"] == 1
    dropped = prepare(tiny_tokenizer, path, overlong="drop")
    report = dropped.report["datasets"][0]
    assert len(dropped.train) == 1 and (report["dropped"], report["skipped"], report["samples"]) == (1, 0, 1)
    with faulty(says("tokens, more"), row=2, cutoff_len=256):
        prepare(tiny_tokenizer, path, overlong="error")


def test_many_cut_samples_are_warned_of_with_a_cutoff_len_that_keeps_95_percent_whole(
    tmp_path: Path, tiny_tokenizer
) -> None:
    rows = [{"instruction": "q", "output": "a" * 10 * number} for number in range(1, 101)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = prepare(tiny_tokenizer, path)
    (note,) = notes(made)
    assert note.sentence == says("would keep 95")
    enough = note.fields["enough"]
    assert note.fields == {"count": 77, "total": 100, "done": Message("cut"), "enough": enough}
    assert made.report["datasets"][0]["truncated"] == 77
    assert all("a" in tiny_tokenizer.decode(row["input_ids"]) for row in made.train)
    fitting = prepare(tiny_tokenizer, path, cutoff_len=enough)
    assert (fitting.report["datasets"][0]["truncated"], notes(fitting)) == (4, [])
    assert prepare(tiny_tokenizer, path, cutoff_len=enough - 1).report["datasets"][0]["truncated"] == 5
    (note,) = notes(prepare(tiny_tokenizer, path, overlong="drop"))
    assert note.fields == {"count": 77, "total": 100, "done": Message("left out"), "enough": enough}


def test_tools_are_a_fault_where_the_template_has_none(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**GOOD, "tools": '[{"name": "f"}]'}])
    with faulty(says("it has tools"), row=1):
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
    with user_error("on: there are", val_size=200, conversations=100):
        prepare(tiny_tokenizer, path, val_size=200)


def test_eval_dataset_is_held_out_and_what_it_shares_is_said(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", questions(5))
    other = write_jsonl(tmp_path / "b.jsonl", questions(10)[3:])
    made = prepare(tiny_tokenizer, path, eval_dataset=(str(other),))
    assert (len(made.train), len(made.eval)) == (5, 7)
    assert notes(made, "eval_datasets") == [
        Message("{count:,} sample{count:plural} of eval_dataset are trained on too", count=2)
    ]


def test_the_first_of_what_is_held_out_is_of_all_labels_and_datasets(tmp_path: Path, tiny_tokenizer) -> None:
    """An evaluation during training may take only the first: rows sorted by label must not make it one of one label."""
    names = [
        write_jsonl(tmp_path / f"{n}.jsonl", [{"instruction": f"q{n}{i}", "output": n} for i in range(60)])
        for n in "ab"
    ]
    rows = write_jsonl(tmp_path / "all.jsonl", [json.loads(line) for name in names for line in name.open()])
    other = write_jsonl(tmp_path / "other.jsonl", questions(2))

    def answers(made: dataset.TrainingData) -> list[str]:
        assert made.eval_lengths.tolist() == [len(row["input_ids"]) for row in made.eval]
        return [chr(tiny_tokenizer.decode([i for i in row["labels"] if i >= 0]).encode()[0]) for row in made.eval]

    split, several = prepare(tiny_tokenizer, rows, val_size=60), prepare(tiny_tokenizer, *names, val_size=60)
    given = prepare(tiny_tokenizer, other, eval_dataset=tuple(map(str, names)))
    for found in map(answers, (split, several, given)):
        assert 3 <= found[:20].count("a") <= 17
    assert answers(prepare(tiny_tokenizer, rows, val_size=60)) == answers(split)
    assert sorted(split.contents) == sorted(map(fingerprint, conversations(rows, val_size=60)))


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
    folder = register(
        tmp_path,
        some={"file_name": "rows.jsonl", "num_samples": 4},
        more={"file_name": "rows.jsonl", "num_samples": 15},
    )
    asked = [c["messages"][0]["content"] for c in conversations("some", dataset_dir=folder)]
    assert len(set(asked)) == 4 and asked != [f"q{n}" for n in range(4)]
    assert asked == [c["messages"][0]["content"] for c in conversations("some", dataset_dir=folder)]
    more = prepare(tiny_tokenizer, "more", dataset_dir=folder)
    assert len(more.train) == 15 and more.report["datasets"][0]["duplicates"] == 5
    cut = prepare(tiny_tokenizer, tmp_path / "rows.jsonl", max_samples=3)
    asked = [row["messages"][0]["content"] for row in conversations(tmp_path / "rows.jsonl", max_samples=3)]
    assert asked == ["q0", "q1", "q2"]
    assert notes(prepare(tiny_tokenizer, tmp_path / "rows.jsonl", max_samples=10)) == []
    assert len(cut.train) == 3 and notes(cut) == [Message("max_samples: only the first {rows:,} rows are used", rows=3)]


def test_skipped_rows_are_recorded_and_a_broken_list_is_never_skipped(tmp_path: Path, tiny_tokenizer) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {"instruction": "q", "output": None}, GOOD])
    made = prepare(tiny_tokenizer, path, on_bad_rows="skip")
    report = made.report["datasets"][0]
    assert len(made.train) == 2 and (report["rows"], report["samples"], report["skipped"]) == (3, 2, 1)
    reason = Message("{where} is null", where="output")
    assert report["faults"] == [{"file": str(path), "rows": [2], "count": 1, "reason": reason.to_json()}]
    assert data_report.notes_of(made.report) == [
        Message("skipped: {fault}", fault=Message("{file}, row {row}: {reason}", file=str(path), row=2, reason=reason))
    ]
    assert f"skipped: {path}, row 2: output is null" in data_report.format_report(made.report)
    with faulty(says("{where} is null"), row=2):  # out of the cache too
        prepare(tiny_tokenizer, path)
    (tmp_path / "rows.json").write_text(json.dumps([GOOD, GOOD])[:-10])
    with faulty(says("broken JSON at line"), row=2):
        prepare(tiny_tokenizer, tmp_path / "rows.json", on_bad_rows="skip")


def test_small_files_are_read_once(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    read: list[str] = []
    real = sources.read_rows

    def counting(path: Path, *args):
        for row in real(path, *args):
            read.append(path.name)
            yield row

    monkeypatch.setattr(sources, "read_rows", counting)
    path = write_jsonl(tmp_path / "rows.jsonl", questions(300))
    dataset.check(config(path))
    count = len(read)
    made = prepare(tiny_tokenizer, path)
    train, held_out = dataset.read_conversations(config(path))
    assert len(made.train) + len(made.eval) == len(train) + len(held_out) == 300
    assert len(read) <= count
    write_jsonl(path, questions(299))  # another file is another question
    assert len(prepare(tiny_tokenizer, path, val_size=0).train) == 299


def test_large_files_are_streamed_with_the_same_result(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    rows = [*questions(700), {"instruction": "q", "output": None}, {"instruction": "{{name}}", "output": "a"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    kept = prepare(tiny_tokenizer, path, on_bad_rows="skip")
    monkeypatch.setattr("preprocessing.rows.SMALL", 0)
    streamed = prepare(tiny_tokenizer, path, on_bad_rows="skip", overwrite_cache=True)
    assert streamed.train.data.table.equals(kept.train.data.table) and streamed.report == kept.report


# ---------------------------------------------------------------------------------------------------------------------
# What people see


def test_sample_is_shown_with_what_is_learned(tmp_path: Path, tiny_tokenizer, monkeypatch) -> None:
    sample = prepare(tiny_tokenizer, write_jsonl(tmp_path / "rows.jsonl", [GOOD])).train[0]
    plain = data_report.show_sample(tiny_tokenizer, sample)
    assert "<|im_start|>assistant\n⟦A kit.<|im_end|>⟧" in plain and "\033" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[32mA kit.<|im_end|>\033[0m" in data_report.show_sample(tiny_tokenizer, sample)
    monkeypatch.setenv("NO_COLOR", "1")
    assert data_report.show_sample(tiny_tokenizer, sample) == plain


def test_table_is_aligned_with_chinese_names() -> None:
    first, second = data_report.format_table([["名字", "12"], ["name", "3"]]).splitlines()
    assert first == "名字  12" and second == "name   3"


@pytest.mark.slow
def test_command_line_prints_report_and_samples(tmp_path: Path, tiny_model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*questions(7), {"instruction": "q", "output": None}])
    environment = {**os.environ, "ONECARD_CACHE": str(tmp_path / "cache")}
    done = ok(run("preview.py", str(path), f"model_name_or_path={tiny_model}", "on_bad_rows=skip", env=environment))
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["dataset", "rows", "samples", "tokens"] and lines[1].split()[1:3] == ["8", "7"]
    assert done.stdout.count("--- sample") == 3 and "⟦a0<|im_end|>⟧" in done.stdout
