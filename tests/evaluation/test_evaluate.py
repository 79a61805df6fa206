"""evaluate.py: probabilities that are the model's own, rows it was never trained on, predictions that go on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run, ok, refused, run, says, user_error, write_jsonl

import common
import evaluate
from common import Message
from evaluation import predict
from evaluation.job import Evaluation, plan_evaluation
from preprocessing import dataset
from preprocessing.rows import fingerprint
from runs.configuration import load_config
from runs.files import write_json, write_text
from runs.folder import TRAINED, run_config

ODD = [{"instruction": f"is {i} odd? {'x' * (7 * i % 40)}", "output": str(i % 2)} for i in range(60)]
SAID = [{"instruction": f"say {i}{'!' * (i % 9)}", "output": f"你好 number {i}"} for i in range(12)]
QUIET = ("infer_dtype=float32",)
EVAL_KEYS = ("loss", "perplexity", "runtime", "samples_per_second", "steps_per_second")


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the first 40 rows of ODD; the test file shares 10 of them."""
    home = tmp_path_factory.mktemp("evaluated")
    write_jsonl(home / "odd.jsonl", ODD[:40])
    write_jsonl(home / "odd_test.jsonl", ODD[30:])
    write_jsonl(home / "say.jsonl", SAID)
    folder = make_run(tiny_model, home / "saves" / "r")
    settings = [f"model_name_or_path={tiny_model}", f"output_dir={folder}", f"dataset={home}/odd.jsonl"]
    config = load_config([*settings, f"dataset_dir={common.ROOT}/data"]).config
    write_text(folder / "config.yaml", common.dump_config(config))
    record(folder)
    return folder


