"""Headers of weights and of GGUF files that are damaged: one clear error each, and nothing is read beyond the file."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from conftest import save_adapter, says, user_error

from common import UserError
from runs.target import missing_from_model
from runs.weights import read_header, weight_files


@pytest.mark.parametrize(
    "header", [b"", b"[" * 100_000, b"null", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}']
)
def test_a_header_that_is_none(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with user_error("safetensors file", file=file):
        read_header(file)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_an_index_names_files_of_its_folder_only(index: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as error:
        weight_files(folder)
    assert error.value.sentence in (says("weight files"), says("read as JSON"))
    assert missing_from_model(folder) == ["model.safetensors.index.json"]


@pytest.mark.parametrize("settings", ["", "[]", "3", '{"peft_type": 7}', '{"peft_type": "LORA", "r": "8"}', "\xff"])
def test_a_broken_description_of_an_adapter(settings: str, tiny_model: Path, tmp_path: Path) -> None:
    import merge

    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(settings, encoding="latin-1")
    with pytest.raises(UserError) as error:
        merge.main([str(adapter), "--no-verify", f"model_name_or_path={tiny_model}"])
    assert error.value.sentence in (says("read as JSON"), says("be merged here"), says("valid number"))


@pytest.mark.slow
def test_damaged_gguf_headers_are_a_clear_error_or_load(embedded_model: Path, tmp_path: Path) -> None:
    """50 GGUF files with a damaged header, loaded by llama.cpp in a child as quantize.py and chat.py do."""
    from export import llamacpp

    file = tmp_path / "x.gguf"
    card: dict[str, str] = {}
    llamacpp.call(
        llamacpp.convert, "converting", folder=embedded_model, target=file, kind="q8_0", card=card, name="x", end=2
    )
    with open(file, "rb") as opened:
        head = opened.read(3000)
    draw, errors = random.Random(0), 0
    for _ in range(50):
        damaged = bytearray(head)
        for _ in range(draw.randint(1, 6)):
            damaged[draw.randrange(len(head))] = draw.randrange(256)
        with open(file, "rb+") as opened:
            opened.write(damaged)
        used = os.times().children_user
        try:
            seen = llamacpp.call(llamacpp.inspect, "reading", file=file, texts=["hello"])
            json.dumps(seen)
        except UserError as error:
            assert error.sentence == says("{doing} failed: {reason}")
            errors += 1
        assert os.times().children_user - used < 30
    assert errors > 5
