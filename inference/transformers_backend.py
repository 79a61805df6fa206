"""How a transformers model computes the tokens of replies.

`FlatBackend` puts the new tokens of all sequences into one flat row and lets each attend to its own keys and values
only: there is no padding, and each reply is what it would be alone. `SerialBackend` computes one sequence after the
other as `generate` does, for a single reply and for models that do not allow the flat row.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from inspect import signature
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inference.backend import Backend, Sequence

PACKED_ROWS = 64  # rows up to which packed weights are used: each number of rows costs oneDNN a kernel of its own
ATTENTION = "onecard_rows"  # the name under which transformers knows flat_attention


def make_backend(engine: Any, slots: int) -> Backend:
    """FlatBackend for several replies where its logits are those that the model gives to each alone."""
    serial = SerialBackend(engine, slots)
    if slots == 1:
        return serial
    memory, prompts = free_memory(engine.model.device), _probes(engine)
    alone = [serial.open(ids, len(ids)) for ids in prompts]
    expected = serial.forward([(sequence, ids, True) for sequence, ids in zip(alone, prompts, strict=True)])
    serial.opened.clear()
    if failed := next((one for one in expected if isinstance(one, Exception)), None):
        raise failed
    serial.capacity = _tokens_in(memory, slots, *alone)
    config = engine.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    able = engine.model.config._attn_implementation in ("sdpa", ATTENTION) and not kinds & {"dynamic", "longrope"}
    if able and engine.croppable:
        flat = FlatBackend(engine, slots, memory)
        if _is_exact(flat, prompts, expected):
            flat.capacity = serial.capacity
            return flat
        engine.model.set_attn_implementation("sdpa")
    return serial


class TransformersBackend(Backend):
    """Sequences whose caches are transformers' own."""

    continues = True  # a prompt computed in pieces is what it is in one pass

    def __init__(self, engine: Any, slots: int) -> None:
        super().__init__(slots)
        self.engine, self.model = engine, engine.model

    def can_take(self, other: Sequence, length: int) -> bool:
        return self.continues and (self.engine.croppable or length == len(other.ids))

    def copy_cache(self, cache: Cache) -> Cache:
        with torch.inference_mode():
            return copy.deepcopy(cache)

    def crop(self, sequence: Sequence, length: int) -> None:
        sequence.cache.crop(length - len(sequence.ids))  # negative: so many from the end


