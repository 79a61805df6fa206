"""api.py under load, and what batching brings.

python bench/api_load.py [TARGET] [--seconds 600] [--clients 64]     good, malformed, oversized, slow and vanishing;
                                                                     with --train a training runs beside it
python bench/api_load.py [TARGET] --speed [--clients 8]              one at a time beside all at once

TARGET as for api.py (unset: the embedded model), or the address of a server that runs already. The first ends with
status 1 where the server answered 500 or worse, kept a place of a client that has gone, or grew. The second prints the
tokens a second of 8 clients one after the other and at once, in turns, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, NEW_TOKENS = 3, 64
SUBJECTS = ("the sea", "a red bicycle", "Paris", "the number seven", "rain", "an old clock", "bread", "the moon")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    with server(args.target) as url:
        if args.speed:
            asyncio.run(speed(url, args.clients or 8))
            return 0
        with contextlib.ExitStack() as stack:
            if args.train:
                folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
                stack.enter_context(training(Path(folder)))
            return asyncio.run(load(url, args.seconds, args.clients or 64))


@contextlib.contextmanager
def training(saves: Path) -> Iterator[None]:
    """Trains the embedded model in saves/run for as long as the block runs.

    Ends this program where the training ends by itself.
    """
    settings = ["dataset=identity", "max_steps=1000000", "cutoff_len=128", "early_stopping=no", "save_steps=50"]
    command = [sys.executable, str(ROOT / "train.py"), *settings, f"output_dir={saves}/run", "bf16=false"]
    with open(ROOT / ".cache" / "api_load_training.log", "w+b") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield
            if process.poll() is not None:
                log.seek(0)
                sys.exit(f"the training has ended: {log.read()[-2000:].decode(errors='replace')}")
        finally:
            process.kill()
            process.wait()
        lines = saves / "run" / "trainer_log.jsonl"
        steps = json.loads(lines.read_text().splitlines()[-1])["step"] if lines.exists() else 0
        print(f"the training beside it made {steps} steps")


@contextlib.contextmanager
def server(target: str) -> Iterator[str]:
    """The address of a server: the one named, or one of our own as long as the block runs."""
    if target.startswith("http"):
        yield target
        return
    env = {**os.environ, "API_PORT": "0", "API_HOST": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "api.py"), target, "infer_dtype=float32"]
    log = open(ROOT / ".cache" / "api_load.log", "w+", encoding="utf-8")  # noqa: SIM115 - the server writes it
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=log)
    try:
        while " answers at " not in Path(log.name).read_text(encoding="utf-8"):
            if process.poll() is not None:
                sys.exit(Path(log.name).read_text(encoding="utf-8"))
            time.sleep(0.2)
        yield Path(log.name).read_text(encoding="utf-8").partition(" answers at ")[2].split()[0]
    finally:
        process.terminate()
        process.wait(30)
        log.close()


# ---------------------------------------------------------------------------------------------------------------------
# Speed


async def speed(url: str, clients: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        model = (await http.get("/models")).json()["data"][0]["id"]

        async def ask(number: int) -> int:
            content = f"Write a long story about {SUBJECTS[number % len(SUBJECTS)]}, number {number}."
            body = {
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "stream": False,
            }
            answer = await http.post("/chat/completions", json=body)
            answer.raise_for_status()
            return answer.json()["usage"]["completion_tokens"]

        print(f"{model}: {clients} clients, up to {NEW_TOKENS} tokens each, {ROUNDS} rounds")
        await ask(99)
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            tokens = [await ask(i) for i in range(clients)]
            alone = sum(tokens) / (time.perf_counter() - started)
            started = time.perf_counter()
            tokens = await asyncio.gather(*(ask(i) for i in range(clients)))
            rounds.append((alone, sum(tokens) / (time.perf_counter() - started)))
            print(f"one at a time {rounds[-1][0]:8.1f} tokens/s    at once {rounds[-1][1]:8.1f} tokens/s")
        ratio = statistics.median(many / one for one, many in rounds)
        print(f"at once / one at a time: {ratio:.2f}   (asked: at least 2.5 with 8 clients on 2 CPU cores)")


# ---------------------------------------------------------------------------------------------------------------------
# Load


class Load:
    """Clients of all kinds against one server, and what they were answered."""

    def __init__(self, url: str, model: str, seconds: float) -> None:
        self.url, self.model, self.until = url, model, time.monotonic() + seconds
        self.answers: collections.Counter[str] = collections.Counter()

    async def client(self, number: int) -> None:
        """One client after another, of a kind drawn anew, until the time is up."""
        rng = random.Random(number)
        kinds = [self.good, self.streamed, self.malformed, self.oversized, self.slow_reader, self.slow_writer]
        kinds += [self.vanishing, self.vanishing_early]
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            while time.monotonic() < self.until:
                kind = rng.choice(kinds)
                try:
                    answer = await kind(http, rng)
                except httpx.HTTPError as error:
                    answer = type(error).__name__  # a connection that the server closed on purpose
                self.answers[f"{kind.__name__}: {answer}"] += 1
                if answer == 429:
                    await asyncio.sleep(rng.random())

    def body(self, rng: random.Random, **fields: object) -> dict:
        content = f"Tell me about {rng.choice(SUBJECTS)}. {rng.random()}"
        talk = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        return {**talk, "max_tokens": rng.randint(1, 40), **fields}

    async def good(self, http: httpx.AsyncClient, rng: random.Random) -> int:
        extra = rng.choice([{}, {"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}])
        return (await http.post("/chat/completions", json=self.body(rng, **extra))).status_code

    async def streamed(self, http: httpx.AsyncClient, rng: random.Random) -> int | str:
        async with http.stream("POST", "/chat/completions", json=self.body(rng, stream=True)) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        if answer.status_code == 200 and lines[-1] != "data: [DONE]":
            return "cut short"
        return answer.status_code

    async def malformed(self, http: httpx.AsyncClient, rng: random.Random) -> int:
        whole = json.dumps(self.body(rng))
        broken = rng.choice(
            [whole[: len(whole) // 2], "[]", '"text"', whole.replace("max_tokens", "max_token"), "\x00\xff", "[" * 9999]
        )
        return (await http.post("/chat/completions", content=broken.encode("latin-1"))).status_code

    async def oversized(self, http: httpx.AsyncClient, rng: random.Random) -> int:
        size = rng.choice([100_000, 3_000_000])
        body = self.body(rng, messages=[{"role": "user", "content": "long " * (size // 5)}])
        return (await http.post("/chat/completions", json=body)).status_code

    async def slow_reader(self, http: httpx.AsyncClient, rng: random.Random) -> int:
        async with http.stream("POST", "/chat/completions", json=self.body(rng, stream=True)) as answer:
            async for _ in answer.aiter_lines():
                await asyncio.sleep(0.05)
        return answer.status_code

    async def slow_writer(self, http: httpx.AsyncClient, rng: random.Random) -> int:
        async def pieces():
            text = json.dumps(self.body(rng)).encode()
            for at in range(0, len(text), 20):
                yield text[at : at + 20]
                await asyncio.sleep(0.05)

        return (await http.post("/chat/completions", content=pieces())).status_code

    async def vanishing(self, http: httpx.AsyncClient, rng: random.Random) -> int | str:
        body = self.body(rng, stream=True, max_tokens=1000)
        async with http.stream("POST", "/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                if rng.random() < 0.3:
                    return "gone"
        return answer.status_code

    async def vanishing_early(self, http: httpx.AsyncClient, rng: random.Random) -> int | str:
        body = self.body(rng, max_tokens=1000)
        try:
            return (await http.post("/chat/completions", json=body, timeout=rng.random())).status_code
        except httpx.TimeoutException:
            return "gone"


async def load(url: str, seconds: float, clients: int) -> int:
    root = url.removesuffix("/v1")
    # an idle connection may be closed by the server in the moment of the next request
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as http:

        async def gauge(name: str) -> float:
            text = (await http.get(f"{root}/metrics")).text
            return float(text.partition(f"\n{name} ")[2].split("\n")[0])

        model = (await http.get(f"{url}/models")).json()["data"][0]["id"]
        run, memory, began = Load(url, model, seconds), [], time.monotonic()
        work = asyncio.gather(*(run.client(i) for i in range(clients)))
        while not work.done():
            resident = await gauge("process_resident_memory_bytes") / 2**20
            memory.append(((time.monotonic() - began) / 60, resident))
            await asyncio.wait([work], timeout=seconds / 30)
        await work
        started = time.monotonic()
        while (places := await gauge("onecard_active_replies") + await gauge("onecard_waiting_replies")) > 0:
            if time.monotonic() - started > 10:
                break
            await asyncio.sleep(0.2)
        alive = (await http.get(f"{root}/health")).status_code == 200
    for name, count in sorted(run.answers.items()):
        print(f"{count:7}  {name}")
    failed = sum(
        count for name, count in run.answers.items() if name.rpartition(" ")[2] in ("500", "502", "503", "short")
    )
    print(f"{sum(run.answers.values())} requests of {clients} clients in {seconds:.0f} s: {failed} answers of 500")
    print(f"{places:.0f} places kept by nobody, {time.monotonic() - started:.1f} s after the last client")
    return int(memory_grew(memory) or failed > 0 or places > 0 or not alive)


def memory_grew(memory: list[tuple[float, float]]) -> bool:
    """Prints what a server's memory did, of (minute, MB); whether it grew in the last third."""
    third = len(memory) // 3
    minutes, sizes = zip(*memory, strict=True)
    middle, last = max(sizes[third : 2 * third]), max(sizes[2 * third :])
    slope = statistics.linear_regression(minutes[third:], sizes[third:]).slope
    print(f"memory {sizes[0]:.0f} MB at first, at most {middle:.0f} in the middle third, {last:.0f} in the last")
    print(f"slope of the last two thirds: {slope:+.1f} MB a minute")
    return last > middle * 1.1 + 64


if __name__ == "__main__":
    sys.exit(main())
