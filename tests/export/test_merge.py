"""Merging: equal to peft for every kind of adapter, whole or not there, refused by name where it would be wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, model_that_sees, ok, refused, run, says, user_error, write_jsonl
from test_hub import Hub, hub_environment, standin

import common
import merge
from export import merge as merging
from export import merged_model, verify
from runs import weights
from runs.adapter import Adapter
from runs.causal_models import register_class
from runs.configuration import load_config
from runs.files import sha256, write_json, write_text
from runs.target import find_target

__all__ = ["standin"]  # a fixture
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, dtype: str = "float32"):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype, dtype)).eval()


def train_adapter(base: Path, folder: Path, *, grow_to: int | None = None, **settings) -> Path:
    """An adapter as peft saves it after training: all that is trainable has moved at random."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = load(base)
    if grow_to:
        model.resize_token_embeddings(grow_to, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **settings}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, folder: Path, grow_to: int | None = None):
    """Logits of base + adapter by peft, and those of peft's own merge."""
    from peft import PeftModel

    model = load(base)
    if grow_to:
        model.resize_token_embeddings(grow_to, mean_resizing=False)
    model = PeftModel.from_pretrained(model, folder).eval()
    apart = logits(model)
    return apart, logits(model.merge_and_unload())


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits[0].double()


def distance(a, b) -> float:
    return (a - b).abs().max().item()


def merged(folder: Path, *settings: str) -> Path:
    """Merges in this process, without the proof by a child, and gives the merged folder."""
    merge.main([str(folder), "--no-verify", *settings])
    return folder / "merged"


def values(folder: Path) -> dict:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


@pytest.fixture(scope="session")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Folders of tiny models: tied (Llama), untied with biases (Llama), gpt2 (Conv1D, names without a prefix)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

    root = tmp_path_factory.mktemp("bases")
    untied = shutil.copytree(tiny_model, root / "untied")
    config = load(tiny_model).config
    config.tie_word_embeddings, config.attention_bias, config.mlp_bias = False, True, True
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.1)
    model.save_pretrained(untied)
    gpt2 = shutil.copytree(tiny_model, root / "gpt2")
    torch.manual_seed(3)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=263, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    ).save_pretrained(gpt2)
    return {"tied": tiny_model, "untied": untied, "gpt2": gpt2}


