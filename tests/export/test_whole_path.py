"""Whatever is trained is answered with, merged and turned into a GGUF: architectures × kinds of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_random_model
from test_experts import EXPERTS
from test_merge import distance, load, logits, merged, peft_logits, train_adapter

ARCHITECTURES = {
    "Llama": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {},
    "Gemma2": {"head_dim": 16},
    "Phi3": {},
    "Granite": {},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64},
}
# Those whose GGUF can be made with the embedded model's tokenizer, one kind of adapter each: llama.cpp's converter asks
# Qwen's models for Qwen's own, Gemma and Phi-3 for a tokenizer.model, and takes gpt-oss only in its published form.
WITH_GGUF = {("Llama", "ends"), ("Mistral", "lora"), ("Mixtral", "experts"), ("Olmo2", "lora")}
ADAPTERS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "ends": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "experts": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
}
CASES = [
    *((architecture, "lora") for architecture in ARCHITECTURES),
    *((architecture, "dora") for architecture in ("Llama", "Gemma2", "Phi3", "Olmo2")),
    *((architecture, "ends") for architecture in ("Llama", "Qwen3", "Mixtral")),
    *((architecture, "experts") for architecture in ("Mixtral", "Qwen3Moe", "GptOss")),
]
QUICK = {("Llama", "lora"), ("Qwen3Moe", "experts")}


@pytest.fixture(scope="module")
def bases(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes a tiny random model of an architecture behind the embedded model's tokenizer, which llama.cpp knows."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = made[architecture] = tmp_path_factory.mktemp("bases") / architecture
            more = {"bos_token_id": 1, "initializer_range": 0.1, **ARCHITECTURES[architecture]}
            save_random_model(folder, embedded_model, architecture, **more)
        return made[architecture]

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("architecture", "kind"), [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_train_answer_merge_quantize(architecture: str, kind: str, bases, tmp_path: Path, monkeypatch) -> None:
    from inference.load import load as load_engine

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    base = bases(architecture)
    folder = train_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    expected, _ = peft_logits(base, folder)
    assert distance(logits(load(base)), expected) > 0.02, "the adapter has to do something"

    engine = load_engine(str(folder), ["infer_dtype=float32"])
    assert distance(logits(engine.model), expected) < 1e-4
    both = load_engine(str(folder), ["infer_dtype=float32"], with_base=True)
    both._switch.turn(True)
    assert distance(logits(both.model), expected) < 1e-4
    both._switch.turn(False)
    assert distance(logits(both.model), logits(load(base))) < 1e-4

    model = merged(folder)
    assert distance(logits(load(model)), expected) < 1e-4
    if (architecture, kind) in WITH_GGUF:
        check_gguf(model, tmp_path)


def check_gguf(model: Path, work: Path) -> None:
    """llama.cpp predicts what the merged model predicts."""
    import numpy as np

    from export import llamacpp

    ids, file = list(range(5, 45)), work / "f32.gguf"
    llamacpp.call(llamacpp.convert, "converting", folder=model, target=file, kind="f32", card={}, name="x", end=2)
    np.save(work / "reference.npy", logits(load(model)).float().numpy())
    measured = llamacpp.call(llamacpp.measure, "comparing", file=file, samples=[ids], reference=work / "reference.npy")
    assert measured["kl_divergence"] < 1e-3
