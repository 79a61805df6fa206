"""Runs Unsloth's CUDA branch on a machine without a card: its Python, its autograd functions and its Triton kernels,
interpreted, on CPU tensors.

    python tests/training/cuda_on_cpu.py exact MODEL ...    prints what exact_training.py measures of each, as JSON
    python tests/training/cuda_on_cpu.py train RUNS         runs train.py in forks, one after the other

RUNS is a JSON list of {"arguments": [...], "kill_at": null, or a path at whose appearance the run is killed}; the exit
statuses are printed as JSON.

UNSLOTH_ALLOW_CPU=1 and TRITON_INTERPRET=1 are Unsloth's and Triton's own switches; the rest is a stand-in for what the
CUDA branch asks `torch.cuda`, and the two patches that `import unsloth` leaves out without a card. In float16 only:
Triton's interpreter computes wrongly in bfloat16.

What this cannot show: bitsandbytes' kernels (4 and 8 bit), compiled Triton kernels and torch.compile, CUDA streams,
mixed precision with a GradScaler, real memory, real speed.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import time
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
    TORCHDYNAMO_DISABLE="1",  # torch.compile would make C++ here
    HF_HUB_OFFLINE="1",
)


SEEN: Counter[str] = Counter()  # calls of attention


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


def plan_kept_layers() -> None:
    """Gives a model Unsloth's planner of kept activations, without its hooks, which measure a card's memory."""
    import unsloth.models._utils as utils

    def install(model: Any) -> None:
        model._unsloth_auto_skip = utils._AutoCheckpointSkip(model, [], None)

    utils._AutoCheckpointSkip.install = install


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


def pretend() -> None:
    """Imports Unsloth's CUDA branch, and has the kit take it for a card's, in float16."""
    pretend_there_is_a_card()
    import unsloth  # noqa: F401

    keep_tensors_on_the_cpu()
    plan_kept_layers()
    patch_trl()
    import torch

    from training import arguments, hardware

    hardware.on_card = lambda: True
    arguments.choose_precision = lambda _: arguments.Precision(torch.float16, None)


def count_attention() -> None:
    """Counts in SEEN the calls of Unsloth's attention ("own") and of transformers' as Unsloth changes it
    ("transformers"), each with the samples' boundaries or ("without boundaries") not."""
    from unsloth.utils import attention_dispatch, hf_packed_attention

    own, transformers = attention_dispatch._run_attention, hf_packed_attention._sdpa_packed_varlen

    def run(*, config: Any, context: Any, **more: Any) -> Any:
        packed = context.seq_info is not None and context.attention_mask is None
        SEEN["own" if packed else "own without boundaries"] += 1
        return own(config=config, context=context, **more)

    def run_transformers(*args: Any, **more: Any) -> Any:
        SEEN["transformers" if "packed_seq_lengths" in more else "transformers without boundaries"] += 1
        return transformers(*args, **more)

    attention_dispatch._run_attention = run
    hf_packed_attention._sdpa_packed_varlen = run_transformers  # what enable_hf_packed_attention will install


def measure(model_folder: str) -> dict[str, Any]:
    """What exact_training.measure reports, in float16 on the CUDA branch, and which attention and trainer ran."""
    import exact_training
    import trl

    SEEN.clear()
    exact_training.LENGTHS = ((3, 2), (6, 5), (5, 2))
    with tempfile.TemporaryDirectory() as folder:
        report = exact_training.measure(model_folder, folder)
    return {**report, "attention": dict(SEEN), "trainer": trl.SFTTrainer.__name__}


def run_train(arguments: list[str], kill_at: str | None) -> int:
    """Runs train.py in a fork of this process; returns its exit status, negative where it was killed."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        import train
        from runs.configuration import run_command

        sys.argv = ["train.py", *arguments]
        run_command(train.main, train.__doc__)
        os._exit(0)
    while kill_at and not Path(kill_at).exists():
        time.sleep(0.01)
        if os.waitpid(process, os.WNOHANG)[0]:
            raise SystemExit(f"ended before {kill_at} appeared")
    if kill_at:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    pretend()
    gc.freeze()  # Unsloth collects garbage often; what the imports have made need not be looked at each time
    what, *words = sys.argv[1:]
    if what == "exact":
        count_attention()
        print(json.dumps([measure(word) for word in words]))
    else:
        print(json.dumps([run_train(**run) for run in json.loads(words[0])]))
    gc.unfreeze()
