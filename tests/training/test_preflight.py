"""`train.py --dry-run`: what it finds, what it advises, and that it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run, write_jsonl

import common
from common import load_config
from training import preflight, starting

GB = 1e9
LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama3_8b(tmp_path_factory) -> Path:
    """The shapes of Llama-3-8B without its weights: config.json and the header of a safetensors file."""
    folder = tmp_path_factory.mktemp("llama3-8b")
    hidden, inner = LLAMA3_8B["hidden_size"], LLAMA3_8B["intermediate_size"]
    vocabulary, layers = LLAMA3_8B["vocab_size"], LLAMA3_8B["num_hidden_layers"]
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "lm_head.weight": [vocabulary, hidden]}
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", 1024, hidden),
            ("self_attn.v_proj", 1024, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = [rows, columns]
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = [hidden]
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B))
    return folder


def test_an_adapter_of_the_8b_shape_has_the_known_number_of_parameters(llama3_8b):
    shapes = preflight.tensor_shapes(llama3_8b)
    # rank 8 on all projections of Llama-3-8B: the number that PEFT and LLaMA-Factory print
    assert preflight.adapter_parameters(load_config(["lora_rank=8"]).config, shapes) == 20_971_520
    assert preflight.adapter_parameters(load_config(["lora_target=q_proj,v_proj"]).config, shapes) == 3_407_872


def card_of(gigabytes: float) -> common.Gpu:
    return common.Gpu("RTX", "580.65", (13, 0), (8, 9), int(gigabytes * GB), int(gigabytes * GB))


def test_the_second_tutorial_file_is_estimated_to_fit_24_gb(llama3_8b):
    config = load_config(["cutoff_len=4096", "per_device_train_batch_size=2"]).config
    parts = preflight.estimate_memory(config, llama3_8b, 2 * 4096, card_of(24))
    assert parts["weights"] == pytest.approx(16.06 * GB, rel=0.001)
    assert 21 * GB < sum(parts.values()) < 22 * GB
    quantized = load_config(["quantization_bit=4"]).config
    needs = {
        free: sum(preflight.estimate_memory(quantized, llama3_8b, 2 * 4096, card_of(free)).values())
        for free in (11, 24)
    }
    assert needs[11] < 11 * GB < needs[24] < 14 * GB  # the pieces of the logits are as large as the card allows


@pytest.mark.parametrize(
    ("tokens", "left", "pieces"), [(8192, 5e9, 8), (8192, 60e9, 4), (300, 60e9, 1), (2048, 3e9, 4)]
)
def test_the_logits_are_computed_in_unsloths_pieces(tokens, left, pieces):
    """The numbers are get_chunk_size's of unsloth_zoo 2026.10.9, for half of what is left."""
    assert preflight.logits_memory(tokens, 128256, left) == 16 * tokens * 128256 / pieces


def test_what_does_not_fit_comes_with_advice(llama3_8b, capsys):
    config = load_config([f"model_name_or_path={llama3_8b}", "cutoff_len=4096", "per_device_train_batch_size=4"]).config
    card = common.Gpu("RTX 4090", "580.65", (13, 0), (8, 9), int(25.7 * GB), int(20 * GB))
    seen = preflight.Examination()
    preflight.check_memory(seen, config, card, None, preflight.read_model(llama3_8b))
    said = capsys.readouterr().out
    assert seen.faults == 1
    assert "20.0 GB are free" in said
    assert "quantization_bit=4" in said
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=32" in said
    assert "cutoff_len=2048" in said


