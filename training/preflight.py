"""Will this run work here? What `train.py --dry-run` looks at, cheap things first; and how much memory a run needs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import common
from common import Config, Gpu, Loaded, UserError
from runs.target import missing_from_model
from training import packing

if TYPE_CHECKING:
    from preprocessing.dataset import Prepared
    from training.early_stopping import Plan

GB = 1e9
# The oldest Linux driver for each CUDA version that torch is built with (NVIDIA's CUDA release notes). Within a major
# version a newer CUDA runs on the driver of its first release; 13 needs 580.
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}
HIDE_THE_CARD = "to train on the CPU all the same, hide the card: CUDA_VISIBLE_DEVICES=-1"


class Examination:
    """Prints a line for each thing looked at and counts the faults."""

    def __init__(self) -> None:
        self.faults = 0
        self.told: set[str] = set()

    def good(self, what: str, finding: str) -> None:
        print(f"  ok     {what:<10}{finding}")

    def note(self, what: str, finding: str) -> None:
        print(f"  note   {what:<10}{finding}")

    def fault(self, what: str, finding: str) -> None:
        """A sentence that was told already is not told, or counted, again."""
        if finding not in self.told:
            self.told.add(finding)
            self.faults += 1
            print(f"  FAULT  {what:<10}{finding}")


def examine(loaded: Loaded, checks: dict[str, Callable[[], Any]]) -> int:
    """Looks at everything a run needs and prints what was found; returns the exit status, 0 or 2.

    `checks` are train.py's own, by what they look at: each raises UserError.
    """
    config, seen = loaded.config, Examination()
    print(f"will {loaded.recipe or 'the default recipe'} run here?")
    check_python(seen)
    gpu = check_gpu(seen, config)
    check_packages(seen, gpu)
    fits = run_checks(seen, checks)
    model = check_model(seen, config)
    on_disk = model is not None and model.folder is not None
    if on_disk:
        config, note = packing.fitted(config)
        if note:
            seen.note("batches", note)
    samples = check_data(seen, config, tokenizes=on_disk and fits["template"])
    if model is None:
        seen.note("memory", "how much of it and of the disk it takes is told once the model is there")
    else:
        check_memory(seen, config, gpu, samples, model)
        check_disk(seen, config, model)
    if seen.faults == 0:
        check_imports(seen)
    print("yes" if seen.faults == 0 else f"no: {seen.faults} fault{'s' if seen.faults > 1 else ''}, see above")
    return 2 if seen.faults else 0


def run_checks(seen: Examination, checks: dict[str, Callable[[], Any]]) -> dict[str, bool]:
    """Makes train.py's checks; whether each was passed."""
    passed = {}
    for what, check in checks.items():
        before = seen.faults
        try:
            found = check()
            if said := getattr(found, "says", ""):
                seen.note(what, said)
        except UserError as error:
            seen.fault(what, str(error))
        passed[what] = seen.faults == before
    return passed


def check_python(seen: Examination) -> None:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        seen.good("python", found)
    else:
        seen.fault("python", f"{found}; the pinned packages need 3.10 to 3.13: make setup PYTHON=python3.12")


def check_gpu(seen: Examination, config: Config) -> Gpu | None:
    gpu = common.find_gpu()
    if gpu is None:
        seen.note("card", "none that nvidia-smi knows of; training runs on the CPU, which suits the embedded model")
        if config.quantization_bit == 8:
            seen.fault("card", "quantization_bit: 8 needs a GPU; take it out, or use 4")
        return None
    seen.good("card", f"{gpu.name}, {gpu.free_memory / GB:.1f} of {gpu.total_memory / GB:.1f} GB free")
    if fault := gpu_fault(gpu):
        seen.fault("card", f"{fault}; {HIDE_THE_CARD}")
    else:
        seen.good("driver", f"{gpu.driver} (CUDA {gpu.cuda[0]}.{gpu.cuda[1]}), torch is built for {torch_cuda()[0]}.x")
    return gpu


