"""Run by test_train.py in a process of its own, since Unsloth patches transformers: prints what it measured as JSON.

Through the code that trains: train.load_model and train.make_trainer, Unsloth's loss, TRL's compute_loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train


def main(folder: str, model_folder: str) -> None:
    train.import_unsloth()
    import datasets
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    import batches

    settings = [f"model_name_or_path={model_folder}", "cutoff_len=64", "lora_rank=4", f"output_dir={folder}/run"]
    settings += ["learning_rate=0.1", "max_steps=1", "max_grad_norm=0", "optim=sgd", "lr_scheduler_type=constant"]
    generator = np.random.default_rng(3)
    samples = []
    for length, learned in ((9, 2), (31, 30), (17, 5), (40, 11)):
        ids = generator.integers(0, 256, length).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * (length - learned) + ids[length - learned :]})
    table = datasets.Dataset.from_list(samples)
    data = SimpleNamespace(train=table, train_lengths=np.array([9, 31, 17, 40]), eval=None, eval_lengths=None)
    float32 = train.Precision(torch.float32, None)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def trainer(*more: str):
        config = common.load_config([*settings, *more]).config
        model = train.load_model(config, float32, model_folder)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:  # PEFT starts it at zero, where most gradients vanish
                torch.manual_seed(len(name))
                torch.nn.init.normal_(parameter, std=0.02)
        return train.make_trainer(config, float32, model, tokenizer, data)[0]

    def loss_and_gradients(made, rows: list[dict], items: int):
        made.model.zero_grad()
        made.model.train()
        loss = made.compute_loss(made.model, dict(batches.collate(rows)), num_items_in_batch=torch.tensor(items))
        loss.backward()
        return loss.item(), [p.grad.clone() for p in made.model.parameters() if p.requires_grad]

    # one flat batch of four, the four alone, and the four as one packed row
    made = trainer()
    items = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    together, gradients = loss_and_gradients(made, samples, items)
    alone = [loss_and_gradients(made, [sample], items) for sample in samples]
    row = batches.packed(table, data.train_lengths, 97)[0]
    packed, packed_gradients = loss_and_gradients(made, [row], items)
    sums = [sum(parts) for parts in zip(*(one[1] for one in alone), strict=True)]

    def difference(left, right) -> float:
        return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))

    report = {
        "loss": together,
        "losses_alone": sum(loss for loss, _ in alone),
        "loss_packed": packed,
        "gradient": max(g.abs().max().item() for g in gradients),
        "gradient_difference": difference(gradients, sums),
        "gradient_difference_packed": difference(gradients, packed_gradients),
    }

    # plain transformers and PyTorch's own cross entropy, sample by sample
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        total = sum(
            torch.nn.functional.cross_entropy(
                plain(input_ids=torch.tensor([s["input_ids"]])).logits[0, :-1], torch.tensor(s["labels"][1:]),
                reduction="sum",
            ).item()
            for s in samples
        )  # fmt: skip
    with made.model.disable_adapter(), torch.no_grad():
        ours, _ = made.compute_loss(made.model, dict(batches.collate(samples)), return_outputs=True)
    report["reference_loss"] = total / items
    report["loss_without_adapter"] = ours.item()

    # one optimizer step, its samples cut into micro-batches in three ways
    steps = {}
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = trainer(f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulation}")
        before = [p.detach().clone() for p in made.model.parameters() if p.requires_grad]
        made.train()
        after = [p.detach() for p in made.model.parameters() if p.requires_grad]
        steps[size] = [a - b for a, b in zip(after, before, strict=True)]
    report["step"] = max(change.abs().max().item() for change in steps[4])
    report["step_difference"] = max(difference(steps[4], steps[2]), difference(steps[4], steps[1]))
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
