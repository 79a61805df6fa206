"""Several replies at once from one model: one thread owns it, and each of its steps computes a token of every reply.

    batch = Batch(engine, slots=8, waiting=64)
    row = Row(engine, ids, Settings(), sink)        # sink(Event) is called by the batch's thread
    batch.submit([row])                             # raises Full, Ended
    row.reply.cancel()

A new reply joins between two steps; its prompt is computed in pieces beside the tokens of the others, so that these
go on. What the model has computed for a finished reply is kept for the next prompt that begins in the same way.

Which rows are computed, and how, is the kernel's part (`Engine.rows`): `FlatRows` puts the new tokens of all rows into
one flat row of a transformers model and lets each attend to its own keys and values only; there is no padding, and
each row's text is what it would be alone. `SerialRows` computes row after row, for models that do not allow that.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inference.engine import Engine, Reply, Settings, TokenLogprob, Writer

ATTENTION = "onecard_rows"
STEP = 0.25  # seconds that the pieces of prompts may add to a step; the others wait for so long
KEEP = 512 << 20  # bytes of keys and values kept of finished replies
PACKED = 64  # rows up to which packed weights are used: each number of rows costs oneDNN a kernel of its own
TRIM = 8  # finished rows after which freed memory goes back to the system
REUSE = 16  # tokens in common from which keeping them is worth the copying


class Full(Exception):
    """There is no place for these rows, not even to wait."""


class Ended(Exception):
    """The batch's thread has ended: nothing is answered any more."""


