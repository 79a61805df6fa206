"""train.py on a tiny model made on the spot, through the real Unsloth, TRL and transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import ROOT, Finished, ok, refused, run, save_adapter, says, train_on, user_error, write_jsonl

import common
import train as script
from common import Message
from preprocessing import dataset
from preprocessing.rows import fingerprint
from runs.configuration import check_training_asked_for, load_config
from runs.files import write_json, write_text
from runs.folder import READ_WITH, earlier_trainings, run_config, trainings_of
from training import checks, prepare, record, resume
from training.arguments import split_learning_rates
from training.findings import Fact

ROWS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in ("one", "two", "three", "four")]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = [
    "cutoff_len=128", "num_train_epochs=6", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
    "learning_rate=0.01", "logging_steps=1", "lora_rank=4",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def train(model: Path, data: Path, folder: Path, *more: str, **kwargs) -> Finished:
    return train_on(model, data, folder, *SETTINGS, *more, cwd=data.parent, **kwargs)


def read_run(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def losses(folder: Path) -> dict[int, float]:
    """Step → loss; fails where a step stands twice."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> Path:
    """Folder of a finished run of 12 steps; treat it as read-only."""
    folder = tmp_path_factory.mktemp("finished")
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    result = ok(train(tiny_model, rows, folder / "run", "save_steps=5"))
    (folder / "stdout").write_text(result.stdout)
    return folder / "run"


@pytest.mark.slow
def test_packed_batches_and_micro_batches_train_the_same(tiny_model):
    """Loss and gradients of a flat batch, a packed row and the samples alone; steps cut into micro-batches."""
    result = ok(run("tests/training/exact_training.py", str(tiny_model)))
    report = json.loads(result.stdout.splitlines()[-1])
    exact = report["device"] == "cpu"  # float32; a card computes in bfloat16, with 8 bits of mantissa
    same = {"abs": 1e-5} if exact else {"rel": 1e-3}
    assert report["gradient"] > 1e-2
    assert report["loss"] == pytest.approx(report["losses_alone"], **same)
    assert report["loss"] == pytest.approx(report["loss_packed"], **same)
    assert report["gradient_difference"] < (1e-5 if exact else 0.02 * report["gradient"])
    assert report["gradient_difference_packed"] < (1e-5 if exact else 0.02 * report["gradient"])
    assert report["loss_without_adapter"] == pytest.approx(report["reference_loss"], **same)
    assert report["step"] > 1e-3
    assert report["step_difference"] < (1e-6 if exact else 0.02 * report["step"])


