"""The proofs: a merged model answers as base + adapter does, and a GGUF as the 16-bit model does."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common import Config, Message, UserError, print_notes
from export import llamacpp
from inference.transformers_engine import quantization
from runs.causal_models import register_class
from runs.files import read_object, write_json
from runs.folder import run_config
from runs.weights import DTYPES, SIZES, Tensor, read_tensors

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------------------------------------------------------------
# Where a model is computed


def own_dtype(tensors: Sequence[Tensor]) -> str:
    """The type of most weights: float32, float16 or bfloat16."""
    return max(DTYPES, key=lambda name: sum(tensor.count for tensor in tensors if tensor.dtype == DTYPES[name]))


def choose_device(folder: Path) -> tuple[str, str]:
    """Where a model fits, and how exactly: in float32 where it does, else in its own type; needs no torch.

    Raises UserError where it fits nowhere.
    """
    import psutil

    gpu = common.find_gpu()

    tensors = list(read_tensors(folder).values())
    count = sum(tensor.count for tensor in tensors)
    free = {"cuda": gpu.free_memory} if gpu else {}
    free["cpu"] = psutil.virtual_memory().available
    needs = {name: int(count * SIZES[DTYPES[name]] * 1.2) + 10**9 for name in ("float32", own_dtype(tensors))}
    for dtype, needed in needs.items():
        for device, available in free.items():
            if needed < available:
                return device, dtype
    raise UserError(
        "the proof needs {needed:.0f} GB of memory, {free:.0f} GB are free; free some, or add --no-verify",
        needed=min(needs.values()) / 1e9,
        free=max(free.values()) / 1e9,
    )


def load_model(folder: Path, device: str, dtype: str, trust_remote_code: bool, bits: int | None = None) -> Any:
    """A model of transformers in evaluation mode, quantized to `bits`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if bits:
        options["quantization_config"] = quantization(bits, options["dtype"])
    register_class(folder, trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **options).eval()


# ---------------------------------------------------------------------------------------------------------------------
# A merged model


@dataclass(frozen=True)
class MergeProof:
    """How far the logits of a merged model are from those of base + adapter (rms over positions and vocabulary)."""

    prompts: int
    positions: int
    computed_in: str
    adapter_effect: float  # how far the adapter moves them
    difference: float
    largest_difference: float
    rounding: float  # how far rounding the weights to the merged type alone moves them
    same_first_choice: float
    mean_kl: float  # nats
    trained_bits: int | None  # of the base that the adapter was trained on, where it was quantized
    trained_kl: float | None  # mean, from that base + adapter

    def __str__(self) -> str:
        return str(
            Message(
                "proof      {prompts} prompts, {positions} positions, {computed_in}\n"
                "           adapter moves the logits by {adapter_effect:.2g} (rms); merged model differs from\n"
                "           base + adapter by {difference:.2g} (at most {largest_difference:.2g}), rounding alone\n"
                "           explains {rounding:.2g}; same first choice {same_first_choice:.1%}, mean KL {mean_kl:.2g}",
                **asdict(self),
            )
        )