def gpu_fault(gpu: Gpu) -> str | None:
    """What keeps a training from this card, and what to do; None where nothing does.

    Unsloth refuses a card that torch cannot use, so such a machine trains only with the card hidden.
    """
    if gpu.compute < (7, 0):
        return f"{gpu.name} has compute capability {gpu.compute[0]}.{gpu.compute[1]}, but Unsloth needs 7.0 or newer"
    built_for = torch_cuda()
    if built_for is None:
        return "torch is a build without CUDA, but there is a card: delete .venv and run make setup again"
    driver = int(gpu.driver.split(".")[0])
    needed = OLDEST_DRIVER.get(built_for[0], 580)
    if driver < needed:
        fits = next((major for major, oldest in OLDEST_DRIVER.items() if driver >= oldest), None)
        other = f", or install the build of the same torch release for CUDA {fits}" if fits else ""
        return (
            f"the driver is {gpu.driver}, but torch is built for CUDA {built_for[0]}.{built_for[1]}, "
            f"which needs {needed} or newer: update the driver{other}"
        )
    if missing := missing_for_triton():
        packages = f"gcc python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return (
            f"Triton compiles what starts its kernels, but finds no {' and no '.join(missing)}: apt install {packages}"
        )
    return None


def missing_for_triton() -> list[str]:
    """What Triton compiles with and does not find here: a C compiler (CC, gcc or clang) and Python's header."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    missing = [] if any(map(shutil.which, compilers)) else [f"C compiler ({' or '.join(compilers)})"]
    # as in triton/runtime/build.py: Debian's own scheme names a folder that its packages do not fill
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    return missing if header.is_file() else [*missing, str(header)]


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA version that the installed torch is built for, without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'(\d+)\.(\d+)'", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def check_packages(seen: Examination, gpu: Gpu | None) -> None:
    """Compares what is installed with requirements.txt."""
    wrong = []
    for line in (common.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, pin, rest = line.partition("==")
        if not pin or line.startswith("#") or (gpu is None and name in ("torchvision", "xformers")):
            continue
        wanted = rest.split()[0]
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "missing"
        if found.split("+")[0] != wanted:
            wrong.append(f"{name} {found} (pinned {wanted})")
    if wrong:
        seen.fault("packages", f"{', '.join(wrong)}: run make setup")
    else:
        seen.good("packages", f"torch {version('torch')}, unsloth {version('unsloth')}, as pinned")


def check_imports(seen: Examination) -> None:
    """Imports Unsloth in a process of its own; it takes ten seconds and may end the process."""
    command = [sys.executable, "-c", "import unsloth"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        seen.fault("unsloth", f"does not import: {last}")
    else:
        seen.good("unsloth", "imports")


def check_model(seen: Examination, config: Config) -> Model | None:
    """What is known of the model: all, where it is on the disk; else what config.json says, where that can be had."""
    path = Path(config.model_name_or_path).expanduser()
    missing = missing_from_model(path)
    if not missing:
        model = read_model(path)
        seen.good("model", f"{path} is whole, {model.size / GB:.2f} GB")
        return told_faults(seen, config, model)
    if config.model_name_or_path == common.EMBEDDED_MODEL and not path.exists():
        seen.note("model", f"{path} will be made from its package by the first run")
        return told_faults(seen, config, model_like(EMBEDDED_SHAPE))
    if path.exists():
        seen.fault("model", f"{path} lacks {', '.join(missing)}")
        return None
    name = hub_name(config.model_name_or_path)
    fetch = common.command("download.py", name or f"ORG/{path.name}")
    if name is None:
        seen.fault("model", f"there is no folder {config.model_name_or_path}; fetch it ({fetch}), or name another")
        return None
    hub = hub_address()
    if not reachable(hub):
        seen.fault(
            "model", f"{name} is not on the disk; {hub} cannot be reached (set HF_ENDPOINT to a mirror): {fetch}"
        )
        return None
    seen.fault("model", f"{name} is not on the disk; {hub} answers: {fetch}")
    settings = hub_config(name)
    return told_faults(seen, config, model_like(settings)) if settings else None


def told_faults(seen: Examination, config: Config, model: Model | None) -> Model | None:
    """The same model, after its faults were told."""
    for fault in model_faults(config, model) if model else ():
        seen.fault("model", fault)
    return model


def model_faults(config: Config, model: Model) -> list[str]:
    """What of the settings the model cannot follow."""
    faults = []
    context = model.settings.get("max_position_embeddings")
    if context and config.cutoff_len > context:
        name = config.model_name_or_path
        faults.append(f"cutoff_len is {config.cutoff_len}, but {name} reads at most {context} tokens; lower it")
    if model.folder is None:  # the names of its modules are a guess
        return faults
    matrices = {name for name, shape in model.shapes.items() if name.endswith(".weight") and len(shape) == 2}
    modules = {name.split(".")[-2] for name in matrices} | {"lm_head"}  # a tied one has no weights of its own
    unknown = [target for target in config.lora_target if target.split(".")[-1] not in modules]
    if config.lora_target != ("all",) and unknown and config.adapter_name_or_path is None:
        linear = sorted({name.split(".")[-2] for name in matrices if not re.search(NOT_ADAPTED, name)})
        faults.append(f"lora_target: {','.join(unknown)} names no module of this model; it has {', '.join(linear)}")
    return faults


def hub_name(name: str) -> str | None:
    """A model's ORG/NAME on the hub, where `name` is one or the folder of a model that a shipped recipe fetches."""
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
        and not name.startswith("models/")
        and not Path(name).parent.exists()
    ):
        return name
    fetched = {
        found.partition("/")[2]: found
        for recipe in sorted((common.ROOT / "configs").glob("*.yaml"))
        for found in re.findall(r"download\.py (\S+/\S+)", recipe.read_text(encoding="utf-8"))
    }
    return fetched.get(Path(name).name) if Path(name).parent == Path("models") else None


