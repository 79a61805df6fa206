"""How a transformers model computes the tokens of replies.

`FlatBackend` puts the new tokens of all sequences into one flat row and lets each attend to its own keys and values
only: there is no padding, and each reply is what it would be alone. `SerialBackend` computes one sequence after the
other as `generate` does, for a single reply and for models that do not allow the flat row.
"""

from __future__ import annotations

import copy
import functools
import threading
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
    config = engine.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    able = engine.model.config._attn_implementation in ("sdpa", ATTENTION) and not kinds & {"dynamic", "longrope"}
    if slots > 1 and able:
        flat = FlatBackend(engine, slots)
        if _is_exact(engine, flat):
            return flat
        engine.model.set_attn_implementation("sdpa")
    return SerialBackend(engine, slots)


class TransformersBackend(Backend):
    """Sequences whose caches are transformers' own."""

    def __init__(self, engine: Any, slots: int) -> None:
        super().__init__(slots)
        self.engine, self.model = engine, engine.model

    def can_crop(self, cache: Cache) -> bool:
        return cache.is_croppable

    def copy_cache(self, cache: Cache) -> Cache:
        with torch.inference_mode():
            return copy.deepcopy(cache)

    def crop(self, sequence: Sequence, length: int) -> None:
        sequence.cache.crop(length - len(sequence.ids))  # negative: so many from the end


class SerialBackend(TransformersBackend):
    """One sequence after the other in each step, with the cache that `generate` uses where it can be cropped."""

    def new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        return cache if any(cache.is_linear) else DynamicCache()  # keeps what a window would drop: it can be cropped

    def forward(self, work: list[tuple[Sequence, list[int], bool]]) -> list[Any]:
        results: list[Any] = []
        for sequence, tokens, _ in work:
            try:
                results.append(self._logits(sequence, tokens))
                sequence.ids += tokens
            except Exception as error:  # noqa: BLE001 - one request failed; the others go on
                results.append(error)
                sequence.ids.clear()  # some layers have seen tokens that others have not
                sequence.cache = self.new_cache()
        return results

    def _logits(self, sequence: Sequence, tokens: list[int]) -> Any:
        self.engine.set_adapter()
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=self.model.device)
            last = self.engine.last_logits_only
            output = self.model(input_ids=ids, past_key_values=sequence.cache, use_cache=True, **last)
            return output.logits[0, -1].float()


class GrowingLayer(DynamicLayer):
    """Keys and values in buffers that grow by a quarter: a new token is no copy of all that were before it."""

    buffers: tuple[Any, Any] = (None, None)

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

    def __init__(self, engine: Any, slots: int) -> None:
        super().__init__(engine, slots)
        AttentionInterface.register(ATTENTION, flat_attention)
        AttentionMaskInterface.register(ATTENTION, _no_mask)
        self.model.set_attn_implementation(ATTENTION)
        self._memory = free_memory(self.model.device)
        _pack_weights(self.model, self._memory // 2)

    def new_cache(self) -> Cache:
        return Cache(layer_class_to_replicate=GrowingLayer)

    def close(self, sequence: Sequence) -> None:
        if sequence.ids:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in sequence.cache.layers)
            self.capacity = self._memory * len(sequence.ids) // max(size, 1)
        super().close(sequence)

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
    """Bytes that keys and values may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // 2


def _is_exact(engine: Any, flat: FlatBackend) -> bool:
    """Compares the flat row's logits of two short prompts, one in two segments, with those of each alone."""
    size = engine.model.get_input_embeddings().num_embeddings
    prompts = [[(7 * i * i + 31) % size for i in range(40)], [(5 * i * i + 11) % size for i in range(9)]]
    alone = SerialBackend(engine, 1)
    expected = alone.forward([(alone.open(ids, len(ids)), ids, True) for ids in prompts])
    first, second = (flat.open(ids, len(ids)) for ids in prompts)
    try:
        flat.forward([(first, prompts[0][:24], False)])
        flat.forward([(second, prompts[1][:-1], False), (first, prompts[0][24:-1], False)])
        found = flat.forward([(first, prompts[0][-1:], True), (second, prompts[1][-1:], True)])
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        for sequence in (first, second):
            flat.close(sequence)
        flat.finished.clear()
    tolerance = 1e-3 if engine.model.dtype == torch.float32 else 0.05
    return all(float((a - b).abs().max() / a.abs().max()) < tolerance for a, b in zip(expected, found, strict=True))


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
