"""The board with many open pages while a training runs that they all watch.

python bench/board_load.py [--pages 20] [--seconds 600] [--no-train]

Each page is what a browser does: the HTML, the heartbeat, the events of its opening, the ticks of its timers (each
answer by a stream of its own), changed settings; it is closed after a while, often in the middle of an answer, and a
new one is opened. Some send what no page would. Ends with status 1 where the server answered 500 or worse or an event
failed, where it kept file descriptors or threads of pages that are closed, or where its memory grew.
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
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
from api_load import ROOT, memory_grew, training

sys.path[:0] = [str(ROOT / "tests" / "web"), str(ROOT)]

TICK = 2.0  # seconds, as the board's timers have it
QUIET_SECONDS = 12  # after the last page: its connections are closed by then, and its worker threads idle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--no-train", action="store_true")
    args = parser.parse_args()
    from browser import serving

    os.environ["WEBUI_PASSWORD"] = ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "models").symlink_to(ROOT / "models")
        board = stack.enter_context(serving(cwd=Path(folder)))
        if not args.no_train:
            stack.enter_context(training(Path(folder, "saves")))
        return asyncio.run(load(board.url, psutil.Process(board.process.pid), args.pages, args.seconds))


class Board:
    """What all pages share: the application's description, and what became of the requests."""

    def __init__(self, url: str, config: dict[str, Any], until: float) -> None:
        self.url, self.until = url, until
        self.values = {part["id"]: part["props"].get("value") for part in config["components"]}
        self.values |= {
            part["id"]: part["props"].get("value") or "" for part in config["components"] if part["type"] == "textbox"
        }
        self.states = {part["id"] for part in config["components"] if part["type"] == "state"}
        self.events = [event for event in config["dependencies"] if event["backend_fn"]]
        self.answers: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []  # of the answered events

    def of(self, kind: str) -> list[tuple[dict[str, Any], int]]:
        """The events that begin with `kind` ("load", "tick"), each with the component where that happens."""
        return [(e, target) for e in self.events for target, trigger in e["targets"] if trigger == kind]


class Page:
    """An open page of the board."""

    def __init__(self, board: Board, http: httpx.AsyncClient, rng: random.Random) -> None:
        self.board, self.http, self.rng, self.session = board, http, rng, uuid.uuid4().hex[:11]

    async def live(self, seconds: float) -> None:
        """Opens the page, looks at it for a while and closes it, wherever it is then."""
        board = self.board
        board.answers[f"page: {(await self.http.get('/en/')).status_code}"] += 1
        beat = asyncio.create_task(self.heartbeat())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    for event, target in board.of("load"):
                        await self.event(event, target)
                    while True:
                        await self.look()
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)

    async def look(self) -> None:
        """What happens on a page within TICK seconds: a timer of the open tab, and sometimes more."""
        started = time.monotonic()
        await self.event(*self.rng.choice(self.board.of("tick")))
        if self.rng.random() < 0.2:
            settings = [
                (e, t[0]) for e in self.board.events for t in e["targets"][:1] if e["api_name"] == "show_settings"
            ]
            await self.event(*settings[0])
        if self.rng.random() < 0.1:
            await self.malformed()
        await asyncio.sleep(max(0.0, TICK - (time.monotonic() - started)))

    async def heartbeat(self) -> None:
        async with self.http.stream("GET", f"/en/gradio_api/heartbeat/{self.session}", timeout=None) as answer:
            self.board.answers[f"heartbeat: {answer.status_code}"] += 1
            async for _ in answer.aiter_bytes():
                pass

    async def event(self, event: dict[str, Any], target: int) -> None:
        """Has a function of the board called, and waits for the end of the stream that answers."""
        board, started = self.board, time.monotonic()
        data = [None if name in board.states else board.values[name] for name in event["inputs"]]
        asked = {"data": data, "fn_index": event["id"], "trigger_id": target, "session_hash": self.session}
        joined = await self.http.post("/en/gradio_api/queue/join", json=asked)
        ended = str(joined.status_code)
        if joined.status_code == 200:
            query = {"session_hash": self.session}
            async with self.http.stream("GET", "/en/gradio_api/queue/data", params=query) as answer:
                ended = str(answer.status_code)
                async for line in answer.aiter_lines():
                    message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                    if message.get("msg") == "process_completed" and not message["success"]:
                        ended = f"failed: {str(message['output'])[:200]}"
        board.answers[f"event: {ended}"] += 1
        board.seconds.append(time.monotonic() - started)

    async def malformed(self) -> None:
        """What no page sends."""
        join = "/en/gradio_api/queue/join"
        session = {"session_hash": self.session}
        kind, answer = self.rng.choice(
            [
                ("no JSON", lambda: self.http.post(join, content=b'{"data": [')),
                ("no object", lambda: self.http.post(join, json=[1])),
                ("no data", lambda: self.http.post(join, json=session)),
                ("an unknown function", lambda: self.http.post(join, json={"data": [], "fn_index": 9999, **session})),
                ("a foreign session", lambda: self.http.get("/en/gradio_api/queue/data?session_hash=none")),
                ("a file beyond its folders", lambda: self.http.get("/files/saves/../../etc/passwd")),
                ("a name that is no page", lambda: self.http.get("/fr/")),
            ]
        )
        try:
            answered = str((await answer()).status_code)
        except httpx.RemoteProtocolError:  # Gradio ends the stream of a session that it does not know in the middle
            answered = "cut off"
        self.board.answers[f"{kind}: {answered}"] += 1