def hub_config(name: str) -> dict[str, Any] | None:
    """config.json of a model on the hub; None where it cannot be had."""
    try:
        with urllib.request.urlopen(f"{hub_address()}/{name}/resolve/main/config.json", timeout=5) as answer:
            return json.load(answer)
    except (OSError, ValueError):  # offline, gated, or no hub
        return None


def hub_address() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def reachable(address: str) -> bool:
    """Whether a server accepts a connection at `address` within three seconds."""
    parts = urlsplit(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Samples:
    """What of the data decides over time and memory: samples, rows of a batch, optimizer steps, tokens, the longest."""

    count: int
    rows: int
    steps: int
    tokens: int
    longest: int


def check_data(seen: Examination, config: Config, tokenizes: bool) -> Samples | None:
    """Reads the data and, where the tokenizer is there, tokenizes it; the report names every faulty row."""
    from preprocessing import dataset
    from training import early_stopping

    try:
        if not tokenizes:
            count_steps(seen, config, len(dataset.read_conversations(config)[0]))
            return None
        from preprocessing.chat_template import load_template
        from preprocessing.tokenizer import load_base_tokenizer

        tokenizer = load_base_tokenizer(config)
        data = dataset.prepare(config, tokenizer, load_template(config.template, tokenizer))
    except UserError as error:
        seen.fault("data", str(error))
        return None
    samples = measure(config, data)
    seen.good("data", f"{samples.count:,} samples, {samples.tokens:,} tokens, the longest {samples.longest:,}")
    seen.good("steps", steps_text(config, samples.steps))
    try:
        plan = make_plan(config, data, samples)
    except UserError as error:
        seen.fault("held out", str(error))
        return samples
    seen.good("held out", early_stopping.describe(config, plan, data.eval_lengths))
    for warning in early_stopping.warnings(config, samples.count, samples.steps, plan):
        seen.note("steps", warning)
    return samples


def count_steps(seen: Examination, config: Config, conversations: int) -> None:
    """What is known of a run before its data can be tokenized."""
    seen.good("data", f"{conversations:,} conversations; their tokens are counted once the model is there")
    most = "at most " if config.packing and config.max_steps <= 0 else ""
    seen.good("steps", most + steps_text(config, packing.total_steps(config, conversations)))


def steps_text(config: Config, steps: int) -> str:
    batch = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps}"
    return f"{steps:,} optimizer steps of {batch}"


