"""tokenizer.py: what a tokenizer.json says is what is encoded, whatever class its label names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ok, run, user_error
from test_template import pieces_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from common import Config
from preprocessing.tokenizer import PROBES, load_base_tokenizer, load_tokenizer
from runs.folder import for_transformers_4

TEXTS = [*PROBES, "The French café, 你好 🙂 42\n\n  return x", "<|im_start|>user\n  two<|im_end|>\n"]


def relabelled(model: Path, folder: Path, label: str) -> Path:
    """A copy of a model's tokenizer under another class."""
    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        if (model / name).exists():
            shutil.copy(model / name, folder)
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": label}))
    return folder


def ids(tokenizer, texts: list[str] = TEXTS) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def ids_of_file(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.fixture(scope="module")
def embedded_ids(embedded_model: Path) -> list[list[int]]:
    return ids_of_file(embedded_model)


@pytest.mark.parametrize(
    "label", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "T5Tokenizer"]
)
def test_the_file_decides_over_the_label(
    embedded_model: Path, embedded_ids: list[list[int]], tmp_path: Path, label: str
):
    folder = relabelled(embedded_model, tmp_path / "model", label)
    tokenizer = load_tokenizer(folder)
    assert ids(tokenizer) == embedded_ids
    assert [tokenizer.decode(some) for some in ids(tokenizer)] == TEXTS
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "saved")
    for_transformers_4(tmp_path / "saved")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "saved")) == embedded_ids  # without the kit


def test_a_right_label_is_kept(embedded_model: Path, tmp_path: Path):
    assert type(load_tokenizer(embedded_model)) is type(AutoTokenizer.from_pretrained(embedded_model))
    qwen = AutoTokenizer.from_pretrained(relabelled(embedded_model, tmp_path / "wrong", "Qwen2Tokenizer"))
    qwen.save_pretrained(tmp_path / "qwen")  # with the pre-tokenizer that belongs to the class
    assert type(load_tokenizer(tmp_path / "qwen")).__name__ == "Qwen2Tokenizer"


def test_a_tokenizer_of_llama_2s_kind_is_left_as_it_is(tmp_path: Path):
    folder = tmp_path / "llama"
    pieces_tokenizer("mistral").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    assert ids(load_tokenizer(folder), ["hi  hi\n你好 x"]) == ids_of_file(folder, ["hi  hi\n你好 x"])


def test_a_tokenizer_without_tokenizer_json_is_left_as_it_is(tmp_path: Path):
    """A tokenizer.model of SentencePiece alone: there is nothing to compare with."""
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(TEXTS * 9), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    assert type(tokenizer).__name__ == "LlamaTokenizer"
    assert ids(tokenizer) == ids(AutoTokenizer.from_pretrained(tmp_path))
    tokenizer.save_pretrained(tmp_path / "saved")  # with a tokenizer.json
    for_transformers_4(tmp_path / "saved")
    assert ids(load_tokenizer(tmp_path / "saved")) == ids(tokenizer)


def test_a_tokenizer_that_cannot_be_loaded(embedded_model: Path, tmp_path: Path):
    folder = relabelled(embedded_model, tmp_path / "model", "PreTrainedTokenizerFast")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with user_error("or copy this", file=folder / "tokenizer.json"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with user_error("the disk, or", model=folder):
        load_tokenizer(folder)
    with user_error("the disk, or", model="org/nowhere"):
        load_base_tokenizer(Config(model_name_or_path="org/nowhere"))


@pytest.mark.slow
def test_preview_of_a_relabelled_model(embedded_model: Path, tmp_path: Path):
    """The whole command: as many tokens as with the right label."""

    def shown(folder: Path) -> str:
        result = ok(run("preview.py", f"model_name_or_path={folder}", "dataset=identity", "template=chatml"))
        return result.stdout

    assert shown(relabelled(embedded_model, tmp_path / "model", "LlamaTokenizerFast")) == shown(embedded_model)
