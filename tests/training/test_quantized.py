"""4 bit without a card, by bitsandbytes' own CPU kernels: trained, asked, measured, merged into the 16-bit base.

That a killed training goes on to the same bits is tested in test_crashes.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SAY, SAY_SETTINGS, ok, run, save_random_model, train_on, write_jsonl

pytestmark = pytest.mark.slow

KINDS = {"Llama": {}, "Qwen3": {"head_dim": 16}, "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16}}


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Gemma2"])
def trained(request, tiny_model: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A base in float32, and a run on it in 4 bit."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    base = save_random_model(folder / "base", tiny_model, kind, **KINDS[kind])
    rows, more = write_jsonl(folder / "rows.jsonl", SAY), [*SAY_SETTINGS, "quantization_bit=4"]
    ok(train_on(base, rows, folder / "run", *more, "infer_dtype=float32", "learning_rate=0.1"))
    return base, folder / "run"


def quantized(base: Path) -> Any:
    """The base as bitsandbytes quantizes it: NF4 with quantized constants."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    how = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=how)


def test_the_model_answers_on_the_base_that_it_was_trained_on(trained):
    """Greedy, the ids of PEFT on a base that is quantized here."""
    import torch
    from peft import PeftModel

    from inference.engine import Settings
    from inference.load import load

    base, folder = trained
    engine = load(str(folder))
    reference = PeftModel.from_pretrained(quantized(base), folder).eval()
    talk = [{"role": "user", "content": "Say one."}]
    ids = engine.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    said = "".join(engine.stream(talk, Settings(temperature=0, max_new_tokens=12)))
    assert said == engine.tokenizer.decode(expected, skip_special_tokens=True)


def test_it_is_measured_and_merged_and_the_difference_is_told(trained):
    _, folder = trained
    ok(run("evaluate.py", str(folder), f"dataset={folder.parent / 'rows.jsonl'}", "max_new_tokens=4", "max_samples=2"))
    merged = ok(run("merge.py", str(folder)))
    assert "note: from the 4-bit base of its training the merged model differs by a mean KL of" in merged.stdout
    proof = json.loads((folder / "merged" / "merge.json").read_text())["proof"]
    assert proof["trained_bits"] == 4 and 0 < proof["trained_kl"] < 0.1
    assert proof["difference"] <= 3 * proof["rounding"] + 1e-6  # from the 16-bit base + adapter
