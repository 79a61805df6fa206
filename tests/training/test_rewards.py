"""Reward functions: exact values, and every way in which a function of one's own can be wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import says, user_error

import common
from training.rewards import Reward, checked, find_function, find_rewards, with_labels


def replies(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def rewards_of(name: str, *texts: str, labels: tuple[str, ...] = (), **columns) -> list[float]:
    _, function = find_function(name, common.Config(labels=labels, max_completion_length=10))
    return function(completions=replies(*texts), **columns)


def test_exact_label_is_the_rows_answer():
    assert rewards_of("exact_label", "1", " 1\n", "11", "", answer=["1", "1", "1", "1 "]) == [1, 1, 0, 0]


def test_one_of_labels():
    assert rewards_of("one_of_labels", "0", "1 ", "2", "0 1", labels=("0", "1")) == [1, 1, 0, 0]


def test_json_valid_is_an_object_or_a_list():
    assert rewards_of("json_valid", '{"a": [1]}', " []\n", "1", "{", "[" * 9999) == [1, 1, 0, 0, 0]


def test_regex_is_found_anywhere():
    assert rewards_of("regex: ^<a>.*</a>$", "<a>x\ny</a>", "x<a></a>") == [1, 0]
    assert rewards_of("regex:b", "abc", "ac") == [1, 0]


def test_length_counts_tokens_of_the_longest_reply():
    assert rewards_of("length", "a", "b", completion_ids=[[1], [1] * 10]) == [0.9, 0]


def test_labels_are_told_from_the_answers():
    config = common.Config(reward_funcs=("one_of_labels", "length"), reward_weights=(0.5, 1.0))
    first, second = with_labels(config, find_rewards(config), ["yes", "no ", "yes"])
    assert (first.name, first.weight, second.weight) == ("one_of_labels", 0.5, 1.0)
    assert first(completions=replies("no", "maybe")) == [1, 0]
    with user_error("name them: labels", found=1):
        with_labels(config, find_rewards(config), ["yes"])
    exact = common.Config(reward_funcs=("exact_label",))
    with user_error("rows have no answer", lacking=1, rows=2):
        with_labels(exact, find_rewards(exact), ["yes", None])


def test_names_of_equal_functions_are_numbered():
    config = common.Config(reward_funcs=("regex: a", "regex: b", "length"))
    assert [reward.name for reward in find_rewards(config)] == ["regex", "regex_2", "length"]


OWN = """
import helper
def fine(prompts, completions, **columns):
    return [helper.POINTS] * len(completions)
def breaks(**_):
    return 1 / 0
number = 3
"""


@pytest.mark.parametrize(
    ("reward", "code", "fields"),
    [
        ("exact_lable", says("is no reward"), {"near": "exact_label"}),
        ("json_valid: x", says("is no reward"), {}),
        ("regex: (", says("reward_funcs: regex: {pattern}"), {"pattern": "("}),
        ("regex:", says("needs a pattern"), {}),
        ("{folder}/none.py:fine", says("reward_funcs: there is no file"), {}),
        ("{folder}/own.py:fin", says("has no function"), {"name": "fin", "near": "fine"}),
        ("{folder}/own.py:number", says("has no function"), {}),
        ("{folder}/broken.py:fine", says("cannot be run"), {}),
    ],
)
def test_rewards_that_cannot_be_found(tmp_path, reward, code, fields):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "helper.py").write_text("POINTS = 2\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("def fine(:\n", encoding="utf-8")
    with user_error(code, **fields):
        find_function(reward.format(folder=tmp_path), common.Config())


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "helper.py").write_text("POINTS = 2\n", encoding="utf-8")
    config = common.Config(reward_funcs=(f"{tmp_path}/own.py:fine", f"{tmp_path}/own.py:breaks"))
    fine, breaks = find_rewards(config)
    assert fine.name == "fine" and fine(prompts=[], completions=["a", "b"]) == [2, 2]
    with user_error("the reward function {name} fails: {problem}", name="breaks") as raised:
        breaks(completions=["a"])
    assert "own.py:6" in raised.value.fields["problem"]


def test_what_a_function_returns_is_checked():
    array = SimpleNamespace(tolist=lambda: [1, 2.5])
    assert checked("own", (1, None, True), 3) == [1, None, 1] and checked("own", array, 2) == [1, 2.5]
    for value in (1.0, [1.0], [1.0, float("nan")], [1.0, float("inf")], [1.0, "1"]):
        with user_error("must return", replies=2):
            checked("own", value, 2)
    assert Reward("own", 1.0, lambda **_: [0.5])(completions=["a"]) == [0.5]
