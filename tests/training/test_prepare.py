"""`train.py --dry-run`: what it finds, what it advises, and that it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, ok, refused, run, says, user_error, write_jsonl
from stand_in import Handler, StandIn, serving

import common
import train
from common import Message
from runs.configuration import load_config
from training import checks, hardware, memory, prepare
from training.findings import Finding, Findings, Problem, Risk
from training.processes import Processes

GB = 1e9
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


LLAMA3 = replace(memory.model_like(LLAMA3_8B), folder=Path("models/llama3"))


def test_an_adapter_of_the_8b_shape_has_the_known_number_of_parameters():
    # rank 8 on all projections of Llama-3-8B: the number that PEFT and LLaMA-Factory print
    assert memory.adapter_parameters(load_config(["lora_rank=8"]).config, LLAMA3.shapes) == 20_971_520
    assert memory.adapter_parameters(load_config(["lora_target=q_proj,v_proj"]).config, LLAMA3.shapes) == 3_407_872
    assert LLAMA3.parameters == 8_030_261_248 - 65 * 4096  # without the norms


def card_of(gigabytes: float) -> common.Gpu:
    return common.Gpu("RTX", "580.65", (13, 0), (8, 9), int(gigabytes * GB), int(gigabytes * GB))


def estimate(gpu: common.Gpu | None, longest: int | None, *settings: str) -> dict[str, float]:
    return memory.estimate_memory(load_config(list(settings)).config, LLAMA3, gpu, longest)


def test_the_second_tutorial_file_is_estimated_to_fit_24_gb():
    given = ("cutoff_len=4096", "per_device_train_batch_size=2")
    parts = estimate(card_of(24), 4096, *given)
    assert parts["weights"] == pytest.approx(16.06 * GB, rel=0.001)
    assert 18.5 * GB < sum(parts.values()) < 19.5 * GB  # an independent count: 19
    parts = estimate(card_of(24), 4096, *given, "quantization_bit=4")
    assert 8.4 * GB < sum(parts.values()) < 9.2 * GB  # an independent count: 8.7


@pytest.mark.parametrize("gpu", [None, card_of(24)])
def test_a_pair_has_two_sequences(gpu):
    """A batch of dpo has as many tokens as the pairs' two sequences have, also where no length is known yet."""
    one = estimate(gpu, 2000, "cutoff_len=2000")
    assert estimate(gpu, 2000, "cutoff_len=1000", "stage=dpo") == one
    assert estimate(gpu, None, "cutoff_len=1000", "stage=dpo") == one
    assert estimate(gpu, 5000, "cutoff_len=1000", "stage=dpo") == one
    assert estimate(gpu, 5, "cutoff_len=2000", "packing=true") == one
    assert one["activations"] == pytest.approx(2 * estimate(gpu, 1000)["activations"])


def test_nothing_recomputed_keeps_every_layer():
    per_layer = (7.6 * 4096 + 2 * 14336) * 2 * 1024
    found = estimate(card_of(24), 1024, "gradient_checkpointing=false", "per_device_train_batch_size=1")
    assert found["activations"] == pytest.approx(32 * per_layer, rel=0.05)


@pytest.mark.parametrize(("tokens", "rows"), [(8192, 512), (100, 100), (65536, 2048)])
def test_the_logits_are_computed_in_unsloths_pieces(tokens, rows):
    """The rows are those of fused_linear_rows of unsloth_zoo 2026.10.9."""
    assert memory.loss_memory(tokens, 4096, 128256) - 6 * tokens * 4096 == 4 * rows * 128256


def test_a_dense_mask_is_counted_where_it_is_built():
    for settings, expected in (([], 0), (["quantization_bit=8"], 4096**2)):
        assert estimate(card_of(24), 2048, *settings)["attention"] == expected


@pytest.mark.parametrize(
    ("free", "change"),
    [
        (20, "per_device_train_batch_size=1 gradient_accumulation_steps=32"),
        (17, "quantization_bit=4"),
        (9, "per_device_train_batch_size=1 gradient_accumulation_steps=32 quantization_bit=4"),
        (7.75, "per_device_train_batch_size=1 gradient_accumulation_steps=32 quantization_bit=4 cutoff_len=1024"),
        (5, None),
    ],
)
def test_what_does_not_fit_comes_with_the_smallest_change(free: float, change: str | None):
    config = load_config(["cutoff_len=4096", "per_device_train_batch_size=4"]).config
    (found,) = checks.check_memory(config, LLAMA3, card_of(free), None)
    assert isinstance(found, Risk) and found.fields["estimate"].fields["have"] == free
    assert found.sentence == (says("this would fit") if change else says("setting makes"))
    assert found.fields.get("settings") == change


