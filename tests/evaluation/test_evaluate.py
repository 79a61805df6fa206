"""evaluate.py: probabilities that are the model's own, rows it was never trained on, predictions that go on."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import make_run, run, write_jsonl

import common
from evaluation import metrics
from preprocessing import dataset
from runs import charts
from runs.files import write_json, write_text
from runs.folder import TRAINED, run_config

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
    write_text(folder / "config.yaml", common.dump_config(config))
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
    assert found["accuracy"] == 0.75 and found["roc_auc"] is not None
    curves = found["curves"]  # of 4 right labels 3 are held for 0.8, of 8 wrong ones 1, all others for 0.1
    assert curves["micro"] and curves["auc"] == pytest.approx((3 * 7 + (3 + 7) / 2) / (4 * 8))
    lacking = metrics.classification(["a", "a"], np.array([[0.9, 0.1], [0.2, 0.8]]), ("a", "b"))
    assert lacking["roc_auc"] is None and lacking["accuracy"] == 0.5 and lacking["curves"] is None


@pytest.mark.filterwarnings("error")
def test_pictures_with_chinese_labels_warn_of_nothing(tmp_path: Path) -> None:
    import numpy as np
    from matplotlib import rcParams

    p = np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    for labels in (("正常", "欺诈"), ("𠀀", "b")):  # the last is in no usual font
        figures = metrics.classification([labels[0], *labels], p, labels)
        charts.draw_classification({"模型": figures}, tmp_path)
    assert (tmp_path / "confusion.png").is_file() and rcParams["font.family"][0] in ("DejaVu Sans", "sans-serif")


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
    from evaluation import scoring

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


def test_of_two_labels_the_positive_one_stands_last() -> None:
    import evaluate

    assert evaluate.closed_set(["正常"] * 9 + ["欺诈"] * 3, []) == ("正常", "欺诈")  # the rarer one
    assert evaluate.closed_set(["fraud"] * 3 + ["normal"] * 3, ["normal"] * 5) == ("normal", "fraud")
    assert evaluate.closed_set(["yes"] * 9 + ["zero"] * 3, []) == ("zero", "yes")
    assert evaluate.closed_set(["是"] * 9 + ["否"] * 3, []) == ("否", "是")
    assert evaluate.closed_set(["a", "b"] * 5, []) == ("a", "b")
    assert evaluate.closed_set(["-1", "1"] * 5 + ["1"], []) == ("-1", "1")
    assert evaluate.closed_set(["①", "②", "²", "--5"] * 5, []) == ("--5", "²", "①", "②")  # no numbers: isdigit lies
    assert evaluate.turned_round(("正常", "欺诈")) == "'labels=欺诈,正常'"


def test_one_odd_answer_among_labels_is_named() -> None:
    import evaluate

    answers = ["0", "1"] * 20
    assert evaluate.odd_answers([*answers, "O"]) == ["O"] and evaluate.closed_set([*answers, "O"], []) == ()
    assert evaluate.odd_answers(answers) == [] == evaluate.odd_answers([f"answer {i}" for i in range(40)])


def test_datasets_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    import evaluate

    names = ["a/test.json", "b/test.json", "mine/general_test.json", evaluate.GENERAL]
    folders = evaluate.part_folders(tmp_path, names)
    assert len(set(folders.values())) == 4 and folders["a/test.json"] == tmp_path / "test"
    assert folders[evaluate.GENERAL] == tmp_path / "general_test" and folders["b/test.json"].name.startswith("test-")


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

    from inference.load import load

    home = trained.parent.parent
    result = run("evaluate.py", str(trained), f"dataset={home}/odd_test.jsonl", *QUIET, cwd=home)
    assert result.returncode == 0, result.stderr
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


def job_of(*arguments: str):
    import evaluate

    return evaluate.find_job(*evaluate.parse(list(arguments)))


def made_run(folder: Path, copied: Path, **changes: object) -> Path:
    """A run with the adapter of another and its configuration with changes."""
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("eval", "report.html"))
    changes = {"output_dir": str(folder), "dataset_dir": str(common.ROOT / "data")} | changes
    write_text(folder / "config.yaml", common.dump_config(dataclasses.replace(common.Config(), **changes)))
    return folder


def write_recipe(file: Path, adapter: Path, names: str, output: Path, *more: str) -> Path:
    """As LLaMA-Factory's example for predictions."""
    lines = [f"adapter_name_or_path: {adapter}", f"model_name_or_path: {run_config(adapter).model_name_or_path}"]
    lines += [f"eval_dataset: {names}", "max_samples: 20", "do_predict: true", "predict_with_generate: true"]
    file.write_text("\n".join([*lines, *more, f"output_dir: {output}"]), encoding="utf-8")
    return file