class SerialBackend(TransformersBackend):
    """One sequence after the other in each step, with the cache that `generate` uses where it cannot be cropped."""

    def __init__(self, engine: Any, slots: int) -> None:
        super().__init__(engine, slots)
        known = signature(self.model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in known else "past_key_values"
        self.takes_positions = "position_ids" in known

    @functools.cached_property
    def continues(self) -> bool:
        """Some recurrent layers of transformers begin anew with each piece, and some keep no cache to go on with."""
        if self.engine.croppable:
            return True
        ids, found = [(7 * i * i + 31) % self.engine.vocabulary_size for i in range(24)], []
        for ends in ((23, 24), (9, 20, 23, 24)):
            sequence, logits = Sequence(), []
            for end in ends:
                logits.append(self._logits(sequence, ids[len(sequence.ids) : end]))
                if sequence.cache is None:
                    return False
            found.append(torch.stack(logits[-2:]))  # a piece may be wrong itself, or what comes after it
        return _difference(*found) < (1e-4 if self.model.dtype == torch.float32 else 0.03)

    def new_cache(self) -> Cache | None:
        """None: the model makes its own. Without a configuration a cache keeps what windows drop: it can be cropped."""
        return DynamicCache() if self.engine.croppable else None

    def forward(self, work: list[tuple[Sequence, list[int], bool]]) -> list[Any]:
        results: list[Any] = []
        for sequence, tokens, wanted in work:
            try:
                if not (self.continues or (wanted and len(tokens) == 1 and sequence.cache)):
                    tokens, sequence.ids, sequence.cache = [*sequence.ids, *tokens], [], None
                    if not wanted:  # all in one pass with the last piece
                        sequence.ids = tokens
                        results.append(None)
                        continue
                results.append(self._logits(sequence, tokens))
            except Exception as error:  # noqa: BLE001 - one request failed; the others go on
                results.append(error)
                sequence.ids.clear()  # some layers have seen tokens that others have not
                sequence.cache = self.new_cache()
        return results

    def _logits(self, sequence: Sequence, tokens: list[int]) -> Any:
        """Computes new ids of a sequence; the logits after the last."""
        self.engine.set_adapter()
        with torch.inference_mode():
            inputs = {"input_ids": torch.tensor([tokens], device=self.model.device), self.cache_name: sequence.cache}
            if self.takes_positions:  # a cache whose first layer keeps no keys does not know how long it is
                start = len(sequence.ids)
                places = torch.arange(start, start + len(tokens), device=self.model.device)
                inputs["position_ids"] = places[None]
            output = self.model(**inputs, use_cache=True, **self.engine.last_logits_only)
            sequence.cache = getattr(output, self.cache_name, None)
            sequence.ids += tokens
            return output.logits[0, -1].float()


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers that grow by a quarter: a new token is no copy of all that were before it."""

    buffers: tuple[Any, Any] = (None, None)
    window: int | None = None  # that its attention was told

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Appends keys and values (1 x heads x new tokens x d); returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self.buffers[0] is None or self.buffers[0].shape[2] < end:
            before, capacity = (self.keys, self.values), (end * 5 // 4 // 128 + 1) * 128
            self.buffers = tuple(
                new.new_empty(*new.shape[:2], capacity, new.shape[3]) for new in (key_states, value_states)
            )
            for buffer, old in zip(self.buffers, before if start else (), strict=False):
                buffer[:, :, :start] = old
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


class FlatBackend(TransformersBackend):
    """All sequences of a step as one flat row without padding; each attends to its own keys and values only."""

    def __init__(self, engine: Any, slots: int, memory: int) -> None:
        super().__init__(engine, slots)
        AttentionInterface.register(ATTENTION, flat_attention)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        self.model.set_attn_implementation(ATTENTION)
        _pack_weights(self.model, memory // 2)

    def new_cache(self) -> Cache:
        return Cache(layer_class_to_replicate=GrowingLayer)

    def forward(self, work: list[tuple[Sequence, list[int], bool]]) -> list[Any]:
        ids = [token for _, tokens, _ in work for token in tokens]
        places = [len(sequence.ids) + i for sequence, tokens, _ in work for i in range(len(tokens))]
        ends, end = [], 0
        for _, tokens, wanted in work:
            end += len(tokens)
            ends += [end - 1] if wanted else []
        device, keeps = self.model.device, bool(self.engine.last_logits_only)
        last = {"logits_to_keep": torch.tensor(ends or [0], device=device)} if keeps else {}
        _forward_pass.segments = [_Segment(sequence, len(tokens)) for sequence, tokens, _ in work]
        try:
            self.engine.set_adapter()
            with torch.inference_mode():
                output = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([places], device=device),
                    use_cache=False,
                    **last,
                )
                logits = (output.logits[0] if keeps else output.logits[0, ends]).float()
        except Exception:
            for sequence, *_ in work:  # some layers have seen tokens that others have not
                for layer in sequence.cache.layers:
                    layer.crop(len(sequence.ids) - layer.get_seq_length())
            raise
        finally:
            _forward_pass.segments = None
        for sequence, tokens, _ in work:
            sequence.ids += tokens
        found = iter(logits)
        return [next(found) if wanted else None for _, _, wanted in work]


def _pack_weights(model: Any, limit: int) -> None:
    """On a CPU, a second copy (`limit`: bytes at most) of the linear layers' weights as oneDNN likes them.

    PyTorch's own product of few rows with a float32 weight packs the weight anew each time: a step of 8 rows takes
    half as long again. The two operations are what torch.compile makes of a linear layer.
    """
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and "forward" not in vars(layer)]
    able = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not able or sum(layer.weight.nbytes for layer in layers) > limit:
        return
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 8)
        layer.forward = functools.partial(_packed_forward, layer.forward, weight, layer.bias)


def _packed_forward(plain: Any, weight: Any, bias: Any, rows: Any) -> Any:
    if getattr(_forward_pass, "segments", None) is None or not 1 < rows.shape[:-1].numel() <= PACKED_ROWS:
        return plain(rows)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def free_memory(device: Any) -> int:
    """Bytes that keys and values may take; their buffers are up to a quarter larger."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.65)
    return psutil.virtual_memory().available // 2


def _tokens_in(memory: int, slots: int, long: Sequence, short: Sequence) -> int:
    """How many tokens' caches fit into so many bytes beside what each sequence has of one size, such as a state."""

    def size(cache: Any) -> int:
        parts: dict[int, Any] = {}
        copy.deepcopy(cache, parts)
        return sum(part.nbytes for part in parts.values() if isinstance(part, torch.Tensor))

    with torch.inference_mode():
        sizes = size(long.cache), size(short.cache)
    token = (sizes[0] - sizes[1]) / (len(long.ids) - len(short.ids))
    fixed = sizes[1] - token * len(short.ids)
    return max(0, int((memory - 2 * slots * fixed) / token)) if token > 0 else sys.maxsize


def _windows(model: Any) -> list[int | None]:
    """How many tokens each layer's attention sees: a window or chunk, or None."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]


def _probes(engine: Any) -> list[list[int]]:
    """A long and a short prompt; the long one exceeds windows and chunks, on a CPU only small ones: it has no time."""
    longest = 8192 if engine.model.device.type == "cuda" else 256
    size = engine.model.get_input_embeddings().num_embeddings
    length = 40 + max((window for window in _windows(engine.model) if window and window <= longest), default=0)
    return [[(7 * i * i + 31) % size for i in range(length)], [(5 * i * i + 11) % size for i in range(9)]]


def _difference(some: Any, others: Any) -> float:
    return float((some - others).abs().max() / some.abs().max())


def _is_exact(flat: FlatBackend, prompts: list[list[int]], expected: list[Any]) -> bool:
    """Whether the flat row of two prompts, one in two segments, gives the logits of each alone, and the attention is
    told the windows that transformers' cache has (a chunk it is not told)."""
    first, second = (flat.open(ids, len(ids)) for ids in prompts)
    try:
        flat.forward([(first, prompts[0][:24], False)])
        flat.forward([(second, prompts[1][:-1], False), (first, prompts[0][24:-1], False)])
        found = flat.forward([(first, prompts[0][-1:], True), (second, prompts[1][-1:], True)])
        told = [layer.window for layer in first.cache.layers]
        tolerance = 1e-3 if flat.model.dtype == torch.float32 else 0.05
        same = all(_difference(a, b) < tolerance for a, b in zip(expected, found, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        flat.opened.clear()
    return same and all(a == b for a, b in zip(told, _windows(flat.model), strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# The attention of flat rows


_forward_pass = threading.local()  # .segments: those of the flat forward pass that this thread is in


class _Segment:
    """The new tokens of a sequence in the flat row."""

    def __init__(self, sequence: Sequence, tokens: int) -> None:
        self.sequence, self.tokens = sequence, tokens
        self._masks: dict[int | None, Any] = {}

    def mask(self, window: int | None, device: Any) -> Any:
        """Which keys each new token sees (tokens x all keys, booleans); None: those up to its own and no more."""
        if window not in self._masks:
            start = len(self.sequence.ids)
            end = start + self.tokens
            distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)[None, :]
            mask = (distance >= 0) & (distance < (window or end))
            self._masks[window] = None if start == 0 and (window or end) >= end else mask
        return self._masks[window]


def _no_mask(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **kwargs) if getattr(_forward_pass, "segments", None) is None else None


def flat_attention(
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
    """Attention of each sequence's new tokens to its own keys; outside of a flat forward pass transformers' own.

    `query` is 1 x heads x T x d, `key` and `value` 1 x key-value heads x T x d. Returns 1 x T x heads x d.
    """
    work: list[_Segment] | None = getattr(_forward_pass, "segments", None)
    if work is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    at = 0
    result = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for segment in work:
        new = slice(at, at + segment.tokens)
        keys, values = segment.sequence.cache.update(key[:, :, new], value[:, :, new], module.layer_idx)
        segment.sequence.cache.layers[module.layer_idx].window = sliding_window
        if segment.tokens == 1:
            result[:, new] = _attend_one(query[:, :, new], keys, values, sliding_window, scaling)
        else:
            mask = segment.mask(sliding_window, query.device)
            result[:, new] = _attend_several(query[:, :, new], keys, values, mask, scaling)
        at = new.stop
    return result, None


def _attend_one(query: Any, keys: Any, values: Any, window: int | None, scaling: float | None) -> Any:
    """Attention of one token, 1 x 1 x heads x d: the heads that share a key are like tokens that see the same."""
    if window is not None:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    heads, shared = query.shape[1], keys.shape[1]
    grouped = query.reshape(1, shared, heads // shared, -1)
    return scaled_dot_product_attention(grouped, keys, values, scale=scaling).reshape(1, 1, heads, -1)


def _attend_several(query: Any, keys: Any, values: Any, mask: Any, scaling: float | None) -> Any:
    """Attention of several tokens, 1 x T x heads x d; causal without a mask."""
    shared = query.shape[1] // keys.shape[1]  # heads that share a key
    if mask is not None and shared > 1:  # with both, PyTorch before 2.14 writes down all scores on a card
        keys, values = (part.repeat_interleave(shared, 1) for part in (keys, values))
    grouped = query.shape[1] != keys.shape[1]
    seen = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return seen.transpose(1, 2)