def measure(config: Config, data: Prepared) -> Samples:
    """What of tokenized data decides over time and memory."""
    rows = len(data.train)
    if config.packing:
        rows = len(packing.pack(data.train_lengths, config.cutoff_len))
    lengths = data.train_lengths
    return Samples(len(data.train), rows, packing.total_steps(config, rows), int(lengths.sum()), int(lengths.max()))


def make_plan(config: Config, data: Prepared, samples: Samples) -> Plan:
    """When the run evaluates; raises UserError where that cannot be."""
    from training import early_stopping

    epoch_steps = packing.epoch_steps(config, samples.rows)
    return early_stopping.make_plan(config, samples.steps, epoch_steps, samples.tokens, data.eval_lengths)


# ---------------------------------------------------------------------------------------------------------------------
# Memory and disk


NOT_ADAPTED = r"embed|lm_head|norm"  # the matrices that "all" leaves out
# config.json of the embedded model, so far as its size depends on it
EMBEDDED_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Model:
    """What time and memory depend on: config.json, the shapes of the tensors, bytes on the disk; None: not there."""

    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    size: int
    folder: Path | None


def read_model(folder: Path) -> Model:
    """A model on the disk, from config.json and the headers of its weights."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config", settings)  # of a model that also sees
    return Model(settings, tensor_shapes(folder), model_bytes(folder), folder)


def model_like(settings: dict[str, Any]) -> Model | None:
    """A model of which only config.json is known, in 16 bit, if that describes one of Llama's kind (attention and a
    gated MLP); else None."""
    settings = settings.get("text_config", settings)
    experts = [name for name in settings if "experts" in name]
    try:
        hidden, inner, vocabulary = (settings[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
        layers, heads = settings["num_hidden_layers"], settings["num_attention_heads"]
    except KeyError:
        return None
    if experts or "quantization_config" in settings:
        return None
    head = settings.get("head_dim") or hidden // heads
    keys = head * settings.get("num_key_value_heads", heads)
    shapes = {"model.embed_tokens.weight": [vocabulary, hidden]}
    if not settings.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = [vocabulary, hidden]
    for layer in range(layers):
        for name, rows, columns in (
            ("self_attn.q_proj", head * heads, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, head * heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = [rows, columns]
    return Model(settings, shapes, 2 * sum(map(math.prod, shapes.values())), None)


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor of a safetensors model, from the files' headers alone."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        shapes.update({name: entry["shape"] for name, entry in header.items() if name != "__metadata__"})
    return shapes


def model_bytes(folder: Path) -> int:
    """Size of a model's weights on the disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def adapter_parameters(config: Config, shapes: dict[str, list[int]]) -> int:
    """Trained parameters: rank × (in + out) of every module that gets an adapter."""
    names = ("all",) if config.lora_target == ("all",) else config.lora_target
    linear = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not re.search(NOT_ADAPTED, name) and (names == ("all",) or name.split(".")[-2] in names)
    ]
    return sum(config.lora_rank * (rows + columns) for rows, columns in linear)


def estimate_memory(config: Config, folder: Path, tokens: int, gpu: Gpu | None) -> dict[str, float]:
    """`memory_of` a model on the disk."""
    return memory_of(config, read_model(folder), tokens, gpu)


