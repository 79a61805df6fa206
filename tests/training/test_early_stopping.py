"""When a training evaluates and stops: the plan's cost, the rule against small cases, and real runs that end early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TALK, ok, run, says, user_error, write_jsonl
from test_training import read_run, train

from common import Config, Message
from preprocessing import dataset
from runs.configuration import load_config
from training import early_stopping, plan
from training.early_stopping import preference_error, ranked_right
from training.plan import TrainingPlan


@pytest.mark.parametrize(
    ("steps", "epoch_steps", "step_tokens", "lengths"),
    [
        (5000, 18, 16 * 1500, [1500] * 31),  # the tutorial: 1,000 passes over some 300 rows
        (60_000, 60_000, 16 * 300, [300] * 200),  # a million rows, once
        (100, 90, 2000, [140] * 160),
        (76, 19, 8 * 25, [25] * 100),
        (400, 40, 1000, [900] * 300),  # long held-out samples beside short steps
    ],
)
def test_planned_evaluations_cost_at_most_a_tenth(steps, epoch_steps, step_tokens, lengths):
    every, samples = plan.cheap_evaluations(steps, epoch_steps, step_tokens, np.array(lengths))
    evaluated = sum(lengths[:samples]) * (steps // every)
    assert evaluated * plan.EVAL_COST <= 0.101 * steps * step_tokens
    assert 1 <= samples <= len(lengths) and steps // every >= 1
    if samples < len(lengths):
        assert samples >= plan.FEWEST_EVAL_SAMPLES


def test_the_tutorials_run_is_evaluated_more_than_once_an_epoch_of_a_thousand():
    every, samples = plan.cheap_evaluations(5000, 18, 16 * 1500.0, np.array([1500] * 31))
    assert (samples, every) == (31, 10)


@pytest.mark.parametrize(
    ("losses", "patience", "epoch_steps", "stops_at"),
    [
        ([3, 2, 1, 1, 1, 1], 3, 10, 60),  # flat for three evaluations
        ([3, 2, 1, 1.2, 1.4, 1.6], 3, 10, 60),  # rising
        ([3, 2, 1, 1, 0.9, 1, 1, 1], 3, 10, 80),  # a late gain starts the count again
        ([1, 0.9995, 0.999, 0.9985, 0.998], 3, 10, None),  # small gains that add up
        ([1, 0.9999, 0.9998, 0.9997], 3, 10, 40),  # gains that do not
        ([1, 1, 1, 1, 1, 1, 1], 3, 55, 70),  # a plateau shorter than an epoch is no reason
        ([float("nan"), float("nan"), float("nan"), float("nan")], 3, 10, 30),
    ],
)
def test_stalled(losses, patience, epoch_steps, stops_at):
    seen, stopped = [], None
    for number, loss in enumerate(losses, 1):
        seen.append((number * 10, loss))
        if early_stopping.has_stalled(seen, patience, 0.001, epoch_steps):
            stopped = number * 10
            break
    assert stopped == stops_at


def test_memorized_needs_three_passes_of_flat_loss_near_zero():
    flat = [(step, 0.01) for step in range(5, 205, 5)]
    assert early_stopping.has_memorized(flat, 10)
    assert not early_stopping.has_memorized(flat, 100)  # not three passes yet
    assert not early_stopping.has_memorized([(step, 0.2) for step, _ in flat], 10)  # flat, but not near zero
    assert not early_stopping.has_memorized([(step, 0.04 - step / 6000) for step, _ in flat], 60)  # still falling
    assert not early_stopping.has_memorized(flat[:3], 1)
    assert not early_stopping.has_memorized([], 1)
    rare = [(1, 2.0), *((step, 0.01) for step in range(100, 600, 100))]  # a line in more than three passes
    assert early_stopping.has_memorized(rare, 5) and not early_stopping.has_memorized(rare[:-1], 5)


def test_the_reason_names_the_step_that_is_counted_from():
    log = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate([2, 1, 0.9999, 0.9998, 0.9997], 1)]
    reason = early_stopping.stop_reason(log, load_config(["early_stopping_patience=3"]).config, 10)
    assert reason == Message(says("no improvement"), threshold=0.001, step=20, figures="eval_loss")


def test_preferences_stop_when_neither_accuracy_nor_loss_gains():
    def reason(losses: list[float], accuracies: list[float]) -> Message | None:
        found = [{"step": 10 * n, "eval_loss": loss} for n, loss in enumerate(losses, 1)]
        log = [line | {"eval_rewards/accuracies": right} for line, right in zip(found, accuracies, strict=True)]
        return early_stopping.stop_reason(log, load_config(["early_stopping_patience=3"]).config, 10)

    assert reason([0.7, 0.6, 0.6, 0.6, 0.6], [0.5, 0.6, 0.7, 0.8, 0.9]) is None
    assert reason([0.7, 0.6, 0.5, 0.4, 0.3], [0.9, 0.9, 0.9, 0.9, 0.9]) is None
    stopped = Message(says("no improvement"), threshold=0.001, step=20, figures="eval_loss, eval_reward_accuracy")
    assert reason([0.7, 0.6, 0.6, 0.6, 0.6], [0.9, 0.9, 0.9, 0.8, 0.9]) == stopped


def test_the_best_preferences_are_those_of_the_highest_accuracy_then_of_the_lowest_loss():
    errors = [preference_error(2 / 3, 3, 0.1), preference_error(2 / 3, 3, 0.2), preference_error(1 / 3, 3, 0.0)]
    assert errors == sorted(errors) and errors[2] == pytest.approx(2 / 3)
    assert preference_error(2 / 3, 3, 99.0) < errors[2]
    assert ranked_right([1.0, 0.0], [0.5, 0.0, -1.0]) == pytest.approx(4 / 6)  # equal rewards are no success


def test_a_tenth_is_held_out_by_default_where_there_is_enough():
    config = Config()
    assert dataset.held_out_size(config, 199) == 0
    assert dataset.held_out_size(config, 314) == 31
    assert dataset.held_out_size(config, 1_000_000) == 200
    assert dataset.held_out_size(replace(config, val_size=0.0), 1000) == 0
    assert dataset.held_out_size(replace(config, val_size=0.5), 10) == 0.5
    assert dataset.held_out_size(replace(config, eval_strategy="no"), 1000) == 0
    assert dataset.held_out_size(replace(config, eval_dataset=("other",)), 1000) == 0


def plan_of(
    *settings: str, steps: int = 100, samples: int = 160, held_out: int | None = 40, tokens: int = 100
) -> TrainingPlan:
    """The plan of so many steps over samples of 100 tokens, 16 a step; ten steps an epoch unless told otherwise."""
    config = load_config([*settings, f"max_steps={steps}"] if steps else list(settings)).config
    lengths = np.full(samples, tokens)
    eval_lengths = None if held_out is None else np.full(held_out, 100)
    return plan.make_plan(config, SimpleNamespace(train_lengths=lengths, eval_lengths=eval_lengths))


def saved_steps(*settings: str, **sizes: int | None) -> list[int]:
    made = plan_of(*settings, **sizes)
    return [step for step in range(1, made.steps + 1) if made.saves_at(step)]


@pytest.mark.parametrize(
    "settings", [(), ("save_steps=7", "eval_steps=4"), ("save_strategy=no",), ("save_strategy=epoch", "eval_steps=15")]
)
def test_the_saves_are_counted_also_of_a_trillion_steps(settings: tuple[str, ...]) -> None:
    made = plan_of(*settings)
    assert made.count_saves() == len([step for step in range(1, made.steps + 1) if made.saves_at(step)])
    assert (plan_of(*settings, steps=1 << 40).count_saves() == 0) == ("save_strategy=no" in settings)


def test_a_checkpoint_is_kept_of_every_step_that_is_evaluated():
    found = plan_of()
    assert found.saves_evaluated and found.eval_samples == 40
    assert all(found.saves_at(step) for step in range(1, 101) if found.evaluates_at(step))
    by_epoch = plan_of("evaluation_strategy=epoch", "save_steps=1000")
    assert by_epoch.saves_evaluated and by_epoch.eval_steps is None
    assert [step for step in range(1, 101) if by_epoch.saves_at(step)] == list(range(10, 101, 10))
    assert not plan_of("save_strategy=no").saves_evaluated
    nothing = plan_of(held_out=None)
    assert (nothing.eval_strategy, nothing.eval_samples, nothing.save_steps) == ("no", 0, 100)
    with user_error("eval_strategy", strategy="steps"):
        plan_of("eval_strategy=steps", held_out=None)


def test_checkpoints_are_saved_at_both_save_steps_and_eval_steps():
    assert saved_steps("save_steps=2", "eval_steps=6", steps=13) == [2, 4, 6, 8, 10, 12, 13]
    assert saved_steps("save_steps=5", "eval_steps=6", steps=13) == [5, 6, 10, 12, 13]
    assert saved_steps("save_strategy=epoch", "eval_steps=6", steps=13) == [6, 10, 12, 13]
    assert saved_steps("save_steps=0.5", "eval_strategy=epoch", steps=25) == [10, 13, 20, 25]
    assert saved_steps("save_steps=4", "eval_steps=3", "load_best_model_at_end=false", steps=10) == [4, 8, 10]
    assert saved_steps("save_strategy=no", "eval_steps=3", steps=10) == []


def test_probable_mistakes_are_warned_of_with_a_way_out():
    def warned(*settings: str, **sizes: int | None) -> list[Message]:
        made = plan_of(*settings, **sizes)
        return list(plan.check_plan(load_config(list(settings)).config, made))

    def only(words: str, *settings: str, **sizes: int | None) -> dict[str, object]:
        (found,) = [message for message in warned(*settings, **sizes) if words in message.sentence]
        return found.fields

    few = only("steps change little", samples=80, steps=None, held_out=None)
    other = Message(" or {setting}", setting="gradient_accumulation_steps: 2")
    assert few == {"steps": 15, "more": "num_train_epochs: 12", "other": other}
    assert only("steps change little", "max_steps=3", steps=3, held_out=None)["more"] == "max_steps: 60"
    by_heart = ["a model overfits", "num_train_epochs=1000"]
    found = only(*by_heart, samples=80, steps=None, held_out=None)
    assert (found["epochs"], found["samples"]) == (1000, 80)
    assert found["ending"].sentence == says("the loss is flat and near zero")
    assert only(*by_heart, samples=80, steps=None, held_out=8)["ending"].sentence == says("when eval_loss")
    found = only(*by_heart, "early_stopping=false", samples=80, steps=None)
    assert found["ending"].sentence == says("early_stopping: auto")
    usual = {"samples": 1000, "steps": None}
    assert warned(**usual, held_out=None) == warned(**usual) == []
    for setting, words in (
        ("save_strategy=no", "save_strategy: steps"),
        ("load_best_model_at_end=false", "load_best_model_at_end: true"),
        ("learning_rate=0", "trains nothing"),
    ):
        assert [words in str(message) for message in warned(setting, **usual)] == [True]
    assert [message.fields for message in warned("warmup_steps=500", **usual)] == [{"warmup": 500, "steps": 189}]
    assert warned("warmup_steps=20", **usual) == warned("warmup_ratio=0.5", **usual) == []


def test_llama_factorys_name_of_the_patience_is_known():
    assert load_config(["early_stopping_steps=3"]).config.early_stopping_patience == 3
    assert load_config(["early_stopping=no"]).config.early_stopping == "no"


@pytest.fixture(scope="module")
def guesses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers cannot be learned, only known by heart: held-out loss soon rises."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"instruction": f"{a}{b}", "output": letters[(7 * i * i + 3 * i) % 26]} for i, (a, b) in enumerate(
        (a, b) for a in letters[:8] for b in letters[:5])]  # fmt: skip
    return write_jsonl(tmp_path_factory.mktemp("guesses") / "rows.jsonl", rows)


@pytest.mark.slow
def test_training_stops_when_the_held_out_loss_rises_and_keeps_the_best(tiny_model, guesses, tmp_path):
    folder = tmp_path / "run"
    more = ["val_size=8", "max_steps=300", "eval_steps=5", "early_stopping_patience=3", "save_total_limit=1"]
    result = ok(train(tiny_model, guesses, folder, *more))
    state = read_run(folder)
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    assert state["status"] == "finished" and state["steps"] < state["total_steps"] == 300
    assert str(Message.from_json(state["stopped_early"])) in result.stdout
    assert f"{state['steps']} of 300 steps" in result.stdout
    best = min(measured, key=lambda found: found[1])
    assert (state["best_step"], state["eval_loss"]) == best and state["best_step"] < state["steps"]
    assert early_stopping.has_stalled(measured, 3, 0.001, 16) and not early_stopping.has_stalled(
        measured[:-1], 3, 0.001, 16
    )
    kept = folder / f"checkpoint-{state['best_step']}" / "adapter_model.safetensors"
    assert kept.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    again = train(tiny_model, guesses, folder, *more)
    assert again.returncode == 0 and "is finished" in again.stdout


@pytest.mark.slow
def test_where_the_best_is_not_kept_the_record_is_of_the_last_step(tiny_model, guesses, tmp_path):
    folder = tmp_path / "run"
    more = ["val_size=8", "max_steps=60", "eval_steps=5", "early_stopping=no", "load_best_model_at_end=false"]
    result = ok(train(tiny_model, guesses, folder, *more))
    assert "note: the adapter of the last step is kept" in result.stdout
    state = read_run(folder)
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    measured = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    assert (state["best_step"], state["eval_loss"]) == measured[-1] != min(measured, key=lambda found: found[1])


@pytest.mark.slow
def test_training_stops_when_everything_is_known_by_heart(parrot, tmp_path):
    talk = [{"instruction": question, "output": answer} for question, answer in TALK.items()]
    rows = write_jsonl(tmp_path / "rows.jsonl", talk)
    result = ok(train(parrot, rows, tmp_path / "run", "num_train_epochs=200", "learning_rate=1e-4"))
    assert "note: 200 epochs of 2 samples" in result.stdout
    state = read_run(tmp_path / "run")
    assert state["steps"] == 30 and state["stopped_early"]["sentence"] == says("training loss")
    assert state["last_loss"] < 0.05 and (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])  # of 4 samples: the last batch of three is not full
def test_eval_loss_is_the_mean_over_all_held_out_tokens(tiny_model, tmp_path, batch):
    """Long and short answers: a mean of the batches' means would be another number."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = [{"instruction": f"say {n}", "output": "x" * (1 + 30 * (n % 2))} for n in range(8)]
    data, held_out = write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "held.jsonl", rows[:4])
    more = ["max_steps=1", "learning_rate=0", f"per_device_eval_batch_size={batch}", "eval_steps=1"]
    ok(train(tiny_model, data, tmp_path / "run", f"eval_dataset={held_out}", *more))
    config = load_config([f"model_name_or_path={tiny_model}", f"dataset={held_out}", "cutoff_len=128"]).config
    from preprocessing.template import load_template
    from preprocessing.tokenizer import load_base_tokenizer

    tokenizer = load_base_tokenizer(config)
    samples = dataset.prepare(config, tokenizer, load_template(None, tokenizer)).train
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, count = 0.0, 0
    for sample in samples:
        ids, labels = torch.tensor(sample["input_ids"]), torch.tensor(sample["labels"])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:].long(), reduction="sum", ignore_index=-100))
        count += int((labels[1:] != -100).sum())
    assert read_run(tmp_path / "run")["eval_loss"] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.slow
def test_a_dry_run_says_what_is_held_out_and_warns(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"a{n}", "output": f"b{n}"} for n in range(250)])
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", "num_train_epochs=100"]
    said = run("train.py", "--dry-run", *settings, cwd=tmp_path).stdout
    assert "25 samples evaluated every" in said and "val_size: 0 would train on them" in said
    assert "100 epochs of 225 samples" in said
