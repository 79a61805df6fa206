"""Samples → flat batches: one row without padding in which no sample sees another.

A batch is `input_ids`, `labels`, `position_ids` (each 1 × T) and `packed_seq_lengths` (int32, one a sample). Unsloth's
GPU kernels read the boundaries from `packed_seq_lengths`; on a CPU cpu.py does.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Config, Message

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import torch

FLAT_STAGES = ("sft", "pt")  # those whose batches are flat
IGNORED = -100  # the label of a token that is not learned, as in transformers
SEPARABLE = {"full_attention", "sliding_attention"}  # the kinds of layers that keep the samples of a flat batch apart
# What keys of config.json start with where there are others: state spaces, convolutions, linear attention. Not every
# such model lists its layers' kinds.
RECURRENT = ("mamba", "ssm", "state_size", "conv", "linear_conv", "linear_attn", "lru_width")


def mixes_samples(folder: Path) -> bool:
    """Whether layers of the model in `folder` would let the samples of a flat batch see each other."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings |= settings.get("text_config") or {}  # of a model that sees images, too
    if not SEPARABLE.issuperset(settings.get("layer_types") or ()):
        return True
    if any(key.startswith(RECURRENT) for key in settings):
        return True
    # Unsloth's Gemma 2 takes no notice of boundaries where it caps the attention's scores
    return settings.get("model_type") == "gemma2"


PROBE = 600  # tokens at most of the longer sample of a probe, which is to be longer than a window or chunk


def probe_samples(model: Any) -> list[torch.Tensor]:
    """Token ids (1 x T) of two samples to try a loaded model with, the first longer than its windows and chunks."""
    import torch

    settings = model.config.get_text_config()
    limits = [getattr(settings, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    longer = min(max([16, *(limit + 8 for limit in limits if isinstance(limit, int))]), PROBE)
    quarter = settings.vocab_size // 4  # apart from control tokens and those of images
    places = torch.arange(longer, device=model.device)
    ids = quarter + (7 * places * places + 31 * places) % quarter
    return [ids[None], ids[None, 5:13]]


def probe_batch(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Samples of a probe as a flat batch in which all tokens are learned."""
    rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids in samples]
    return {name: tensor.to(samples[0].device) for name, tensor in collate(rows).items()}


def logits_alone(model: Any) -> torch.Tensor:
    """Logits (T x vocabulary) of the samples of a probe, each in a forward pass of its own."""
    import torch

    with torch.no_grad():
        return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in probe_samples(model)])


def keeps_apart(model: Any, alone: torch.Tensor) -> bool:
    """Whether the logits of a flat batch are those of each of its samples alone, as `logits_alone` has them.

    Layers that mix samples, or that lose the batch's boundaries on their way to the attention, change them by far more
    than rounding does. Chunks are not known to the attention of a flat batch, and may be too long to try.
    """
    import torch

    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return False
    samples = probe_samples(model)
    batch = probe_batch(samples)
    del batch["labels"]
    try:
        with torch.no_grad():
            flat = model(**batch, use_cache=False).logits[0].float()
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):  # what does not take such a batch
        return False
    rounding = 1e-3 if model.dtype == torch.float32 else 0.05
    lengths = [ids.shape[1] for ids in samples]
    pairs = zip(flat.split(lengths), alone.split(lengths), strict=True)
    return all(bool((one - own).norm() <= rounding * (own - own.mean(-1, keepdim=True)).norm()) for one, own in pairs)


def fit_batches(config: Config) -> tuple[Config, Message | None]:
    """The configuration for the model on the disk, and what was changed: one sample a forward pass if it mixes them.

    An optimizer step still sees as many samples, except that packed rows held several.
    """
    is_flat = config.stage in FLAT_STAGES
    if not is_flat or not mixes_samples(Path(config.model_name_or_path)):
        return config, None
    one = dataclasses.replace(
        config,
        packing=False,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.gradient_accumulation_steps * config.per_device_train_batch_size,
    )
    changed = [
        f"{name}={str(getattr(one, name)).lower()}"
        for name in ("packing", "per_device_train_batch_size", "gradient_accumulation_steps")
        if getattr(one, name) != getattr(config, name)
    ]
    return one, Message(
        "this model's layers would mix the samples of a batch, so they go one by one: {changed}", changed=changed
    ) if changed else None


def micro_batch_tokens(config: Config, longest: int) -> int:
    """The most tokens of a forward pass: as many as `per_device_train_batch_size` of the longest samples or rows have.

    An optimizer step's samples are the same however they are put together, and no batch is larger than the largest that
    the setting asks for.
    """
    if mixes_samples(Path(config.model_name_or_path)):
        return 0
    return config.per_device_train_batch_size * (config.cutoff_len if config.packing else longest)


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Fills rows of `capacity` tokens with whole samples, longest first, each into the row it fits best.

    Returns the indices of each row's samples. Best-fit decreasing wastes about 1 % where first come, first packed
    wastes 15 %. A sample longer than `capacity` gets a row of its own.
    """
    import numpy as np

    rows: list[list[int]] = []
    capacity = min(capacity, int(np.sum(lengths)))  # more is never filled, and the list below would not fit into memory
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the space that is left
    spaces = 0  # bit s is set where open_rows[s] is not empty
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
            rows[row].append(index)
        else:
            space, row = max(length, capacity), len(rows)
            rows.append([index])
        left = space - length
        if left > 0:
            open_rows[left].append(row)
            spaces |= 1 << left
    return rows


def packed(dataset: datasets.Dataset, rows: list[list[int]]) -> datasets.Dataset:
    """`dataset` with the samples of each of `rows` (from `pack`) in one row; `seq_lengths` holds their lengths.

    Samples are read when a row is: nothing is copied.
    """
    import datasets

    def read(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for members in batch["members"]:
            samples = [dataset[member] for member in members]
            found["input_ids"].append([token for sample in samples for token in sample["input_ids"]])
            # the first token of a sample has nothing before it to be predicted from
            found["labels"].append([label for sample in samples for label in (IGNORED, *sample["labels"][1:])])
            found["seq_lengths"].append([len(sample["input_ids"]) for sample in samples])
        return found

    return datasets.Dataset.from_dict({"members": rows}).with_transform(read)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a flat batch of samples, or of packed rows (which bring their `seq_lengths`)."""
    import torch

    lengths = [n for row in rows for n in row.get("seq_lengths", (len(row["input_ids"]),))]
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[starts] = IGNORED  # else the last token of one sample would learn the first of the next
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def prompts_a_step(config: Config) -> int:
    """Prompts of an optimizer step of stage grpo, whose batches are counted in replies."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps // config.num_generations


def epoch_steps(config: Config, rows: int) -> int:
    """Optimizer steps of one pass over `rows` samples or packed rows, counted as transformers does.

    Of prompts to reply to (grpo) as TRL does: what is left over of the last step's prompts is not used.
    """
    if config.stage == "grpo":
        return max(1, rows // prompts_a_step(config))
    forwards = math.ceil(rows / config.per_device_train_batch_size)
    return max(1, math.ceil(forwards / config.gradient_accumulation_steps))


def total_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run."""
    return config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch_steps(config, rows))
