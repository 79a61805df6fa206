"""The model with its adapter, loaded by Unsloth: the only place that imports it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from common import Config, Message, UserError
from runs.adapter import Adapter
from runs.causal_models import register_class, tie_word_embeddings
from runs.folder import LOADING_LOG
from runs.peft_loading import write_readable
from runs.process import quick_imports
from training import hardware, packing, pissa
from training.arguments import Precision, checkpointing_setting, uses_vllm
from training.memory import EXPERTS, is_own


@contextlib.contextmanager
def quietly(log: Path | None = None) -> Iterator[None]:
    """Keeps what libraries print while they load from the terminal, unless they fail; writes it into `log`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except BaseException as error:
        if not isinstance(error, UserError | KeyboardInterrupt):
            print(printed.getvalue(), file=sys.stderr)
        raise
    finally:
        if log and log.parent.is_dir() and printed.getvalue():
            log.write_text(printed.getvalue(), encoding="utf-8")


def import_unsloth() -> None:
    """Imports Unsloth, which must come before transformers, trl and peft."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it asks the hub at every start
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(common.CACHE / "unsloth_compiled"))
    print(Message("loading Unsloth ..."), flush=True)
    with quietly(), quick_imports():
        import unsloth  # noqa: F401
    gc.freeze()  # Unsloth and transformers collect garbage often: what was imported need not be looked through
    atexit.register(gc.unfreeze)  # else nanobind takes what is left for leaks


def load_model(config: Config, precision: Precision) -> Any:
    """The model with its adapter, a new one or the one to go on with, by Unsloth on every device.

    Of a PiSSA adapter the model's `pissa_start` says how it began.
    """
    log = Path(config.output_dir) / LOADING_LOG
    if config.full_determinism:  # cuBLAS reads it once, long before transformers would set it
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    if not hardware.on_card():  # there Unsloth finds the class itself
        register_class(config.model_name_or_path, config.trust_remote_code)
    with _folder_to_load(config) as folder, quietly(log), quick_imports():
        model = _load_from(folder, config, precision)
    check_quantized(model, config.quantization_bit, log)
    train_in_float32(model)
    # PEFT takes the vectors of lora_bias for shards of a matrix, at each save
    warnings.filterwarnings("ignore", message=r".*LoRA tensor\(s\) have invalid shape")
    if config.pissa_init and not config.adapter_name_or_path:
        model.pissa_start = pissa.take_components(model, config.pissa_iter, config.seed)
    if hardware.on_card():  # models that Unsloth has no attention of its own for, and all in 8 bit
        from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

        enable_hf_packed_attention()
        own = is_own(config, model.config.to_dict())
        model.keeps_samples_apart = own or packing.keeps_apart(model, packing.logits_alone(model))
    else:
        from training import cpu

        model.keeps_samples_apart = cpu.use_sample_attention(model)
        cpu.round_once(model)
        if precision.mixed == "bf16":
            cpu.store_in_bfloat16(model)
    return model


def train_in_float32(model: Any) -> None:
    """Modules trained in full, too: a 16-bit weight has too few digits for small steps."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def check_quantized(model: Any, bits: int | None, log: Path) -> None:
    """Raises UserError where Unsloth, which cannot use bitsandbytes, has loaded 16-bit weights with a printed line."""
    wanted = {4: "Params4bit", 8: "Int8Params"}.get(bits)
    if wanted and not any(type(weight).__name__ == wanted for weight in model.parameters()):
        raise UserError(
            "quantization_bit: bitsandbytes does not work here (see {log}); run make setup, or take it out", log=log
        )