def memory_of(config: Config, known: Model, tokens: int, gpu: Gpu | None) -> dict[str, float]:
    """Bytes a training needs at its peak, by what they are for.

    `tokens` are those of the largest forward pass. The parts are counted from the model's shapes; the activations are
    those of a Llama layer (attention and a gated MLP), all layers' where nothing is recomputed, else one layer's and
    every layer's input.
    """
    shapes, model = known.shapes, known.settings
    total = sum(math.prod(shape) for shape in shapes.values())
    linear = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and not re.search(NOT_ADAPTED, name))
    width = 2 if gpu or config.bf16 else 4
    by_bits = {4: 0.53, 8: 1.03}  # with the quantization constants
    weights = linear * by_bits.get(config.quantization_bit or 0, width) + (total - linear) * width
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    layers, vocabulary = model["num_hidden_layers"], model["vocab_size"]
    one_layer = tokens * (10 * hidden + 5 * inner) * width
    if gpu and config.gradient_checkpointing != "false":
        # recomputed; Unsloth's kernels write most gradients over them, and it keeps the layers' inputs in main memory
        activations = one_layer
    elif config.gradient_checkpointing == "true":
        activations = 2 * one_layer + layers * tokens * hidden * width
    else:
        activations = one_layer * layers
    adapter = adapter_parameters(config, shapes) * 16  # float32 weight, gradient and two moments
    runtime = 1.2 * GB  # CUDA context, or Python with torch and Unsloth
    left = gpu.free_memory - weights - adapter - activations - runtime if gpu else None
    return {
        "weights": weights,
        "adapter": adapter,
        "activations": activations,
        "logits": logits_memory(tokens, vocabulary, left),
        "runtime": runtime,
    }


def logits_memory(tokens: int, vocabulary: int, left: float | None) -> float:
    """Bytes of the logits with their gradient and what lies between; both of Unsloth's backends compute them in pieces.

    On a card it makes pieces (a multiple of four) of at most half the memory that is `left` there, and at most 4 GiB,
    at 16 bytes a logit (unsloth_zoo/fused_losses/cross_entropy_loss.py): the larger the card, the higher the peak.
    """
    if left is None:
        return min(3 * 4 * tokens * vocabulary, 0.2 * GB)
    whole, room = 16 * tokens * vocabulary, max(0.2 * GB, min(left / 2, 4 << 30))
    return whole if whole <= room else whole / (4 * math.ceil(whole / room / 4))


def check_memory(seen: Examination, config: Config, gpu: Gpu | None, samples: Samples | None, model: Model) -> None:
    longest = samples.longest if samples and not config.packing else config.cutoff_len
    tokens = config.per_device_train_batch_size * longest
    try:
        parts = memory_of(config, model, tokens, gpu)
    except KeyError:  # its config.json has other words than Llama's
        seen.note("memory", "cannot be estimated for this kind of model")
        return
    need = sum(parts.values())
    have = gpu.free_memory if gpu else free_memory()
    detail = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items() if size >= 0.05 * GB)
    most = "at most " if samples is None and not config.packing else ""
    finding = f"{most}about {need / GB:.1f} GB at the peak ({detail}), {have / GB:.1f} GB are free"
    if need <= have:
        seen.good("memory", finding)
        return
    advice = []
    if gpu and config.quantization_bit is None:
        advice.append("quantization_bit=4")
    if config.gradient_checkpointing != "true" and not gpu:
        advice.append("gradient_checkpointing=true")
    if config.per_device_train_batch_size > 1:
        steps = config.per_device_train_batch_size * config.gradient_accumulation_steps
        advice.append(f"per_device_train_batch_size=1 gradient_accumulation_steps={steps}")
    advice.append(f"cutoff_len={config.cutoff_len // 2}")
    seen.fault("memory", f"{finding}; try {', then '.join(advice)}")


def free_memory() -> int:
    """Bytes of main memory that a new process can have."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024
    except (OSError, TypeError):
        import psutil

        return psutil.virtual_memory().available


def check_disk(seen: Examination, config: Config, model: Model) -> None:
    adapter = adapter_parameters(config, model.shapes) * 12  # weights and two moments
    checkpoints = adapter * ((config.save_total_limit or 10) + 2)
    exports = 2 * model.size
    fetched = 0 if model.folder else model.size
    folder = Path(config.output_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    fetch = f"the model takes about {fetched / GB:.1f} GB, " if fetched else ""
    finding = (
        f"{free / GB:.1f} GB free; {fetch}checkpoints take about {checkpoints / GB:.2f} GB, "
        f"the merged model and a 16-bit GGUF {exports / GB:.1f} GB more"
    )
    if free < fetched + checkpoints:
        seen.fault("disk", f"{finding}: make room, or set output_dir to another disk")
    elif free < fetched + checkpoints + exports:
        seen.note("disk", f"{finding}: enough to train, not to export")
    else:
        seen.good("disk", finding)