@pytest.mark.slow
def test_the_run_folder_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml", "run.json", "trainer_log.jsonl", "training_loss.png", "adapter_config.json",
        "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "checkpoint-10", "checkpoint-12", "report.html", "trained.npy", "loading.log",
    }  # fmt: skip
    trained, _ = dataset.read_conversations(run_config(finished))
    assert set(np.load(finished / "trained.npy").tolist()) == set(map(fingerprint, trained))
    state = read_run(finished)
    assert state["status"] == "finished"
    assert state["steps"] == state["total_steps"] == 12
    assert state["data"]["datasets"][0]["rows"] == 4
    assert state["seed"] == 42
    assert state["versions"]["unsloth"]
    assert state["peak_memory"] > (1e8 if common.find_gpu() is None else 1e6)  # a card holds the model alone
    lines = [json.loads(line) for line in (finished / "trainer_log.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert set(lines[0]) == {
        "step", "total_steps", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
        "elapsed", "remaining",
    }  # fmt: skip
    assert lines[-1]["tokens"] == 6 * state["data"]["datasets"][0]["tokens"] == state["tokens"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert (finished / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("training_args.bin"))


@pytest.mark.slow
def test_what_the_script_says(finished):
    said = (finished.parent / "stdout").read_text()
    assert "are learned" in said
    assert "12 of 2 x 1 samples" in said
    assert said.rstrip().endswith(f"python {ROOT / 'chat.py'} {finished}")


@pytest.mark.slow
def test_plain_peft_loads_the_adapter_and_the_template(finished, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, finished)(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    template = AutoTokenizer.from_pretrained(finished).chat_template
    assert "generation %}" not in template
    assert "<|im_start|>" in template
    settings = json.loads((finished / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # as transformers 4 knows it


@pytest.mark.slow
def test_a_finished_run_says_so_and_other_settings_are_refused(finished, tiny_model):
    rows = finished.parent / "rows.jsonl"
    before = (finished / "run.json").read_bytes()
    result = train(tiny_model, rows, finished, "save_steps=5")
    assert result.returncode == 0
    assert f"{finished} is finished; to train it again" in result.stdout
    result = train(tiny_model, rows, finished, "save_steps=5", "lora_rank=8")
    assert result.returncode == 2
    changed = [Message("{name}={then} then, {now} now", name="lora_rank", then="4", now="8")]
    assert refused(result, "begun with other settings").fields["changed"] == changed
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.slow
def test_its_own_config_trains_the_same_losses(finished, tmp_path):
    ok(run("train.py", str(finished / "config.yaml"), f"output_dir={tmp_path / 'again'}", cwd=finished.parent))
    on_card = common.find_gpu() is not None  # whose kernels do not add up in one order
    expected = pytest.approx(losses(finished), rel=1e-2) if on_card else losses(finished)
    assert losses(tmp_path / "again") == expected


def interrupt(process: subprocess.Popen, folder: Path, step: int, number: int) -> None:
    """Sends a signal once the log has reached `step`."""
    log = folder / "trainer_log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)


LONGER = ["save_steps=4", "max_steps=40"]  # enough steps that a signal comes before the end


@pytest.fixture(scope="module")
def uninterrupted(finished, tiny_model) -> Path:
    folder = finished.parent / "uninterrupted"
    ok(train(tiny_model, finished.parent / "rows.jsonl", folder, *LONGER))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_with_the_same_losses(finished, uninterrupted, tiny_model, tmp_path, number):
    """Though its recipe says overwrite_output_dir, as LLaMA-Factory's do; by the command that is printed, as it is."""
    rows = finished.parent / "rows.jsonl"
    folder = tmp_path / "my run"
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={folder}", *SETTINGS, *LONGER]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{s.replace('=', ': ', 1)}\n" for s in [*settings, "overwrite_output_dir=true"]))
    command = [sys.executable, str(ROOT / "train.py"), str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=rows.parent)
    interrupt(process, folder, 6, number)
    out, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        again = out.rpartition("to resume: python ")[2]
        command = f"'{sys.executable}' {again}"
        state = read_run(folder)
        assert state["status"] == "interrupted"
        assert (folder / f"checkpoint-{state['steps']}").is_dir()
    else:
        command = shlex.join(command)
        assert read_run(folder)["status"] == "running"  # nobody was left to write it
    assert not (folder / "adapter_model.safetensors").exists()
    result = ok(subprocess.run(command, shell=True, capture_output=True, text=True, cwd=rows.parent))
    assert "resuming from" in result.stdout
    assert read_run(folder)["status"] == "finished"
    assert losses(folder) == pytest.approx(losses(uninterrupted), rel=1e-4)
    assert read_run(folder)["train_loss"] == pytest.approx(read_run(uninterrupted)["train_loss"], rel=1e-4)


def an_interrupted_run(folder: Path, *settings: str, **run) -> Path:
    """What a run leaves that was interrupted after step 4."""
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    write_text(folder / "config.yaml", common.dump_config(load_config([*settings, f"output_dir={folder}"]).config))
    write_json(folder / "run.json", {"status": "interrupted", **run})
    return folder


def start(folder: Path, recipe: str, *typed: str) -> resume.ResumePlan:
    (folder.parent / "recipe.yaml").write_text(f"output_dir: {folder}\n{recipe}\n")
    return resume.plan_resume(load_config([str(folder.parent / "recipe.yaml"), *typed]), folder)


def test_only_what_is_told_to_be_is_started_over(tmp_path):
    over, folder = "overwrite_output_dir: true", an_interrupted_run(tmp_path / "run")
    newest = folder / "checkpoint-4"
    assert (start(folder, "").checkpoint, start(folder, "").overwrite) == (newest, False)
    on = start(folder, over)
    assert (on.checkpoint, on.overwrite) == (newest, False)
    assert on.notes == (Message(says("to start over"), checkpoint=newest),)
    for recipe, typed in (
        (over, ["overwrite_output_dir=true"]),
        (over, ["resume_from_checkpoint=false"]),
    ):
        begun = start(folder, recipe, *typed)
        assert (begun.checkpoint, begun.overwrite) == (None, True)
    for recipe in ("seed: 1", f"seed: 1\n{over}"):
        with user_error(
            "begun with other settings",
            changed=[Message("{name}={then} then, {now} now", name="seed", then="42", now="1")],
        ):
            start(folder, recipe)
    assert start(folder, "logging_steps: 1").checkpoint == newest  # nothing that is learned depends on it
    write_json(folder / "run.json", {"status": "finished"})
    assert start(folder, "").finished
    assert start(folder, over).overwrite
    write_text(folder / "run.json", "[]")
    assert start(folder, over).overwrite
    with user_error("it, or train"):
        start(folder, "")
    assert start(tmp_path / "other", over).checkpoint is None


def test_a_finished_run_that_is_to_be_longer_is_told_the_two_ways(tmp_path):
    folder = an_interrupted_run(tmp_path / "run", status="finished")
    changed = [Message("{name}={then} then, {now} now", name="num_train_epochs", then="3.0", now="5.0")]
    with user_error("is finished", changed=changed, checkpoint=folder / "checkpoint-4") as raised:
        start(folder, "num_train_epochs: 5")
    told = str(raised.value)
    assert f"adapter_name_or_path={folder}" in told and f"resume_from_checkpoint={folder / 'checkpoint-4'}" in told
    with user_error("begun with other settings"):
        start(folder, "num_train_epochs: 5\nseed: 1")


def test_a_checkpoint_that_is_named_is_used_and_never_deleted(tmp_path):
    folder = an_interrupted_run(tmp_path / "run")
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "trainer_state.json").write_text('{"global_step": 8}')
    named = f"resume_from_checkpoint: {folder / 'checkpoint-4'}"
    kept = (folder / "checkpoint-4", False)
    for typed in ([], ["overwrite_output_dir=true"]):
        found = start(folder, named, *typed)
        assert (found.checkpoint, found.overwrite) == kept
    (folder / "run.json").unlink()  # as LLaMA-Factory leaves its folders
    found = start(folder, f"{named}\noverwrite_output_dir: true")
    assert (found.checkpoint, found.overwrite) == kept
    elsewhere = start(tmp_path / "new", named)
    assert elsewhere.checkpoint == kept[0]
    resume.check_steps_left(elsewhere, tmp_path / "new", SimpleNamespace(steps=5))
    with user_error("raise num_train_epochs", step=4, steps=4):
        resume.check_steps_left(elsewhere, tmp_path / "new", SimpleNamespace(steps=4))
    with user_error("a checkpoint-N", path=str(tmp_path)):
        start(tmp_path / "new", f"resume_from_checkpoint: {tmp_path}")


@pytest.mark.slow
def test_a_new_run_goes_on_from_the_checkpoint_of_another(finished, tiny_model, tmp_path):
    rows, more = finished.parent / "rows.jsonl", f"resume_from_checkpoint={finished / 'checkpoint-10'}"
    ok(train(tiny_model, rows, tmp_path / "run", "save_steps=5", more))
    assert losses(tmp_path / "run") == pytest.approx({n: losses(finished)[n] for n in (11, 12)}, rel=1e-4)
    config = run_config(tmp_path / "run")
    assert (config.resume_from_checkpoint, config.overwrite_output_dir) == (None, False)


@pytest.mark.slow
def test_held_out_data_choose_the_best_step_and_an_adapter_is_trained_further(finished, tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "more.jsonl", ROWS * 5)
    ok(
        train(
            tiny_model,
            rows,
            tmp_path / "run",
            "val_size=4",
            "eval_steps=2",
            "save_steps=2",
            "max_steps=6",
            "neat_packing=true",
            "use_rslora=true",
            "save_total_limit=1",
            f"adapter_name_or_path={finished}",
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert sorted(measured) == [2, 4, 6]
    state = read_run(tmp_path / "run")
    assert measured[state["best_step"]] == min(measured.values()) == state["eval_loss"]
    best = tmp_path / "run" / f"checkpoint-{state['best_step']}" / "adapter_model.safetensors"
    assert best.read_bytes() == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    # it went on from the trained adapter, not from a fresh one
    first = next(line["loss"] for line in lines if "loss" in line)
    assert first < losses(finished)[1] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_2024-05-25.yaml", "train_2024-07-09.yaml"])
def test_the_tutorials_own_files_train(tiny_model, tmp_path, name):
    """Unchanged, with the data of data/; only the model's path differs (and two steps are enough here)."""
    more = [f"model_name_or_path={tiny_model}", f"output_dir={tmp_path / 'run'}", "max_steps=2"]
    result = ok(run("train.py", f"tests/tutorial/{name}", *more))
    assert "note: fp16" in result.stdout
    assert "<|start_header_id|>" in (tmp_path / "run" / "chat_template.jinja").read_text()
    state = read_run(tmp_path / "run")
    assert list(losses(tmp_path / "run")) == [1, 2]  # the last one too, though logging_steps is 5
    assert state["last_loss"] == losses(tmp_path / "run")[2]
    assert [entry["name"] for entry in state["data"]["datasets"]] == [
        "fintech" if "05-25" in name else "diy",
        "identity",
    ]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    wanted = {"q_proj", "v_proj"} if "05-25" in name else set(PROJECTIONS)
    assert set(config["target_modules"]) == wanted
    assert (config["r"], config["lora_alpha"]) == (8, 16)


@pytest.mark.slow
def test_overwriting_deletes_the_run_and_nothing_else(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-99").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    refused(train(tiny_model, data, folder), "but no run.json")
    ok(train(tiny_model, data, folder, "overwrite_output_dir=true", "max_steps=1", "use_dora=true"))
    assert not (folder / "checkpoint-99").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    assert config["lora_alpha"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_trains(tiny_model, tmp_path, recipe):
    """A step on the tiny model, with the data of data/; and the recipe is what one talks to."""
    more = [f"model_name_or_path={tiny_model}", f"dataset_dir={ROOT / 'data'}", "max_steps=1", "cutoff_len=384"]
    ok(run("train.py", str(recipe), *more, cwd=tmp_path))
    assert read_run(tmp_path / "saves" / recipe.stem)["steps"] == 1
    if recipe.stem == "llama3-8b-chinese-chat":
        ok(run("chat.py", str(recipe), "-p", "hi", "max_new_tokens=2", cwd=tmp_path, input=""))


@pytest.mark.slow
def test_a_loss_that_explodes_ends_the_run(tiny_model, data, tmp_path):
    result = train(tiny_model, data, tmp_path / "run", "learning_rate=1e38", "max_grad_norm=0", "optim=sgd")
    assert result.returncode == 2
    assert result.error.sentence == says("a tenth of learning_rate")
    assert read_run(tmp_path / "run")["status"] == "failed"
    assert not list((tmp_path / "run").rglob("adapter_model.safetensors"))


def in_a_second(model: Path, data: Path, folder: Path, *more: str) -> Message:
    """The error of a run that must end with status 2 before anything heavy, having written nothing."""
    before = time.monotonic()
    used = os.times().children_user
    result = train(model, data, folder, *more)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert os.times().children_user - used < 1.5, f"{time.monotonic() - before:.1f} s"
    assert not folder.exists()
    assert result.error is not None, result.stderr
    return result.error


def test_bad_input_is_told_in_a_second(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    bad = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], {**ROWS[1], "output": None}])
    message = str(in_a_second(tiny_model, bad, folder))
    assert "bad.jsonl" in message and "2" in message
    assert in_a_second(tmp_path / "nothing", data, folder).sentence == says("there is no model {folder}")
    message = in_a_second(tiny_model, data, folder, "cutoff_len=10000")
    assert (message.sentence, message.fields["context"]) == (says("cutoff_len:"), 8192)
    in_a_second(tiny_model, tmp_path / "none.jsonl", folder)
    message = in_a_second(tiny_model, data, folder, "lora_target=q_proj,c_attn")
    assert message.sentence == says("the model has no {targets}") and message.fields["targets"] == ["c_attn"]
    assert message.fields["modules"] == sorted(PROJECTIONS)
    in_a_second(tiny_model, data, folder, "template=llama33")


def test_a_recipe_that_predicts_is_not_trained(tiny_model, data, tmp_path):
    recipe, folder = tmp_path / "predict.yaml", tmp_path / "run"
    settings = f"eval_dataset: {data}\nmodel_name_or_path: {tiny_model}\noutput_dir: {folder}\n"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "finished"}')
    evaluate = f"python {ROOT / 'evaluate.py'} {recipe}"
    for asked in ("do_predict: true\n", "do_train: false\ndataset: identity\noverwrite_output_dir: true\n"):
        recipe.write_text(settings + asked)
        for more in ([], ["--dry-run"]):
            error = run("train.py", str(recipe), *more, cwd=tmp_path).error
            assert (error.sentence, error.fields["evaluate"]) == (says("set do_train"), evaluate)
    assert [file.name for file in folder.iterdir()] == ["run.json"], "a run that is to be evaluated is never deleted"
    recipe.write_text(settings + "do_predict: true\ndo_train: true\n")
    check_training_asked_for(load_config([str(recipe)]))


def test_what_was_trained_on_before_an_interruption_is_kept(tmp_path):
    def trained(contents: list[int], resumed: str | None, folder: Path = tmp_path, **settings: object) -> list[int]:
        config = common.Config(output_dir=str(folder), **settings)
        before = earlier_trainings(config, resumed and Path(resumed), unknown)
        folder.mkdir(exist_ok=True)
        data = dataset.TrainingData(None, None, None, None, np.array(contents), report={})
        record.write_fingerprints(folder, data, before)
        (folder / "config.yaml").write_text(common.dump_config(config))
        names = [{name: getattr(training.config, name) for name in READ_WITH} for training in before]
        write_json(folder / "run.json", {"status": "finished", "trained_before": names})
        return np.load(folder / "trained.npy").tolist()

    unknown: list[Message] = []
    here, other = str(tmp_path), tmp_path / "other"
    assert trained([3, 5], None) == [3, 5]
    assert trained([4, 5], f"{here}/checkpoint-4", name="Nova") == [3, 4, 5]
    assert trained([4, 5], None, name="Nova") == [4, 5]
    assert trained([7], None, adapter_name_or_path=here) == [4, 5, 7], "into the same folder"
    assert trained([8], f"{here}/checkpoint-4", other) == [4, 5, 7, 8]
    assert trained([8], None, other, model_name_or_path=f"{here}/merged") == [4, 5, 7, 8]
    assert {training.config.name for training in trainings_of(other, unknown)} == {"onecard", "Nova"}
    assert unknown == []
    assert trained([9], None, other, adapter_name_or_path="org/adapter") == [9] and len(unknown) == 1
    (other / "config.yaml").write_text("no_key_of_this_version: 1")
    assert trained([9], None, tmp_path / "new", adapter_name_or_path=str(other)) == [9] and len(unknown) == 2


def test_all_that_is_wrong_is_told_at_once(tiny_model, data, tmp_path):
    folder = an_interrupted_run(tmp_path / "run")
    more = ["cutoff_len=10000", "lora_target=c_attn", "template=llama33", f"adapter_name_or_path={tmp_path}"]
    result = train(tiny_model, data, folder, *more)
    faults = result.error.fields["faults"]
    assert (result.returncode, result.error.sentence, len(faults)) == (2, says("{count} faults:\n  {faults:lines}"), 4)
    said = [fault.sentence for fault in faults]
    for words in ("begun with other settings", "cutoff_len:", "adapter_name_or_path: {folder} has no {file}"):
        assert says(words) in said
    looked = train(tiny_model, data, folder, "--dry-run", *more)
    assert (looked.returncode, looked.stdout.rstrip().split("\n")[-1]) == (
        2,
        str(Message("no: {count} fault{count:plural}, see above", count=4)),
    )
    for fault in faults:
        assert str(fault) in result.stderr and str(fault) in looked.stdout


def test_bad_input_deletes_nothing_of_an_earlier_run(tiny_model, data, tmp_path):
    folder = an_interrupted_run(tmp_path / "run", status="finished")
    before = (folder / "run.json").read_text()
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "a", "output": 5}])
    for rows, more in (
        (bad, "seed=42"), (data, "lora_target=c_attn"), (data, "template=llama33"), (data, "optim=adamw_torchh"),
    ):  # fmt: skip
        assert train(tiny_model, rows, folder, "overwrite_output_dir=true", more).returncode == 2
        assert (folder / "checkpoint-4").is_dir()
        assert (folder / "run.json").read_text() == before