@pytest.mark.slow
def test_what_was_trained_on_is_known_along_the_chain_and_whatever_became_of_the_files(
    trained: Path, tmp_path: Path
) -> None:
    import numpy as np

    own = tmp_path / "own.jsonl"
    named = [{"instruction": f"who? {i}", "output": f"I am {{{{name}}}}, {i}"} for i in range(4)]
    new = write_jsonl(tmp_path / "new.jsonl", [{"instruction": "where?", "output": "here"}])
    write_jsonl(own, named)
    run = made_run(tmp_path / "run", trained, dataset=(str(own),), adapter_name_or_path=str(trained), name="Nova")
    for data in (own, trained.parent.parent / "odd.jsonl"):  # its own, and what the run before it was trained on
        for more in ((), ("name=Ming", "default_system=hi")):
            with pytest.raises(common.UserError, match="was trained on"):
                job_of(str(run), f"dataset={data}", *more)
    contents = [dataset.fingerprint(row) for row in dataset.read_conversations(run_config(run))[0]]
    own.unlink()
    assert "rows that it saw may be among these" in "".join(job_of(str(run), f"dataset={new}").notes)
    np.save(run / TRAINED, np.array(contents, dtype=np.int64))
    assert job_of(str(run), f"dataset={new}").notes == []
    write_jsonl(own, [named[0], {**named[1], "output": "changed"}])
    job = job_of(str(run), f"dataset={own}")
    assert [part.left_out for part in job.parts][:1] == [1] and len(job.parts[0].rows) == 1


@pytest.mark.slow
def test_a_recipe_says_what_is_predicted(trained: Path, tmp_path: Path) -> None:
    home = trained.parent.parent
    names = f"{home}/odd_test.jsonl,{home}/say.jsonl"
    recipe = write_recipe(tmp_path / "predict.yaml", trained, names, tmp_path / "out", "max_new_tokens: 5")
    job = job_of(str(recipe))
    assert (job.run, job.output, job.config.do_predict) == (trained, tmp_path / "out", True)
    assert [(part.task, len(part.rows), part.left_out) for part in job.parts[:2]] == [
        ("classification", 10, 10),
        ("text", 12, 0),
    ]
    assert "max_new_tokens" in job.given and job.config.max_new_tokens == 5
    assert job_of(str(recipe), f"dataset={home}/say.jsonl").parts[0].name == f"{home}/say.jsonl"
    split = made_run(tmp_path / "split", trained, dataset=(f"{home}/odd.jsonl",), val_size=0.2)
    job = job_of(str(split / "config.yaml"))  # the recipe of the training: what it held out
    assert len(job.parts[0].rows) == 8 and "dataset" not in job.given
    assert (
        len(job_of(str(split), f"eval_dataset={home}/say.jsonl").parts[0].rows) == 12
    )  # val_size does not stand in its way


def test_a_run_that_was_killed_names_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "saves" / "r" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")
    write_json(tmp_path / "saves/r/run.json", {"status": "running", "pid": 1})
    with pytest.raises(common.UserError, match=f"holds no trained adapter .*; name its checkpoint: {checkpoint}"):
        job_of(str(tmp_path / "saves/r"))


@pytest.mark.slow
def test_labels_are_for_the_datasets_that_they_fit(trained: Path) -> None:
    home = trained.parent.parent
    job = job_of(str(trained), f"dataset={home}/odd_test.jsonl,{home}/say.jsonl", "labels=1,0")
    assert [(part.task, part.labels) for part in job.parts[:2]] == [("classification", ("1", "0")), ("text", ())]
    assert "labels do not fit" in job.notes[-1]
    for labels, message in (("0,2", "the answer '1', which is not among labels"), ("0,0", "twice"), ("0", "alone")):
        with pytest.raises(common.UserError, match=message):
            job_of(str(trained), f"dataset={home}/odd_test.jsonl", f"labels={labels}")


@pytest.mark.slow
def test_an_interruption_has_taken_its_time(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate
    from evaluation import scoring
    from inference import engine

    job = job_of(str(trained), f"dataset={trained.parent.parent}/say.jsonl", "--no-base", "max_samples=3")

    def stopped(*_: object):
        yield [{"row": 0, "label": "", "prediction": ""}]
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load", lambda _: None)
    monkeypatch.setattr(scoring, "of", lambda _: None)
    monkeypatch.setattr(evaluate, "rows_predicted", stopped)
    clock = iter((10.0, 12.5, 20.0, 21.0))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    for seconds, batches in ((2.5, 1), (3.5, 2)):
        with pytest.raises(KeyboardInterrupt):
            evaluate.predict(job, job.contenders[0])
        state = evaluate.read_state(job.parts[0])["trained"]
        assert (state["seconds"], state["batches"]) == (seconds, batches)
    shutil.rmtree(job.parts[0].folder)


def test_a_call_of_tools_is_its_own_right_answer(tiny_tokenizer, tmp_path: Path) -> None:
    import evaluate
    from preprocessing import chat_template

    call = {"name": "look", "arguments": {"x": 1}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        ]
    }
    part = evaluate.Part("calls", [row], tmp_path, "text")
    encoded = evaluate.encode_texts(
        part, common.Config(), tiny_tokenizer, chat_template.load_template("qwen", tiny_tokenizer)
    )
    assert '{"name": "look", "arguments": {"x": 1}}' in encoded.answers[0] and "<|im_end|>" not in encoded.answers[0]


