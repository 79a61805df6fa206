"""Runs Unsloth's CUDA branch on a machine without a card: its Python, its autograd functions and its Triton kernels,
interpreted, on CPU tensors.

    python tests/training/cuda_on_cpu.py MODEL       prints what exact_training.py measures there, as JSON

UNSLOTH_ALLOW_CPU=1 and TRITON_INTERPRET=1 are Unsloth's and Triton's own switches; the rest is a stand-in for what the
CUDA branch asks `torch.cuda`, and the two patches that `import unsloth` leaves out without a card. In float16 only:
Triton's interpreter computes wrongly in bfloat16.

What this cannot show: bitsandbytes' kernels (4 and 8 bit), compiled Triton kernels and torch.compile, CUDA streams,
mixed precision with a GradScaler, real memory, real speed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
os.environ.update(
    UNSLOTH_ALLOW_CPU="1",
    TRITON_INTERPRET="1",
    UNSLOTH_DISABLE_STATISTICS="1",
    UNSLOTH_DISABLE_PINNED_MEMORY="1",
    UNSLOTH_DISABLE_DOUBLE_BUFFER="1",
    UNSLOTH_MIXED_PRECISION="bfloat16",  # no autocast: accelerate has none of float16 on a CPU
    HF_HUB_OFFLINE="1",
)


def pretend_there_is_a_card() -> None:
    """Answers what Unsloth asks `torch.cuda` at import and while it trains."""
    import torch

    card = SimpleNamespace(
        name="pretended RTX 4090", total_memory=24_000_000_000, major=8, minor=9, multi_processor_count=128,
        is_integrated=0, warp_size=32, L2_cache_size=72 << 20, shared_memory_per_block_optin=101376,
        max_threads_per_multi_processor=1536, regs_per_multiprocessor=65536,
    )  # fmt: skip
    cuda = torch.cuda
    cuda.get_device_properties = lambda *_, **__: card
    cuda.get_device_capability = lambda *_, **__: (8, 9)
    cuda.mem_get_info = cuda.memory.mem_get_info = lambda *_, **__: (8_000_000_000, 24_000_000_000)
    cuda.max_memory_reserved = cuda.memory_reserved = lambda *_, **__: 0
    cuda.synchronize = lambda *_, **__: None
    cuda.device_count, cuda.current_device = (lambda: 1), (lambda: 0)
    stream = SimpleNamespace(synchronize=lambda: None, cuda_stream=0, wait_stream=lambda _: None)
    cuda.current_stream = lambda *_, **__: stream
    if not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        torch._C._cuda_getCurrentRawStream = lambda _: 0


def keep_tensors_on_the_cpu() -> None:
    """Unsloth's device is the CPU, and its tables of rotary embeddings are made there."""
    import torch
    import unsloth.device_type as device_type
    import unsloth.models._utils as utils
    import unsloth.models.llama as llama

    for module in (device_type, llama, utils):
        if hasattr(module, "get_current_device"):
            module.get_current_device = lambda: "cpu"
        if hasattr(module, "DEVICE_TYPE_TORCH"):
            module.DEVICE_TYPE_TORCH = "cpu"
    cache = llama._PerDeviceRopeCache
    ensure = cache._ensure_rope_cache

    def build(self: Any, _: int) -> None:
        size = self.current_rope_size
        with self._rope_build_mode():
            self._set_cos_sin_cache(
                seq_len=self._rope_cache_rows(), device=torch.device("cpu", 0), dtype=self._rope_cache_dtype
            )
        self.current_rope_size = size
        self._rope_cache_versions[0] = self._rope_cache_version
        self._mark_rope_build(0)

    cache._ensure_rope_cache = lambda self, _: ensure(self, 0)
    cache._build_rope_cache = build


def patch_trl() -> None:
    """What `import unsloth` does to TRL where there is a card."""
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"
    try:
        from unsloth.context_parallel import patch_sft_trainer
        from unsloth.models import llama, rl
        from unsloth.trainer import _patch_trl_trainer

        rl.PatchFastRL(FastLanguageModel=llama.FastLlamaModel)
        _patch_trl_trainer()
        patch_sft_trainer()
    finally:
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"


def count_attention(seen: Counter[str]) -> None:
    """Counts how Unsloth's attention is called: with the samples' boundaries and without a mask, or otherwise."""
    from unsloth.utils import attention_dispatch

    real = attention_dispatch._run_attention

    def run(*, config: Any, context: Any, **more: Any) -> Any:
        packed = context.seq_info is not None and context.attention_mask is None
        seen["packed" if packed else "other"] += 1
        return real(config=config, context=context, **more)

    attention_dispatch._run_attention = run


def measure(model_folder: str) -> dict[str, Any]:
    """What exact_training.measure reports, in float16 on the CUDA branch, and which attention and trainer ran."""
    pretend_there_is_a_card()
    import unsloth  # noqa: F401

    keep_tensors_on_the_cpu()
    patch_trl()
    import exact_training
    import torch
    import trl

    from training import trainer

    seen: Counter[str] = Counter()
    count_attention(seen)
    precision, checkpointing = trainer.Precision, trainer.checkpointing_setting
    trainer.Precision = lambda *_: precision(torch.float16, None)
    trainer.checkpointing_setting = lambda config, _: checkpointing(config, False)
    exact_training.LENGTHS = ((3, 2), (6, 5), (5, 2))
    with tempfile.TemporaryDirectory() as folder:
        report = exact_training.measure(model_folder, folder)
    return {**report, "attention": dict(seen), "trainer": trl.SFTTrainer.__name__}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
