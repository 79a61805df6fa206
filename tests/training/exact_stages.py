"""The first loss and gradients of stages dpo, kto and pt: by the kit, or by hand with PEFT. Prints them as JSON.

    python tests/training/exact_stages.py (kit|plain) MODEL ADAPTER

In float32 on a CPU. The plain side takes one sequence at a time, has a second copy of the model as its reference and
writes each loss as its paper does: plain TRL cannot compute them on a CPU (the kernel of its output layer is Triton's).
test_stages.py compares the two, each in a process:
Unsloth patches transformers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import kit

BETA, GAMMA, FTX = 0.3, 0.7, 0.2
LOSSES = {name: {"pref_loss": name} for name in ("sigmoid", "hinge", "ipo", "orpo", "simpo")}
LOSSES |= {"smoothed": {"dpo_label_smoothing": 0.2}, "with_ftx": {"pref_ftx": FTX}}


# "kto" is of the other stage: the first answer of each pair is a good one, the second a bad one.
KTO = {"stage": "kto", "kto_chosen_weight": 1.5, "kto_rejected_weight": 0.5}
RUNS = LOSSES | {"kto": KTO, "kto_with_ftx": KTO | {"pref_ftx": FTX}, "pt": {"stage": "pt", "packing": True}}


def make_pairs() -> list[dict[str, list[int]]]:
    import numpy as np

    draw = np.random.default_rng(3).integers
    lengths = ((9, 2, 5), (3, 17, 8))
    return [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (draw(0, 256, n).tolist() for n in row), strict=True))
        for row in lengths
    ]


def make_judged() -> list[dict[str, Any]]:
    """Both answers of the pairs, as rows of KTO."""
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{kind}_ids"], "label": kind == "chosen"}
        for pair in make_pairs()
        for kind in ("chosen", "rejected")
    ]


def make_documents() -> list[dict[str, list[int]]]:
    """What fits into one packed row."""
    sequences = [pair["prompt_ids"] + pair["rejected_ids"] for pair in make_pairs()]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def measured(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([dict(row) for row in trainer.train_dataset]))
    loss.backward()
    return facts(trainer.model, loss)


def facts(model: Any, loss: Any) -> dict[str, Any]:
    gradients = {
        name.replace("default.", ""): parameter.grad.double().flatten()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    sums = {name: [float(g.norm()), float(g[::7].sum())] for name, g in sorted(gradients.items())}
    return {"loss": float(loss), "gradients": sums}


def by_kit(model_folder: str, adapter: str) -> dict[str, Any]:
    kit.import_unsloth()
    import common

    found = {}
    for name, settings in RUNS.items():
        make = {"kto": make_judged, "pt": make_documents}.get(settings.get("stage"), make_pairs)
        rows = make()
        with tempfile.TemporaryDirectory() as folder:
            config = common.Config(
                **{"model_name_or_path": model_folder, "adapter_name_or_path": adapter, "output_dir": folder},
                **{
                    "stage": "dpo",
                    "cutoff_len": 64,
                    "pref_beta": BETA,
                    "simpo_gamma": GAMMA,
                    "bf16": False,
                    **settings,
                },
            )
            made = kit.make(config, kit.table(rows, [20] * len(rows)))
            assert list(made.model.peft_config) == ["default"], "a copy of the adapter"
            found[name] = measured(made)
    return found


def by_hand(model_folder: str, adapter: str) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    found = {}
    for name in RUNS:
        model = PeftModel.from_pretrained(base(), adapter, is_trainable=True)
        if name == "pt":
            loss = documents_loss(model)
        elif name.startswith("kto"):
            loss = judged_loss(FTX if name == "kto_with_ftx" else 0, model, base())
        else:
            loss = torch.stack([pair_loss(name, pair, model, base()) for pair in make_pairs()]).mean()
        loss.backward()
        found[name] = facts(model, loss)
    return found


def answer_log(scored: Any, prompt: list[int], answer: list[int]) -> Any:
    import torch

    logits = scored(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def pair_loss(name: str, pair: dict[str, list[int]], model: Any, reference: Any) -> Any:
    import torch
    from torch.nn.functional import logsigmoid, relu

    answers = [pair["chosen_ids"], pair["rejected_ids"]]
    chosen, rejected = (answer_log(model, pair["prompt_ids"], answer) for answer in answers)
    with torch.no_grad():
        before = [answer_log(reference, pair["prompt_ids"], answer) for answer in answers]
    margin = BETA * ((chosen - before[0]) - (rejected - before[1]))
    if name in ("sigmoid", "with_ftx"):
        return -logsigmoid(margin) - (FTX * chosen / len(answers[0]) if name == "with_ftx" else 0)
    if name == "hinge":
        return relu(1 - margin)
    if name == "smoothed":
        return -0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin)
    lengths = [len(answer) for answer in answers]
    if name == "ipo":
        difference = (chosen - before[0]) / lengths[0] - (rejected - before[1]) / lengths[1]
        return (difference - 1 / (2 * BETA)) ** 2
    chosen, rejected = chosen / lengths[0], rejected / lengths[1]
    if name == "simpo":
        return -logsigmoid(BETA * (chosen - rejected) - GAMMA)
    odds = torch.log(chosen.exp() / (1 - chosen.exp())) - torch.log(rejected.exp() / (1 - rejected.exp()))
    return -chosen - BETA * logsigmoid(odds)


def documents_loss(model: Any) -> Any:
    sequences = [document["input_ids"] for document in make_documents()]
    return -sum(answer_log(model, ids[:1], ids[1:]) for ids in sequences) / sum(len(ids) - 1 for ids in sequences)


def judged_loss(ftx: float, model: Any, reference: Any) -> Any:
    import torch

    def gained(prompt: list[int], answer: list[int]) -> Any:
        with torch.no_grad():
            before = answer_log(reference, prompt, answer)
        return answer_log(model, prompt, answer) - before

    rows, losses = make_judged(), []
    others = [gained(row["prompt_ids"], rows[i - 1]["completion_ids"]) for i, row in enumerate(rows)]
    kl = torch.stack(others).mean().clamp(min=0).detach()
    for row in rows:
        distance = BETA * (gained(row["prompt_ids"], row["completion_ids"]) - kl)
        if row["label"]:
            own = answer_log(model, row["prompt_ids"], row["completion_ids"]) / len(row["completion_ids"])
            losses.append(1.5 * (1 - torch.sigmoid(distance)) - ftx * own)
        else:
            losses.append(0.5 * (1 - torch.sigmoid(-distance)))
    return torch.stack(losses).mean()


if __name__ == "__main__":
    way = {"kit": by_kit, "plain": by_hand}[sys.argv[1]]
    print(json.dumps(way(*sys.argv[2:])))
