"""Which rows are evaluated, which of their answers are labels, and their tokens."""

from __future__ import annotations

from pathlib import Path

import common
from evaluation.data import GENERAL, closed_set, exceptional_answers, result_folders
from evaluation.tasks import Classification, EvalDataset, Texts, without_end


def test_the_closed_set_is_found_in_the_answers() -> None:
    assert closed_set(["0", "1", "1", "0", "10", "10"] * 3, []) == ("0", "1", "10")
    assert closed_set([f"answer {i}" for i in range(20)], []) == ()
    assert without_end([[5, 9], [6, 9]]) == [[5], [6]]
    assert without_end([[5, 9], [5, 6, 9]]) == [[5, 9], [5, 6, 9]]


def test_of_two_labels_the_positive_one_is_last() -> None:
    assert closed_set(["正常"] * 9 + ["欺诈"] * 3, []) == ("正常", "欺诈")  # the rarer one
    assert closed_set(["fraud"] * 3 + ["normal"] * 3, ["normal"] * 5) == ("normal", "fraud")
    assert closed_set(["yes"] * 9 + ["zero"] * 3, []) == ("zero", "yes")
    assert closed_set(["是"] * 9 + ["否"] * 3, []) == ("否", "是")
    assert closed_set(["a", "b"] * 5, []) == ("a", "b")
    assert closed_set(["-1", "1"] * 5 + ["1"], []) == ("-1", "1")
    assert closed_set(["①", "②", "²", "--5"] * 5, []) == ("--5", "²", "①", "②")  # no numbers: isdigit lies
    assert Classification(("正常", "欺诈")).describe().fields["swap"] == "'labels=欺诈,正常'"


def test_one_exceptional_answer_among_labels_is_found() -> None:
    answers = ["0", "1"] * 20
    assert exceptional_answers([*answers, "O"]) == ["O"] and closed_set([*answers, "O"], []) == ()
    assert exceptional_answers(answers) == [] == exceptional_answers([f"answer {i}" for i in range(40)])


def test_datasets_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["a/test.json", "b/test.json", "mine/general_test.json", GENERAL]
    folders = result_folders(tmp_path, names)
    assert len(set(folders.values())) == 4 and folders["a/test.json"] == tmp_path / "test"
    assert folders[GENERAL] == tmp_path / "general_test" and folders["b/test.json"].name.startswith("test-")


def test_results_stay_below_their_folder_whatever_the_dataset_is_called(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    home = tmp_path / "run" / "eval"
    found = result_folders(home, [".", "..", "/", "../..", "a/..", "../../etc/passwd", "/x/y.json"])
    assert found["."] == home / "mine" and found[".."] == home / tmp_path.name and found["/"] == home / "data"
    assert all(folder.parent == home for folder in found.values())


def test_a_tool_call_is_its_own_reference_answer(tiny_tokenizer, tmp_path: Path) -> None:
    from preprocessing.template import load_template

    call = {"name": "look", "arguments": {"x": 1}}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    row = {"messages": [{"role": "user", "content": "q"}, called]}
    data = EvalDataset("calls", [row], tmp_path, Texts())
    (item,) = data.task.encode(data, common.Config(), tiny_tokenizer, load_template("qwen", tiny_tokenizer))
    assert '{"name": "look", "arguments": {"x": 1}}' in item.answer and "<|im_end|>" not in item.answer
