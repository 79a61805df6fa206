"""target.py: what a path or name on the command line means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import ROOT, make_run, save_adapter, says, user_error

from common import Message, UserError
from runs.files import read_object, write_json
from runs.target import find_target


def name_base(adapter: Path, name: str | None) -> None:
    file = adapter / "adapter_config.json"
    write_json(file, read_object(file) | {"base_model_name_or_path": name})


def test_run_is_found_by_folder_recipe_and_age(parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(parrot, tmp_path / "saves" / "mine")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model_name_or_path: {parrot}\ndataset: identity\ntemplate: llama3\ntop_k: 7\n")
    for source in (find_target(), find_target("saves/mine"), find_target("mine.yaml")):
        assert (source.adapter.resolve(), Path(source.model), source.template) == (folder, parrot, None)
    assert find_target("saves/mine").config.max_new_tokens == 12  # the run's own settings
    assert find_target("saves/mine", ["max_new_tokens=5"]).config.max_new_tokens == 5
    assert find_target("mine.yaml").config.top_k == 7
    checkpoint = shutil.copytree(folder, folder / "checkpoint-3")
    (checkpoint / "run.json").unlink()
    assert find_target(str(checkpoint)).config.max_new_tokens == 12


def test_llama_factory_chat_file(parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    adapter = save_adapter(parrot, tmp_path / "adapter")
    recipe = tmp_path / "chat.yaml"
    recipe.write_text(
        f"model_name_or_path: {parrot}\nadapter_name_or_path: {adapter}\ntemplate: chatml\nfinetuning_type: lora\n"
        "infer_backend: huggingface\ntrust_remote_code: true\n"
    )
    source = find_target(str(recipe))
    assert (source.adapter, source.model, source.template) == (adapter, str(parrot), "chatml")
    plain = find_target(None, [f"model_name_or_path={parrot}", "template=chatml"])
    assert (plain.adapter, plain.model, plain.template) == (None, str(parrot), "chatml")
    assert plain.notes == ()
    assert find_target(str(parrot), ["quantization_bit=4"]).notes == (
        Message("quantized weights are slow without a GPU; quantization_bit=none answers in 16 bit"),
    )


def test_what_is_missing_is_said_in_a_sentence(parrot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError):
        find_target()
    with user_error("name its folder", model="nobody/nothing") as caught:
        find_target("nobody/nothing")
    assert str(caught.value) == (
        f"there is no model nobody/nothing; fetch it (python {ROOT / 'download.py'} nobody/nothing), or name its folder"
    )
    with user_error(
        "there is no run {folder}{near:suggestion}; python evaluate.py --runs lists them",
        folder="saves/mine",
        near=None,
    ):
        find_target("saves/mine")
    with user_error("make one: python", path="x.gguf"):
        find_target("x.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"PK and more")
    with user_error("is not a GGUF file", path="bad.gguf"):
        find_target("bad.gguf")
    (tmp_path / "empty").mkdir()
    with user_error("no config.json", folder="empty"):
        find_target("empty")
    recipe = tmp_path / "new.yaml"
    recipe.write_text("dataset: identity\n")
    with user_error("is not trained yet", train=f"python {ROOT / 'train.py'} new.yaml"):
        find_target("new.yaml")

    half = shutil.copytree(parrot, tmp_path / "half")
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-9])
    with user_error(
        "{model} is not complete: it lacks {missing}; fetch or make it again", missing=["model.safetensors"]
    ):
        find_target("half")

    folder = make_run(parrot, tmp_path / "saves" / "mine")
    for name in ("saves/mien", str(tmp_path / "saves/mien")):
        with user_error(
            "there is no run {folder}{near:suggestion}; python evaluate.py --runs lists them",
            near=Path(name).parent / "mine",
        ):
            find_target(name)
    with user_error("run, adapter", near=Path("saves/mine")):
        find_target("saves/mien", [], "merge")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(parrot), "/gone/base"))
    with user_error("the base of {adapter}, is not", base="/gone/base", adapter="saves/mine"):
        find_target("saves/mine")
    assert find_target("saves/mine", [f"model_name_or_path={parrot}"]).model == str(parrot)
    (folder / "adapter_model.safetensors").unlink()
    with user_error("has no adapter_model", folder="saves/mine"):
        find_target("saves/mine")
    (folder / "adapter_config.json").unlink()
    (folder / "run.json").write_text('{"status": "running"}')
    with user_error("has no adapter (its", folder="saves/mine", status="running"):
        find_target("saves/mine")


def test_template_beside_a_gguf_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    assert find_target(str(file)).notes == ()
    assert find_target(str(file), ["template=qwen"]).notes == (
        Message("template: a GGUF answers with the chat template in its file; this one is not used"),
    )


def test_a_base_in_4_bit_gives_way_to_the_one_on_the_disk(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_model)
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    name_base(adapter, "unsloth/tiny-unsloth-bnb-4bit")
    for use, words in (("answer", "answering on"), ("merge", "merging into")):
        target = find_target(str(adapter), [], use)
        assert (target.base, target.model, target.tokenizer) == ("unsloth/tiny", "models/tiny", adapter)
        assert [note.sentence for note in target.notes] == [says(words)]


@pytest.mark.parametrize("name", [None, ""])
def test_a_base_that_nothing_names_is_asked_for(name: str | None, tiny_model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    name_base(adapter, name)
    for use in ("answer", "merge", "quantize"):
        with user_error("give model_name_or_path=that", folder=adapter):
            find_target(str(adapter), [], use)
        assert find_target(str(adapter), [f"model_name_or_path={tiny_model}"], use).model == str(tiny_model)
