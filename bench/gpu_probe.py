"""What bench/gpu.py does to the process of a training: makes the card smaller, and watches what is loaded and done."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common

LIMIT, CONTEXT = 24e9, 0.6e9  # bytes; the CUDA context is not seen by the limit
WATCHED = 5  # the optimizer step that is watched, the last one of bench/gpu.py: the profiler takes its time
# Parts of the names of attention's kernels: flash-attn, xformers, PyTorch's (on a CPU: its operators).
ATTENTION = ("flash", "fmha", "attention", "attn", "mem_eff")


def on_card() -> bool:
    import torch

    return torch.cuda.is_available()


def hold_to_limit() -> None:
    """Makes the card as small as one of 24 GB, to PyTorch's allocator and to those who ask how much there is.

    To be called after Unsloth's import, which looks at the card. mem_get_info goes on telling the real total: Unsloth
    multiplies it by the allocator's share.
    """
    import torch

    if not on_card():
        return
    room, properties, find_gpu = int(LIMIT - CONTEXT), torch.cuda.get_device_properties, common.find_gpu
    total = properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total)

    class Smaller:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return int(LIMIT) if name == "total_memory" else getattr(self.real, name)

    def smaller_gpu() -> common.Gpu | None:
        gpu = find_gpu()
        return gpu and dataclasses.replace(gpu, total_memory=int(LIMIT), free_memory=room)

    torch.cuda.get_device_properties = lambda *given, **named: Smaller(properties(*given, **named))
    torch.cuda.mem_get_info = lambda *_, **__: (max(0, room - torch.cuda.memory_reserved()), total)
    torch.cuda.memory.mem_get_info = torch.cuda.mem_get_info
    common.find_gpu = smaller_gpu


def kinds_of_weights(model: Any) -> dict[str, int]:
    """Bytes of a model's parameters by class and type: of 4 bit they are "Params4bit uint8", of 8 "Int8Params int8"."""
    found: Counter[str] = Counter()
    for weight in model.parameters():
        found[f"{type(weight).__name__} {weight.dtype}".replace("torch.", "")] += weight.nbytes
    return dict(found)


def watch(found: dict[str, Any]) -> None:
    """Has the next training in this process fill `found`: loaded weights, the estimate of memory, a step's kernels."""
    from training import memory, model, stages

    load, make = model.load_model, stages.make_trainer

    def load_model(*given: Any) -> Any:
        loaded = load(*given)
        found["loaded"] = kinds_of_weights(loaded)
        return loaded

    def make_trainer(prepared: Any, *given: Any) -> Any:
        config = prepared.config
        size = memory.read_model(Path(config.model_name_or_path))
        estimate = memory.estimate_memory(config, size, common.find_gpu(), prepared.plan.longest)
        found["estimate"] = sum(estimate.values())
        made = make(prepared, *given)
        made.add_callback(step_watcher(found))
        return made

    model.load_model, stages.make_trainer = load_model, make_trainer


def step_watcher(found: dict[str, Any]) -> Any:
    """A callback that profiles step WATCHED: the share of its time in which the card computes, and its attention."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step + 1 == WATCHED:
                self.profiler = profile(
                    activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card() else [])]
                )
                self.profiler.start()
                self.started = time.perf_counter()

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == WATCHED:
                if on_card():
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - self.started
                self.profiler.stop()
                found.update(summary(self.profiler.events(), seconds))

    return Watcher()


def summary(events: Any, seconds: float) -> dict[str, Any]:
    """`busy`: the share of `seconds` in which a kernel ran on the card (None without one); `attention`: the name of the
    attention's kernel, or operator, that took the most time."""
    import torch

    device = torch.autograd.DeviceType.CUDA if on_card() else torch.autograd.DeviceType.CPU
    ran = [event for event in events if event.device_type == device]
    busy, until = 0.0, 0.0  # microseconds; kernels of several streams may overlap
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in ran):
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    times: Counter[str] = Counter()
    for event in ran:
        if any(part in event.name.lower() for part in ATTENTION):
            times[event.name] += event.time_range.end - event.time_range.start
    attention = times.most_common(1)[0][0] if times else None
    return {"busy": busy / 1e6 / seconds if on_card() else None, "attention": attention}
