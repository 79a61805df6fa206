"""How the rows of a batch are computed by a transformers model.

`FlatKernel` puts the new tokens of all rows into one flat row and lets each attend to its own keys and values only:
there is no padding, and each row's text is what it would be alone. `SerialKernel` computes row after row, for models
that do not allow that.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from inference.engine import MIN_SHARED, common_prefix

ATTENTION = "onecard_rows"  # the name under which transformers knows flat_attention
KEPT_BYTES = 512 << 20  # keys and values kept of finished replies
PACKED_ROWS = 64  # rows up to which packed weights are used: each number of rows costs oneDNN a kernel of its own


@dataclass(eq=False)
class KVCache:
    """Token ids, and for each layer their keys and values (1 x heads x capacity x d)."""

    ids: list[int] = field(default_factory=list)
    keys: dict[int, Any] = field(default_factory=dict)
    values: dict[int, Any] = field(default_factory=dict)
    reserved: int = 0  # tokens that the row may come to

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for part in (self.keys, self.values) for t in part.values())

    def append(self, layer: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Appends keys and values (1 x heads x new tokens x d) to a layer's; returns all that are valid."""
        start, end = len(self.ids), len(self.ids) + key.shape[2]
        for part, new in ((self.keys, key), (self.values, value)):
            old = part.get(layer)
            if old is None or old.shape[2] < end:
                capacity = -(-max(end, start * 5 // 4) // 128) * 128
                part[layer] = torch.empty(*new.shape[:2], capacity, new.shape[3], dtype=new.dtype, device=new.device)
                if old is not None:
                    part[layer][:, :, :start] = old[:, :, :start]
            part[layer][:, :, start:end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def prefix(self, length: int) -> KVCache:
        """A copy of its first `length` tokens."""
        copied = ({i: t[:, :, :length].clone() for i, t in part.items()} for part in (self.keys, self.values))
        return KVCache(self.ids[:length], *copied)


def free_memory(device: Any) -> int:
    """Bytes that keys and values may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // 2


class FlatKernel:
    """Computes all rows of a step as one flat row without padding; each attends to its own keys and values only."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model = engine, engine.model
        self.opened: list[KVCache] = []
        self.finished: list[KVCache] = []  # oldest first
        _register_attention()
        self.model.set_attn_implementation(ATTENTION)
        _pack_weights(self.model)
        self._token_bytes = 0
        self._memory = free_memory(self.model.device)

    def fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens fits into the memory beside those that are there."""
        reserved = sum(cache.reserved for cache in self.opened)
        return (reserved + tokens) * self._token_bytes <= self._memory

    def open(self, ids: list[int], max_tokens: int) -> KVCache:
        """The cache of a row that begins with `ids`; what another row has computed of them is taken over."""
        shared, best = 0, None
        for cache in [*self.opened, *self.finished]:
            same = common_prefix(cache.ids, ids[:-1])
            if same >= max(shared, MIN_SHARED):
                shared, best = same, cache
        if best is None:
            cache = KVCache()
        elif best in self.finished and shared * 2 >= len(best.ids):
            self.finished.remove(best)
            cache, best.ids = best, best.ids[:shared]
        else:
            cache = best.prefix(shared)
        cache.reserved = max_tokens
        self.opened.append(cache)
        return cache

    def close(self, cache: KVCache) -> None:
        """The row is finished; what was computed for it is kept as long as there is memory."""
        self.opened.remove(cache)
        self.finished.append(cache)
        if cache.ids:
            self._token_bytes = cache.bytes // max(t.shape[2] for t in cache.keys.values())
        while sum(cache.bytes for cache in self.finished) > min(KEPT_BYTES, self._memory // 4):
            del self.finished[0]

    def forward(self, work: list[tuple[KVCache, list[int], bool]]) -> list[Any]:
        """One forward pass over `work`: for each row its cache, new ids, and whether the logits after them are wanted.

        Returns for each row its logits (vocabulary, float32), or None.
        """
        ids = [token for _, tokens, _ in work for token in tokens]
        places = [len(cache.ids) + i for cache, tokens, _ in work for i in range(len(tokens))]
        ends, end = [], 0
        for _, tokens, wanted in work:
            end += len(tokens)
            ends += [end - 1] if wanted else []
        device, keeps = self.model.device, bool(self.engine.last_logits_only)
        last = {"logits_to_keep": torch.tensor(ends or [0], device=device)} if keeps else {}
        _forward_pass.segments = [_Segment(cache, len(tokens)) for cache, tokens, _ in work]
        try:
            with torch.inference_mode(), self.engine.adapter_state():
                output = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([places], device=device),
                    use_cache=False,
                    **last,
                )
                logits = (output.logits[0] if keeps else output.logits[0, ends]).float()
        finally:
            _forward_pass.segments = None
        for cache, tokens, _ in work:
            cache.ids += tokens
        found = iter(logits)
        return [next(found) if wanted else None for _, _, wanted in work]


class SerialKernel:
    """The rows of any transformers model, one after the other in each step."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def fits(self, _: int) -> bool:
        return True

    def open(self, *_: Any) -> KVCache:
        cache = KVCache()
        cache.keys[0] = DynamicCache(config=self.engine.model.config)
        return cache

    def close(self, cache: KVCache) -> None:
        cache.keys.clear()

    def forward(self, work: list[tuple[KVCache, list[int], bool]]) -> list[Any]:
        results: list[Any] = []
        for cache, tokens, _ in work:
            try:
                results.append(self.engine.forward(tokens, cache.keys[0]))
                cache.ids += tokens
            except Exception as error:  # noqa: BLE001 - one request failed; the others go on
                results.append(error)
        return results


def transformers_kernel(engine: Any) -> FlatKernel | SerialKernel:
    """FlatKernel where its logits are those that the model gives to each row alone, else SerialKernel."""
    config = engine.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    able = engine.model.config._attn_implementation in ("sdpa", ATTENTION) and not kinds & {"dynamic", "longrope"}
    if able:
        rows = FlatKernel(engine)
        if _is_exact(engine, rows):
            return rows
        engine.model.set_attn_implementation("sdpa")
    return SerialKernel(engine)


def _is_exact(engine: Any, rows: FlatKernel) -> bool:
    """Compares the flat rows' logits of two short prompts, one in two segments, with those of each alone."""
    size = engine.model.get_input_embeddings().num_embeddings
    prompts = [[(7 * i * i + 31) % size for i in range(40)], [(5 * i * i + 11) % size for i in range(9)]]
    alone = [engine.forward(ids, SerialKernel(engine).open().keys[0]) for ids in prompts]
    first, second = (rows.open(ids, len(ids)) for ids in prompts)
    try:
        rows.forward([(first, prompts[0][:24], False)])
        rows.forward([(second, prompts[1][:-1], False), (first, prompts[0][24:-1], False)])
        found = rows.forward([(first, prompts[0][-1:], True), (second, prompts[1][-1:], True)])
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        for cache in (first, second):
            rows.close(cache)
        rows.finished.clear()
    tolerance = 1e-3 if engine.model.dtype == torch.float32 else 0.05
    return all(float((a - b).abs().max() / a.abs().max()) < tolerance for a, b in zip(alone, found, strict=True))


def _pack_weights(model: Any) -> None:
    """On a CPU, a second copy of the linear layers' weights as oneDNN likes them, used where several rows are computed.

    PyTorch's own product of few rows with a float32 weight repacks the weight each time: with 8 rows it takes up to
    four times as long (docs/log.md). Left out where the copy would take more than a quarter of the free memory.
    """
    layers = [layer for layer in model.modules() if type(layer) is torch.nn.Linear and "forward" not in vars(layer)]
    size = sum(layer.weight.nbytes for layer in layers)
    able = model.device.type == "cpu" and model.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if able and size < free_memory(model.device) // 2:
        for layer in layers:
            _pack(layer)


def _pack(layer: Any) -> None:
    plain, ops = layer.forward, torch.ops.mkldnn  # what torch.compile makes of a linear layer
    weight = ops._reorder_linear_weight(layer.weight.detach(), 8)

    def forward(rows: Any) -> Any:
        if getattr(_forward_pass, "segments", None) is None or not 1 < rows.shape[:-1].numel() <= PACKED_ROWS:
            return plain(rows)
        return ops._linear_pointwise(rows, weight, layer.bias, "none", [], "")

    layer.forward = forward


# ---------------------------------------------------------------------------------------------------------------------
# The attention of flat rows


_forward_pass = threading.local()  # .segments: those of the flat forward pass that this thread is in


class _Segment:
    """The new tokens of a row in a flat one."""

    def __init__(self, cache: KVCache, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens
        self._masks: dict[int | None, Any] = {}

    def mask(self, window: int | None, device: Any) -> Any:
        """Which keys each new token sees (tokens x all keys, booleans); None: those up to its own and no more."""
        if window not in self._masks:
            start, end = len(self.cache.ids), len(self.cache.ids) + self.tokens
            distance = torch.arange(start, end, device=device)[:, None] - torch.arange(end, device=device)[None, :]
            mask = (distance >= 0) & (distance < (window or end))
            self._masks[window] = None if start == 0 and (window or end) >= end else mask
        return self._masks[window]


def _register_attention() -> None:
    AttentionInterface.register(ATTENTION, flat_attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **kwargs) if getattr(_forward_pass, "segments", None) is None else None


def _may_group(device: Any, mask: Any) -> bool:
    """Whether PyTorch may be told that heads share their keys: on a card, before torch 2.14, a mask beside that leaves
    only the kernel that writes down all scores, new tokens x keys for each head."""
    return mask is None or device.type != "cuda"


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
    """Attention of each row's new tokens to that row's keys; outside of a flat forward pass transformers' own.

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
        keys, values = segment.cache.append(module.layer_idx, key[:, :, new], value[:, :, new])
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
    heads, shared = query.shape[1], keys.shape[1]
    grouped = heads != shared
    if grouped and not _may_group(query.device, mask):
        keys, values = (part.repeat_interleave(heads // shared, 1) for part in (keys, values))
        grouped = False
    seen = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
    return seen.transpose(1, 2)
