"""What the options of an adapter and of its schedule do: exact_options.py, run once for all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import ok, run, says, write_jsonl

from runs.adapter import Adapter, find_places
from runs.configuration import load_config
from runs.weights import read_tensor, read_tensors
from training import checks, memory
from training.findings import Note


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("options")
    done = ok(run("tests/training/exact_options.py", str(tiny_model), "", str(folder)))
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_loraplus_has_the_rates_of_peft(measured):
    """Learning rate and weight decay of every parameter; of layer norms that learn whole there is none, as always."""
    for name in ("plain", "bias", "dora", "whole"):
        ours, theirs = measured["loraplus"][name]
        assert {n: rate for n, (rate, _) in ours.items()} == {n: rate for n, (rate, _) in theirs.items()}, name
        assert {n: d for n, (_, d) in ours.items() if "norm" not in n} == {
            n: d for n, (_, d) in theirs.items() if "norm" not in n
        }
    assert {tuple(rate) for rate in measured["loraplus"]["plain"][0].values()} == {(0.01, 0.1), (0.16, 0.1)}


@pytest.mark.slow
def test_embeddings_have_a_rate_of_their_own(measured):
    rates = measured["loraplus"]["embedding"]
    kinds = {("B" if "lora_B" in n else "A" if "lora_A" in n else "whole"): rate[0] for n, rate in rates.items()}
    assert kinds == {"A": 0.01, "B": 0.16, "whole": 0.001}


WHOLE = {
    "embed_tokens": ["model.embed_tokens"],
    "lm_head": ["lm_head"],
    "both": ["model.embed_tokens"],  # of which the output layer is a second use
    "norms": [
        *(f"model.layers.{n}.{norm}_layernorm" for n in (0, 1) for norm in ("input", "post_attention")),
        "model.norm",
    ],
    "target": ["model.embed_tokens"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_bias", *WHOLE])
def test_what_learns_and_that_the_saved_adapter_answers_the_same(measured, tiny_model, name):
    found = measured["saved"][name]
    assert found["learned"] == found["moved"]
    whole = {
        n.removeprefix("base_model.model.").partition(".modules_to_save")[0]
        for n in found["learned"]
        if "lora_" not in n
    }
    assert whole == set(WHOLE.get(name, ()))
    biases = [n for n in found["learned"] if n.endswith("bias")]
    assert len(biases) == (14 if name == "lora_bias" else 0)
    assert found["apart"] < 1e-6 < 0.1 < found["change"]
    config = load_config(["lora_rank=4", *SETTINGS[name]]).config
    tensors = Adapter(Path(found["folder"])).tensors
    saved_twice = {"base_model.model.lm_head.weight"} if name == "both" else set()
    trained = sum(math.prod(tensor.shape) for n, tensor in tensors.items() if n not in saved_twice)
    counted = memory.adapter_parameters(config, memory.tensor_shapes(tiny_model))
    assert counted == trained


SETTINGS = {
    "lora_bias": ["lora_bias=true"],
    "embed_tokens": ["additional_target=embed_tokens"],
    "lm_head": ["additional_target=lm_head"],
    "both": ["additional_target=embed_tokens,lm_head"],
    "norms": ["additional_target=input_layernorm,norm"],
    "target": ["lora_target=q_proj,embed_tokens"],
}


@pytest.mark.slow
def test_a_merge_of_what_learned_whole_answers_the_same(measured):
    """merge.py compares the answers itself; tied ends stay tied where both learned."""
    for name, tied in (("both", True), ("lm_head", False)):
        folder = Path(measured["saved"][name]["folder"])
        done = run("merge.py", str(folder))
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "merged/config.json").read_text())["tie_word_embeddings"] is tied
    assert run("merge.py", measured["saved"]["lora_bias"]["folder"]).error.sentence == says("train without")


@pytest.mark.slow
def test_pissa_starts_as_the_model_and_is_saved_as_a_lora_on_it(measured):
    found = measured["pissa"]
    assert found["size"] > 0.01
    assert max(found["product"], found["rest"]) == 0  # PEFT's own start
    assert max(found["start"], found["start_fast"]) < 1e-6
    assert found["rank"] == 8
    assert found["change"] > 0.1
    assert max(found["apart"], found["apart_fast"]) < 1e-6
    assert found["resumed"] == 0
    adapter = Adapter(Path(found["folder"]) / "checkpoint-6")
    assert not adapter.unsupported
    base = json.loads((adapter.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    update = find_places(adapter, {n: t.shape for n, t in read_tensors(Path(base)).items()}, tied=True).updates
    change = update["model.layers.0.mlp.up_proj.weight"]
    assert (read_tensor(change.b).float() @ read_tensor(change.a).float()).abs().max() > 1e-4


@pytest.mark.slow
def test_neftunes_noise_is_that_of_each_sample(measured):
    found = measured["neftune"]
    assert sorted(found["lengths"]) == [9, 17, 31, 40]
    assert all(0.98 < largest <= 1.0001 for largest in found["largest"])
    assert found["spread"] == pytest.approx([1 / math.sqrt(3)] * 4, rel=0.05)
    assert max(map(abs, found["mean"])) < 0.1
    assert found["evaluated"] == 0


@pytest.mark.slow
def test_schedules_with_values_of_their_own(measured):
    found = measured["schedules"]
    half = [0.01 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert found["restarts"] == pytest.approx([*half, *half])
    assert found["least"] == pytest.approx([0.001 + 0.009 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)])
    assert found["power"] == pytest.approx([1e-4 + (0.01 - 1e-4) * (1 - s / 8) ** 2 for s in range(8)])
    assert found["stable"] == pytest.approx([0.01] * 4 + half)


@pytest.mark.slow
def test_evaluations_begin_after_the_delay(measured):
    for name, evaluated, saved in (
        ("steps", [4, 6, 8], [3, 4, 6, 8]),
        ("epochs", [6, 8], [2, 4, 6, 8]),
        ("beyond", [], [5, 8]),
    ):
        found = measured["delays"][name]
        assert (found["evaluated"], found["saved"]) == (evaluated, saved), name
        assert found["planned"] == [evaluated, saved]
    assert measured["delays"]["beyond"]["best"] is None


@pytest.mark.slow
def test_full_determinism_is_switched_on(measured):
    assert measured["determinism"]["deterministic"] is True
    assert measured["determinism"]["loss"] == pytest.approx(5.6, abs=0.2)


LLAMA = {
    "model.embed_tokens.weight": (320, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.norm.weight": (64,),
}


@pytest.mark.parametrize(
    ("arguments", "shapes", "codes"),
    [
        (["additional_target=embed_tokens,lm_head,norm"], LLAMA, []),
        (["additional_target=q_proj"], LLAMA, [says("is a linear layer")]),
        (["additional_target=wte"], LLAMA, [says("the model has no {target}")]),
        (["lora_bias=all"], LLAMA, [says("has no biases")]),
        (["lora_bias=lora_only"], {**LLAMA, "model.layers.0.self_attn.q_proj.bias": (64,)}, []),
        (["lora_bias=true"], LLAMA, []),
    ],
)
def test_parts_that_the_model_cannot_learn_are_named(arguments, shapes, codes):
    assert [found.sentence for found in checks.check_whole(load_config(arguments).config, shapes, [])] == codes


def test_a_bias_that_cannot_be_merged_is_noted():
    config = load_config(["lora_bias=true"]).config
    query = "model.layers.0.self_attn.q_proj"
    (note,) = checks.check_whole(config, LLAMA, [f"{query}.weight"])
    assert note == Note(says("cannot be merged"), module=query)
    biased = {**LLAMA, f"{query}.bias": (64,)}
    assert list(checks.check_whole(config, biased, [f"{query}.weight"])) == []


def test_what_learns_whole_counts_in_memory():
    config = load_config(["additional_target=embed_tokens,lm_head,norm", "lora_rank=4"]).config
    assert memory.adapter_parameters(config, LLAMA) == 4 * 128 + 320 * 64 + 2 * 64
    alone = load_config(["additional_target=lm_head", "lora_rank=4"]).config
    assert memory.adapter_parameters(alone, LLAMA) == 4 * 128 + 320 * 64


@pytest.mark.slow
def test_a_training_that_is_to_predict_starts_the_evaluation_after_it(tiny_model, tmp_path):
    words = ("one", "two", "three", "four", "five", "six")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"Say {w}.", "output": f"{w}!"} for w in words])
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    settings += ["do_train=true", "do_predict=true", "val_size=2", "max_new_tokens=4", "cutoff_len=64"]
    done = run("train.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run/generated_predictions.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
