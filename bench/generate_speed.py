"""The engine beside transformers' own `model.generate`: tokens a second, and the time to the first token.

python bench/generate_speed.py [TARGET] [key=value ...]      TARGET as for chat.py; unset: the embedded model
    --unsloth    Unsloth's generation of the same model beside them; for a model without an adapter

Both use the same loaded model, the same prompt and greedy choice. They take turns, and the median of the rounds'
ratios is told, so that a busy machine harms both alike. Then a conversation of ten turns: what each turn's first token
costs with the cache kept, and without. Unsloth changes transformers' own classes, so it comes last, in its own process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from inference import engine
from inference.load import load
from inference.request import Settings
from inference.transformers_engine import TransformersEngine
from runs.target import find_target

ROUNDS, NEW_TOKENS = 7, 48
QUESTION = (
    "Explain to a child why the sky is blue, why it turns red in the evening, and what the moon has to do with it. "
)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--unsloth-alone"]:
        print(json.dumps(rounds_of_unsloth(argv[1])))
        return
    targets = [word for word in argv if "=" not in word and word != "--unsloth"]
    target, settings = targets[0] if targets else common.EMBEDDED_MODEL, [word for word in argv if "=" in word]
    model = load(target, settings)
    model.stop_ids = frozenset()  # both write NEW_TOKENS
    messages = [{"role": "user", "content": QUESTION * 6}]
    ids = model.prompt_ids(messages)
    print(f"{model.name}, {model.model.dtype}, prompt {len(ids)} tokens, reply {NEW_TOKENS} tokens, {ROUNDS} rounds")
    rounds = [(by_generate(model, ids), by_engine(model, messages)) for _ in range(ROUNDS + 1)][1:]
    print(f"{'':<18}{'tokens/s':>12}{'first token s':>16}{'CPU s':>10}")
    for name, column in zip(("model.generate", "engine"), zip(*rounds, strict=True), strict=True):
        print(row(name, column))
    ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in rounds]
    speed, first, cpu = (statistics.median(values) for values in zip(*ratios, strict=True))
    print(f"{'engine/generate':<18}{speed:>12.3f}{first:>16.3f}{cpu:>10.3f}   (asked: at least 0.95, at most 1.1)")
    ten_turns(model)
    if "--unsloth" in argv:
        beside_unsloth(model, find_target(target, settings).model, ids)


def row(name: str, rounds: Any) -> str:
    speed, first, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
    return f"{name:<18}{speed:>12.1f}{first:>16.3f}{cpu:>10.2f}"


def beside_unsloth(model: TransformersEngine, folder: str, ids: list[int]) -> None:
    """Unsloth's figures, once this process has given back the card's memory."""
    import torch

    del model.model, model.scheduler
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--unsloth-alone", folder]
    alone = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True)
    if alone.returncode:
        print(f"\nUnsloth failed: {alone.stderr.strip().splitlines()[-1]}")
    else:
        print("\n" + row("Unsloth", json.loads(alone.stdout.splitlines()[-1])))


def rounds_of_unsloth(folder: str) -> list[tuple[float, float, float]]:
    """The figures of `by_generate` for Unsloth's model of `folder`; the prompt's ids come from stdin."""
    from types import SimpleNamespace

    from unsloth import FastLanguageModel

    ids = json.load(sys.stdin)
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(Path(folder).resolve()),
        max_seq_length=len(ids) + NEW_TOKENS,
        dtype=None,
        load_in_4bit=False,
        local_files_only=True,
        use_exact_model_name=True,
    )
    FastLanguageModel.for_inference(model)
    contestant: Any = SimpleNamespace(model=model)
    return [by_generate(contestant, ids) for _ in range(ROUNDS + 1)][1:]


def by_generate(model: TransformersEngine, ids: list[int]) -> tuple[float, float, float]:
    """Tokens a second after the first, seconds to the first, CPU seconds, of transformers with a streamer."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        times: list[float] = []  # noqa: RUF012 - one for the one object

        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock, inputs = Clock(), torch.tensor([ids], device=model.model.device)
    clock.times = []
    started, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        model.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            streamer=clock,
        )
    speed = (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])
    return speed, clock.times[0] - started, time.process_time() - cpu


def by_engine(model: TransformersEngine, messages: list[engine.ChatMessage]) -> tuple[float, float, float]:
    """The same figures of the engine, with no cache from before; its counting of the prompt is in the first token."""
    model.scheduler.backend.finished.clear()
    started, cpu = time.perf_counter(), time.process_time()
    reply = model.stream(messages, Settings(temperature=0, max_new_tokens=NEW_TOKENS))
    before = time.perf_counter() - started
    list(reply)
    return reply.tokens_per_second, before + reply.first_token_seconds, time.process_time() - cpu


def ten_turns(model: TransformersEngine) -> None:
    """Ten turns of one conversation; the first token of each with the cache, and without."""
    messages: list[engine.ChatMessage] = []
    backend = model.scheduler.backend
    backend.finished = []
    print(f"\n{'turn':<6}{'prompt tokens':>14}{'kept':>8}{'first token s':>16}{'without cache s':>18}")
    settings = Settings(temperature=0, max_new_tokens=16)
    for turn in range(1, 11):
        messages.append({"role": "user", "content": QUESTION})
        reply = model.stream(messages, settings)
        text, kept = "".join(reply), backend.finished
        backend.finished = []
        fresh = model.stream(messages, Settings(temperature=0, max_new_tokens=1))
        list(fresh)
        backend.finished = kept
        messages.append({"role": "assistant", "content": text})
        figures = f"{reply.cached_tokens:>8}{reply.first_token_seconds:>16.3f}{fresh.first_token_seconds:>18.3f}"
        print(f"{turn:<6}{reply.prompt_tokens:>14}{figures}")


if __name__ == "__main__":
    common.run_script(main)