def verify_merged(folder: Path) -> MergeProof:
    """Compares logits and keeps the proof in merge.json; raises UserError where they differ too much.

    The yardstick is the rounding itself: how far the logits of base + adapter move when the sum of weight and update is
    rounded to the merged type. Where that sum cannot be formed here (DoRA, tied ends, a model that fits in 16 bit only)
    every twelfth of the changed weights moves by one unit in the last place, which has the variance of rounding.
    """
    if not (folder / "merge.json").is_file():
        raise UserError("{folder} has no merge.json; give a folder that merge.py made", folder=folder)
    record = read_object(folder / "merge.json")
    for part in ("base", "adapter"):
        if not Path(record[part]).is_dir():
            raise UserError("{path}, which was merged into {folder}, is missing", folder=folder, path=record[part])
    import torch

    torch.manual_seed(0)
    device, dtype = choose_device(Path(record["base"]))
    prompts = proof_prompts(folder, record)
    with torch.no_grad():
        expected, base, rounded = adapter_logits(record, prompts, device, dtype)
        merged = logits(load_model(folder, device, dtype, record["trust_remote_code"]), prompts)
        bits = run_config(Path(record["run"])).quantization_bit if record["run"] else None
        trained = logits(adapted(record, device, dtype, bits), prompts) if bits else None
    proof = MergeProof(
        prompts=len(prompts),
        positions=len(expected),
        computed_in=f"{dtype} on {device}",
        adapter_effect=rms(expected - base),
        difference=rms(merged - expected),
        largest_difference=(merged - expected).abs().max().item(),
        rounding=rms(rounded - expected),
        same_first_choice=(merged.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        mean_kl=divergence(expected, merged),
        trained_bits=bits,
        trained_kl=divergence(trained, merged) if bits else None,
    )
    write_json(folder / "merge.json", {**record, "proof": asdict(proof)})
    if not proof.difference <= 3 * proof.rounding + 1e-6 * rms(expected):
        raise UserError(
            "the logits of the merged model differ from base + adapter by {difference:.3g}, rounding explains "
            "{rounding:.3g}; nothing was kept. Please report it, with adapter_config.json",
            difference=proof.difference,
            rounding=proof.rounding,
        )
    return proof


# Asked of models whose training data is not at hand.
QUESTIONS = (
    ("Who are you, and who made you?", "I am a small language model."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("用一句话介绍一下你自己。", "我是一个语言模型。"),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("How much is 1234 + 4321?", "1234 + 4321 = 5555"),
)


def proof_prompts(folder: Path, record: dict[str, Any]) -> list[list[int]]:
    """Token ids of up to 8 rows of the run's data as its stage has them, at most 128 each; else of the QUESTIONS."""
    from preprocessing import dataset
    from preprocessing.encode_stages import encode_batch, sequence_of
    from preprocessing.template import load_template
    from preprocessing.tokenizer import load_tokenizer

    stage = "sft"
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS
    ]
    if record["run"]:
        try:
            config = run_config(Path(record["run"]))
            few = dataclasses.replace(config, max_samples=8, val_size=0.0, eval_dataset=(), on_bad_rows="skip")
            stage, rows = config.stage, dataset.read_conversations(few)[0][:8]
        except UserError as error:
            note = Message("the run's data cannot be read, general questions are compared ({reason})", reason=error)
            print_notes([note])
    tokenizer = load_tokenizer(folder, trust_remote_code=record["trust_remote_code"])
    if not record["stop"]:
        texts = [row.get("text") or row["messages"][-1]["content"] for row in rows]
        return [tokenizer(text)["input_ids"][:128] for text in texts]
    short = Config(cutoff_len=128, max_completion_length=1)
    found = encode_batch(stage, rows, short, load_template(None, tokenizer, stage), tokenizer)
    return [sequence_of(samples[0]) for samples in found if not isinstance(samples, Message)]


def adapted(record: dict[str, Any], device: str, dtype: str, bits: int | None = None) -> Any:
    """The base of a merge, quantized to `bits`, with the adapter."""
    from runs.peft_loading import load_peft_model

    base = load_model(Path(record["base"]), device, dtype, record["trust_remote_code"], bits)
    return load_peft_model(base, Path(record["adapter"])).eval()


def adapter_logits(record: dict[str, Any], prompts: Any, device: str, dtype: str) -> list[torch.Tensor]:
    """Logits of base + adapter, of the base alone, and of base + adapter with its weights rounded."""
    model = adapted(record, device, dtype)
    expected = logits(model, prompts)
    with model.disable_adapter():
        alone = logits(model, prompts)
    done = round_sums(model, record["dtype"])
    for name, weight in model.named_parameters():
        if id(weight) in done:
            continue
        changed = ".base_layer." in name or ".modules_to_save." in name
        if (changed or record["cast"]) and "lora_" not in name:
            jitter(weight, record["dtype"])
    return [expected, alone, logits(model, prompts)]


def round_sums(model: Any, dtype: str) -> set[int]:
    """Moves the base weights of plain LoRA layers so that weight + update is what `dtype` makes of it.

    An update below half a unit in the last place vanishes when it is rounded, all of it in the same direction: noise of
    the same size would move the logits less. Returns the ids of the weights moved.
    """
    import torch

    tied = model.get_input_embeddings().weight.data_ptr()
    done = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, torch.nn.Linear) or not hasattr(module, "get_delta_weight"):
            continue
        weight = base.weight
        if weight.dtype != torch.float32 or weight.data_ptr() == tied or any(module.use_dora.values()):
            continue
        update = sum(module.get_delta_weight(name) for name in module.active_adapters if name in module.lora_A)
        weight.data = (weight + update).to(getattr(torch, dtype)).float() - update
        done.add(id(weight))
    return done


