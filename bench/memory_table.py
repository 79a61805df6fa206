"""What fits on a card: the table of docs/training.md, from training/memory.py's estimates. Takes a second.

python bench/memory_table.py [GIGABYTES]      of a card of 24 GB, of which 0.6 are taken, unless said otherwise
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Config, Gpu
from training.memory import GB, ModelSize, estimate_memory, model_like

NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
MODELS = {
    "3B (Llama 3.2)": (3072, 8192, 28, 24, 8, 128256, True),
    "8B (Llama 3)": (4096, 14336, 32, 32, 8, 128256, False),
    "14B (Qwen 2.5)": (5120, 13824, 48, 40, 8, 152064, False),
    "32B (Qwen 2.5)": (5120, 27648, 64, 40, 8, 152064, False),
}
LENGTHS = (1024, 4096, 16384)


def cell(model: ModelSize, bits: int | None, length: int, gpu: Gpu) -> str:
    """Gigabytes, and the largest micro-batch of full-length samples that fits."""
    batch, need = 0, 0.0
    for size in (1, 2, 4, 8):
        config = Config(cutoff_len=length, per_device_train_batch_size=size, quantization_bit=bits)
        found = sum(estimate_memory(config, model, gpu, length).values())
        if size == 1:
            need = found
        if found <= gpu.free_memory:
            batch = size
    return f"{need / GB:.0f} GB, batch {batch}" if batch else f"no ({need / GB:.0f} GB)"


def main() -> None:
    total = float(sys.argv[1]) if len(sys.argv) > 1 else 25.2  # what a card "of 24 GB" has, in 10⁹ bytes
    gpu = Gpu("card", "580.65", (13, 0), (8, 9), int(total * GB), int((total - 0.6) * GB))
    print("| model | weights | " + " | ".join(f"{n // 1024}k tokens" for n in LENGTHS) + " |")
    print("|---" * (2 + len(LENGTHS)) + "|")
    for name, shape in MODELS.items():
        model = model_like(dict(zip(NAMES, shape, strict=True)))
        for bits in (None, 4):
            cells = [cell(model, bits, length, gpu) for length in LENGTHS]
            print(f"| {name} | {'4 bit' if bits else '16 bit'} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
