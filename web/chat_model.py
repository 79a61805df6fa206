"""The model that the chat page talks to: one at a time in the process of the server, for all browsers, one reply at a
time."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
from common import UserError
from inference.engine import Engine
from inference.load import load
from inference.reply import Reply
from runs.folder import run_folders
from runs.target import Target

PAINT_SECONDS = 0.08  # between two updates of the page: as smooth as eyes need, and cheap

busy = threading.Lock()  # held while a model is loaded or answers
_loaded: tuple[object, Engine] | None = None
requests: dict[str, Request] = {}  # by the browser's session
_importing = threading.Lock()


@dataclasses.dataclass
class Request:
    """A reply that one browser waits for; `stop` ends it from another thread."""

    stopped: bool = False
    instead: Callable[[], dict[Any, Any]] | None = None  # what the page shows now: something else was asked meanwhile
    reply: Reply | None = None
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def stop(self) -> None:
        self.stopped = True
        if self.reply:
            self.reply.cancel()


def import_libraries() -> None:
    """Imports transformers and torch, which take seconds: once a page needs them, and one thread at a time."""
    with _importing:
        import transformers

        assert transformers.AutoTokenizer and transformers.AutoModelForCausalLM  # imported when they are asked for


def free() -> None:
    """Frees the memory of the model, once the reply it gives has ended."""
    with busy:
        _forget()


def stop_and_free() -> None:
    """Ends every reply and frees the memory of the model, for a command that needs the card."""
    for request in list(requests.values()):
        request.stop()
    free()


def _forget() -> None:
    global _loaded
    _loaded = None
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()


def _key(source: Target, with_base: bool) -> object:
    """Changes when a loaded model is no longer what is meant: a run may have been trained again meanwhile."""
    file = Path(source.adapter, "adapter_model.safetensors") if source.adapter else Path(source.model)
    return source.name, str(source.config), file.stat().st_mtime_ns, with_base


def engine(source: Target, with_base: bool) -> Engine:
    """The engine of a source; the one before is freed first, as two may not fit on a card. The caller holds `busy`."""
    global _loaded
    key = _key(source, with_base)
    if _loaded is None or _loaded[0] != key:
        _forget()
        import_libraries()
        _loaded = key, load(source, with_base=with_base)
    return _loaded[1]


def is_loaded(source: Target, with_base: bool) -> bool:
    return _loaded is not None and _loaded[0] == _key(source, with_base)


def is_any_loaded() -> bool:
    return _loaded is not None


@contextlib.contextmanager
def explaining_full_memory() -> Iterator[None]:
    """Turns the device's out-of-memory error into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):  # torch.OutOfMemoryError, and what drivers raise
            raise
        _forget()
        raise UserError(
            "the model does not fit into the memory that is free; end a training that runs, or load it in 4 bit: "
            "quantization_bit=4"
        ) from None


def targets() -> list[tuple[str, str]]:
    """What can be talked to, newest first: (label, path) of runs, their merged models and GGUF files, and models."""
    found = []
    for run in run_folders():
        parts = [run] if (run / "adapter_config.json").is_file() else []
        parts += [run / "merged"] if (run / "merged" / "config.json").is_file() else []
        parts += sorted(run.glob("gguf/*.gguf"))
        found += [(str(path.relative_to(common.SAVES)), str(path)) for path in parts]
    models = sorted(path.parent for path in Path("models").glob("[!.]*/config.json"))
    return found + [(str(path), str(path)) for path in models]


def pieces(reply: Reply) -> Iterator[str]:
    """The new text of a reply, every PAINT_SECONDS; the model goes on while the page is painted."""
    arrived: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for piece in reply:
                arrived.put(piece)
            arrived.put(None)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that paints
            arrived.put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        text, painted = "", time.monotonic()
        while (piece := arrived.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            text += piece
            if time.monotonic() - painted >= PAINT_SECONDS:
                yield text
                text, painted = "", time.monotonic()
        if text:
            yield text
    finally:
        reply.cancel()
        thread.join()