@dataclass(frozen=True)
class Event:
    """Text of a reply, with the log-probabilities of its tokens; `end`: it was the last, and it failed with `error`."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    end: bool = False
    error: Exception | None = None


class Row:
    """A reply to be made: the prompt's ids, and after them the reply's. Raises UserError for a wrong grammar."""

    def __init__(
        self,
        engine: Engine,
        ids: list[int],
        settings: Settings,
        sink: Callable[[Event], None],
        *,
        dropped: int = 0,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self.ids, self.settings, self.sink = list(ids), settings, sink
        self.reply = Reply(prompt_tokens=len(ids), dropped_messages=dropped)
        self.draw = engine.draw(settings, len(ids))
        self.writer = Writer(engine, settings, self.reply, shown)
        self.place: Any = None  # the kernel's
        self._told = 0  # log-probabilities that the sink has

    @property
    def longest(self) -> int:
        """Tokens that it may come to."""
        return self.reply.prompt_tokens + self.writer.limit

    def extend(self, logits: Any) -> None:
        """Draws the next token and tells the sink what can be shown."""
        token = self.draw(self.ids, logits, self.reply)
        self.ids.append(token)
        text = self.writer.feed(token)
        if self.reply.finish_reason:
            self.finish(text)
        elif text:
            self._tell(Event(text, self._new_logprobs()))

    def finish(self, text: str = "", error: Exception | None = None) -> None:
        """Ends the reply, whatever state it is in."""
        if error is not None:
            self.reply.finish_reason = "error"
        text += self.writer.end()
        self._tell(Event(text, self._new_logprobs(), True, error))

    def _new_logprobs(self) -> tuple[TokenLogprob, ...]:
        new = tuple(self.reply.logprobs[self._told : self.writer.shown_tokens])
        self._told += len(new)
        return new

    def _tell(self, event: Event) -> None:
        self.sink(event)


class Batch:
    """The thread that owns an engine's model. At most `slots` rows are computed at once; `waiting` more may wait."""

    def __init__(self, engine: Engine, slots: int = 8, waiting: int = 64) -> None:
        self.engine, self.slots, self.waiting = engine, slots, waiting
        self.kernel = engine.rows(slots)
        self.active: list[Row] = []
        self.queue: collections.deque[Row] = collections.deque()
        self._piece = 64  # tokens of prompts a step; found out by measuring
        self._released = 0
        self._row_seconds = 2.0  # what a row takes, on average
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Puts rows in line, all or none. Raises Full where they have no place even to wait, Ended after the end."""
        with self._changed:
            if self._closed:
                raise Ended
            if len(rows) > self.free:
                raise Full
            self.queue.extend(rows)
            self._changed.notify()

    @property
    def free(self) -> int:
        """How many rows have a place, if only to wait."""
        return max(0, self.slots - len(self.active)) + self.waiting - len(self.queue)

    @property
    def alive(self) -> bool:
        return not self._closed

    @property
    def patience(self) -> int:
        """Seconds after which asking again is worth while: what those in line may take."""
        return max(1, min(60, round(self._row_seconds * (1 + len(self.queue) / self.slots) / 2)))

    def close(self) -> None:
        """Ends the thread; replies that still go on are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        fault = None
        try:
            while self._wait():
                self._leave()
                self._admit()
                self._step()
        except Exception as error:
            fault = error
            raise
        finally:  # whatever has happened, nobody waits for a thread that has ended
            with self._changed:
                self._closed = True
            for row in [*self.active, *self.queue]:
                row.finish(error=fault)

    def _wait(self) -> bool:
        """Until there is something to do; False: the end."""
        with self._changed:
            while not (self.active or self.queue or self._closed):
                self._changed.wait()
            return not self._closed

    def _leave(self) -> None:
        """Cancelled rows go, those that wait too."""
        with self._changed:
            gone = [row for row in [*self.active, *self.queue] if row.reply.cancelled]
            self.queue = collections.deque(row for row in self.queue if not row.reply.cancelled)
        for row in gone:
            if row.place is not None:
                self._release(row)
            row.finish()

    def _release(self, row: Row) -> None:
        self._row_seconds += 0.1 * (row.reply.seconds - self._row_seconds)
        self._released += 1
        if self._released % TRIM == 0:
            _trim()
        with self._changed:
            self.active.remove(row)
        self.kernel.close(row.place)

    def _admit(self) -> None:
        """Rows in line take the free slots, in their order, as far as there is memory for them."""
        while self.queue and len(self.active) < self.slots:
            row = self.queue[0]
            if self.active and not self.kernel.has_room(row.longest):
                return
            try:
                row.place = self.kernel.open(row.ids, row.longest)
            except Exception as error:  # noqa: BLE001 - it belongs to one request; the others go on
                with self._changed:
                    self.queue.popleft()
                row.finish(error=error)
                continue
            row.reply.cached_tokens = len(row.place.ids)
            with self._changed:
                self.active.append(self.queue.popleft())

    def _step(self) -> None:
        """One forward pass: the last token of every reply, and pieces of the prompts that are not through yet."""
        work, budget = [], self._piece
        for row in self.active:
            todo = row.ids[len(row.place.ids) :]
            if len(todo) > 1:
                todo = todo[:budget]
                budget -= len(todo)
            if todo:
                work.append((row, todo))
        if not work:
            return
        started = time.perf_counter()
        results = self._forward(work)
        if budget <= 0:
            self._adapt(time.perf_counter() - started)
        for (row, _), result in zip(work, results, strict=True):
            error = result if isinstance(result, Exception) else None
            if error is None and len(row.place.ids) == len(row.ids):
                try:
                    row.extend(result)
                except Exception as fault:  # noqa: BLE001 - it belongs to one request; the others go on
                    error = fault
            if error is not None:
                row.finish(error=error)
            if row.reply.finish_reason:
                self._release(row)

    def _forward(self, work: list[tuple[Row, list[int]]]) -> list[Any]:
        """Logits for each row, or what went wrong with it: where all together fail, each is tried alone."""
        asked = [(row.place, todo, len(row.place.ids) + len(todo) == len(row.ids)) for row, todo in work]
        try:
            return self.kernel.forward(asked)
        except Exception as error:  # noqa: BLE001 - it belongs to one request; the others go on
            return [error] if len(work) == 1 else [self._forward([one])[0] for one in work]

    def _adapt(self, seconds: float) -> None:
        if seconds > 2 * STEP:
            self._piece = max(16, self._piece // 2)
        elif seconds < STEP:
            self._piece = min(2048, self._piece * 2)


def _trim() -> None:
    """Gives freed memory back to the system: rows come and go in all sizes, and glibc keeps the holes between them."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@dataclass(eq=False)
class Place:
    """What a model has computed for a row: its ids, and for each layer their keys and values (1 x heads x room x d)."""

    ids: list[int] = field(default_factory=list)
    keys: dict[int, Any] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    reserved: int = 0  # tokens

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for part in (self.keys, self.values) for t in part.values())

    def write(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Appends the keys and values of new tokens to a layer's; all of its rows that count come back."""
        import torch

        start, end = len(self.ids), len(self.ids) + key.shape[2]
        for part, new in ((self.keys, key), (self.values, value)):
            old = part.get(layer)
            if old is None or old.shape[2] < end:
                room = -(-max(end, start * 5 // 4) // 128) * 128
                part[layer] = torch.empty(*new.shape[:2], room, new.shape[3], dtype=new.dtype, device=new.device)
                if old is not None:
                    part[layer][:, :, :start] = old[:, :, :start]
            part[layer][:, :, start:end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def start(self, length: int) -> Place:
        """A copy of its first `length` tokens."""
        copied = ({i: t[:, :, :length].clone() for i, t in part.items()} for part in (self.keys, self.values))
        return Place(self.ids[:length], *copied)


class FlatRows:
    """The rows of a transformers model, in one flat row without padding."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model = engine, engine.model
        self.opened: list[Place] = []
        self.parked: list[Place] = []  # of finished replies, oldest first
        _register_attention()
        self.model.set_attn_implementation(ATTENTION)
        _pack_weights(self.model)
        self._token_bytes = 0
        self._room = _free_memory(self.model.device)

    def has_room(self, tokens: int) -> bool:
        """Whether a row of so many tokens fits into the memory beside those that are there."""
        reserved = sum(place.reserved for place in self.opened)
        return (reserved + tokens) * self._token_bytes <= self._room

    def open(self, ids: list[int], longest: int) -> Place:
        """A place for a row that begins with `ids`; what another row has computed of them is taken over."""
        shared, best = 0, None
        for place in [*self.opened, *self.parked]:
            same = in_common(place.ids, ids[:-1])
            if same >= max(shared, REUSE):
                shared, best = same, place
        if best is None:
            place = Place()
        elif best in self.parked and shared * 2 >= len(best.ids):
            self.parked.remove(best)
            place, best.ids = best, best.ids[:shared]
        else:
            place = best.start(shared)
        place.reserved = longest
        self.opened.append(place)
        return place

    def close(self, place: Place) -> None:
        """The row is finished; what was computed for it is kept as long as there is memory."""
        self.opened.remove(place)
        self.parked.append(place)
        if place.ids:
            self._token_bytes = place.bytes // max(t.shape[2] for t in place.keys.values())
        while sum(place.bytes for place in self.parked) > min(KEEP, self._room // 4):
            del self.parked[0]

    def forward(self, work: list[tuple[Place, list[int], bool]]) -> list[Any]:
        """The logits (vocabulary, float32) after the tokens of each row, None for those that do not want theirs."""
        import torch

        ids = [token for _, tokens, _ in work for token in tokens]
        places = [len(place.ids) + i for place, tokens, _ in work for i in range(len(tokens))]
        ends, end = [], 0
        for _, tokens, wanted in work:
            end += len(tokens)
            ends += [end - 1] if wanted else []
        device, keeps = self.model.device, bool(self.engine._last_only)
        last = {"logits_to_keep": torch.tensor(ends or [0], device=device)} if keeps else {}
        _flat.work = [_Piece(place, len(tokens)) for place, tokens, _ in work]
        try:
            with torch.inference_mode(), self.engine._adapters.switched(self.engine._trained):
                output = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([places], device=device),
                    use_cache=False,
                    **last,
                )
                logits = (output.logits[0] if keeps else output.logits[0, ends]).float()
        finally:
            _flat.work = None
        for place, tokens, _ in work:
            place.ids += tokens
        found = iter(logits)
        return [next(found) if wanted else None for _, _, wanted in work]


class SerialRows:
    """The rows of any transformers model, one after the other in each step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def has_room(self, _: int) -> bool:
        return True

    def open(self, *_: Any) -> Place:
        from transformers import DynamicCache

        place = Place()
        place.keys[0] = DynamicCache(config=self.engine.model.config)
        return place

    def close(self, place: Place) -> None:
        place.keys.clear()

    def forward(self, work: list[tuple[Place, list[int], bool]]) -> list[Any]:
        results: list[Any] = []
        for place, tokens, _ in work:
            try:
                results.append(self.engine._forward(tokens, place.keys[0]))
                place.ids += tokens
            except Exception as error:  # noqa: BLE001 - it belongs to one request; the others go on
                results.append(error)
        return results


def transformers_rows(engine: Any) -> FlatRows | SerialRows:
    """FlatRows where its logits are those that the model gives to each row alone, else SerialRows."""
    config = engine.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    able = engine.model.config._attn_implementation in ("sdpa", ATTENTION) and not kinds & {"dynamic", "longrope"}
    if able:
        rows = FlatRows(engine)
        if _is_exact(engine, rows):
            return rows
        engine.model.set_attn_implementation("sdpa")
    return SerialRows(engine)


def _is_exact(engine: Any, rows: FlatRows) -> bool:
    """Compares the flat rows' logits of two short prompts, one in two pieces, with those of each alone."""
    import torch

    size = engine.model.get_input_embeddings().num_embeddings
    prompts = [[(7 * i * i + 31) % size for i in range(40)], [(5 * i * i + 11) % size for i in range(9)]]
    alone = [engine._forward(ids, SerialRows(engine).open().keys[0]) for ids in prompts]
    first, second = (rows.open(ids, len(ids)) for ids in prompts)
    try:
        rows.forward([(first, prompts[0][:24], False)])
        rows.forward([(second, prompts[1][:-1], False), (first, prompts[0][24:-1], False)])
        found = rows.forward([(first, prompts[0][-1:], True), (second, prompts[1][-1:], True)])
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        for place in (first, second):
            rows.close(place)
        rows.parked.clear()
    tolerance = 1e-3 if engine.model.dtype == torch.float32 else 0.05
    return all(float((a - b).abs().max() / a.abs().max()) < tolerance for a, b in zip(alone, found, strict=True))


def _pack_weights(model: Any) -> None:
    """On a CPU, a second copy of the linear layers' weights as oneDNN likes them, used where several rows are computed.

    PyTorch's own product of few rows with a float32 weight repacks the weight each time: with 8 rows it takes up to
    four times as long (docs/log.md). Left out where the copy would take more than a quarter of the free memory.
    """
    import torch

    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and "forward" not in vars(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    able = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if able and size < _free_memory(model.device) // 2:
        for layer in layers:
            _pack(layer)


def _pack(layer: Any) -> None:
    import torch

    plain, ops = layer.forward, torch.ops.mkldnn  # what torch.compile makes of a linear layer
    weight = ops._reorder_linear_weight(layer.weight.detach(), 8)

    def forward(rows: Any) -> Any:
        if getattr(_flat, "work", None) is None or not 1 < rows.shape[:-1].numel() <= PACKED:
            return plain(rows)
        return ops._linear_pointwise(rows, weight, layer.bias, "none", [], "")

    layer.forward = forward


def in_common(some: list[int], others: list[int]) -> int:
    """How many ids both begin with."""
    return next((i for i, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


def _free_memory(device: Any) -> int:
    """Bytes that keys and values may take."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // 2


# ---------------------------------------------------------------------------------------------------------------------
# The attention of flat rows


_flat = threading.local()  # .work: the pieces of the forward pass that this thread is in


class _Piece:
    """The new tokens of a row in a flat one."""

    def __init__(self, place: Place, tokens: int) -> None:
        self.place, self.tokens = place, tokens
        self._bands: dict[int | None, Any] = {}

    def band(self, window: int | None, device: Any) -> Any:
        """Which keys each new token sees (tokens x all keys, booleans); None: those up to its own and no more."""
        import torch

        if window not in self._bands:
            start, end = len(self.place.ids), len(self.place.ids) + self.tokens
            distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)[None, :]
            band = (distance >= 0) & (distance < (window or end))
            self._bands[window] = None if start == 0 and (window or end) >= end else band
        return self._bands[window]


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, rows_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask_for_rows)


def _no_mask_for_rows(*args: Any, **kwargs: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs) if getattr(_flat, "work", None) is None else None


def _may_group(device: Any, band: Any) -> bool:
    """Whether PyTorch may be told that heads share their keys: on a card, before torch 2.14, a mask beside that leaves
    only the kernel that writes down all scores, new tokens x keys for each head."""
    return band is None or device.type != "cuda"


def rows_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    sliding_window: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Attention of each row's new tokens to that row's keys; outside of a flat forward pass transformers' own.

    `query` is 1 x heads x T x d, `key` and `value` 1 x key-value heads x T x d. Returns 1 x T x heads x d.
    """
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    work: list[_Piece] | None = getattr(_flat, "work", None)
    if work is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    heads, shared, at = query.shape[1], key.shape[1], 0
    result = query.new_empty(1, query.shape[2], heads, value.shape[3])
    for piece in work:
        to = at + piece.tokens
        keys, values = piece.place.write(module.layer_idx, key[:, :, at:to], value[:, :, at:to])
        if piece.tokens == 1:  # the heads that share a key are like tokens that see the same
            if sliding_window is not None:
                keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
            grouped = query[:, :, at].reshape(1, shared, heads // shared, -1)
            seen = scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            result[:, at] = seen.reshape(1, heads, -1)
        else:
            band = piece.band(sliding_window, query.device)
            grouped = heads != shared
            if grouped and not _may_group(query.device, band):
                keys, values = (part.repeat_interleave(heads // shared, 1) for part in (keys, values))
                grouped = False
            seen = scaled_dot_product_attention(
                query[:, :, at:to],
                keys,
                values,
                attn_mask=band,
                is_causal=band is None,
                scale=scaling,
                enable_gqa=grouped,
            )
            result[:, at:to] = seen.transpose(1, 2)
        at = to
    return result, None
