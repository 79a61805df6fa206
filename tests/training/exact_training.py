"""What Unsloth trains is what PyTorch would: prints what it measured as JSON.

    python tests/training/exact_training.py MODEL      the folder of a model; a small one, as it is trained three times

Through the code that trains: load_model and make_trainer, Unsloth's loss, TRL's compute_loss.
In float32 on a CPU, in the card's own precision on a card. test_training.py runs it in a process of its own: Unsloth
patches transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import kit

from runs.configuration import load_config

LENGTHS = ((9, 2), (31, 30), (17, 5), (40, 11))  # tokens, and how many of them are learned


def make_samples() -> list[dict[str, list[int]]]:
    import numpy as np

    generator, samples = np.random.default_rng(3), []
    for length, learned in LENGTHS:
        ids = generator.integers(0, 256, length).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * (length - learned) + ids[length - learned :]})
    return samples


def plain_loss(model_folder: str) -> float:
    """Plain transformers and PyTorch's own cross entropy, sample by sample in float32; without Unsloth."""
    import torch
    from transformers import AutoModelForCausalLM

    plain, total, learned = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), 0.0, 0
    for sample in make_samples():
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(sample["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        learned += int((labels != -100).sum())
    return total / learned


def measure(model_folder: str, folder: str) -> dict[str, float | str]:
    kit.import_unsloth()
    import numpy as np
    import torch

    from training import packing

    settings = [f"model_name_or_path={model_folder}", "cutoff_len=64", "lora_rank=4", f"output_dir={folder}/run"]
    settings += ["learning_rate=0.1", "max_steps=1", "max_grad_norm=0", "optim=sgd", "lr_scheduler_type=constant"]
    samples, lengths = make_samples(), np.array([length for length, _ in LENGTHS])
    data = kit.table(samples, lengths)

    def add_noise(model) -> None:
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:  # PEFT starts it at zero, where most gradients vanish
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.data.copy_(0.02 * noise)

    def trainer(*more: str):
        return kit.make(load_config([*settings, *more]).config, data, prepare=add_noise)

    def loss_of(made, rows: list[dict], items: int):
        count = torch.tensor(items, device=made.args.device)
        batch = {name: tensor.to(made.args.device) for name, tensor in packing.collate(rows).items()}
        return made.compute_loss(made.model, batch, num_items_in_batch=count)

    def loss_and_gradients(made, rows: list[dict], items: int):
        made.model.zero_grad()
        made.model.train()
        loss = loss_of(made, rows, items)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in made.model.parameters() if p.requires_grad]

    # one flat batch of four, the four alone, and the four as one packed row
    made = trainer()
    items = sum(label != -100 for sample in samples for label in sample["labels"][1:])
    together, gradients = loss_and_gradients(made, samples, items)
    alone = [loss_and_gradients(made, [sample], items) for sample in samples]
    row = packing.packed(data.train, packing.pack(lengths, int(lengths.sum())))[0]
    packed, packed_gradients = loss_and_gradients(made, [row], items)
    sums = [sum(parts) for parts in zip(*(one[1] for one in alone), strict=True)]

    def difference(left, right) -> float:
        return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))

    report = {
        "device": made.args.device.type,
        "dtype": str(made.model.dtype),
        "loss": together,
        "losses_alone": sum(loss for loss, _ in alone),
        "loss_packed": packed,
        "gradient": max(g.abs().max().item() for g in gradients),
        "gradient_difference": difference(gradients, sums),
        "gradient_difference_packed": difference(gradients, packed_gradients),
    }
    with made.model.disable_adapter(), torch.no_grad():
        report["loss_without_adapter"] = loss_of(made, samples, items).item()

    # one optimizer step, its samples cut into micro-batches in three ways
    steps, report["planned_tokens"] = {}, {}
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = trainer(f"per_device_train_batch_size={size}", f"gradient_accumulation_steps={accumulation}")
        before = [p.detach().clone() for p in made.model.parameters() if p.requires_grad]
        if planner := getattr(made.model, "_unsloth_auto_skip", None):  # of a card
            report["planned_tokens"][size] = planner.target_batch * planner.target_seq
        made.train_from(None)
        after = [p.detach() for p in made.model.parameters() if p.requires_grad]
        steps[size] = [a - b for a, b in zip(after, before, strict=True)]
    report["step"] = max(change.abs().max().item() for change in steps[4])
    report["step_difference"] = max(difference(steps[4], steps[2]), difference(steps[4], steps[1]))
    return report


def main(argv: list[str]) -> None:
    if argv[0] == "--plain":
        print(plain_loss(argv[1]))
        return
    alone = subprocess.run([sys.executable, __file__, "--plain", argv[0]], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(argv[0], folder)
    report["reference_loss"] = float(alone.stdout.split()[-1])
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