def jitter(weight: torch.Tensor, dtype: str) -> None:
    """Moves one of 12 weights up or down by one unit in the last place of `dtype`."""
    import torch

    wide = weight.dtype == torch.float32
    bits = weight.data.view(torch.int32 if wide else torch.int16)
    unit = {"float32": 1, "float16": 1 << 13, "bfloat16": 1 << 16}[dtype] if wide else 1
    draw = torch.randint(0, 24, weight.shape, dtype=torch.int8, device=weight.device)
    moves = (draw == 0).to(bits.dtype) - (draw == 1).to(bits.dtype)
    bits += unit * moves * (weight.data.abs() > torch.finfo(torch.float16).tiny)  # zero has no unit below it


LAST = 32  # positions of each prompt that are compared


def logits(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Logits at the last positions of each prompt (positions x vocabulary), float32, each row's mean taken off."""
    import torch

    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        rows.append(model(input_ids=ids).logits[0, -LAST:].float().cpu())
    values = torch.cat(rows)
    return values - values.mean(-1, keepdim=True)


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def divergence(expected: torch.Tensor, merged: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the merged model's next-token distribution from the expected one."""
    import torch

    return torch.nn.functional.kl_div(
        merged.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


# ---------------------------------------------------------------------------------------------------------------------
# A GGUF: llama.cpp reads the tokens as the tokenizer writes them, and predicts what the 16-bit model predicts

# Mean KL divergence of the embedded model computed in this type from the same weights computed in float32.
DTYPE_DIVERGENCE = {"float32": 0.0, "float16": 0.00004, "bfloat16": 0.0022}
PROOF_TOKENS, PROOF_LENGTH = 1024, 256  # tokens of all proof samples, of one at most
TEXTS = (
    "Hello, world! It's 12:30, isn't it? I've 3.14159 reasons.",
    "你好，世界！今天是2026年11月23日，星期一。",
    "1234567890 007 3,141.59 １２３ ⅷ ½",
    "emoji 😀👍🏽 👩‍👩‍👧 🇫🇷 é é ñ",
    "def f(x):\n\treturn {'a': x ** 2}  # twice\n\n\n    if x != 0:\r\n        pass\n",
    "  leading, trailing and   inner spaces  \t \n \n\n",
    "Straße naïve Привет мир שלום עולם مرحبا สวัสดี こんにちは 안녕하세요",
    "zero\u200bwidth \u00a0 nbsp \ufeff \u3000 ideographic",
)


@dataclass(frozen=True)
class GgufProof:
    """What a GGUF was found to be. llama.cpp splits the texts into the tokenizer's tokens, or there is no proof."""

    kl_divergence: float  # mean, in nats, from the 16-bit model's next-token distributions
    top1_agreement: float  # share of tokens with the same likeliest successor
    perplexity: float
    reference_perplexity: float  # of the 16-bit model
    tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    texts: int
    adds_bos: bool  # whether llama.cpp itself begins with the token for it
    reference_dtype: str


@dataclass(frozen=True)
class Reference:
    """What a GGUF is compared with: the 16-bit model, its tokenizer and the tokens that end a turn, and samples."""

    model: Path
    tokenizer: Any
    stop: tuple[str, ...]
    samples: list[list[int]]  # token ids
    trust_remote_code: bool
    work: Path  # a folder for the logits of the 16-bit model

    def verify(self, kind: str, file: Path, limit: float | None, usual: float) -> GgufProof:
        """Measures a file of a GGUF type; raises UserError where it is not what it should be.

        `limit` is the mean KL divergence that is accepted, None: the `usual` one of the type and what the reference's
        type adds to it.
        """
        seen = self.check_contents(kind, file)
        reference, computed_in = self.reference_logits()
        measured = llamacpp.call(
            llamacpp.measure, f"comparing {kind}", file=file, samples=self.samples, reference=reference
        )
        proof = GgufProof(**measured, **seen, reference_dtype=computed_in)
        if limit is None:
            limit = usual + 3 * DTYPE_DIVERGENCE[computed_in]
        if not proof.kl_divergence <= limit and kind in ("f32", "f16", "bf16"):  # no larger type would help
            raise UserError(
                "{type} diverges from the model it was made of: mean KL {divergence:.4f}, above {limit:g}; the weights "
                "may be too large for the type, or llama.cpp wrong: try bf16 or f32, or a newer one (LLAMA_CPP_DIR)",
                type=kind,
                divergence=proof.kl_divergence,
                limit=limit,
            )
        if not proof.kl_divergence <= limit:
            raise UserError(
                "{type} diverges from the 16-bit model: mean KL {divergence:.4f}, usually below {limit:g}; take a "
                "larger type, or accept it: --max-divergence X",
                type=kind,
                divergence=proof.kl_divergence,
                limit=limit,
            )
        return proof

    def check_contents(self, kind: str, file: Path) -> dict[str, Any]:
        """Compares token ids, end of turn and template with what llama.cpp reads; raises UserError for a wrong one."""
        tokenizer = self.tokenizer
        controls = "".join(tokenizer.all_special_tokens)
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, TEXTS, strict=True)]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        data = [tokenizer.decode(ids) for ids in self.samples]
        texts = [*TEXTS, controls, f"a{controls} b", rendered, *data]
        seen = llamacpp.call(llamacpp.inspect, f"reading {kind}", file=file, texts=texts)
        for text, ids in zip(texts, seen["ids"], strict=True):
            if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise UserError(
                    "llama.cpp splits {text!r} into other tokens than the tokenizer; nothing was kept. Try a newer "
                    "llama.cpp: LLAMA_CPP_DIR=folder",
                    text=text[:60],
                )
        ends = tokenizer.convert_tokens_to_ids(list(self.stop))
        if (seen["eos"], seen["eot"]) != (ends[0], ends[0]) or not set(ends) <= set(seen["end"]):
            stop = " ".join(self.stop)
            raise UserError("llama.cpp would not stop at {stop}; nothing was kept. Please report it", stop=stop)
        if seen["template"] != tokenizer.chat_template:
            raise UserError("the file does not hold the trained chat template; nothing was kept. Please report it")
        return {"texts": len(texts), "adds_bos": seen["adds_bos"]}

    def reference_logits(self) -> tuple[Path, str]:
        """Logits of the 16-bit model by transformers, float32 (tokens × vocabulary) in a .npy file; computed once.

        Computed in float32 where memory allows it, on the card or the CPU, else in the model's own type; the type's
        name is the second result.
        """
        if found := next(self.work.glob("reference-*.npy"), None):
            return found, found.stem.removeprefix("reference-")
        import numpy as np
        import torch
        from tqdm import tqdm

        device, dtype = choose_device(self.model)
        target = self.work / f"reference-{dtype}.npy"
        model = load_model(self.model, device, dtype, self.trust_remote_code)
        values, start = None, 0
        with torch.inference_mode():
            for ids in tqdm(self.samples, desc="16-bit model"):
                inputs = torch.tensor([ids], device=device)
                rows = model(input_ids=inputs, use_cache=False).logits[0].float().cpu().numpy()
                if values is None:
                    shape = (sum(map(len, self.samples)), rows.shape[1])
                    values = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=shape)
                    if hasattr(os, "posix_fallocate"):  # a mapped page that finds the disk full kills the process
                        with open(target, "rb+") as file:
                            os.posix_fallocate(file.fileno(), 0, target.stat().st_size)
                values[start : start + len(ids)] = rows
                start += len(ids)
        values.flush()
        return target, dtype


def spread(samples: Any, tokens: int, longest: int) -> list[list[int]]:
    """Token ids of samples spread evenly over the data, each cut to `longest`, `tokens` in all at most."""
    from preprocessing.encode_stages import sequence_of

    order = sorted(range(len(samples)), key=lambda i: (i * 2654435761) % 2**32)  # a fixed shuffle
    chosen, left = [], tokens
    for i in order:
        ids = [int(token) for token in sequence_of(samples[i])[: min(longest, left)]]
        if len(ids) > 1:
            chosen.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return chosen
