"""The stages beside sft, by the command line: trained on a tiny model, resumed, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ok, run, save_adapter, train_on, write_jsonl

from runs.folder import read_log


def train(model: Path, folder: Path, data: Path, *settings: str):
    return train_on(
        model,
        data,
        folder,
        *("cutoff_len=128", "learning_rate=1e-2", "gradient_accumulation_steps=1", "val_size=6", "seed=1"),
        *settings,
    )


def metrics(folder: Path, data: Path) -> dict:
    return json.loads((folder / "eval" / data.stem / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_documents_are_learned_and_evaluated(tmp_path, tiny_model):
    documents = [{"text": " ".join(["one two three"] * (i % 9 + 1)) + str(i)} for i in range(40)]
    data, folder = write_jsonl(tmp_path / "documents.jsonl", documents), tmp_path / "run"
    done = ok(train(tiny_model, folder, data, "stage=pt", "max_steps=40"))
    assert "packed rows" in done.stdout and "100.0%" in done.stdout  # of the tokens are learned
    losses = [line["eval_loss"] for line in read_log(folder) if "eval_loss" in line]
    assert losses[-1] < 4.8
    ok(run("evaluate.py", str(folder)))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("documents", 6)
    assert found["models"]["trained"]["perplexity"] < found["models"]["base"]["perplexity"] / 2


def test_stages_that_are_not_trained_here_say_what_to_use():
    for stage, instead in (("rm", "use stage: dpo"), ("ppo", "use stage: grpo or dpo")):
        done = run("train.py", f"stage={stage}")
        (fault,) = done.error.fields["faults"]
        assert done.returncode == 2 and instead in str(fault.fields["problem"])


PAIRS = [
    {"prompt": f"say {i}", "chosen": "yes please " + "x" * (i % 7 + 1), "rejected": "no no " + "y" * (i % 5 + 1)}
    for i in range(40)
]


@pytest.mark.slow
def test_preferences_are_learned_and_evaluated(tmp_path, tiny_model):
    data, folder = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    settings = (
        "stage=dpo",
        "max_steps=16",
        "save_strategy=steps",
        "save_steps=8",
        "save_total_limit=9",
        "eval_steps=8",
    )
    done = ok(train(tiny_model, folder, data, *settings))
    assert "[chosen] yes please" in done.stdout and "[rejected] no no" in done.stdout
    last = read_log(folder)[-1]
    assert last["eval_loss"] < 0.5 and last["eval_reward_accuracy"] == 1 and last["eval_reward_margin"] > 0.5
    ok(run("evaluate.py", str(folder)))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("pairs", 6)
    assert "preference_accuracy_interval" in found["models"]["trained"]
    assert found["models"]["trained"]["margin"] > found["models"]["base"]["margin"] + 1


JUDGED = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]


@pytest.mark.slow
def test_judged_answers_are_learned_and_evaluated(tmp_path, tiny_model):
    data, folder = write_jsonl(tmp_path / "judged.jsonl", JUDGED), tmp_path / "run"
    steps = ("max_steps=16", "save_strategy=steps", "save_steps=8", "save_total_limit=9", "eval_steps=8")
    settings = ("stage=kto", "val_size=12", *steps)
    ok(train(tiny_model, folder, data, *settings, "per_device_train_batch_size=1", "gradient_accumulation_steps=4"))
    last = read_log(folder)[-1]
    assert last["eval_loss"] < 0.4 and last["eval_reward_accuracy"] > 0.8 and last["eval_reward_margin"] > 0.5
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:6])
    ok(run("evaluate.py", str(folder), f"dataset={data},{pairs}"))
    found = metrics(folder, data)
    assert (found["task"], found["rows"]) == ("judged", 12)
    assert found["models"]["trained"]["roc_auc"] > found["models"]["base"]["roc_auc"]
    figures = metrics(folder, pairs)["models"]
    assert figures["trained"]["margin"] > figures["base"]["margin"] + 1


@pytest.mark.slow
def test_first_losses_and_gradients_are_those_of_plain_pytorch(tmp_path, tiny_model):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", noise=0.05)
    found = []
    for way in ("kit", "plain"):
        done = ok(run("tests/training/exact_stages.py", way, str(tiny_model), str(adapter)))
        found.append(json.loads(done.stdout.splitlines()[-1]))
    kit, plain = found
    for name in plain:
        assert kit[name]["loss"] == pytest.approx(plain[name]["loss"], rel=1e-5), name
        assert kit[name]["gradients"].keys() == plain[name]["gradients"].keys()
        for parameter, sums in plain[name]["gradients"].items():
            assert kit[name]["gradients"][parameter] == pytest.approx(sums, rel=1e-4, abs=1e-5), (name, parameter)


# A recipe in the form of LLaMA-Factory's examples (examples/train_lora/qwen3_lora_*.yaml) with the stage's own lines.
RECIPE = """
### model
model_name_or_path: {model}
trust_remote_code: true

### method
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
{method}

### dataset
cutoff_len: 2048
max_samples: 1000
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/{stage}
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
PREFERENCE_LINES = "pref_beta: 0.1\ntemplate: qwen3_nothink\n"
MORE_LINES = "save_only_model: false\nresume_from_checkpoint: null\n"
METHODS = {
    "pt": f"stage: pt\ndataset: c4_demo\n{MORE_LINES}",
    "dpo": f"stage: dpo\npref_loss: sigmoid  # choices\ndataset: dpo_en_demo\n{PREFERENCE_LINES}{MORE_LINES}",
    "kto": f"stage: kto\ndataset: kto_en_demo\n{PREFERENCE_LINES}",
}
# The datasets of those examples as its dataset_info.json describes them, and rows of their form.
MESSAGES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
DEMOS = {
    "c4_demo": ({"columns": {"prompt": "text"}}, [{"text": f"The page number {i}."} for i in range(9)]),
    "dpo_en_demo": (
        {
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        [
            {
                "conversations": [{"from": "human", "value": f"Count to {i}."}],
                "chosen": {"from": "gpt", "value": f"I count to {i}."},
                "rejected": {"from": "gpt", "value": "No."},
            }
            for i in range(9)
        ],
    ),
    "kto_en_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "label"}, "tags": MESSAGES},
        [
            {
                "messages": [
                    {"role": "user", "content": f"Count to {i}."},
                    {"role": "assistant", "content": f"I count to {i}."},
                ],
                "label": i % 2 == 0,
            }
            for i in range(9)
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", METHODS)
def test_recipes_in_the_form_of_llama_factorys_examples_run(tmp_path, tiny_model, stage: str):
    (tmp_path / "data").mkdir()
    for name, (_, rows) in DEMOS.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    registry = {name: {"file_name": f"{name}.json", **entry} for name, (entry, _) in DEMOS.items()}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    recipe = RECIPE.format(model=tiny_model, stage=stage, method=METHODS[stage])
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    done = run("train.py", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "saves" / stage
    assert (folder / "adapter_model.safetensors").exists() and (folder / "training_loss.png").exists()
    assert read_log(folder)[-1]["step"] == (3 if stage == "pt" else 6)
