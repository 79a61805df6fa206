"""Stage grpo: settings and their faults, and by the command line a training on rewards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import ok, refused, run, save_adapter, says, train_on, write_jsonl

from runs.folder import read_log


def faults_of(*settings: str) -> list[str]:
    from common import UserError
    from runs.configuration import load_config

    with pytest.raises(UserError) as raised:
        load_config(["stage=grpo", *settings])
    return [fault.sentence for fault in raised.value.fields["faults"]]


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ((), says("needs reward_funcs")),
        (("reward_funcs=length,json_valid", "reward_weights=1"), says("reward_weights has")),
        (("reward_funcs=length", "num_generations=3"), says("must be a multiple of")),
        (("reward_funcs=length", "cutoff_len=200", "max_completion_length=200"), says("leaves no room")),
        (("reward_funcs=length", "temperature=0"), says("so nothing is learned")),
    ],
)
def test_settings_that_do_not_go_together(settings, code):
    assert faults_of(*settings) == [code]


def test_a_pattern_stands_in_a_list_as_text_or_as_yaml_reads_it(tmp_path):
    from runs.configuration import load_config

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: grpo\nreward_funcs:\n- length\n- regex: ^[01]{1,2}$\n- own.py:points\n", encoding="utf-8")
    (tmp_path / "own.py").write_text("def points(**_): pass\n", encoding="utf-8")
    found = load_config([str(recipe)]).config.reward_funcs
    assert found == ("length", "regex: ^[01]{1,2}$", f"{tmp_path / 'own.py'}:points")  # beside the recipe


def test_steps_are_counted_in_whole_groups_of_prompts():
    import common
    from training.packing import epoch_steps

    config = common.Config(
        num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=3, stage="grpo"
    )
    assert [epoch_steps(config, prompts) for prompts in (2, 3, 7, 9)] == [1, 1, 2, 3]


def test_a_run_stops_when_the_held_out_reward_no_longer_rises():
    import common
    from training.early_stopping import stop_reason

    config = common.Config(stage="grpo", early_stopping_patience=2)
    log = [{"step": step, "loss": 0.0} for step in range(1, 100)]
    assert stop_reason(log, config, 5) is None  # its loss says nothing
    log = [
        {"step": 10 * i, "eval_loss": 0.0, "eval_reward": reward} for i, reward in enumerate((0.1, 0.9, 0.9, 0.8), 1)
    ]
    assert stop_reason(log[:3], config, 5) is None
    assert stop_reason(log, config, 5) == common.Message(
        says("no improvement"), threshold=0.001, step=20, figures="eval_reward"
    )


def test_memory_has_a_place_for_the_replies(tiny_model):
    import common
    from training.memory import estimate_memory, read_model

    config = common.Config(stage="grpo", per_device_train_batch_size=16, max_completion_length=10)
    model = read_model(tiny_model)
    parts = estimate_memory(config, model, None, 100)
    # keys and values of 2 layers, 2 heads of 16 numbers, 4 bytes each; 8 forward passes a step
    assert parts["replies"] == 2 * 2 * 32 * 4 * 128 * 110
    alone = estimate_memory(common.Config(per_device_train_batch_size=16), model, None, 110)
    assert parts["activations"] == alone["activations"]


# Rewards a reply for the share of its tokens that have low numbers.
OWN = """
def low(prompts, completions, answer, shade, completion_ids, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    assert answer[0] == "b" and shade[0] in (0, 1, None)
    return [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def loud_model(tiny_model, tmp_path_factory):
    """The tiny model with larger embeddings: what it learns changes its replies in a few steps."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "loud")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.get_input_embeddings().weight.data.mul_(6)
    model.save_pretrained(folder)
    return folder


def train(model: Path, folder: Path, data: Path, *settings: str):
    return train_on(
        model,
        data,
        folder,
        *("stage=grpo", "max_completion_length=2", "cutoff_len=64", "num_generations=16", "learning_rate=3e-2"),
        *("per_device_train_batch_size=64", "gradient_accumulation_steps=1", "logging_steps=1", "seed=1", "val_size=6"),
        *settings,
    )


@pytest.mark.slow
def test_rewards_are_learned_resumed_and_evaluated(tmp_path, loud_model):
    rows = [{"prompt": f"say {i}", "answer": "b"} | ({"shade": i % 2} if i else {}) for i in range(22)]
    data, folder = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "run"
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    settings = (
        f"reward_funcs={tmp_path / 'own.py'}:low,length",
        *("reward_weights=1,0.1", "max_steps=14", "eval_steps=7", "save_steps=7", "save_total_limit=9"),
    )
    done = train(loud_model, folder, data, *settings)
    assert done.returncode == 0, done.stderr
    log = read_log(folder)
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 15))
    assert sum(line["reward_low"] for line in steps[-3:]) > sum(line["reward_low"] for line in steps[:3]) + 0.6
    for line in steps:
        assert line["reward"] == pytest.approx(line["reward_low"] + 0.1 * line["reward_length"], abs=1e-5)
        assert {
            "reward_std",
            "reward_low_std",
            "groups_alike",
            "entropy",
            "reply_tokens",
            "replies_cut",
        } <= set(line)
    held_out = [line["eval_reward"] for line in log if "eval_reward" in line]
    assert len(held_out) == 2 and held_out[-1] > 0.5
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 14 * 2 * 16 and samples[0].keys() == {
        *("step", "prompt", "reply", "rewards", "reward", "advantage")
    }
    assert samples[-1]["rewards"].keys() == {"low", "length"}
    recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert recorded["eval_reward"] == max(held_out) and math.isfinite(recorded["last_reward"])

    done = run("evaluate.py", str(folder))
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "eval" / "prompts" / "metrics.json").read_text(encoding="utf-8"))
    base, trained = found["models"]["base"], found["models"]["trained"]
    assert (found["task"], found["rows"]) == ("rewarded", 6)
    assert trained["reward_low"] > base["reward_low"] + 0.5
    assert trained["reward"] == pytest.approx(trained["reward_low"] + 0.1 * trained["reward_length"])
    assert trained["reward_low_interval"][0] <= trained["reward_low"] <= trained["reward_low_interval"][1]
    assert found["rewards"]["trained - base"]["reward_low"]["difference"] > 0.5

    assert run("merge.py", str(folder)).returncode == 0  # with its proof on the run's prompts

    again = tmp_path / "again"  # in the third pass over the 16 prompts
    done = train(loud_model, again, data, *settings, f"resume_from_checkpoint={folder / 'checkpoint-7'}")
    assert done.returncode == 0, done.stderr
    weights = [(one / "checkpoint-14" / "adapter_model.safetensors").read_bytes() for one in (folder, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_training_in_which_no_reply_gets_a_reward_is_no_success(tmp_path, loud_model):
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}", "answer": "b"} for i in range(22)])
    text = "def never(completions, **columns):\n    return [None] * len(completions)\n"
    text += "def odd(completions, **columns):\n    return [None, 1.0] * (len(completions) // 2)\n"
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    never = f"{tmp_path / 'own.py'}:never"
    small = ("per_device_train_batch_size=16", "max_steps=2", "val_size=0")  # 32 replies: told at the end
    for name, more in (("all", ("max_steps=2",)), ("few", small)):
        done = train(loud_model, tmp_path / name, data, f"reward_funcs={never}", *more)
        assert refused(done, "so nothing is learned").fields["names"] == ["never"]
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "failed"
    done = train(loud_model, tmp_path / "odd", data, f"reward_funcs={never},{tmp_path / 'own.py'}:odd", *small)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_first_loss_and_gradients_are_those_of_plain_pytorch(tmp_path, tiny_model):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", noise=0.05)
    file, found = tmp_path / "found.json", []
    for way in (("kit", str(tiny_model), str(adapter)), ("plain", str(tiny_model), str(adapter), str(file))):
        done = ok(run("tests/training/exact_rewards.py", *way))
        file.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
        found.append(json.loads(file.read_text(encoding="utf-8")))
    kit, plain = found
    assert len({len(reply) for reply in kit["replies"]}) >= 1 and len(kit["replies"]) == 12
    assert kit["advantages"] == pytest.approx(plain["advantages"], abs=1e-5)
    assert kit["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-6)
    assert kit["gradients"].keys() == plain["gradients"].keys()
    for parameter, sums in plain["gradients"].items():
        assert kit["gradients"][parameter] == pytest.approx(sums, rel=1e-4, abs=1e-5), parameter