def test_a_start_that_cannot_fit_ends_before_the_model_is_loaded():
    config, model = load_config(["per_device_train_batch_size=8"]).config, LLAMA3
    plan = SimpleNamespace(longest=2048)
    for free, begins in ((24, True), (17, True), (14, False)):  # 17: it may just fit, a sample at a time
        found = Findings()
        found.add("memory", checks.check_memory(config, model, card_of(free), plan))
        if begins:
            assert len(found.conclude()) == (free == 17)
        else:
            with user_error("this would fit"):
                found.conclude()
    (found,) = checks.check_memory(replace(config, cutoff_len=10**9, packing=True), model, None, plan)
    assert isinstance(found, Risk)


FAKE_SMI = """#!/bin/sh
case "$*" in
-L) echo "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)" ;;
*query-gpu*) echo "NVIDIA GeForce RTX 4090, {driver}, 8.9, 24564, 24100" ;;
*) echo "| NVIDIA-SMI {driver}    Driver Version: {driver}    CUDA Version: 12.2 |" ;;
esac
"""


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card as nvidia-smi tells of it, on a machine without one, and a torch for CUDA 13: `card("580.65.06")`."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(hardware, "torch_cuda", lambda: (13, 0))
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})

    def program(name: str, text: str = "") -> None:
        file = tmp_path / name
        file.write_text(text)
        file.chmod(0o755)

    def make(driver: str) -> common.Gpu:
        for name in ("gcc", "Python.h"):
            program(name)
        program("nvidia-smi", FAKE_SMI.format(driver=driver))
        return common.find_gpu()

    return make


def refusal() -> Message:
    """What keeps the card from training."""
    _, found = checks.check_card(load_config([]).config, common.find_gpu())
    assert isinstance(found, Problem) and "CUDA_VISIBLE_DEVICES=-1" in found.sentence
    return found.fields["reason"]


def test_a_card_that_will_do(card):
    assert card("580.65.06") == common.Gpu(
        "NVIDIA GeForce RTX 4090", "580.65.06", (12, 2), (8, 9), 24564 << 20, 24100 << 20
    )
    _, found = checks.check_card(load_config([]).config, common.find_gpu())
    assert found == Message(says("driver {driver}"), driver="580.65.06", cuda="12.2", built=13)


def test_a_driver_too_old_for_torch_is_told_with_what_fits(card):
    card("535.104.05")
    fault = refusal()
    assert (fault.fields["driver"], fault.fields["cuda"], fault.fields["needed"]) == ("535.104.05", "13.0", 580)
    assert "rm -r .venv && make setup" in str(fault)


@pytest.mark.parametrize("driver", ["525.60.13", "535.104.05", "550.54.15", "570.86.10", "580.65.06"])
def test_drivers_of_rented_machines_run_the_pinned_torch(card, monkeypatch, driver):
    assert checks.pinned_packages("gpu")["torch"] == "2.10.0"  # built for CUDA 12.8
    monkeypatch.setattr(hardware, "torch_cuda", lambda: (12, 8))
    assert hardware.gpu_fault(card(driver)) is None


def test_a_volta_card_is_refused_beside_cuda_13(card, monkeypatch):
    volta = replace(card("580.65.06"), compute=(7, 0))
    assert hardware.gpu_fault(volta).sentence == says("longer supports")
    monkeypatch.setattr(hardware, "torch_cuda", lambda: (12, 8))
    assert hardware.gpu_fault(volta) is None


def test_a_torch_without_cuda_is_told(card, monkeypatch):
    card("580.65.06")
    monkeypatch.setattr(hardware, "torch_cuda", lambda: None)
    assert refusal().sentence == says("torch is built without CUDA")


def test_what_triton_compiles_with_is_told(card, tmp_path, monkeypatch):
    card("580.65.06")
    monkeypatch.setenv("CC", "icc")
    assert refusal().fields["missing"] == ["icc"]
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    assert refusal().fields["missing"] == [str(tmp_path / "Python.h")]
    (tmp_path / "gcc").rename(tmp_path / "clang")
    (tmp_path / "Python.h").touch()
    assert hardware.missing_for_triton() == []
    (tmp_path / "clang").unlink()
    assert refusal().fields["missing"] == ["gcc / clang"]