async def visitor(board: Board, number: int) -> None:
    """One page after the other, until the time is up."""
    rng = random.Random(number)
    await asyncio.sleep(rng.random() * TICK)
    while time.monotonic() < board.until:
        limits = httpx.Limits(keepalive_expiry=2)  # the server closes a connection that idles for five seconds
        async with httpx.AsyncClient(base_url=board.url, timeout=120, limits=limits) as http:
            try:
                await Page(board, http, rng).live(min(rng.uniform(5, 60), board.until - time.monotonic()))
            except httpx.HTTPError as error:
                board.answers[f"lost: {error.request.url.path}: {type(error).__name__}: {error}"] += 1


async def look_once(url: str, config: dict[str, Any]) -> None:
    """Opens one page for a while, without and after others: at a call, worker threads that idle for 10 s are ended."""
    for seconds in (QUIET_SECONDS, 0):
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            await Page(Board(url, config, 0), http, random.Random(0)).live(4)
        await asyncio.sleep(seconds)


async def load(url: str, server: psutil.Process, pages: int, seconds: float) -> int:
    async with httpx.AsyncClient(timeout=120) as http:
        config = (await http.get(f"{url}/en/config")).json()
    await look_once(url, config)  # what is loaded once
    before = server.num_fds(), server.num_threads()
    board, memory, began = Board(url, config, time.monotonic() + seconds), [], time.monotonic()
    work = asyncio.gather(*(visitor(board, number) for number in range(pages)))
    while not work.done():
        memory.append(((time.monotonic() - began) / 60, server.memory_info().rss / 2**20))
        await asyncio.wait([work], timeout=seconds / 60)
    await work
    await look_once(url, config)
    after = server.num_fds(), server.num_threads()
    for name, count in sorted(board.answers.items()):
        print(f"{count:7}  {name}")
    wrong = sum(
        count
        for name, count in board.answers.items()
        if "failed" in name or name.rpartition(" ")[2].startswith("5") or name.startswith("lost")
    )
    slow = statistics.quantiles(board.seconds, n=20)
    print(f"{board.answers['page: 200']} pages, {pages} at a time, in {seconds:.0f} s; {len(board.seconds)} events:")
    print(f"answered in {slow[9]:.2f} s in the median, 95 % within {slow[18]:.2f} s; {wrong} failed")
    print(f"file descriptors {before[0]} before, {after[0]} after; threads {before[1]} before, {after[1]} after")
    kept = after[0] > before[0] + 3 or after[1] > before[1] + 3
    return int(memory_grew(memory) or wrong > 0 or kept)


if __name__ == "__main__":
    sys.exit(main())
