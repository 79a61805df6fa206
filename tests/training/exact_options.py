"""What the options of an adapter and of its schedule do, through the code that trains: prints it as JSON.

    python tests/training/exact_options.py MODEL [CASE ...]      the folder of a small model

In float32 on a CPU, one process for all: importing Unsloth takes longer than everything here. test_options.py compares.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kit

from runs.configuration import load_config

SETTINGS = ["cutoff_len=64", "lora_rank=4", "learning_rate=0.01", "per_device_train_batch_size=2",
            "gradient_accumulation_steps=1", "weight_decay=0.1", "num_train_epochs=4", "early_stopping=no",
            "plot_loss=false"]  # fmt: skip
LENGTHS = (9, 31, 17, 40)


def make_data(held_out: int = 0) -> Any:
    import numpy as np

    draw = np.random.default_rng(3).integers
    samples = [{"input_ids": (ids := draw(0, 256, n).tolist()), "labels": [-100, -100, *ids[2:]]} for n in LENGTHS]
    return kit.table(samples, LENGTHS, held_out)


class Trainers:
    """Makes trainers for one model; each has a folder of its own."""

    def __init__(self, model: str, folder: str) -> None:
        self.model, self.folder, self.count = model, Path(folder), 0

    def trainer(self, *settings: str, held_out: int = 0, folder: Path | None = None) -> Any:
        self.count += 1
        place = folder or self.folder / str(self.count)
        place.mkdir(exist_ok=True)
        named = [f"model_name_or_path={self.model}", f"output_dir={place}"]
        config = load_config([*named, *SETTINGS, *settings]).config
        return kit.make(config, make_data(held_out))

    def logits(self, model: Any) -> Any:
        import torch

        model.eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(40)[None]).logits

    def answers_after_saving(self, trainer: Any) -> tuple[float, float]:
        """Largest difference of the logits of the trained model to those of plain PEFT on the plain base with the
        saved adapter, and to the base's own."""
        import torch
        from transformers import AutoModelForCausalLM

        from runs.peft_loading import load_peft_model

        folder = Path(trainer.args.output_dir)
        trainer.save_adapter(SimpleNamespace(saved=None))
        base = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        before = self.logits(base)
        again = self.logits(load_peft_model(base, folder))
        own = self.logits(trainer.model)
        return (again - own).abs().max().item(), (own - before).abs().max().item()


def rates_of(optimizer: Any, names: dict[Any, str]) -> dict[str, list[float]]:
    return {names[p]: [g["lr"], g["weight_decay"]] for g in optimizer.param_groups for p in g["params"]}


