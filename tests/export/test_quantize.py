"""quantize.py, llamacpp.py and modelfile.py, with llama.cpp's real converter, quantizer and runtime."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_hub
from conftest import (
    ROOT,
    make_run,
    ok,
    refused,
    run,
    save_random_model,
    says,
    user_error,
    write_hollow_weights,
    write_jsonl,
)
from safetensors import SafetensorError

import quantize
from common import Config, Message, UserError, dump_config
from export import gguf_files, llamacpp, verify
from export.modelfile import go_template, modelfile, template_shape
from inference import child_process, llamacpp_build
from preprocessing.template import TEMPLATES, load_template
from runs import files
from runs.configuration import load_config

standin = test_hub.standin  # the fixture: a hub on this machine

ROWS = [
    {"instruction": "你是谁？", "input": "", "output": "我是小一，由一张卡训练。"},
    {"instruction": "Who are you?", "input": "", "output": "I am onecard 😀, 100% trained on one card."},
    {"instruction": "Add 12 and 30.", "input": "", "output": "```python\nprint(12 + 30)  # 42\n```"},
]


# ---------------------------------------------------------------------------------------------------------------------
# Quick: what is refused before anything heavy


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["--type", "q4_k_n"],
            says("not known; use"),
            "--type q4_k_n (did you mean 'q4_k_m'?) is not known; use f32, f16,",
        ),
        (["--type", ","], says("not known; use"), "--type  is not known"),
        (["no/such/folder"], says("there is no model"), "there is no model no/such/folder; fetch it"),
        ([".", "tests"], says("targets; give"), ". and tests are two targets; give one"),
        (["data"], says("no config.json"), "data is no run, adapter or model"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(arguments, code, sentence):
    used = os.times().children_user
    result = run("quantize.py", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {sentence}") and "Traceback" not in result.stderr
    assert result.error.sentence == code
    assert os.times().children_user - used < 1.5


def test_help_names_every_type():
    result = run("quantize.py", "--help")
    assert result.returncode == 0
    assert all(f"{kind}," in result.stdout + "," or f"{kind}\n" in result.stdout for kind in gguf_files.TYPES)
    assert "--max-divergence" in result.stdout and "--push REPO" in result.stdout


def make_model(folder: Path, dtype: str = "F16", shape: tuple[int, ...] = (4, 2)) -> Path:
    """A folder with a config and weights of zeros, enough for what is asked before the converter."""
    folder.mkdir(parents=True)
    write_hollow_weights(folder / "model.safetensors", {"w": shape}, dtype)
    (folder / "config.json").write_text('{"vocab_size": 8}')
    return folder


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    model = make_model(tmp_path / "m")
    (model / "gguf").mkdir()
    there = model / "gguf" / "m-q8_0.gguf"
    there.write_bytes(b"precious")
    result = run("quantize.py", str(model), "--type", "q8_0,q4_k_m")
    assert result.returncode == 2
    assert result.stderr == f"error: {there} exists; add --overwrite to replace it\n"
    assert there.read_bytes() == b"precious"


def test_a_disk_without_room_is_told_before_the_work(tmp_path):
    model = make_model(tmp_path / "m", shape=(10**12,))
    result = run("quantize.py", str(model), "--type", "f16", "--no-verify")
    refused(result, "of free disk")
    assert result.error.fields["needed"] == pytest.approx(2000, abs=0.01)  # the converter writes it at once
    assert not (model / "gguf").exists()


def test_a_large_model_s_files_are_not_thought_larger_than_they_are(tmp_path):
    model = make_model(tmp_path / "m", shape=(4 * 10**12,))
    (model / "gguf" / ".work.12ab.tmp").mkdir(parents=True)
    job = gguf_files.GgufJob(None, model, model, ("q4_k_m", "f16"))
    needed, sizes = gguf_files.space_needed(job)
    assert {kind: round(size / 1e9) for kind, size in sizes.items()} == {"q4_k_m": 2700, "f16": 8000}
    assert round(needed / 1e9) == 10700
    gguf_files.remove_leftovers(job)
    assert list((model / "gguf").iterdir()) == []  # what a kill left takes no room


def test_a_merge_counts_before_it_is_made(tmp_path):
    run_folder = make_run_folder(tmp_path, make_model(tmp_path / "base", shape=(10**12,)))
    result = run("quantize.py", str(run_folder), "--type", "q8_0", "--no-verify")
    assert result.returncode == 2
    assert "merging first" not in result.stdout
    assert result.error.sentence == says("of free disk")
    assert result.error.fields["needed"] == pytest.approx(1125 + 2000, abs=0.01)


def make_run_folder(folder: Path, base: Path, **settings) -> Path:
    """A finished run, as far as what is asked before the merge."""
    made = folder / "run"
    made.mkdir()
    config = Config(model_name_or_path=str(base), output_dir=str(made), **settings)
    (made / "config.yaml").write_text(dump_config(config))
    (made / "run.json").write_text("{}")
    (made / "adapter_config.json").write_text("{}")
    (made / "adapter_model.safetensors").write_bytes(b"trained")
    return made


def test_what_the_training_said_of_its_output_is_not_about_the_files(tmp_path):
    base = make_model(tmp_path / "base")
    folder = make_run_folder(tmp_path, base, overwrite_output_dir=True, export_dir=str(tmp_path / "other"))
    for arguments in ([str(folder)], [str(folder / "config.yaml"), "export_dir="]):
        job = gguf_files.find_job("q8_0", arguments[0], arguments[1:])
        assert job.config.overwrite_output_dir is False
        assert job.model == folder / "merged"
        assert job.merge.base == base
    job = gguf_files.find_job("q8_0", str(folder), ["overwrite_output_dir=true", f"export_dir={tmp_path / 'x'}"])
    assert job.config.overwrite_output_dir is True
    assert (job.model, job.home) == (tmp_path / "x", folder)
    assert gguf_files.find_job("q8_0", str(folder / "config.yaml"), []).model == tmp_path / "other"


def test_a_merged_folder_is_proven_on_the_data_of_its_run(tmp_path):
    folder = make_run_folder(tmp_path, make_model(tmp_path / "base"), dataset=("mine",), template="qwen")
    merged = make_model(tmp_path / "merged")
    (merged / "merge.json").write_text(json.dumps({"run": str(folder)}))
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"adapter_name_or_path: {folder}\ntemplate: llama3\nexport_dir: {tmp_path / 'to come'}\n")
    for argument, template in ((merged, "qwen"), (recipe, "llama3")):
        config = gguf_files.find_job("q8_0", str(argument), []).config
        assert (config.dataset, config.template) == (("mine",), template)
    assert gguf_files.find_job("q8_0", str(merged), ["dataset=other"]).config.dataset == ("other",)


def test_files_are_proven_as_long_as_nothing_has_changed(tmp_path):
    model = make_model(tmp_path / "m")
    job = gguf_files.find_job("q8_0,f16", str(model), [])
    job.output.mkdir()
    entries = {}
    for kind in job.types:
        assert not gguf_files.are_proven(job)
        job.file(kind).write_bytes(b"whole")
        entries[job.file(kind).name] = {"bytes": 5, "verified": True, "adapter_sha256": None}
        (job.output / "gguf.json").write_text(json.dumps({"files": entries}))
    assert gguf_files.are_proven(job)
    (model / "merge.json").write_text('{"adapter_sha256": "of another training"}')
    assert not gguf_files.are_proven(job)


def test_what_a_killed_call_has_made_is_kept(tmp_path, capsys):
    job = gguf_files.find_job("q8_0,f16", str(make_model(tmp_path / "m")), [])
    job.output.mkdir()
    entry = {"bytes": 5, "verified": True, "adapter_sha256": None}
    (job.output / "gguf.json").write_text(json.dumps({"files": {job.file("q8_0").name: entry}}))
    assert gguf_files.types_to_make(job, proving=True) == ("q8_0", "f16")  # killed before the file took its place
    job.file("q8_0").write_bytes(b"whole")
    assert gguf_files.types_to_make(job, proving=True) == ("f16",)
    assert "it is kept" in capsys.readouterr().out
    job.file("q8_0").write_bytes(b"another one's")
    with user_error("--overwrite to", files=[job.file("q8_0")]):
        gguf_files.types_to_make(job, proving=True)


def test_a_reference_in_bfloat16_widens_the_limit_and_says_so(tmp_path, monkeypatch):
    model = make_model(tmp_path / "m", "BF16", (10**9,))
    job = gguf_files.GgufJob(None, model, model, ("f16",))
    proof = verify.Reference(model, None, (), [], False, tmp_path)
    measured = dict.fromkeys(("top1_agreement", "perplexity", "tokens_per_second", "prompt_tokens_per_second"), 1.0)
    measured |= {"reference_perplexity": 1.0, "kl_divergence": 0.004, "tokens": 8}
    monkeypatch.setattr(verify.Reference, "check_contents", lambda *_: {"texts": 1, "adds_bos": False})
    monkeypatch.setattr(llamacpp, "call", lambda *_, **__: measured)
    (tmp_path / "reference-float32.npy").write_bytes(b"")
    usual = gguf_files.TYPES["f16"].limits[0]
    with user_error("it was made of", type="f16", divergence=0.004, limit=0.002):  # no larger type would help
        proof.verify("f16", tmp_path, None, usual)
    with user_error("or accept it", type="q8_0", limit=0.002):
        proof.verify("q8_0", tmp_path, None, usual)
    (tmp_path / "reference-float32.npy").rename(tmp_path / "reference-bfloat16.npy")
    made = gguf_files.GgufFile("f16", 2 * 10**9, proof.verify("f16", tmp_path, None, usual))
    text = quantize.table(job, [made])
    assert "16-bit model, in bfloat16" in text
    assert "(bfloat16 alone makes a divergence of about 0.0022; three times that is allowed on top" in text


@pytest.mark.parametrize(("dtype", "own"), [("F16", "f16"), ("BF16", "bf16"), ("F32", "f32")])
def test_weights_are_counted_from_the_headers(tmp_path, dtype, own):
    assert gguf_files.weights_of(make_model(tmp_path / "m", dtype)) == (8, own)


def test_quantized_weights_are_refused(tmp_path):
    with user_error("no 16-bit weights"):
        gguf_files.weights_of(make_model(tmp_path / "m", "U8"))


def test_a_stale_merge_is_refused(tmp_path):
    adapter = tmp_path / "run"
    model = make_model(adapter / "merged")
    (adapter / "adapter_model.safetensors").write_bytes(b"new")
    (model / "merge.json").write_text(json.dumps({"adapter": str(adapter), "adapter_sha256": "of the old one"}))
    job = gguf_files.GgufJob(None, model, adapter, ("f16",))
    with user_error("an earlier adapter", model=model):
        gguf_files.check_merge(job)


def test_without_a_compiler_only_the_converter_s_types_are_made(monkeypatch, capsys):
    monkeypatch.setattr(llamacpp_build, "_found", lambda: None)
    monkeypatch.setattr(llamacpp_build, "_cmake", lambda: None)
    job = gguf_files.GgufJob(None, Path(), Path(), ("q8_0", "bf16"))
    assert gguf_files.can_prove(job) is False
    assert "the files will not be verified: quantizing and checking a GGUF need" in capsys.readouterr().out
    k_quant = gguf_files.GgufJob(None, Path(), Path(), ("q8_0", "q4_k_m"))
    with user_error("and checking"):
        gguf_files.can_prove(k_quant)
    monkeypatch.setattr(llamacpp_build, "quantizer", lambda: "llama-quantize")  # the user's own
    assert gguf_files.can_prove(k_quant) is False
    called = []
    monkeypatch.setattr(gguf_files, "run_child", lambda command, _: called.append(command))
    gguf_files.make(k_quant, "q4_k_m", Path("f16.gguf"), Path())
    assert called == [["llama-quantize", "f16.gguf", "q4_k_m.gguf", "Q4_K_M"]]
    with user_error("only verified files"):
        gguf_files.check_push("me/it", job, proving=False)


def test_a_llama_cpp_of_the_user_s_own_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is no folder"):
        llamacpp_build.quantizer()
    tool = tmp_path / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert llamacpp_build.quantizer() == str(tool)
    assert llamacpp_build.converter() == tmp_path / "convert_hf_to_gguf.py"


def test_the_library_is_built_for_the_card_where_there_is_a_compiler_for_it(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(llamacpp_build, "HOME", tmp_path)
    monkeypatch.setattr(llamacpp_build, "run_child", lambda command, _: built.append(command))
    monkeypatch.setattr(llamacpp_build.shutil, "copytree", lambda *_, **__: None)
    monkeypatch.setattr(llamacpp_build.os, "replace", lambda *_: None)
    names = set()
    for card in (None, SimpleNamespace(compute=(8, 9))):
        monkeypatch.setattr(llamacpp_build, "_card", lambda card=card: card)
        names.add(llamacpp_build._built().name)
        llamacpp_build._build(Path("lib"))
        assert ("-DGGML_CUDA=ON" in built[-2]) is (card is not None)
    assert len(names) == 2


def test_a_child_that_dies_is_one_sentence():
    code = "import os, sys; print('ggml.c:1: GGML_ASSERT(x) failed', flush=True); os.abort()"
    reason = Message(
        "llama.cpp was killed by signal {signal}; its last message: {line}",
        line="ggml.c:1: GGML_ASSERT(x) failed",
        signal=6,
    )
    with user_error("{doing} failed: {reason}", doing="trying", reason=reason):
        child_process.run_child([sys.executable, "-c", code], "trying")


def test_a_full_disk_is_told_where_a_child_meets_it(tmp_path, monkeypatch):
    code = "import sys; sys.exit('OSError: [Errno 28] No space left on device')"
    for free, expected in ((10**6, says("of free disk")), (10**12, says("{doing} failed: {reason}"))):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with user_error(expected), files.on_disk_full(tmp_path, 10**9):
            child_process.run_child([sys.executable, "-c", code], "converting")


def test_a_full_disk_is_told_where_a_library_writes(tmp_path, monkeypatch):
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (full, RuntimeError("[enforce fail at inline_container.cc:664]")):  # torch's
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
        with user_error("of free disk", free=4096 / 1e9), files.on_disk_full(tmp_path, 10**7):
            raise error
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
        with pytest.raises(type(error)), files.on_disk_full(tmp_path, 10**7):
            raise error


def test_samples_are_spread_and_cut():
    rows = [{"input_ids": [i] * 10} for i in range(100)]
    chosen = verify.spread(rows, 25, 8)
    assert [len(ids) for ids in chosen] == [8, 8, 8]
    assert len({ids[0] for ids in chosen}) == 3
    assert verify.spread(rows, 25, 8) == chosen


# ---------------------------------------------------------------------------------------------------------------------
# Quick: Ollama's template


class Renderer(SimpleNamespace):
    """A tokenizer as far as a chat template needs it."""

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        assert tokenize is False
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        return _compile_jinja_template(self.text).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **names
        )


def renderer(name: str) -> Renderer:
    from preprocessing.template import ChatTemplate

    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return Renderer(text=ChatTemplate(name, text, (), False).saved, bos_token="<s>")


def go(template: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama makes of a TEMPLATE: as much of Go's text/template as go_template writes."""
    system = "\n\n".join(words for role, words in messages if role == "system")
    template = template.removeprefix("{{ $system := .System }}")
    head, rest = template.split("{{ range $i, $_ := .Messages }}")
    body, tail = rest.rsplit("{{ end }}{{ end }}", 1)
    parts = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', body)
    branches = dict(zip(parts[1::2], parts[2::2], strict=True))
    opening = r"\{\{ if ([^}]*)\}\}\{\{ \$system \}\}(.*?)\{\{ \$system = \"\" \}\}\{\{ end \}\}"
    text = head
    for number, (role, words) in enumerate(messages, 1):
        piece = branches[role]
        if match := re.search(opening, piece, re.DOTALL):
            here = system and ("slice" not in match[1] or number == len(messages))
            piece = piece.replace(match[0], system + match[2] if here else "")
            system = "" if here else system
        text += piece.replace("{{ .Content }}", words)
    return (text + tail).replace('{{ "{{" }}', "{{")