@pytest.mark.slow
def test_a_held_out_part_that_is_not_there_deletes_nothing(tiny_model, data, tmp_path):
    folder = an_interrupted_run(tmp_path / "run", status="finished")
    refused(train(tiny_model, data, folder, "overwrite_output_dir=true", "eval_strategy=steps"), "eval_strategy")
    assert read_run(folder) == {"status": "finished"} and (folder / "checkpoint-4").is_dir()


def test_a_model_that_does_not_load_deletes_nothing(tiny_model, data, tmp_path, monkeypatch):
    folder = an_interrupted_run(tmp_path / "run", status="finished")

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script.model, "import_unsloth", lambda: None)
    monkeypatch.setattr(script, "choose_precision", lambda _: SimpleNamespace(note=None))
    monkeypatch.setattr(script.model, "load_model", out_of_memory)
    settings = [f"model_name_or_path={tiny_model}", f"dataset={data}", f"output_dir={folder}"]
    with pytest.raises(RuntimeError):
        script.main([*settings, "overwrite_output_dir=true"])
    assert read_run(folder) == {"status": "finished"} and (folder / "checkpoint-4").is_dir()


def test_a_model_is_found_where_chat_finds_it(tiny_model, data, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/tiny", "models/tiny", "~/models/tiny"):
        loaded = resume.locate_model(load_config([f"model_name_or_path={name}", f"dataset={data}"]))
        assert Path(loaded.config.model_name_or_path).samefile(tiny_model)
        (found,) = checks.check_model(loaded.config, prepare.find_model_size(loaded.config))
        assert isinstance(found, Fact)
    run = an_interrupted_run(tmp_path / "run", "model_name_or_path=models/tiny")
    found = resume.locate_model(load_config([f"output_dir={run}", "model_name_or_path=org/tiny"]))
    assert resume.plan_resume(found, run).checkpoint == run / "checkpoint-4"


def test_settings_that_the_adapter_to_go_on_with_does_not_follow_are_noted(tiny_model, tmp_path):
    save_adapter(tiny_model, tmp_path, r=4, lora_alpha=8, target_modules=PROJECTIONS)

    def found(*more: str) -> list[Message]:
        given = [f"model_name_or_path={tiny_model}", f"adapter_name_or_path={tmp_path}", *more]
        return list(checks.check_adapter(load_config(given)))

    (note,) = found("lora_rank=16", "lora_target=q_proj", "lora_alpha=8")
    assert note == Message(says("keeps its own"), names=["lora_rank", "lora_target"], folder=tmp_path)
    (note,) = found("use_dora=true", "use_rslora=true", "lora_dropout=0.1", "lora_rank=4", "lora_bias=none")
    assert note.fields["names"] == ["lora_dropout", "use_rslora", "use_dora"]
    assert found("lora_rank=4", "lora_target=all") == []


def test_every_option_of_an_adapter_is_compared_or_has_its_effect_on_any_adapter():
    options = [field.name for field in dataclasses.fields(common.Config)]
    group = set(options[options.index("_lora") + 1 : options.index("_preferences")])
    anew = {"finetuning_type", "loraplus_lr_ratio", "embedding_learning_rate", "pissa_iter"}
    compared = set(checks.own_settings({"r": 8, "lora_alpha": 16})) | {"lora_target", "additional_target"}
    assert group == compared | anew and not compared & anew


def test_settings_that_this_machine_cannot_follow(tiny_model, data, tmp_path):
    folder = tmp_path / "run"
    message = in_a_second(tiny_model, data, folder, f"adapter_name_or_path={tmp_path}")
    assert (message.sentence, message.fields["file"]) == (
        says("adapter_name_or_path: {folder} has no {file}"),
        "adapter_config.json",
    )
    if importlib.util.find_spec("wandb") is None:
        assert in_a_second(tiny_model, data, folder, "report_to=wandb").sentence == says("is not installed")
    if common.find_gpu() is None:
        assert in_a_second(tiny_model, data, folder, "quantization_bit=8").sentence == says("trains 8 bit on a GPU")


def test_a_folder_that_is_no_runs_and_a_rank_above_a_layers_width_are_told_before_loading(tiny_model, data, tmp_path):
    for place in (Path("/"), ROOT, ROOT.parent, tiny_model):
        assert [found.sentence for found in checks.check_output(place)] == [says("name a folder of the run's own")]
    assert list(checks.check_output(tmp_path / "run")) == []
    message = in_a_second(tiny_model, data, tmp_path / "run", "pissa_init=true", "lora_rank=4096")
    assert message.sentence == says("has no more components") and message.fields["width"] < 4096


def test_half_a_model_is_named(tiny_model, data, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (half / name).write_bytes((tiny_model / name).read_bytes())
    (half / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:5000])
    message = in_a_second(half, data, tmp_path / "run")
    assert (message.sentence, message.fields["missing"]) == (
        says("is incomplete"),
        ["model.safetensors"],
    )


def test_a_run_that_is_under_way_is_left_alone(tiny_model, data, tmp_path):
    created = psutil.Process().create_time()
    folder = an_interrupted_run(tmp_path / "run", status="running", pid=os.getpid(), created=created)
    for more in ("seed=42", "overwrite_output_dir=true"):
        result = train(tiny_model, data, folder, more)
        refused(result, "being trained")
        assert result.error.fields["process"] == os.getpid()


def test_another_process_of_the_same_number_blocks_no_run(tmp_path):
    created = psutil.Process().create_time() - 100
    folder = an_interrupted_run(tmp_path / "run", status="running", pid=os.getpid(), created=created)
    assert start(folder, "").checkpoint == folder / "checkpoint-4"


def test_lora_plus_lets_the_b_matrices_learn_faster():
    import torch

    names = {
        torch.nn.Parameter(torch.zeros(1, 1)): f"layers.{i}.q_proj.lora_{half}.weight" for i in (0, 1) for half in "AB"
    }
    optimizer = torch.optim.AdamW([{"params": list(names), "weight_decay": 0.1}], lr=1e-4)
    split_learning_rates(optimizer.param_groups, names, ratio=16)
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {name: pytest.approx(1.6e-3 if "lora_B" in name else 1e-4) for name in names.values()}
    assert optimizer.param_groups[0]["lr"] == 1e-4, "the rate that is logged"
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)