@pytest.mark.slow
def test_a_run_that_will_work(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    folder = tmp_path / "run"
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={folder}", "cutoff_len=64"]
    result = ok(run("train.py", "--dry-run", *settings, cwd=tmp_path))
    for what in ("python", "packages", "model", "data", "steps", "held out", "memory", "disk", "unsloth"):
        assert f"{what}  " in result.stdout
    assert result.stdout.rstrip().endswith("yes")
    assert not folder.exists()


def test_all_faults_are_told(tiny_model, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(tiny_model, half)
    (half / "model.safetensors").write_bytes(b"")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": None}])
    result = run("train.py", "--dry-run", f"model_name_or_path={half}", f"dataset={rows}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"{half} is incomplete, model.safetensors missing" in result.stdout
    assert "rows.jsonl" in result.stdout
    assert str(Message("no: {count} fault{count:plural}, see above", count=2)) in result.stdout


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
LAUNCHED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_processes_that_cannot_train_together_are_refused(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    named = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={tmp_path / 'run'}"]
    settings = ["stage=grpo", "reward_funcs=length"]
    refused(run("train.py", *named, *settings, cwd=tmp_path, env=os.environ | LAUNCHED), "in one process")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_several_processes_makes_the_dry_run(tiny_model, tmp_path, monkeypatch, capsys, rank):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": f"a{n}", "output": "b"} for n in range(64)])
    monkeypatch.setattr(checks, "check_imports", lambda: ())
    for name, value in (LAUNCHED | {"RANK": rank, "LOCAL_RANK": rank}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="0"):
        train.main(["--dry-run", f"model_name_or_path={tiny_model}", f"dataset={rows}", "num_train_epochs=1"])
    said = capsys.readouterr().out
    assert "2 of 2 x 8 x 2 processes samples" in said if rank == "0" else said == ""


def test_more_processes_than_cards_are_refused(card, monkeypatch):
    card("580.65.06")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in (LAUNCHED | {"RANK": "1", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    launched = Processes.of_launcher()
    assert launched == Processes(rank=1, count=2, here=2)
    (found,) = checks.check_processes(load_config([]).config, launched)
    assert found == Message(says("start one per GPU"), count=2, cards=1)


def test_a_model_that_is_nowhere(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for model, fetched in (("org/name", "org/name"), ("models/name", "ORG/name")):
        settings = ["--dry-run", f"dataset={rows}", f"model_name_or_path={model}"]
        result = run("train.py", *settings, cwd=tmp_path, env=environment)
        assert result.returncode == 2
        assert f"there is no model {model}; fetch it: python {ROOT / 'download.py'} {fetched}" in result.stdout
        asked = "http://127.0.0.1:9 cannot be reached; set HF_ENDPOINT to a mirror" in result.stdout
        assert asked == (model == "org/name")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on loopback that has one model's config.json, and the environment of a script that asks it."""

    class Hub(Handler):
        def do_GET(self) -> None:
            found = self.path == "/shenzhi-wang/Llama3-8B-Chinese-Chat/resolve/main/config.json"
            self.answer(LLAMA3_8B if found else b"", 200 if found else 404)

    with serving(StandIn(Hub)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server.url


def test_steps_memory_and_disk_are_told_before_the_model_is_fetched(hub, tmp_path):
    """The README's command, on a machine that has not yet fetched the model."""
    recipe = str(ROOT / "configs" / "llama3-8b-chinese-chat.yaml")
    result = run("train.py", recipe, "--dry-run", f"dataset_dir={ROOT / 'data'}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"python {ROOT / 'download.py'} shenzhi-wang/Llama3-8B-Chinese-Chat" in result.stdout
    assert f"{hub} can be reached" in result.stdout
    assert "at most 114 optimizer steps of 1 x 8" in result.stdout
    assert "(weights 16.1, " in result.stdout or "(weights 32.1, " in result.stdout
    assert "the model takes about 16.1 GB" in result.stdout
    assert "checkpoints take about 1.36 GB" in result.stdout


@pytest.mark.usefixtures("hub")
def test_a_model_that_cannot_be_estimated_yet_is_said_to_be(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 9)
    settings = ["model_name_or_path=org/name", f"dataset={rows}", "max_steps=7"]
    said = run("train.py", "--dry-run", *settings, cwd=tmp_path).stdout
    assert "7 optimizer steps" in said and "estimated once the model is there" in said
    assert memory.model_like({"n_embd": 768}) is None
    assert memory.model_like(LLAMA3_8B | {"num_local_experts": 8}) is None


def test_the_shapes_of_a_config_json_are_those_of_its_model(embedded_model):
    settings, own = memory.EMBEDDED_SHAPE, json.loads((embedded_model / "config.json").read_text())
    matrices = {name: shape for name, shape in memory.tensor_shapes(embedded_model).items() if len(shape) == 2}
    assert memory.model_like(settings).shapes == matrices
    assert {name: own[name] for name in settings} == settings


def test_a_chip_that_shares_the_main_memory(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI.format(driver="580.95").replace("24564, 24100", "[N/A], [N/A]"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.find_gpu().total_memory == psutil.virtual_memory().total


def problems(topic: str, *settings: str) -> list[Finding]:
    """What keeps a recipe of these settings from starting, of one topic."""
    found = Findings()
    prepare.look(load_config(list(settings)), Processes(), found)
    return found.of(Problem, topic=topic)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_a_base_that_is_quantized_in_another_way_is_refused_before_it_is_loaded(tiny_model, tmp_path, method):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": method}}))
    found = problems("model", f"model_name_or_path={base}")
    is_ours = method == "bitsandbytes"
    assert found == ([] if is_ours else [Message(says("quantization_bit: 4"), folder=base, method=method)])


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["use_dora=true"], ["use_dora"]),
        (["use_dora=true", "lora_dropout=0.1", "lora_target=q_proj,up_proj"], ["use_dora", "lora_dropout"]),
        (["use_dora=true", "lora_target=q_proj,o_proj"], []),
        ([], []),
    ],
)
def test_what_peft_refuses_on_experts_is_told_before_the_start(tiny_model, tmp_path, settings, refused):
    folder = shutil.copytree(tiny_model, tmp_path / "experts")
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**model, "num_experts": 4, "num_experts_per_tok": 2}))
    told = problems("model", f"model_name_or_path={folder}", *settings)
    targets = ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert told == ([Message(says("not for experts"), settings=refused, targets=targets)] if refused else [])


def test_a_run_folder_that_cannot_be_made_is_told_before_the_start(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, wrong in (("file", "file"), ("file/run", "file"), ("dangling/run", "dangling")):
        (found,) = problems("output", f"output_dir={tmp_path / name}")
        assert found.sentence == says("cannot be written") and found.fields["path"] == tmp_path / wrong
        assert problems("run", f"output_dir={tmp_path / name}") == []
    assert len(problems("output", "output_dir=/proc/run")) == 1  # where even root can write nothing
    assert problems("output", f"output_dir={tmp_path}/a/b/c") == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("left", "is_run"),
    [
        (["loading.log"], False),  # a model failed to load
        (["trained.npy"], False),  # killed before the other files of a run's beginning were written
        (["loading.log", "trained.npy", "config.yaml"], False),
        (["config.yaml"], True),  # of somebody else
        (["trained.npy", "trainer_log.jsonl"], True),
    ],
)
def test_what_comes_before_the_record_of_a_run_is_no_run(tmp_path, left: list[str], is_run: bool):
    for name in left:
        (tmp_path / name).touch()
    found = [found.sentence for found in problems("run", f"output_dir={tmp_path}")]
    assert found == ([says("but no run.json")] if is_run else [])


def test_control_tokens_with_embeddings_of_zeros_are_told_before_the_model_is_loaded(tiny_model, tmp_path):
    """As those of a base model; Unsloth ends there on a card. The end of a turn is the tokenizer's own eos_token."""
    from safetensors.torch import load_file, save_file

    base, start = shutil.copytree(tiny_model, tmp_path / "base"), 257  # <|im_start|>
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][start:] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    data = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)

    def faults(*more: str) -> list[Finding]:
        found = Findings()
        loaded = load_config([f"model_name_or_path={base}", f"dataset={data}", f"output_dir={tmp_path / 'run'}", *more])
        prepare.prepare(prepare.look(loaded, Processes(), found), found)
        return found.of(Problem)

    assert faults() == [Message(says("was never trained on"), model=base, tokens=["<|im_start|>"])]
    assert faults("additional_target=embed_tokens,lm_head") == []


def test_an_adapter_of_few_modules_on_a_card_is_told_what_all_would_take(tiny_model):
    def notes(*more: str) -> list[Finding]:
        config = load_config([f"model_name_or_path={tiny_model}", "cutoff_len=64", *more]).config
        return [
            found
            for found in checks.check_memory(config, memory.read_model(tiny_model), card_of(24), None)
            if found.label == "note"
        ]

    (note,) = notes("lora_target=q_proj,v_proj", "lora_rank=8")
    assert note.fields["missing"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "up_proj"]
    # two layers of 8 x (96 + 128 + 3 x 192) weights, of 16 bytes each
    assert note.fields["gb"] * 1e9 == 2 * 8 * (96 + 128 + 3 * 192) * 16
    assert notes() == notes("lora_target=q_proj,v_proj", "quantization_bit=8") == []


def test_an_adapter_that_is_none_is_told_before_the_start(tmp_path):
    def refused() -> str:
        return problems("adapter", f"adapter_name_or_path={tmp_path}")[0].sentence

    assert refused() == says("has no {file}")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    assert refused() == says("safetensors file")
    (tmp_path / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for text, words in (
        ("{", "read as JSON"),
        ("[]", "read as JSON"),
        ('{"peft_type": "LORA"}', "no LoRA adapter"),
        ('{"peft_type": "IA3", "r": 1, "lora_alpha": 1, "target_modules": []}', "no LoRA adapter"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        assert refused() == says(words)