FAKE_SMI = """#!/bin/sh
case "$*" in
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
    monkeypatch.setattr(preflight, "torch_cuda", lambda: (13, 0))
    monkeypatch.setattr(preflight.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})

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


def refusal(capsys) -> str:
    """What keeps the card from training, of which `--dry-run` and training tell alike."""
    seen, config = preflight.Examination(), load_config([]).config
    preflight.check_gpu(seen, config)
    assert seen.faults == 1
    with pytest.raises(common.UserError) as caught:
        starting.check_environment(config)
    assert str(caught.value) in capsys.readouterr().out
    return str(caught.value)


def test_a_card_that_will_do(card, capsys):
    assert card("580.65.06") == common.Gpu(
        "NVIDIA GeForce RTX 4090", "580.65.06", (12, 2), (8, 9), 24564 << 20, 24100 << 20
    )
    seen, config = preflight.Examination(), load_config([]).config
    preflight.check_gpu(seen, config)
    starting.check_environment(config)
    assert seen.faults == 0
    assert "580.65.06 (CUDA 12.2), torch is built for 13.x" in capsys.readouterr().out


def test_a_driver_too_old_for_torch_is_told_with_what_fits(card, capsys):
    card("535.104.05")
    said = refusal(capsys)
    assert "needs 580 or newer" in said
    assert "for CUDA 12" in said
    assert "CUDA_VISIBLE_DEVICES=-1" in said


def test_a_torch_without_cuda_is_told(card, monkeypatch, capsys):
    card("580.65.06")
    monkeypatch.setattr(preflight, "torch_cuda", lambda: None)
    assert "run make setup again" in refusal(capsys)


def test_what_triton_compiles_with_is_told(card, tmp_path, monkeypatch, capsys):
    card("580.65.06")
    monkeypatch.setenv("CC", "icc")
    assert "no C compiler (icc)" in refusal(capsys)
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    assert f"no {tmp_path / 'Python.h'}: apt install gcc python3" in refusal(capsys)
    (tmp_path / "gcc").rename(tmp_path / "clang")
    (tmp_path / "Python.h").touch()
    assert preflight.missing_for_triton() == []
    (tmp_path / "clang").unlink()
    assert "no C compiler (gcc or clang)" in refusal(capsys)


@pytest.mark.slow
def test_a_run_that_will_work(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    folder = tmp_path / "run"
    settings = [f"model_name_or_path={tiny_model}", f"dataset={rows}", f"output_dir={folder}", "cutoff_len=64"]
    result = run("train.py", "--dry-run", *settings, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    for what in ("python", "packages", "model", "data", "steps", "memory", "disk", "unsloth"):
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
    assert "lacks model.safetensors" in result.stdout
    assert "rows.jsonl" in result.stdout
    assert "no: 2 faults" in result.stdout


def test_a_model_that_is_nowhere(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    settings = ["--dry-run", f"dataset={rows}"]
    result = run("train.py", *settings, "model_name_or_path=org/name", cwd=tmp_path, env=environment)
    assert result.returncode == 2
    assert "http://127.0.0.1:9 cannot be reached" in result.stdout
    assert f"python {ROOT / 'download.py'} org/name" in result.stdout
    result = run("train.py", *settings, "model_name_or_path=models/name", cwd=tmp_path, env=environment)
    assert "there is no folder models/name" in result.stdout


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on loopback that has one model's config.json, and the environment of a script that asks it."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/shenzhi-wang/Llama3-8B-Chinese-Chat/resolve/main/config.json"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps(LLAMA3_8B).encode() if found else b"")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield address
    server.shutdown()


def test_steps_memory_and_disk_are_told_before_the_model_is_fetched(hub, tmp_path):
    """The README's command, on a machine that has not yet fetched the model."""
    recipe = str(ROOT / "configs" / "llama3-8b-chinese-chat.yaml")
    result = run("train.py", recipe, "--dry-run", f"dataset_dir={ROOT / 'data'}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"{hub} answers: python {ROOT / 'download.py'} shenzhi-wang/Llama3-8B-Chinese-Chat" in result.stdout
    assert "at most 114 optimizer steps of 1 x 8" in result.stdout
    assert "(weights 16.1, " in result.stdout or "(weights 32.1, " in result.stdout
    assert "the model takes about 16.1 GB" in result.stdout
    assert "checkpoints take about 1.01 GB" in result.stdout


@pytest.mark.usefixtures("hub")
def test_a_model_that_cannot_be_estimated_yet_is_said_to_be(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 9)
    settings = ["model_name_or_path=org/name", f"dataset={rows}", "max_steps=7"]
    said = run("train.py", "--dry-run", *settings, cwd=tmp_path).stdout
    assert "7 optimizer steps" in said and "is told once the model is there" in said
    assert preflight.model_like({"n_embd": 768}) is None
    assert preflight.model_like(LLAMA3_8B | {"num_local_experts": 8}) is None


def test_the_shapes_of_a_config_json_are_those_of_its_model(llama3_8b, embedded_model):
    for folder, settings in ((llama3_8b, LLAMA3_8B), (embedded_model, preflight.EMBEDDED_SHAPE)):
        matrices = {name: shape for name, shape in preflight.tensor_shapes(folder).items() if len(shape) == 2}
        assert preflight.model_like(settings).shapes == matrices
        own = json.loads((folder / "config.json").read_text())
        assert {name: own[name] for name in settings} == settings


def test_a_chip_that_shares_the_main_memory(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(FAKE_SMI.format(driver="580.95").replace("24564, 24100", "[N/A], [N/A]"))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.find_gpu().total_memory == psutil.virtual_memory().total