CONVERSATIONS = [
    [("user", "Hi {{ there }}")],
    [("system", "Be brief."), ("user", "你好"), ("assistant", "好"), ("user", "再见")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


@pytest.mark.parametrize("name", ["llama3", "qwen", "qwen3", "chatml", "gemma", "mistral", "default"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ollama_s_template_writes_what_the_trained_one_writes(name, turns):
    tokenizer = renderer(name)
    text = modelfile("m-q8_0.gguf", "m", tokenizer, ("<|end|>",), adds_bos=False)
    template = text.split('"""')[1]
    if 'SYSTEM """' in text and turns[0][0] != "system":
        turns = [("system", text.split('SYSTEM """')[1].split('"""')[0]), *turns]
    messages = [{"role": role, "content": words} for role, words in turns]
    assert go(template, turns) == tokenizer.apply_chat_template(messages, False, add_generation_prompt=True)


def test_the_modelfile_in_full():
    text = modelfile("tiny-q8_0.gguf", "tiny", renderer("llama3"), ("<|eot_id|>",), adds_bos=False)
    assert text == (
        "# ollama create tiny -f tiny-q8_0.Modelfile\n"
        "FROM ./tiny-q8_0.gguf\n"
        'TEMPLATE """<|begin_of_text|>{{ range $i, $_ := .Messages }}'
        '{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ else if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>\n\n{{ .Content }}<|eot_id|>'
        '{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"""\n'
        'PARAMETER stop "<|eot_id|>"\n'
    )


def test_the_beginning_token_is_written_once():
    tokenizer = renderer("gemma")
    assert '"""<s>' in modelfile("m.gguf", "m", tokenizer, ("<end_of_turn>",), adds_bos=False).replace(
        "{{ $system := .System }}", ""
    )
    assert "<s>" not in modelfile("m.gguf", "m", tokenizer, ("<end_of_turn>",), adds_bos=True)


def test_a_template_that_ollama_cannot_write_is_told(capsys):
    tokenizer = Renderer(text="{{ messages[-1].content | upper }}<e>", bos_token=None)
    assert template_shape(tokenizer) is None
    text = modelfile("m.gguf", "m", tokenizer, ("<e>",), adds_bos=False)
    assert 'TEMPLATE """' not in text and 'PARAMETER stop "<e>"' in text
    assert "cannot be written in Ollama's template language" in capsys.readouterr().out


def test_braces_of_a_template_are_no_code():
    shape = dict.fromkeys(("head", "user", "user_end", "assistant", "assistant_end", "system", "system_end"), "")
    text = go_template(shape | {"user": "{{x}}", "prompt": "", "joint": "", "default": "", "place": "first"})
    assert '{{ "{{" }}x}}{{ .Content }}' in text


# ---------------------------------------------------------------------------------------------------------------------
# Slow: the real converter, quantizer and runtime


@pytest.fixture(scope="module")
def small_model(embedded_model, tmp_path_factory) -> Path:
    """Two layers of random weights behind the embedded model's tokenizer: what a proof needs, in seconds."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 2048}
    more = {"tie_word_embeddings": True, "initializer_range": 0.1, "dtype": "bfloat16"}
    return save_random_model(tmp_path_factory.mktemp("models") / "small", embedded_model, **sizes, **more)


@pytest.fixture
def model(small_model, tmp_path) -> Path:
    """A copy of the small model to write into."""
    return Path(shutil.copytree(small_model, tmp_path / "small"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS * 5)


def gguf_fields(path: Path) -> dict:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.slow
def test_the_embedded_model_keeps_its_answers(embedded_model, tmp_path):
    """f16 to rounding, q4_k_m as usual, tokens and end of turn right: the proof itself, on the real model."""
    model = tmp_path / "it"
    model.mkdir()
    for path in embedded_model.iterdir():
        if path.is_file():
            (model / path.name).symlink_to(path)
    result = ok(run("quantize.py", str(model), "--type", "q4_k_m,f16"))
    record = json.loads((model / "gguf" / "gguf.json").read_text())["files"]
    f16, q4 = record["it-f16.gguf"], record["it-q4_k_m.gguf"]
    assert f16["kl_divergence"] < 1e-4 and f16["top1_agreement"] > 0.99
    assert abs(f16["perplexity"] / f16["reference_perplexity"] - 1) < 0.002
    assert 0.01 < q4["kl_divergence"] < 0.35
    assert 0.7 < q4["top1_agreement"] < 0.99
    assert q4["bytes"] < 0.45 * f16["bytes"]
    assert f16["adds_bos"] is False
    fields = gguf_fields(model / "gguf" / "it-q4_k_m.gguf")
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 2)
    assert fields["general.name"] == "it"
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.base_model.0.name"] == "SmolLM2 135M Instruct"
    assert fields["general.base_model.0.organization"] == "HuggingFaceTB"
    assert fields["tokenizer.chat_template"] == (embedded_model / "chat_template.jinja").read_text(encoding="utf-8")
    assert sorted(path.name for path in (model / "gguf").iterdir()) == [
        "gguf.json",
        "it-f16.Modelfile",
        "it-f16.gguf",
        "it-q4_k_m.Modelfile",
        "it-q4_k_m.gguf",
    ]
    for word in ("16-bit model", "KL divergence", "same first choice", "perplexity", "tokens/s", "q4_k_m"):
        assert word in result.stdout
    text = (model / "gguf" / "it-q4_k_m.Modelfile").read_text()
    assert "FROM ./it-q4_k_m.gguf\n" in text and 'PARAMETER stop "<|im_end|>"' in text


@pytest.mark.slow
def test_every_kind_of_type_is_what_it_says(model, rows):
    from gguf import LlamaFileType

    types = list(gguf_files.TYPES)
    result = ok(run("quantize.py", str(model), "--type", ",".join(types), f"dataset={rows}", "--no-verify"))
    assert result.stdout.count("not verified") == len(types)
    sizes = {}
    for kind in types:
        file = model / "gguf" / f"small-{kind}.gguf"
        name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
        assert gguf_fields(file)["general.file_type"] == LlamaFileType[name], kind
        sizes[kind] = file.stat().st_size
    assert (
        sizes["f32"] > sizes["f16"] == sizes["bf16"] > sizes["q8_0"] > sizes["q6_k"] > sizes["q4_k_m"] > sizes["q2_k"]
    )


@pytest.mark.slow
def test_coarser_types_diverge_more(model, rows):
    types = "bf16,q8_0,q4_k_m,q2_k"
    ok(run("quantize.py", str(model), "--type", types, f"dataset={rows}", "--max-divergence", "9"))
    files = json.loads((model / "gguf" / "gguf.json").read_text())["files"]
    kl = {entry["type"]: entry["kl_divergence"] for entry in files.values()}
    assert kl["bf16"] < 1e-3
    assert kl["bf16"] < kl["q8_0"] < kl["q4_k_m"] < kl["q2_k"]


@pytest.mark.slow
def test_a_run_is_merged_first_and_pushed_at_last(small_model, rows, tmp_path, standin):
    folder = make_run(small_model, tmp_path / "talker", noise=0.05)
    arguments = [str(folder), "--type", "q8_0", f"dataset={rows}", "--push", "me/talker"]
    environment = test_hub.hub_environment(standin, tmp_path / "hub")
    standin.broken = True
    result = run("quantize.py", *arguments, env=environment)
    refused(result, "all files are kept")
    assert "merging first\n" in result.stdout
    file = folder / "gguf" / "talker-q8_0.gguf"
    before, standin.broken = file.stat().st_ino, False
    ok(run("quantize.py", *arguments, env=environment))
    assert file.stat().st_ino == before
    assert standin.repos["me/talker"].keys() == {".gitattributes", "talker-q8_0.gguf", "talker-q8_0.Modelfile"}
    assert standin.repos["me/talker"]["talker-q8_0.gguf"] == file.read_bytes()
    fields = gguf_fields(file)
    assert fields["general.name"] == "talker"
    assert fields["general.base_model.0.name"] == "Small"
    assert fields["tokenizer.chat_template"] == (folder / "merged" / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"trained on")
    refused(run("quantize.py", str(folder), "--type", "f16"), "an earlier adapter")


@pytest.mark.slow
def test_a_file_off_its_usual_divergence_is_an_error_and_not_kept(model, rows):
    result = run("quantize.py", str(model), "--type", "q2_k", f"dataset={rows}", "--max-divergence", "0.00001")
    assert result.returncode == 2
    assert (result.error.sentence, result.error.fields["type"]) == (says("or accept it"), "q2_k")
    assert list((model / "gguf").iterdir()) == []


@pytest.mark.slow
def test_the_user_s_own_quantizer_is_called_as_llama_cpp_s(small_model, rows, tmp_path, monkeypatch):
    """A `llama-quantize` on the path, with that program's command line: SOURCE TARGET TYPE."""
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from export import llamacpp
source, target, kind = sys.argv[1:]
assert kind.isupper()
open({str(tmp_path / "called")!r}, "a").write(kind)
llamacpp.call(llamacpp.quantize, "x", source=source, target=target, kind=kind.lower())
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    model = Path(shutil.copytree(small_model, tmp_path / "small"))
    ok(run("quantize.py", str(model), "--type", "q4_k_m", f"dataset={rows}"))
    assert (tmp_path / "called").read_text() == "Q4_K_M"
    assert (model / "gguf" / "small-q4_k_m.gguf").stat().st_size > 10**6


@pytest.mark.slow
def test_an_unknown_tokenizer_is_one_sentence(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "tiny"))
    result = run("quantize.py", str(model), "--type", "q8_0", "--no-verify")
    assert result.returncode == 2
    assert "converting to q8_0 failed: llama.cpp does not know this model's tokenizer" in result.stderr
    assert list((model / "gguf").iterdir()) == []


@pytest.mark.slow
def test_a_wrong_end_of_turn_and_other_tokens_are_found(model, rows, tmp_path):
    start = tmp_path / "x.gguf"
    llamacpp.call(llamacpp.convert, "converting", folder=model, target=start, kind="q8_0", card={}, name="x", end=1)
    job = gguf_files.GgufJob(load_config([f"dataset={rows}"]).config, model, model, ("q8_0",))
    assert load_template(None, job.tokenizer).stop == ("<|im_end|>",)
    with user_error("llama.cpp would", stop="<|im_end|>"):
        job.reference(tmp_path).check_contents("q8_0", start)
    # the converter takes a tokenizer for another one's: the proof must see that it cuts otherwise (no single digits)
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": byte_level}), encoding="utf-8")
    other = gguf_files.GgufJob(job.config, model, model, ("q8_0",))
    with user_error("other tokens"):
        other.reference(tmp_path).check_contents("q8_0", start)


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_looks_whole(model, rows):
    command = [sys.executable, str(ROOT / "quantize.py"), str(model), "--type", "q4_k_m,f16", f"dataset={rows}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    output = model / "gguf"
    for _ in range(1200):  # until the converter writes
        if any(output.glob(".work.*.tmp/*.gguf")):
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(output.glob("*.gguf")) and not (output / "gguf.json").exists()
    assert len(list(output.glob(".work.*.tmp"))) == 1
    ok(run("quantize.py", str(model), "--type", "q8_0", f"dataset={rows}"))
    assert sorted(path.name for path in output.iterdir()) == ["gguf.json", "small-q8_0.Modelfile", "small-q8_0.gguf"]
