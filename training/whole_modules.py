"""What learns beside the matrices of LoRA: modules as a whole (`additional_target`) and biases (`lora_bias`)."""

from __future__ import annotations

from common import Config, Message
from runs.adapter import EMBEDDINGS, HEADS

Shapes = dict[str, tuple[int, ...]]  # of a model's tensors, by name


def whole_tensors(targets: tuple[str, ...], shapes: Shapes) -> Shapes:
    """The tensors that learn as a whole; as in PEFT a module is meant whose name ends with that of a target."""
    found = {name: shape for name, shape in shapes.items() if _is_named(name, targets)}
    embedding = next((name for name in shapes if name.endswith(EMBEDDINGS)), None)
    if _is_named("lm_head.weight", targets) and embedding and not any(name.endswith(HEADS) for name in shapes):
        found.setdefault(embedding, shapes[embedding])  # a tied output layer, of which a copy learns
    return found


def _is_named(tensor: str, targets: tuple[str, ...]) -> bool:
    return tensor.rpartition(".")[0].endswith(targets)


def find_faults(config: Config, shapes: Shapes) -> list[Message]:
    """What of additional_target and lora_bias the model cannot follow."""
    faults = []
    for target in config.additional_target:
        meant = whole_tensors((target,), shapes)
        others = [n for n, shape in meant.items() if len(shape) > 1 and not n.endswith(EMBEDDINGS + HEADS)]
        if not meant:
            faults.append(
                Message(
                    "additional_target: the model has no module {target}; it has {known}",
                    target=target,
                    known=_known(shapes),
                )
            )
        elif others:
            faults.append(
                Message(
                    "additional_target: {target} is the linear layer {module}; only embeddings, the output layer and "
                    "layer norms learn whole, name linear layers in lora_target",
                    target=target,
                    module=others[0].rpartition(".")[0],
                )
            )
    if config.lora_bias in ("all", "lora_only") and not any(name.endswith(".bias") for name in shapes):
        faults.append(
            Message(
                "lora_bias: {value}: the model has no biases, so nothing more would learn; leave it out, or use "
                "lora_bias: true",
                value=config.lora_bias,
            )
        )
    return faults


def _known(shapes: Shapes) -> list[str]:
    """The last names of embedding, output layer and layer norms."""
    vectors = {name.split(".")[-2] for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 1}
    return [*sorted(name.split(".")[-2] for name in shapes if name.endswith(EMBEDDINGS)), "lm_head", *sorted(vectors)]


def find_notes(config: Config, shapes: Shapes, adapted: list[str]) -> list[Message]:
    """What lora_bias means for a merge; `adapted` are the names of the weights that get an adapter."""
    lacking = [name for name in adapted if f"{name.removesuffix('weight')}bias" not in shapes]
    return (
        [
            Message(
                "lora_bias: {module} has no bias in the base, so this adapter cannot be merged or made a "
                "GGUF; chat.py and "
                "api.py use it as it is",
                module=lacking[0].rpartition(".")[0],
            )
        ]
        if config.lora_bias == "true" and lacking
        else []
    )
