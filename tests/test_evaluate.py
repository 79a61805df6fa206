"""evaluate.py: probabilities that are the model's own, rows it was never trained on, predictions that go on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from conftest import make_run, run, write_jsonl

import common
import metrics

ODD = [{"instruction": f"is {i} odd? {'x' * (7 * i % 40)}", "output": str(i % 2)} for i in range(60)]
SAID = [{"instruction": f"say {i}{'!' * (i % 9)}", "output": f"你好 number {i}"} for i in range(12)]
QUIET = ("infer_dtype=float32",)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the first 40 rows of ODD; the test file shares 10 of them."""
    home = tmp_path_factory.mktemp("evaluated")
    write_jsonl(home / "odd.jsonl", ODD[:40])
    write_jsonl(home / "odd_test.jsonl", ODD[30:])
    write_jsonl(home / "say.jsonl", SAID)
    folder = make_run(tiny_model, home / "saves" / "r")
    settings = [f"model_name_or_path={tiny_model}", f"output_dir={folder}", f"dataset={home}/odd.jsonl"]
    config = common.load_config([*settings, f"dataset_dir={common.ROOT}/data"]).config
    common.write_text(folder / "config.yaml", common.dump_config(config))
    return folder


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "there is no model nobody"),
        (["a", "b"], "a and b are two targets"),
        (["--bse"], "unknown argument --bse"),
        (["val_size=0.5"], "val_size cannot be changed after training"),
        (["--compare", "a", "b"], "a is no run folder"),
    ],
)
def test_what_is_wrong_is_said_at_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run("evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr


def test_figures_are_those_of_a_case_worked_out_by_hand() -> None:
    import numpy as np

    truth = ["0", "0", "0", "0", "1", "1", "1", "1"]
    p = np.array([0.1, 0.2, 0.3, 0.7, 0.4, 0.6, 0.8, 0.9])
    found = metrics.classification(truth, np.stack([1 - p, p], 1), ("0", "1"))
    assert found["confusion"] == [[3, 1], [1, 3]]
    assert found["accuracy"] == found["precision"] == found["recall"] == found["f1"] == 0.75
    assert found["roc_auc"] == pytest.approx(14 / 16)  # of 16 pairs, 0.4 and 0.6 stand below 0.7
    assert found["tpr_at_fpr_10"] == 0.5
    assert found["brier"] == pytest.approx(float(np.mean((p - np.array([0] * 4 + [1] * 4)) ** 2)))
    assert found["accuracy_interval"] == pytest.approx([0.409, 0.929], abs=1e-3)  # Wilson's, of 6 in 8
    low, high = found["roc_auc_interval"]
    assert low < 14 / 16 < high <= 1


def test_more_than_two_labels_and_a_label_that_does_not_occur() -> None:
    import numpy as np

    found = metrics.classification(["a", "b", "c", "a"], np.eye(3)[[0, 1, 2, 1]] * 0.7 + 0.1, ("a", "b", "c"))
    assert found["accuracy"] == 0.75 and found["roc_auc"] is not None and found["curves"] is None
    lacking = metrics.classification(["a", "a"], np.array([[0.9, 0.1], [0.2, 0.8]]), ("a", "b"))
    assert lacking["roc_auc"] is None and lacking["accuracy"] == 0.5


def test_majority_vote_is_the_trained_rows_majority() -> None:
    shares = metrics.majority(["1", "1", "0"], ["0", "0"], ("0", "1"))
    assert shares.tolist() == [pytest.approx([1 / 3, 2 / 3])] * 2


def test_mcnemar_and_the_difference_of_two() -> None:
    pair = metrics.paired(["1"] * 10, ["0"] * 6 + ["1"] * 4, ["1"] * 10)
    assert (pair["difference"], pair["only_first_right"], pair["only_second_right"]) == (0.6, 0, 6)
    assert pair["mcnemar_p"] == pytest.approx(2 * 0.5**6)


def test_texts_are_compared_in_chinese_words() -> None:
    same = metrics.texts(["我爱北京天安门", "a b"], ["我爱北京天安门", "a b"])
    assert same["exact_match"] == 1 and same["rougeL"] == 1 and same["chrf"] == pytest.approx(100)
    near = metrics.texts(["我爱上海"], ["我爱北京"])
    assert near["exact_match"] == 0 and 0 < near["rouge1"] < 1
    loss = metrics.surprise([(10.0, 10), (0.0, 30)])
    assert loss["loss"] == 0.25 and loss["perplexity"] == pytest.approx(math.exp(0.25))  # by tokens, not by rows


def test_batches_hold_every_row_once_and_grow_shorter() -> None:
    import scoring

    lengths = [5, 100, 7, 3, 50, 51]
    made = scoring.batches(lengths, tokens=110)
    assert sorted(row for batch in made for row in batch) == list(range(6))
    assert all(max(lengths[row] for row in batch) * len(batch) <= 110 for batch in made)
    assert lengths[made[0][0]] == 100


def test_the_closed_set_is_told_from_the_answers() -> None:
    import evaluate

    assert evaluate.closed_set(["0", "1", "1", "0", "10", "10"] * 3, []) == ("0", "1", "10")
    assert evaluate.closed_set([f"answer {i}" for i in range(20)], []) == ()
    assert evaluate.without_end([[5, 9], [6, 9]]) == [[5], [6]]
    assert evaluate.without_end([[5, 9], [5, 6, 9]]) == [[5, 9], [5, 6, 9]]


def test_forgetting_is_told_beyond_the_intervals() -> None:
    import evaluate

    base = {"perplexity": 5.0, "perplexity_interval": [4.0, 6.0]}
    worse = {"perplexity": 12.0, "perplexity_interval": [9.0, 15.0]}
    near = {"perplexity": 6.5, "perplexity_interval": [5.5, 7.5]}
    told = evaluate.describe_forgetting({"base": base, "trained": worse})
    assert "perplexity 5.0 before, 12.0 now" in told
    assert evaluate.describe_forgetting({"base": base, "trained": near}) is None
    assert evaluate.describe_forgetting({"trained": worse}) is None


@pytest.mark.slow
def test_probabilities_are_the_models_own_and_no_row_was_trained_on(trained: Path) -> None:
    """Against a forward pass of transformers, one row and one answer at a time, on a run with rows shared."""
    import torch

    import engine

    home = trained.parent.parent
    result = run("evaluate.py", str(trained), f"dataset={home}/odd_test.jsonl", *QUIET, cwd=home)
    assert result.returncode == 0, result.stderr
    folder = trained / "eval" / "odd_test"
    lines = read(folder / "predictions.jsonl")
    assert [line["prompt"] for line in lines] == [row["instruction"] for row in ODD[40:]]
    model = engine.load(str(trained), QUIET)
    for line in lines[::5]:
        ids = model.prompt_ids([{"role": "user", "content": line["prompt"]}])
        with torch.inference_mode():
            logits = model.model(torch.tensor([ids])).logits[0, -1]
        tokens = [model.tokenizer.encode(label)[0] for label in ("0", "1")]
        expected = logits[tokens].softmax(0).tolist()
        assert list(line["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
        assert line["mass"] == pytest.approx(float(logits.softmax(0)[tokens].sum()), rel=1e-4)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (found["rows"], found["left_out"]) == (20, 10)
    assert list(found["models"]) == ["majority vote", "base", "trained"]
    assert all((folder / f"{name}.png").is_file() for name in ("roc", "precision_recall", "calibration", "confusion"))
    assert "perplexity" in json.loads((folder.parent / "general_test/metrics.json").read_text())["models"]["trained"]
    assert (trained / "report.html").is_file()
    seen = run("evaluate.py", str(trained), f"dataset={home}/odd.jsonl", cwd=home)
    assert seen.returncode == 2 and "was trained on" in seen.stderr

    interrupted = "\n".join(json.dumps(line) for line in lines[:7]) + '\n{"row": 9, "pro'  # as a kill leaves it
    (folder / "predictions.jsonl").write_text(interrupted, encoding="utf-8")
    again = run("evaluate.py", str(trained), f"dataset={home}/odd_test.jsonl", *QUIET, cwd=home)
    assert again.returncode == 0 and "going on after 7 of 20 rows" in again.stdout
    repeated = read(folder / "predictions.jsonl")
    for first, second in zip(lines, repeated, strict=True):
        assert second["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    listed = run("evaluate.py", "--runs", cwd=home)
    assert "odd_test" in listed.stdout and "accuracy" in listed.stdout


@pytest.mark.slow
def test_several_tokens_padding_and_greedy_text(trained: Path) -> None:
    """Answers of several tokens, one the beginning of another, in batches: as one by one, and as the engine streams."""
    import torch

    import engine
    import scoring

    source = engine.find(str(trained), QUIET)
    model = engine.load(source)
    scorer = scoring.of(model)
    talks = [[{"role": "user", "content": text}] for text in ("hi", "a longer one than that", "你好吗")]
    prompts = [model.prompt_ids(talk) for talk in talks]
    end = model.tokenizer.eos_token_id
    answers = [[[5, end], [5, 6, 7, end], [8, end]]] * 3
    for prompt, row in zip(prompts, scorer.choices(prompts, answers), strict=True):
        for tokens, value in zip(answers[0], row, strict=True):
            with torch.inference_mode():
                known = model.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected = sum(float(known[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
            assert value == pytest.approx(expected, abs=1e-4)
    samples = [{"input_ids": [*p, 5, 6], "labels": [-100] * len(p) + [5, 6]} for p in prompts]
    for (nats, count), sample in zip(scorer.losses(samples), samples, strict=True):
        inputs = {key: torch.tensor([value]) for key, value in sample.items()}
        assert count == 2 and nats / 2 == pytest.approx(float(model.model(**inputs).loss), abs=1e-5)
    greedy = dataclasses.replace(engine.Settings(temperature=0), max_new_tokens=16)
    assert scorer.replies(prompts, 16) == ["".join(model.stream(talk, greedy)) for talk in talks]


@pytest.mark.slow
def test_texts_in_llamafactorys_form(trained: Path) -> None:
    home = trained.parent.parent
    settings = (f"dataset={home}/say.jsonl", "do_predict=true", "--no-base", *QUIET)
    result = run("evaluate.py", str(trained), *settings, cwd=home)
    assert result.returncode == 0, result.stderr
    lines = read(trained / "generated_predictions.jsonl")
    assert [line["label"] for line in lines] == [row["output"] for row in SAID]
    assert all(list(line) == ["prompt", "predict", "label"] and "<|im_start|>" in line["prompt"] for line in lines)
    keys = json.loads((trained / "predict_results.json").read_text(encoding="utf-8"))
    assert {"predict_bleu-4", "predict_rouge-1", "predict_rouge-l", "predict_runtime"} <= keys.keys()
    found = json.loads((trained / "eval/say/metrics.json").read_text(encoding="utf-8"))
    assert found["task"] == "text" and len(found["samples"]) == 10