def record(run: Path) -> None:
    """The fingerprints of a run's data, as its training records them."""
    contents = [fingerprint(row) for row in dataset.read_conversations(run_config(run))[0]]
    np.save(run / TRAINED, np.array(contents, dtype=np.int64))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "there is no model"),
        (["a", "b"], "targets; give"),
        (["--bse"], "see --help"),
        (["--val_size", "0.5"], "data instead"),
        (["--compare", "a", "b"], "error: a is not a run folder; python evaluate.py --runs lists them\n"),
        (["--runs"], "is no run in"),
    ],
)
def test_errors_come_at_once(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run("evaluate.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_probabilities_are_the_models_own_and_no_row_was_trained_on(trained: Path) -> None:
    """Against a forward pass of transformers, one row and one answer at a time, on a run with rows shared."""
    import torch

    from inference.load import load

    home = trained.parent.parent
    ok(run("evaluate.py", str(trained), f"dataset={home}/odd_test.jsonl", *QUIET, cwd=home))
    folder = trained / "eval" / "odd_test"
    lines = read(folder / "predictions.jsonl")
    assert [line["prompt"] for line in lines] == [row["instruction"] for row in ODD[40:]]
    model = load(str(trained), QUIET)
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
    assert "perplexity" in json.loads((folder.parent / "general_test/metrics.json").read_text())["models"]["trained"]
    assert (trained / "report.html").is_file()
    seen = run("evaluate.py", str(trained), f"dataset={home}/odd.jsonl", cwd=home)
    assert refused(seen, "was trained on every row").fields == {"dataset": f"{home}/odd.jsonl"}

    interrupted = "\n".join(json.dumps(line) for line in lines[:7]) + '\n{"row": 9, "pro'  # as a kill leaves it
    (folder / "predictions.jsonl").write_text(interrupted, encoding="utf-8")
    again = run("evaluate.py", str(trained), f"dataset={home}/odd_test.jsonl", *QUIET, cwd=home)
    assert again.returncode == 0 and "going on after 7 of 20 rows" in again.stdout
    repeated = read(folder / "predictions.jsonl")
    for first, second in zip(lines, repeated, strict=True):
        assert second["probabilities"] == pytest.approx(first["probabilities"], abs=1e-6)
    listed = run("evaluate.py", "--runs", cwd=home)
    assert "odd_test" in listed.stdout and "accuracy" in listed.stdout


def plan(*arguments: str) -> Evaluation:
    flags, target, settings = evaluate.parse(list(arguments))
    return plan_evaluation(target, settings, only_base=flags.base, no_base=flags.no_base)


def made_run(folder: Path, copied: Path, **changes: object) -> Path:
    """A run with the adapter of another and its configuration with changes."""
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("eval", "report.html"))
    base = run_config(copied).model_name_or_path
    paths = {"model_name_or_path": base, "output_dir": str(folder), "dataset_dir": str(common.ROOT / "data")}
    changes = {**paths, **changes}
    write_text(folder / "config.yaml", common.dump_config(dataclasses.replace(common.Config(), **changes)))
    record(folder)
    return folder


PREDICT = ("max_samples: 20", "do_predict: true", "predict_with_generate: true")


def write_recipe(file: Path, adapter: Path, names: str, output: Path, *more: str) -> Path:
    """As LLaMA-Factory's examples."""
    lines = [f"adapter_name_or_path: {adapter}", f"model_name_or_path: {run_config(adapter).model_name_or_path}"]
    lines += [f"eval_dataset: {names}"]
    file.write_text("\n".join([*lines, *more, f"output_dir: {output}"]), encoding="utf-8")
    return file


@pytest.mark.slow
def test_what_was_trained_on_is_known_along_the_chain_and_whatever_became_of_the_files(
    trained: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    named = [{"instruction": f"who? {i}", "output": f"I am {{{{name}}}}, {i}"} for i in range(4)]
    new = write_jsonl(tmp_path / "new.jsonl", [{"instruction": "where?", "output": "here"}])
    write_jsonl(own, named)
    run = made_run(tmp_path / "run", trained, dataset=(str(own),), adapter_name_or_path=str(trained), name="Nova")
    for data in (own, trained.parent.parent / "odd.jsonl"):  # its own, and what the run before it was trained on
        for more in ((), ("name=Ming", "default_system=hi")):
            with user_error("on every row", dataset=data):
                plan(str(run), f"dataset={data}", *more)
    own.unlink()
    assert plan(str(run), f"dataset={new}").notes == []
    write_jsonl(own, [named[0], {**named[1], "output": "changed"}])
    planned = plan(str(run), f"dataset={own}")
    assert [data.left_out for data in planned.datasets][:1] == [1] and len(planned.datasets[0].rows) == 1
    (run / TRAINED).unlink()  # as in an older run
    notes = plan(str(run), f"dataset={new}").notes
    assert notes == [Message("rows that {adapter} was trained on may be among these", adapter=run)]


@pytest.mark.slow
def test_a_recipe_names_what_is_predicted(trained: Path, tmp_path: Path) -> None:
    home = trained.parent.parent
    names = f"{home}/odd_test.jsonl,{home}/say.jsonl"
    recipe = write_recipe(tmp_path / "predict.yaml", trained, names, tmp_path / "out", *PREDICT, "max_new_tokens: 5")
    planned = plan(str(recipe))
    assert (planned.run, planned.output, planned.config.do_predict) == (trained, tmp_path / "out", True)
    found = [(data.task.name, len(data.rows), data.left_out) for data in planned.datasets[:2]]
    assert found == [("classification", 10, 10), ("text", 12, 0)]
    assert "max_new_tokens" in planned.given and planned.config.max_new_tokens == 5
    assert plan(str(recipe), f"dataset={home}/say.jsonl").datasets[0].name == f"{home}/say.jsonl"
    split = made_run(tmp_path / "split", trained, dataset=(f"{home}/odd.jsonl",), val_size=0.2)
    planned = plan(str(split / "config.yaml"))  # the recipe of the training: what it held out
    assert len(planned.datasets[0].rows) == 8 and "dataset" not in planned.given
    planned = plan(str(split), f"eval_dataset={home}/say.jsonl")  # val_size does not stand in its way
    assert len(planned.datasets[0].rows) == 12


@pytest.mark.slow
def test_the_labels_of_a_reward_need_not_be_the_answers_of_the_rows(trained: Path, tmp_path: Path) -> None:
    home = trained.parent.parent
    rewards = {"reward_funcs": ("one_of_labels",), "labels": ("No", "Yes")}
    run = made_run(tmp_path / "run", trained, stage="grpo", dataset=(f"{home}/odd.jsonl",), **rewards)
    assert plan(str(run), f"dataset={home}/odd_test.jsonl").datasets[0].task.name == "rewarded"


def test_a_run_that_was_killed_names_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "saves" / "r" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    write_json(tmp_path / "saves/r/run.json", {"status": "running", "pid": 1})
    with user_error("not finished", checkpoint=checkpoint):
        plan(str(tmp_path / "saves/r"))


@pytest.mark.slow
def test_labels_are_for_the_datasets_that_they_fit(trained: Path) -> None:
    home = trained.parent.parent
    planned = plan(str(trained), f"dataset={home}/odd_test.jsonl,{home}/say.jsonl", "labels=1,0")
    found = [(data.task.name, data.task.labels) for data in planned.datasets[:2]]
    assert found == [("classification", ("1", "0")), ("text", ())]
    assert planned.notes[-1].sentence == says("labels do not")
    cases = {"0,2": ("is not in labels", {"answer": "1"}), "0,0": ("is given twice", {"label": "0"})}
    for labels, (words, fields) in {**cases, "0": ("alone leaves", {"label": "0"})}.items():
        with user_error(words, **fields):
            plan(str(trained), f"dataset={home}/odd_test.jsonl", f"labels={labels}")


@pytest.mark.slow
def test_the_time_of_an_interrupted_evaluation_counts(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(str(trained), f"dataset={trained.parent.parent}/say.jsonl", "--no-base", "max_samples=3")

    def stopped(*_: object):
        yield [{"row": 0, "label": "", "prediction": ""}]
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "load", lambda _: None)
    monkeypatch.setattr(predict.scoring, "scorer_for", lambda _: None)
    monkeypatch.setattr(predict, "predicted_rows", stopped)
    clock = iter((10.0, 12.5, 20.0, 21.0))
    monkeypatch.setattr(predict.time, "monotonic", lambda: next(clock))
    for seconds, batches in ((2.5, 1), (3.5, 2)):
        with pytest.raises(KeyboardInterrupt):
            predict.predict(planned, planned.models[0])
        state = predict.read_state(planned.datasets[0])["trained"]
        assert (state["seconds"], state["batches"]) == (seconds, batches)
    shutil.rmtree(planned.datasets[0].folder)


@pytest.mark.slow
def test_recipes_of_llamafactory_name_model_data_and_what_to_do(trained: Path, tmp_path: Path) -> None:
    """As older and newer examples of LLaMA-Factory are written; the keys that only a training needs do not matter."""
    home = trained.parent.parent
    base = run_config(trained).model_name_or_path
    for data in (f"dataset: {home}/say.jsonl", f"eval_dataset: {home}/say.jsonl"):
        for more in ("do_predict: true", "do_predict: true\ndo_train: false", "do_eval: true", "do_train: 0"):
            text = f"stage: SFT\nfinetuning_type: lora\n{data}\n{more}\noutput_dir: {tmp_path}/out\n"
            recipe = tmp_path / "llamafactory.yaml"
            recipe.write_text(f"model_name_or_path: {base}\nadapter_name_or_path: {trained}\n{text}")
            planned = plan(str(recipe))
            assert (planned.run, planned.output) == (trained, tmp_path / "out")
            assert [model.label for model in planned.models] == ["base", "trained"]
            assert (planned.datasets[0].name, len(planned.datasets[0].rows)) == (f"{home}/say.jsonl", 12)
            assert planned.datasets[0].task.name == ("loss" if "do_eval" in more else "text")
            recipe.write_text(f"model_name_or_path: {base}\n{text}overwrite_output_dir: true\n")
            planned = plan(str(recipe))  # the model itself, without an adapter
            assert (planned.run, planned.models[0].source.name, len(planned.models)) == (None, base, 1)
    recipe.write_text(f"model_name_or_path: {base}\n{text}val_size: 0.25\n".replace("eval_dataset", "dataset"))
    assert len(plan(str(recipe)).datasets[0].rows) == 3  # the part that LLaMA-Factory would split off
    other = make_run(Path(base), tmp_path / "out")
    recipe.write_text(f"model_name_or_path: {base}\nadapter_name_or_path: {trained}\n{text}")
    assert plan(str(recipe)).run == trained and other.exists()  # its output_dir may be a run, too


@pytest.mark.slow
def test_do_eval_measures_the_loss_alone(trained: Path, tmp_path: Path) -> None:
    home = trained.parent.parent
    names = f"{home}/say.jsonl,{home}/odd_test.jsonl"
    recipe = write_recipe(tmp_path / "eval.yaml", trained, names, tmp_path / "out", "do_eval: true")
    ok(run("evaluate.py", str(recipe), "--no-base", *QUIET, cwd=home))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["all_results.json", "eval_results.json"]
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert found.keys() == {f"eval_{key}" for key in EVAL_KEYS}
    nats = [line for name in ("say", "odd_test") for line in read(trained / f"eval/{name}/predictions.jsonl")]
    mean = sum(line["nats"] for line in nats) / sum(line["tokens"] for line in nats)
    assert len(nats) == 32 and found["eval_loss"] == pytest.approx(mean)


@pytest.mark.slow
def test_texts_in_llamafactorys_files(trained: Path) -> None:
    home = trained.parent.parent
    recipe = write_recipe(home / "predict.yaml", trained, f"{home}/say.jsonl", home / "predicted", *PREDICT)
    ok(run("evaluate.py", str(recipe), "--no-base", *QUIET, cwd=home))
    lines = read(home / "predicted" / "generated_predictions.jsonl")
    assert [line["label"] for line in lines] == [row["output"] for row in SAID]
    assert all(list(line) == ["prompt", "predict", "label"] and "<|im_start|>" in line["prompt"] for line in lines)
    keys = json.loads((home / "predicted" / "predict_results.json").read_text(encoding="utf-8"))
    assert keys["predict_steps_per_second"] < keys["predict_samples_per_second"]
    assert {"predict_bleu-4", "predict_rouge-1", "predict_rouge-l", "predict_runtime"} <= keys.keys()
    found = json.loads((trained / "eval/say/metrics.json").read_text(encoding="utf-8"))
    assert found["task"] == "text" and len(found["samples"]) == 10