KINDS = {
    "lora": ("tied", {}),
    "rslora": ("tied", {"use_rslora": True}),
    "dora": ("tied", {"use_dora": True}),
    "patterns": (
        "tied",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
            "alpha_pattern": {"v_proj": 3, "^model.layers.0.self_attn.q_proj": 5},
            "use_rslora": True,
        },
    ),
    "bias_all": ("untied", {"bias": "all"}),
    "bias_lora_only": ("untied", {"bias": "lora_only"}),
    "lora_bias": ("untied", {"lora_bias": True}),
    "norms_saved": ("tied", {"modules_to_save": ["norm", "input_layernorm"]}),
    "ends_saved": ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_ends_saved": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_ends_saved_as_one": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied_embedding_saved": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "tied_head_saved": ("tied", {"modules_to_save": ["lm_head"]}),
    "embedding": ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_dora": ("untied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tied_embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied_head": ("tied", {"target_modules": ["lm_head"]}),
    "tied_both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied_both_as_one": ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "grown": ("untied", {"grow_to": 270}),
    "tied_grown": ("tied", {"grow_to": 270}),
    "grown_saved": ("untied", {"grow_to": 270, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_grown_saved": ("tied", {"grow_to": 270, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_grown_embedding": ("tied", {"grow_to": 270, "target_modules": ["embed_tokens", "q_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "conv1d_undeclared": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
}


# The base ties its two ends: what the adapter adds to one of them, peft's merge adds to both.
WRONG_IN_PEFT = {"tied_head", "tied_both", "tied_both_as_one", "tied_embedding", "tied_grown_embedding"}


QUICK = {"lora", "dora", "patterns", "lora_bias", "tied_embedding", "tied_grown_saved", "conv1d_dora"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_equals_peft(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    base = models[name]
    folder = train_adapter(base, tmp_path / "adapter", **settings)
    if kind == "conv1d_undeclared":  # peft itself corrects the setting as it saves; an older file may have it wrong
        config = json.loads((folder / "adapter_config.json").read_text())
        write_json(folder / "adapter_config.json", {**config, "fan_in_fan_out": False})
    apart, peft_merged = peft_logits(base, folder, settings.get("grow_to"))
    model = load(merged(folder))
    assert distance(logits(load(base)), apart[:, :263]) > 0.05, "the adapter has to do something"
    assert distance(logits(model), apart) < 2e-5
    assert (distance(logits(model), peft_merged) < 2e-5) is (kind not in WRONG_IN_PEFT)
    rows = {values(folder / "merged")[key].shape[0] for key in ("model.embed_tokens.weight",) if name != "gpt2"}
    assert rows <= {settings.get("grow_to", 263)}
    assert model.config.vocab_size == settings.get("grow_to", 263)
    record = json.loads((folder / "merged" / "merge.json").read_text())
    assert record["adapter_tensors"] == len(values(folder))


@pytest.fixture(scope="session")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a plain LoRA adapter of the tiny model; treat it as read-only."""
    return train_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "plain")


@pytest.fixture
def lora(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "lora")


def make_finished_run(adapter: Path, folder: Path, base: Path, **settings) -> Path:
    """A finished run as train.py leaves it."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    config = common.Config(model_name_or_path=str(base), template="chatml", output_dir=str(folder), **settings)
    write_text(folder / "config.yaml", common.dump_config(config))
    write_text(folder / "chat_template.jinja", "the trained template")
    write_json(folder / "run.json", {"status": "finished", "stop": ["<|im_end|>"], "steps": 7})
    return folder


# Types and files


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_computed_in_float32_and_cast_once(dtype: str, lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    import torch

    base = shutil.copytree(models["tied"], tmp_path / "base")
    load(base).to(getattr(torch, dtype)).save_pretrained(base)
    result = values(merged(lora, f"model_name_or_path={base}"))
    weights, low = values(base), values(lora)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        delta = low[f"{module}.lora_B.weight"].double() @ low[f"{module}.lora_A.weight"].double() * 2
        exact = weights[name].double() + delta
        assert result[name].dtype == getattr(torch, dtype)
        info = torch.finfo(result[name].dtype)
        half_a_unit = torch.clamp(exact.abs() * info.eps, min=info.smallest_normal * info.eps) / 2
        assert ((result[name].double() - exact).abs() <= half_a_unit * 1.001).all()
    untouched = "model.embed_tokens.weight"
    assert torch.equal(result[untouched], weights[untouched])


def test_export_dtype_casts_everything(lora: Path) -> None:
    import torch

    folder = merged(lora, "export_dtype=bfloat16")
    assert {tensor.dtype for tensor in values(folder).values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert load(folder, "auto").dtype == torch.bfloat16


def test_shards_have_an_index_that_transformers_reads(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    whole = values(merged(lora))
    plan = merging.make_plan(weights.read_tensors(models["tied"]), {"tie_word_embeddings": True}, Adapter(lora), None)
    target = shutil.copytree(lora / "merged", tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    merging.write_shards(plan, target, 100_000)
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max((target / file).stat().st_size for file in files) < 105_000
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.size == sum(t.nbytes for t in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    assert distance(logits(load(target)), logits(load(lora / "merged"))) == 0


# What is merged into what


def test_run_folder_is_complete_and_knows_its_turns(
    plain: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    base = shutil.copytree(models["tied"], tmp_path / "base")
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n")
    (base / "LICENSE").write_text("the licence")
    write_json(base / "generation_config.json", {"eos_token_id": 0, "temperature": 0.6, "do_sample": True})
    folder = make_finished_run(plain, tmp_path / "saves" / "first", base, dataset=("rows",), learning_rate=1e-3)
    monkeypatch.chdir(tmp_path)
    merge.main(["--no-verify"])
    out = folder / "merged"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"talk to it: python {ROOT / 'chat.py'} saves/first/merged",
        f"make a GGUF: python {ROOT / 'quantize.py'} saves/first/merged",
    ]
    assert {path.name for path in out.iterdir()} == {
        *("LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merge.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (out / "chat_template.jinja").read_text() == "the trained template"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 258, "temperature": 0.6, "do_sample": True}
    card = (out / "README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "Trained on: rows (7 steps)." in card
    assert str(tmp_path) not in card
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings and settings["eos_token"] == "<|im_end|>"
    config = json.loads((out / "config.json").read_text())  # what vLLM reads
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    names = values(out).keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names and not any("lora" in name for name in names)


def test_llamafactory_merge_file_unchanged(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The keys of the tutorial's merge file; the template by its name."""
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(
        f"### model\nmodel_name_or_path: {models['tied']}\nadapter_name_or_path: {lora}\ntemplate: llama3\n"
        f"finetuning_type: lora\n\n### export\nexport_dir: {tmp_path / 'out'}\nexport_size: 2\nexport_device: cpu\n"
        "export_legacy_format: false\n"
    )
    merge.main([str(recipe), "--no-verify"])
    out = tmp_path / "out"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 262  # <|eot_id|>
    template = (out / "chat_template.jinja").read_text()
    assert "<|start_header_id|>" in template
    assert "generation %}" not in template
    assert not (lora / "merged").exists()


def test_training_recipe_finds_its_run(plain: Path, models: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"model_name_or_path: {models['tied']}\nlearning_rate: 1e-3\ntemplate: chatml\n")
    make_finished_run(plain, Path("saves/mine"), models["tied"])
    make_finished_run(plain, Path("saves/newer"), models["tied"])
    merge.main(["mine.yaml", "--no-verify"])
    assert Path("saves/mine/merged/config.json").exists()
    assert not Path("saves/newer/merged").exists()
    shutil.copytree(plain, "saves/mine/checkpoint-5")
    merge.main(["saves/mine/checkpoint-5", "--no-verify"])
    assert Path("saves/mine/checkpoint-5/merged/chat_template.jinja").read_text() == "the trained template"
    assert "(5 steps)" in Path("saves/mine/checkpoint-5/merged/README.md").read_text()


def test_a_recipe_with_another_output_or_a_first_adapter_finds_its_run(
    plain: Path, models: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    make_finished_run(plain, Path("saves/mine"), models["tied"])
    shutil.copytree(plain, "first")
    recipe = f"model_name_or_path: {models['tied']}\n"
    for number, (more, setting, adapter) in enumerate(
        (
            ("", "export_dir=out 0", "saves/mine"),
            ("export_dir: out 1\n", "seed=1", "saves/mine"),
            ("adapter_name_or_path: [first]\n", "export_dir=out 2", "saves/mine"),
            ("adapter_name_or_path: [first]\nexport_dir: out 3\n", "seed=1", "first"),
            ("export_dir: out 4\n", "adapter_name_or_path=first", "first"),
        )
    ):
        Path("mine.yaml").write_text(recipe + more)
        merge.main(["mine.yaml", setting, "--no-verify"])
        assert json.loads(Path(f"out {number}/merge.json").read_text())["adapter"] == str(Path(adapter).resolve())
        assert f"make a GGUF: python {ROOT / 'quantize.py'} 'out {number}'\n" in capsys.readouterr().out


def test_the_revision_of_a_base_is_not_passed_over(lora: Path, models: dict[str, Path]) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, "revision": "v2"})
    with user_error("with that revision", revision="v2"):
        merge.main([str(lora), "--no-verify"])
    assert merged(lora, f"model_name_or_path={models['tied']}").exists()


def test_without_a_template_the_end_of_the_base_stays(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(models["tied"], tmp_path / "base")
    for name in ("generation_config.json", "chat_template.jinja"):
        (base / name).unlink()
    folder = merged(lora, f"model_name_or_path={base}")
    assert load(folder).generation_config.eos_token_id == load(base).generation_config.eos_token_id == 258


def test_the_tokenizer_is_named_as_transformers_4_knows_it(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = shutil.copytree(models["tied"], tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    write_json(base / "tokenizer_config.json", {**settings, "extra_special_tokens": ["<|eot_id|>"]})
    folder = merged(lora, f"model_name_or_path={base}")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings  # a list, where transformers 4 takes names only
    old, new = (AutoTokenizer.from_pretrained(path) for path in (base, folder))
    assert type(old) is type(new)
    assert old.all_special_tokens == new.all_special_tokens
    text = "Hello 你好 <|eot_id|> 123"
    assert old(text)["input_ids"] == new(text)["input_ids"]


def test_quantized_base_gives_way_to_the_model_it_was_made_of(
    lora: Path, models: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    quantized = Path("models/tiny-unsloth-bnb-4bit")
    quantized.mkdir(parents=True)
    write_json(quantized / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with user_error("is quantized ({method}); merge", method="bitsandbytes", plain="models/tiny"):
        merge.main([str(lora), f"model_name_or_path={quantized}", "--no-verify"])
    shutil.copytree(models["tied"], "models/tiny")
    merge.main([str(lora), "model_name_or_path=unsloth/tiny-unsloth-bnb-4bit", "--no-verify"])
    assert "merging into models/tiny" in capsys.readouterr().out
    assert (lora / "merged" / "config.json").exists()
    with user_error(
        "the base of {adapter}, is not", base="unsloth/other", command=common.command("download.py", "unsloth/other")
    ):
        merge.main([str(lora), "model_name_or_path=unsloth/other-bnb-4bit"])


# What is refused


@pytest.mark.parametrize(
    ("setting", "code", "fields"),
    [
        ({"peft_type": "IA3"}, says("be merged here"), {"reasons": ["peft_type: 'IA3'"]}),
        (
            {"init_lora_weights": "pissa_niter_4"},
            says("be merged here"),
            {"reasons": ["init_lora_weights: 'pissa_niter_4'"]},
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            says("be merged here"),
            {"reasons": ["loftq_config: {'loftq_bits': 4}", "init_lora_weights: 'loftq'"]},
        ),
        ({"trainable_token_indices": [1, 2]}, says("be merged here"), {}),
        ({"layer_replication": [[0, 2], [1, 2]]}, says("be merged here"), {}),
        ({"alora_invocation_tokens": [5]}, says("be merged here"), {}),
        ({"use_qalora": True}, says("be merged here"), {"reasons": ["use_qalora: True"]}),
        ({"a_setting_of_tomorrow": 3}, says("be merged here"), {"reasons": ["a_setting_of_tomorrow: 3"]}),
        ({"r": 5}, says("has rank {rank}"), {"rank": 4, "configured": 5}),
        ({"r": None}, says("valid number"), {"key": "r"}),
        ({"r": 0}, says("valid number"), {"key": "r"}),
        ({"lora_alpha": None}, says("valid number"), {"key": "lora_alpha"}),
        ({"use_dora": True}, says("contradicts use_dora"), {}),
    ],
)
def test_refused_by_name(setting: dict, code: str, fields: dict, lora: Path) -> None:
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, **setting})
    with user_error(code, **fields):
        merge.main([str(lora), "--no-verify"])
    assert not (lora / "merged").exists()


def rename(folder: Path, old: str, new: str | None) -> None:
    """Renames (or drops) tensors of an adapter."""
    from safetensors.torch import save_file

    kept = {name.replace(old, new or ""): t for name, t in values(folder).items() if new is not None or old not in name}
    save_file(kept, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "code", "fields"),
    [
        ("layers.1.mlp.up_proj.lora_A", None, says("copy it again"), {"part": "lora_A"}),
        ("layers.1.mlp", "layers.9.mlp", says("the base lacks"), {}),
        ("mlp.up_proj", "mlp.down_proj2", says("the base lacks"), {}),
        ("self_attn.q_proj.lora_A", "self_attn.q_proj.lora_diag", says("be merged here"), {}),
        (
            "layers.0.mlp.gate_proj.lora_A",
            "layers.0.extra",
            says("the base lacks"),
            {"tensor": "model.layers.0.extra.weight"},
        ),
    ],
)
def test_every_tensor_has_its_place(old: str, new: str | None, code: str, fields: dict, lora: Path) -> None:
    rename(lora, old, new)
    with pytest.raises(common.UserError) as error:
        merge.main([str(lora), "--no-verify"])
    found = error.value.message.to_json()
    assert found["sentence"] == code
    assert {name: found["fields"][name] for name in fields} == fields


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float64", "F64"), ("int16", "I16"), ("float8_e4m3fn", "F8_E4M3"), ("bool", "BOOL")]
)
def test_types_that_cannot_be_computed_with_are_refused(dtype: str, stored: str, lora: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in values(lora).items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    with user_error("save it in", dtype=stored, known=["float32", "float16", "bfloat16"]):
        merge.main([str(lora), "--no-verify"])


def test_two_values_for_one_tensor_of_the_base_are_refused(lora: Path, models: dict[str, Path]) -> None:
    from safetensors.torch import save_file

    ends = values(models["tied"])["model.embed_tokens.weight"]
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    trained = values(lora)
    save_file({**trained, names[0]: ends + 1, names[1]: ends + 1}, lora / "adapter_model.safetensors")
    assert distance(values(merged(lora))["model.embed_tokens.weight"], ends + 1) == 0
    save_file({**trained, names[0]: ends + 1, names[1]: ends + 2}, lora / "adapter_model.safetensors")
    with user_error("the base ties", head="lm_head.weight"):
        merge.main([str(lora), "--no-verify"])


def test_the_language_model_of_one_that_also_sees_is_merged_and_all_else_is_copied(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Its tensors have another prefix on the disk than in memory, where the adapter is trained."""
    base = shutil.copytree(models["tied"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    text = json.loads((base / "config.json").read_text())
    text |= {"model_type": "mistral", "tie_word_embeddings": False, "head_dim": 16}
    model_that_sees(text).save_pretrained(base)
    register_class(base)
    layers = r"model\.language_model\.layers\..*(q_proj|down_proj)"
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=layers)
    out, before, after = (
        merged(adapter, f"model_name_or_path={base}"),
        values(base),
        values(tmp_path / "adapter/merged"),
    )
    changed = {name for name in before if not before[name].equal(after[name])}
    count = 2 * text["num_hidden_layers"]
    assert len(changed) == count and all(name.startswith("language_model.model.layers.") for name in changed)
    assert before.keys() == after.keys()
    by_peft = peft_logits(base, adapter)[1]
    assert distance(logits(load(out)), by_peft) <= 1e-5 < distance(by_peft, logits(load(base)))
    assert type(load(out)).__name__ == "Mistral3ForConditionalGeneration"


def test_a_multimodal_base_is_told_from_a_wrong_one(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(models["tied"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {"model_type": "gemma3", "text_config": config})
    rename(lora, "base_model.model.model.layers", "base_model.model.model.language_model.blocks")
    with user_error("a multimodal base"):
        merge.main([str(lora), "--no-verify", f"model_name_or_path={base}"])


def test_other_base_and_broken_files_are_told(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    base = shutil.copytree(models["tied"], tmp_path / "base")
    file = base / "model.safetensors"
    wider = values(base)
    wider["model.layers.0.mlp.up_proj.weight"] = torch.zeros(130, 64)
    save_file(wider, file)
    with user_error("trained on shape", trained="(128, 64)", base="(130, 64)"):
        merge.main([str(lora), f"model_name_or_path={base}"])
    file.write_bytes((models["tied"] / "model.safetensors").read_bytes()[:-1])
    with user_error("safetensors file", file=file):
        merge.main([str(lora), f"model_name_or_path={base}"])
    file.rename(base / "pytorch_model.bin")
    with user_error("pytorch_model.bin", folder=base):
        merge.main([str(lora), f"model_name_or_path={base}"])
    with user_error("is a GGUF; merge"):
        merge.main([str(lora), f"model_name_or_path={base}.gguf"])
    broken = values(models["tied"])
    broken["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(broken, file)
    with user_error("would hold NaN", tensor="model.layers.0.mlp.up_proj.weight"):
        merge.main([str(lora), f"model_name_or_path={base}", "--no-verify"])
    broken["model.layers.0.mlp.up_proj.weight"][3, 5] = 70000.0
    save_file(broken, file)
    with user_error("would hold NaN", dtype="float16"):
        merge.main([str(lora), f"model_name_or_path={base}", "export_dtype=float16", "--no-verify"])
    assert list(lora.glob("*merged*")) == []


def test_faults_of_the_command_line_come_at_once(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"adapter_name_or_path: {lora}\nexport_dirr: x\n")
    (tmp_path / "saves" / "cut" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "saves" / "cut" / "checkpoint-20" / "adapter_config.json").write_text("{}")
    for arguments, code in (
        (["m.yaml"], says("the configuration")),
        (["nowhere"], says("run, adapter")),
        (["nowhere", "else"], says("targets; give")),
        (["saves/cut"], says("not finished")),
        ([str(lora), "model_name_or_path=org/missing"], says("the base of {adapter}, is not")),
    ):
        used = os.times().children_user
        result = run("merge.py", *arguments, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, ""), result
        assert result.error.sentence == code
        assert "Traceback" not in result.stderr
        assert os.times().children_user - used < 1.5
    result = run("merge.py", str(lora), "model_name_or_path=org/missing", cwd=tmp_path)
    assert result.stderr == (
        f"error: org/missing, the base of {lora}, is not on this disk; fetch it (python {ROOT / 'download.py'} "
        "org/missing), or give model_name_or_path=\n"
    )
    help_text = run("merge.py", "--help", cwd=tmp_path)
    assert help_text.returncode == 0
    assert "--push REPO" in help_text.stdout


def test_nothing_is_overwritten_unasked(lora: Path, models: dict[str, Path]) -> None:
    before = (merged(lora) / "model.safetensors").stat().st_ino
    with user_error("add --overwrite, or set", output=lora / "merged"):
        merge.main([str(lora), "--no-verify"])
    assert (lora / "merged" / "model.safetensors").stat().st_ino == before
    merged(lora, "--overwrite")
    assert (lora / "merged" / "model.safetensors").stat().st_ino != before
    with user_error("set another export_dir"):
        merge.main([str(lora), "--no-verify", "--overwrite", f"export_dir={models['tied']}"])


def test_overwrite_replaces_earlier_merges_only(plain: Path, models: dict[str, Path], tmp_path: Path) -> None:
    folder = make_finished_run(plain, tmp_path / "run", models["tied"], overwrite_output_dir=True)  # of the training
    checkpoint = shutil.copytree(plain, folder / "checkpoint-5")
    for output in (folder, tmp_path, checkpoint):
        with user_error("set another export_dir"):
            merge.main([str(checkpoint), "--no-verify", "--overwrite", f"export_dir={output}"])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    with user_error("not an earlier merge"):
        merge.main([str(folder), "--no-verify", "--overwrite", f"export_dir={tmp_path / 'photos'}"])
    merged(folder)
    for arguments in ([str(folder)], [str(folder / "config.yaml")]):
        with user_error("add --overwrite, or set"):
            merge.main([*arguments, "--no-verify"])
    merged(folder, "overwrite_output_dir=true")


def sparse_base(models: dict[str, Path], folder: Path, size: int) -> Path:
    """The tiny model with one tensor more of `size` bytes, which take no room on the disk."""
    shutil.copytree(models["tied"], folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["model.extra.weight"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [end, end + size]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    os.truncate(file, 8 + len(text) + end + size)
    return folder


def test_disk_space_is_looked_at_first(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    base = sparse_base(models, tmp_path / "base", 6 << 40)
    killed = lora / ".merged.12ab.tmp"
    killed.mkdir()
    with user_error("of free disk") as error:
        merge.main([str(lora), "--no-verify", f"model_name_or_path={base}"])
    assert 6597 < error.value.fields["needed"] < 6598
    assert not killed.exists()
    with user_error("GB of memory") as error:
        verify.choose_device(base)
    assert 7900 < error.value.fields["needed"] < 8000


@pytest.mark.slow
def test_push_comes_last_and_is_asked_for_first(lora: Path, standin: Hub, tmp_path: Path) -> None:
    environment = hub_environment(standin, tmp_path / "home")
    standin.repos["me/taken"] = {"model.safetensors": b""}
    result = run("merge.py", str(lora), "--push", "me/taken", env=environment)
    assert result.returncode == 2
    assert result.error.sentence == says("is not empty; add --overwrite")
    assert not (lora / "merged").exists()
    standin.broken = True
    refused(run("merge.py", str(lora), "--push", "me/mine", env=environment), "all files are kept")
    standin.broken = False
    before = (lora / "merged" / "model.safetensors").stat().st_ino
    result = ok(run("merge.py", str(lora), "--push", "me/mine", env=environment))
    assert f"uploaded   {standin.url}/me/mine/commit/1" in result.stdout
    assert (lora / "merged" / "model.safetensors").stat().st_ino == before
    sent, local = standin.repos["me/mine"], {path.name: path.read_bytes() for path in (lora / "merged").iterdir()}
    assert {name: sent[name] for name in sent if name != ".gitattributes"} == {
        name: local[name] for name in local if name != "merge.json"
    }


def test_only_what_is_proven_is_pushed(lora: Path) -> None:
    with user_error("only verified files"):
        merge.main([str(lora), "--no-verify", "--push", "me/mine"])
    record = merged(lora) / "merge.json"
    job = merged_model.make_job(find_target(str(lora), [], "merge"))
    assert not merged_model.is_verified(job)
    content = json.loads(record.read_text()) | {"proof": {}}
    write_json(record, content)
    assert merged_model.is_verified(job)
    for other in ({"adapter_sha256": "of an earlier one"}, {"base": "/another"}):
        write_json(record, content | other)
        assert not merged_model.is_verified(job)


# The proof


def test_a_run_that_was_moved_is_told(lora: Path, tmp_path: Path) -> None:
    merged(lora)
    lora.rename(tmp_path / "moved")
    with user_error("is missing", path=lora, folder=tmp_path / "moved" / "merged"):
        merge.main(["--check", str(tmp_path / "moved" / "merged")])


@pytest.mark.slow
def test_proof_passes_and_is_kept(plain: Path, models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    base = shutil.copytree(models["tied"], tmp_path / "base")
    import torch

    load(base).to(torch.bfloat16).save_pretrained(base)
    folder = make_finished_run(plain, tmp_path / "saves" / "proven", base, dataset=(str(data),))
    shutil.copy(base / "chat_template.jinja", folder)
    result = ok(run("merge.py", "saves/proven", cwd=tmp_path))
    proof = json.loads((folder / "merged" / "merge.json").read_text())["proof"]
    assert proof["prompts"] == 8
    assert 0.3 * proof["rounding"] < proof["difference"] < 3 * proof["rounding"] < proof["adapter_effect"]
    assert proof["same_first_choice"] > 0.9
    assert "proof      8 prompts" in result.stdout
    assert "where rounding to bfloat16 alone makes" in (folder / "merged" / "README.md").read_text().replace("\n", " ")

    weights = values(folder / "merged")  # as if one matrix had been merged with half its scale
    name = "model.layers.1.self_attn.v_proj.weight"
    weights[name] = (weights[name].float() + values(base)[name].float()).div(2).to(torch.bfloat16)
    from safetensors.torch import save_file

    save_file(weights, folder / "merged" / "model.safetensors")
    refused(run("merge.py", "--check", "saves/proven/merged", cwd=tmp_path), "rounding explains")


@pytest.mark.slow
def test_an_update_too_small_for_the_type_is_no_fault_of_the_merge(lora: Path, models, tmp_path: Path) -> None:
    """As after two steps of training: most of it vanishes in bfloat16, all in the same direction."""
    import torch
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(models["tied"], tmp_path / "base")
    load(base).to(torch.bfloat16).save_pretrained(base)
    file = lora / "adapter_model.safetensors"
    save_file({name: value / 200 if "lora_B" in name else value for name, value in load_file(file).items()}, file)
    rows = [{"instruction": f"question {i}", "input": "", "output": f"answer {i}"} for i in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = make_finished_run(lora, tmp_path / "saves" / "short", base, dataset=(str(data),))
    shutil.copy(base / "chat_template.jinja", folder)
    ok(run("merge.py", "saves/short", cwd=tmp_path))
    proof = json.loads((folder / "merged" / "merge.json").read_text())["proof"]
    assert proof["difference"] > 0.2 * proof["adapter_effect"]
    assert proof["difference"] == pytest.approx(proof["rounding"], rel=0.1)


# How much of the adapter survives the rounding


def test_the_share_of_the_adapter_that_survives_is_told(lora: Path, models, tmp_path: Path, capsys) -> None:
    """Against the weights themselves; a small adapter loses most of its product in bfloat16."""
    import torch

    base = shutil.copytree(models["tied"], tmp_path / "base")
    load(base).to(torch.bfloat16).save_pretrained(base)
    shares = []
    for scale in (1.0, 0.0003):
        rescale_outputs(lora, scale)
        result, before = values(merged(lora, f"model_name_or_path={base}", "--overwrite")), values(base)
        low, arrived, wanted = values(lora), 0.0, 0.0
        for name, weight in low.items():
            if "lora_A" in name:
                update = 2 * low[name.replace("lora_A", "lora_B")].double() @ weight.double()
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                moved = result[target].double() - before[target].double()
                arrived, wanted = arrived + (moved * update).sum().item(), wanted + update.square().sum().item()
        share = json.loads((lora / "merged" / "merge.json").read_text())["adapter_share"]
        assert share == pytest.approx(arrived / wanted, abs=0.1)
        assert f"{share:.1%} of the adapter's product remains in bfloat16" in capsys.readouterr().out
        shares.append(share)
    assert shares[0] > 0.98
    assert shares[1] < 0.9
    assert json.loads((merged(lora, "--overwrite") / "merge.json").read_text())["adapter_share"] is None  # float32


def rescale_outputs(folder: Path, factor: float) -> None:
    from safetensors.torch import save_file

    tensors = {name: value * factor if "lora_B" in name else value for name, value in values(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors")


# Crashes, a full disk, links


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(lora: Path, monkeypatch) -> None:
    """As where another program fills the disk: the earlier merge stays, and it goes on once there is space."""
    before = (merged(lora) / "model.safetensors").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with user_error("of free disk", folder=lora / "merged") as error:
        merged(lora, "--overwrite")
    assert error.value.fields["needed"] > 0
    monkeypatch.undo()
    assert (lora / "merged" / "model.safetensors").read_bytes() == before
    assert not list(lora.glob(".merged*"))
    assert (merged(lora, "--overwrite") / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_a_full_tmpfs(lora: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with user_error("of free disk") as told:
            merged(lora, f"export_dir={small / 'merged'}")
        fields = told.value.message.fields
        assert fields["needed"] > fields["free"]
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_kill_leaves_nothing_that_looks_whole_and_is_not(lora: Path) -> None:
    """Before each kind of operation that changes the folders; tests/torture/kills.py kills at any moment."""

    def kill(name: str, call: int, *more: str) -> None:
        """A fork of this process merges, and kills itself at the `call`-th call of `os.name`."""
        child = os.fork()
        if not child:
            operation, calls = getattr(os, name), itertools.count(1)

            def killing(*given: Any, **named: Any) -> Any:
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*given, **named)

            setattr(os, name, killing)
            merge.main([str(lora), "--no-verify", *more])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    kill("fsync", 1)
    (left,) = lora.glob(".merged.*")
    assert {file.name for file in left.iterdir()} == {"model.safetensors"} and not (lora / "merged").exists()
    whole = sha256(merged(lora) / "model.safetensors")
    assert not left.exists()
    for name, call, stays in (
        ("rmdir", 1, True),  # while the earlier merge is removed
        ("fsync", 1, True),
        ("replace", 1, True),  # the first small file
        ("rename", 2, True),  # before the earlier merge is moved away
        ("rename", 3, False),  # before the new one takes its place
    ):
        kill(name, call, "--overwrite")
        assert (lora / "merged").exists() is stays, (name, call)
        if stays:
            assert (lora / "merged" / "merge.json").exists()
            assert sha256(lora / "merged" / "model.safetensors") == whole
    assert sha256(merged(lora, "--overwrite") / "model.safetensors") == whole
    assert not list(lora.glob(".merged*"))


def test_links_do_not_lead_out_of_the_folders(lora: Path, models: dict[str, Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a key")
    base = shutil.copytree(models["tied"], tmp_path / "base")
    (base / "LICENSE").symlink_to(secret)
    with user_error("put a copy there", link=base / "LICENSE", target=secret):
        merged(lora, f"model_name_or_path={base}")
    assert not (lora / "merged").exists()
    (base / "LICENSE").unlink()
    (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")  # to save space
    elsewhere = tmp_path / "other disk"
    elsewhere.mkdir()
    (lora / "merged").symlink_to(elsewhere)
    merged(lora, f"model_name_or_path={base}")
    assert (elsewhere / "config.json").exists()
    assert (lora / "merged").is_symlink()
    shutil.rmtree(elsewhere)
    with user_error("missing folder", output=lora / "merged"):
        merged(lora, f"model_name_or_path={base}")


@pytest.mark.parametrize(
    ("stage", "row", "ending"),
    [
        ("dpo", {"prompt": "Hi.", "chosen": "Hello.", "rejected": "What?"}, "Hello.<|im_end|>"),
        ("kto", {"prompt": "Hi.", "completion": "Hello.", "label": True}, "Hello.<|im_end|>"),
        ("pt", {"text": "Once upon a time."}, "Once upon a time.<|im_end|>"),
    ],
)
def test_the_proof_reads_the_rows_of_every_stage(
    tmp_path, tiny_model, tiny_tokenizer, stage: str, row: dict, ending: str
):
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    settings = [f"stage={stage}", f"dataset={data}", f"model_name_or_path={tiny_model}"]
    write_text(tmp_path / "config.yaml", common.dump_config(load_config(settings).config))
    record = {"run": str(tmp_path), "stop": ["<|im_end|>"], "trust_remote_code": False}
    (ids,) = verify.proof_prompts(tiny_model, record)
    assert tiny_tokenizer.decode(ids).endswith(ending)
