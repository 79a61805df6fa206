"""What is trained besides LoRA: modules trained in full (`additional_target`) and biases (`lora_bias`)."""

from __future__ import annotations

from collections.abc import Iterator

from common import Config, Message
from runs.adapter import EMBEDDINGS, HEADS
from training.findings import Note, Problem

Shapes = dict[str, tuple[int, ...]]  # of a model's tensors, by name


def whole_tensors(targets: tuple[str, ...], shapes: Shapes) -> Shapes:
    """The tensors trained in full; as in PEFT, a target names every module whose name ends with it."""
    found = {name: shape for name, shape in shapes.items() if _is_named(name, targets)}
    embedding = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if _is_named("lm_head.weight", targets) and embedding and not any(name.endswith(HEADS) for name in shapes):
        found.setdefault(embedding, shapes[embedding])  # a tied output layer, of which a copy is trained
    return found


def _is_named(tensor: str, targets: tuple[str, ...]) -> bool:
    return tensor.rpartition(".")[0].endswith(targets)


def check_whole(config: Config, shapes: Shapes, adapted: list[str]) -> Iterator[Message]:
    """What of additional_target and lora_bias the model cannot follow; `adapted` are the weights with an adapter."""
    for target in config.additional_target:
        meant = whole_tensors((target,), shapes)
        others = [n for n, shape in meant.items() if len(shape) > 1 and not n.endswith(EMBEDDINGS + HEADS)]
        if not meant:
            known = _known(shapes)
            yield Problem("additional_target: the model has no {target}; it has {known}", target=target, known=known)
        elif others:
            module = others[0].rpartition(".")[0]
            yield Problem("additional_target: {module} is a linear layer; name it in lora_target", module=module)
    if config.lora_bias in ("all", "lora_only") and not any(name.endswith(".bias") for name in shapes):
        yield Problem("lora_bias: {value}: the model has no biases; use lora_bias: true", value=config.lora_bias)
    lacking = [name for name in adapted if f"{name.removesuffix('weight')}bias" not in shapes]
    if config.lora_bias == "true" and lacking:
        module = lacking[0].rpartition(".")[0]
        yield Note(
            "lora_bias: {module} has no bias, so this adapter cannot be merged or become a GGUF; chat.py and api.py "
            "use it as it is",
            module=module,
        )


def _known(shapes: Shapes) -> list[str]:
    """The last names of embedding, output layer and layer norms."""
    vectors = {name.split(".")[-2] for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 1}
    return [*sorted(name.split(".")[-2] for name in shapes if name.endswith(EMBEDDINGS)), "lm_head", *sorted(vectors)]