def loraplus(trainers: Trainers) -> dict[str, Any]:
    """Learning rate and weight decay of each parameter, here and by PEFT's create_loraplus_optimizer."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    found = {}
    for name, settings in {
        "plain": [],
        "bias": ["lora_bias=true"],
        "dora": ["use_dora=true"],
        "whole": ["additional_target=embed_tokens,norm"],
    }.items():
        made = trainers.trainer("loraplus_lr_ratio=16", *settings)
        names = {parameter: name for name, parameter in made.model.named_parameters()}
        theirs = create_loraplus_optimizer(
            made.model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
        )
        found[name] = [rates_of(made.create_optimizer(), names), rates_of(theirs, names)]
    made = trainers.trainer(
        "additional_target=embed_tokens,lm_head", "embedding_learning_rate=0.001", "loraplus_lr_ratio=16"
    )
    names = {parameter: name for name, parameter in made.model.named_parameters()}
    found["embedding"] = rates_of(made.create_optimizer(), names)
    return found


def saved(trainers: Trainers) -> dict[str, Any]:
    """What learns, and whether the saved adapter answers as the trained model does."""
    found = {}
    for name, settings in {
        "lora_bias": ["lora_bias=true"],
        "bias_all": ["lora_bias=all"],
        "bias_lora_only": ["lora_bias=lora_only"],
        "embed_tokens": ["additional_target=embed_tokens"],
        "lm_head": ["additional_target=lm_head"],
        "both": ["additional_target=embed_tokens,lm_head"],
        "norms": ["additional_target=input_layernorm,norm"],
        "target": ["lora_target=q_proj,embed_tokens"],
    }.items():
        made = trainers.trainer(*settings, "max_steps=2")
        before = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
        made.train_from(None)
        after = dict(made.model.named_parameters())
        moved = [n for n, p in before.items() if not (after[n] == p).all()]
        apart, change = trainers.answers_after_saving(made)
        found[name] = {"learned": sorted(before), "moved": sorted(moved), "apart": apart, "change": change}
        found[name]["folder"] = made.args.output_dir
    return found


def pissa(trainers: Trainers) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trainers.model, dtype=torch.float32)
    plain = trainers.logits(base)
    made = trainers.trainer("pissa_init=true", "pissa_iter=-1", "save_steps=3")
    targets = list(made.model.peft_config["default"].target_modules)
    theirs = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="pissa", task_type="CAUSAL_LM")
    )
    ours, others = dict(made.model.named_parameters()), dict(theirs.named_parameters())
    name = "base_model.model.model.layers.1.mlp.up_proj"
    products = [m[f"{name}.lora_B.default.weight"] @ m[f"{name}.lora_A.default.weight"] for m in (ours, others)]
    rests = [m[f"{name}.base_layer.weight"] for m in (ours, others)]
    found: dict[str, Any] = {
        "start": (trainers.logits(made.model) - plain).abs().max().item(),
        "product": (products[0] - products[1]).abs().max().item(),
        "rest": (rests[0] - rests[1]).abs().max().item(),
        "size": products[1].abs().max().item(),
    }
    made.train_from(None)
    final = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    found["apart"], found["change"] = trainers.answers_after_saving(made)
    folder = Path(made.args.output_dir)
    found["rank"] = json.loads((folder / "adapter_config.json").read_text())["r"]
    found["folder"] = str(folder)
    again = trainers.trainer("pissa_init=true", "pissa_iter=-1", "save_steps=3", folder=folder)
    again.train_from(folder / "checkpoint-6")
    now = {n: p.detach() for n, p in again.model.named_parameters() if p.requires_grad}
    found["resumed"] = max((now[n] - p).abs().max().item() for n, p in final.items())
    fast = trainers.trainer("pissa_init=true", "use_rslora=true", "lora_target=q_proj,down_proj", held_out=2)
    found["start_fast"] = (trainers.logits(fast.model) - plain).abs().max().item()
    fast.train_from(None)
    found["apart_fast"], _ = trainers.answers_after_saving(fast)
    return found


def neftune(trainers: Trainers) -> dict[str, Any]:
    import torch

    alpha, found = 5.0, {}
    made = trainers.trainer(f"neftune_noise_alpha={alpha}", "per_device_train_batch_size=4")
    seen: list[Any] = []
    embedding = made.model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output.detach())))
    made.args.max_steps = 1
    made.train_from(None)
    tokens, output = seen[0]
    noise = (output - embedding.weight[tokens])[0]
    order = made.noise.lengths.tolist()
    parts = noise.split(order)
    bounds = [alpha / (n * noise.shape[-1]) ** 0.5 for n in order]
    found["lengths"] = order
    found["largest"] = [part.abs().max().item() / bound for part, bound in zip(parts, bounds, strict=True)]
    found["mean"] = [part.mean().item() / bound for part, bound in zip(parts, bounds, strict=True)]
    found["spread"] = [part.std().item() / bound for part, bound in zip(parts, bounds, strict=True)]
    made.model.eval()
    with torch.no_grad():
        made.model(input_ids=tokens)
    found["evaluated"] = (seen[-1][1] - embedding.weight[tokens]).abs().max().item()
    return found


def schedules(trainers: Trainers) -> dict[str, Any]:
    found = {}
    for name, settings in {
        "restarts": ["lr_scheduler_type=cosine_with_restarts", "lr_scheduler_kwargs={num_cycles: 2}"],
        "least": ["lr_scheduler_type=cosine_with_min_lr", 'lr_scheduler_kwargs={"min_lr_rate": 0.1}'],
        "power": ["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={power: 2, lr_end: 1e-4}"],
        "stable": ["lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs={num_decay_steps: 4}"],
    }.items():
        made = trainers.trainer(*settings)
        made.create_optimizer_and_scheduler(8)
        rates = []
        for _ in range(8):
            rates.append(made.lr_scheduler.get_last_lr()[0])
            made.optimizer.step()
            made.lr_scheduler.step()
        found[name] = rates
    return found


def delays(trainers: Trainers) -> dict[str, Any]:
    """The steps that were evaluated and those that were saved."""
    found = {}
    for name, settings in {
        "steps": ["eval_steps=2", "eval_delay=4", "save_steps=3"],
        "epochs": ["eval_strategy=epoch", "eval_delay=3", "save_strategy=epoch"],
        "beyond": ["eval_steps=2", "eval_delay=100", "save_steps=5"],
    }.items():
        made = trainers.trainer(*settings, "save_total_limit=", held_out=2)
        made.train_from(None)
        evaluated = [line["step"] for line in made.state.log_history if "eval_loss" in line]
        steps = range(1, 9)
        planned = [[s for s in steps if made.plan.evaluates_at(s)], [s for s in steps if made.plan.saves_at(s)]]
        found[name] = {"evaluated": evaluated, "saved": made.saved, "planned": planned}
        found[name]["best"] = made.state.best_global_step
    return found


def determinism(trainers: Trainers) -> dict[str, Any]:
    import torch

    made = trainers.trainer("full_determinism=true", "max_steps=1")
    made.train_from(None)
    found = {"deterministic": torch.are_deterministic_algorithms_enabled(), "loss": made.state.log_history[0]["loss"]}
    torch.use_deterministic_algorithms(False)
    return found


CASES = {case.__name__: case for case in (loraplus, saved, pissa, neftune, schedules, delays, determinism)}


def main(argv: list[str]) -> None:
    kit.import_unsloth()
    with tempfile.TemporaryDirectory() as folder:
        trainers = Trainers(argv[0], argv[2] if len(argv) > 2 else folder)
        chosen = argv[1].split(",") if len(argv) > 1 and argv[1] else CASES
        print(json.dumps({name: CASES[name](trainers) for name in chosen}))


if __name__ == "__main__":
    main(sys.argv[1:])