def test_runs_that_were_killed_and_models_made_of_a_run_are_listed(tmp_path: Path, monkeypatch) -> None:
    import evaluate

    monkeypatch.chdir(tmp_path)
    part = tmp_path / "saves" / "a" / "eval" / "d"
    part.mkdir(parents=True)
    process = subprocess.Popen(["true"])
    process.wait()
    write_json(tmp_path / "saves/a/run.json", {"status": "running", "pid": process.pid, "eval_loss": 0.0})
    figures = {"base": {"accuracy": 0.5}, "merged": {"accuracy": 0.75}}
    write_json(part / "metrics.json", {"dataset": "d", "models": figures})
    listed = evaluate.list_runs()
    assert "interrupted" in listed and "accuracy 0.750 (merged)" in listed and "0.0000" in listed
    assert evaluate.amount(1_234_567) == "1,234,567" and evaluate.amount(0.12345678) == "0.12346"


def test_two_runs_are_compared_on_whole_conversations(tmp_path: Path) -> None:
    """Rows whose last messages are the same and what was said before is not."""
    import numpy as np

    import evaluate

    figures = metrics.classification(["0", "1"], np.array([[0.9, 0.1], [0.2, 0.8]]), ("0", "1"))
    found = {"dataset": "d", "task": "classification", "labels": ["0", "1"], "models": {"trained": figures}}
    for folder, said in ((tmp_path / "a", "00"), (tmp_path / "b", "01")):
        folder.mkdir()
        write_json(folder / "metrics.json", found)
        lines = [
            {"row": i, "conversation": str(i), "prompt": "same", "label": "0", "prediction": word}
            for i, word in enumerate(said)
        ]
        write_jsonl(folder / "predictions.jsonl", lines)
    told = evaluate.compare_part(tmp_path / "a/metrics.json", tmp_path / "b/metrics.json", "a", "b")
    assert "b - a on 2 rows of both: accuracy -0.500" in told


def scorer_of(model: object):
    import contextlib
    from types import SimpleNamespace

    from evaluation import scoring

    adapters = SimpleNamespace(switched=lambda _: contextlib.nullcontext())
    return scoring.TransformersScorer(SimpleNamespace(model=model, _adapters=adapters, _trained=True, _last_only=True))


@pytest.mark.slow
def test_logits_too_large_for_the_memory_are_made_in_parts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evaluation import scoring

    scorer = scorer_of(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    samples = [
        {"input_ids": list(range(5, 25)), "labels": [-100] * n + list(range(5 + n, 25))} for n in (3, 9, 0, 5, 12)
    ]
    whole, sizes, made = scorer.losses(samples), [], scorer._logits
    assert [count for _, count in whole] == [17, 11, 19, 15, 8]

    def measured(*arguments: object, **kept: int) -> torch.Tensor:
        logits = made(*arguments, **kept)
        sizes.append(4 * logits.numel())
        return logits

    monkeypatch.setattr(scoring, "LOGITS", 2 * 4 * 21 * scorer.vocabulary)
    monkeypatch.setattr(scorer, "_logits", measured)
    assert scorer.losses(samples) == whole
    assert len(sizes) > 2 and max(sizes) <= scoring.LOGITS


@pytest.mark.slow
def test_labels_of_several_tokens_on_a_model_with_convolutions() -> None:
    """LFM2's convolutions have a state that cannot be cropped."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "vocab_size": 64, "pad_token_id": 0}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, **kinds)).eval()
    prompts, answers = [[1, 2, 3, 4, 5, 6], [7, 8, 9]], [[5, 6], [5, 7, 8], [9]]
    for prompt, row in zip(prompts, scorer_of(model).choices(prompts, [answers] * 2), strict=True):
        for tokens, value in zip(answers, row, strict=True):
            with torch.inference_mode():
                known = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            expected = sum(float(known[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens))
            assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_several_tokens_padding_and_greedy_text(trained: Path) -> None:
    """Answers of several tokens, one the beginning of another, in batches: as one by one, and as the engine streams."""
    import torch

    from evaluation import scoring
    from inference import engine
    from inference.load import load
    from runs.target import find

    source = find(str(trained), QUIET)
    model = load(source)
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
    recipe = write_recipe(home / "predict.yaml", trained, f"{home}/say.jsonl", home / "predicted")
    result = run("evaluate.py", str(recipe), "--no-base", *QUIET, cwd=home)
    assert result.returncode == 0, result.stderr
    lines = read(home / "predicted" / "generated_predictions.jsonl")
    assert [line["label"] for line in lines] == [row["output"] for row in SAID]
    assert all(list(line) == ["prompt", "predict", "label"] and "<|im_start|>" in line["prompt"] for line in lines)
    keys = json.loads((home / "predicted" / "predict_results.json").read_text(encoding="utf-8"))
    assert keys["predict_steps_per_second"] < keys["predict_samples_per_second"]
    assert {"predict_bleu-4", "predict_rouge-1", "predict_rouge-l", "predict_runtime"} <= keys.keys()
    found = json.loads((trained / "eval/say/metrics.json").read_text(encoding="utf-8"))
    assert found["task"] == "text" and len(found["samples"]) == 10