def _load_from(folder: str, config: Config, precision: Precision) -> Any:
    from unsloth import FastLanguageModel

    on_cpu = not hardware.on_card()
    checkpointing, vllm = checkpointing_setting(config, on_cpu), {}
    if uses_vllm(config):  # the weights are loaded once for it and for the training
        share = config.vllm_gpu_memory_utilization
        vllm = {"fast_inference": True, "gpu_memory_utilization": share, "max_lora_rank": config.lora_rank}
    model, _ = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=config.cutoff_len,
        dtype=precision.weights,
        load_in_4bit=config.quantization_bit == 4,
        load_in_8bit=config.quantization_bit == 8,
        full_finetuning=False,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
        use_exact_model_name=True,
        **vllm,
    )
    if config.adapter_name_or_path:
        return FastLanguageModel.for_training(model, use_gradient_checkpointing=bool(checkpointing))
    return FastLanguageModel.get_peft_model(
        model,
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        bias=config.lora_bias if config.lora_bias in ("all", "lora_only") else "none",
        lora_bias=config.lora_bias == "true",
        **_modules_to_save(model, config.additional_target),
        target_modules=find_linear(model) if config.lora_target == ("all",) else list(config.lora_target),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        use_gradient_checkpointing=checkpointing,
        random_state=config.seed,
        max_seq_length=config.cutoff_len,
        # recomputing takes a third of a step: after the first one Unsloth leaves out what fits into memory
        **({} if on_cpu or config.gradient_checkpointing != "auto" else {"checkpoint_skip_layers": "auto"}),
        **_families(model),
    )


def find_linear(model: Any) -> list[str]:
    """What `lora_target: all` means: every linear layer of attention and feed-forward in the language model.

    Left out are the output layer, towers for images and sound with their projections, routers of experts, and the inner
    projections of a Mamba, which its fused kernels read past PEFT. Last names, or where a module that is left out has
    the same one, whole names. Of a mixture of experts also the experts by these names, where Unsloth or PEFT knows
    the model's as one parameter for each projection; of others they get no adapter.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    decoder, output = model.get_decoder(), model.get_output_embeddings()
    layers = model.base_model if decoder in (model, output) else decoder  # not all classes know theirs
    text = {id(module) for module in layers.modules()} - {id(output)}
    wanted, others = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            parent = model.get_submodule(name.rpartition(".")[0])
            taken = id(module) in text and not _is_router(module, parent) and not _is_state_space(parent)
            (wanted if taken else others).add(name)
    if not wanted:  # a Mamba alone: what PEFT adapts of it
        wanted = {name for name in others if id(model.get_submodule(name)) in text and not name.endswith("out_proj")}
    last_names = {name.rpartition(".")[2] for name in wanted}
    if not last_names & {name.rpartition(".")[2] for name in others - wanted}:
        wanted = last_names
    has_experts = any(".experts." in name and weight.ndim == 3 for name, weight in model.named_parameters())
    return sorted(wanted | (EXPERTS if has_experts else set()))


def _is_router(module: Any, parent: Any) -> bool:
    """Whether a linear layer chooses experts: it stands beside them, and has an output for each."""
    experts = getattr(parent, "experts", None)
    if experts is None:
        return False
    joined = next((weight.shape[0] for weight in experts.parameters() if weight.ndim == 3), None)
    return getattr(module, "out_features", None) == (joined or len(experts))


def _is_state_space(module: Any) -> bool:
    """Whether a module is a Mamba's mixer, by its parameters A and D; linear attention has no D."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def _modules_to_save(model: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The modules trained in full. A tied output layer stays tied where both it and the embedding are trained."""
    is_tied = tie_word_embeddings(model)
    if not names:
        return {}
    if is_tied and {"embed_tokens", "lm_head"} <= set(names):
        return {"modules_to_save": [name for name in names if name != "lm_head"], "ensure_weight_tying": True}
    return {"modules_to_save": list(names), "ensure_weight_tying": False}


def _families(model: Any) -> dict[str, bool]:
    """Keeps Unsloth from dropping targets of a text model whose modules are not named as Llama's.

    For models that it has no code of its own for, FastLanguageModel asks for adapters outside of vision layers only,
    and finds them by the names around them ("model.layers.N.mlp."): of a GPT-NeoX it would find none.
    """
    generic = os.environ.get("UNSLOTH_USE_NEW_MODEL", "0") == "1"  # how Unsloth's loader tells get_peft_model
    sees = getattr(model.config, "vision_config", None) or getattr(model.config, "audio_config", None)
    return {"finetune_vision_layers": True} if generic and not sees else {}


@contextlib.contextmanager
def _folder_to_load(config: Config) -> Iterator[str]:
    """What Unsloth is to load: the base model, or a copy of the adapter that names the base where it is now."""
    base = str(Path(config.model_name_or_path).resolve())
    if config.adapter_name_or_path is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as copy:
        write_readable(Adapter(Path(config.adapter_name_or_path)), Path(copy), base_model_name_or_path=base)
        yield copy
