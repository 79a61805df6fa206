"""llama.cpp at work: conversion, quantization and measuring, each in a child process, because llama.cpp can abort.

`python -m export.llamacpp` fetches and builds the library; `python -m export.llamacpp FUNCTION` is how `call` runs a
function in a child.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common import ROOT, run_script
from inference.child_process import RESULT, run_child
from inference.llamacpp_build import converter, library, quantizer, runtime

if TYPE_CHECKING:
    import numpy as np


def call(function: Callable[..., Any], doing: str, **arguments: Any) -> Any:
    """Runs a function of this room in a child process, as llama.cpp may abort; its result comes back as JSON."""
    # a thread that waits for the others spins; on a busy machine that costs nine tenths of the speed and more
    environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # files are measured on the CPU: the card's memory is torch's
    if function is not convert:
        environment["LLAMA_CPP_LIB_PATH"] = str(library().resolve())
    command = [sys.executable, "-P", "-m", "export.llamacpp", function.__name__]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return json.loads(run_child(command, doing, environment, json.dumps(arguments, default=str)))


# ---------------------------------------------------------------------------------------------------------------------
# The child's side: each function's arguments (standard input) and result are JSON


def convert(folder: str, target: str, kind: str, card: dict[str, Any], name: str, end: int) -> None:
    """Runs llama.cpp's converter on a model folder; `kind` is f32, f16, bf16 or q8_0.

    The token `end`, which ends a turn of the trained template, becomes the file's end-of-sequence and end-of-turn;
    `card` is the head of a model card (licence, base model).
    """
    import runpy

    script = converter()
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    import gguf

    class SpecialVocab(gguf.SpecialVocab):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            self.special_token_ids |= {"eos": end, "eot": end}

    gguf.SpecialVocab = SpecialVocab
    gguf.Metadata.load_model_card = staticmethod(lambda path=None: card)  # noqa: ARG005 - the converter's signature
    sys.argv = [str(script), folder, "--outfile", target, "--outtype", kind, "--model-name", name]
    runpy.run_path(str(script), run_name="__main__")


def quantize(source: str, target: str, kind: str) -> None:
    """Writes `target`, a GGUF of type `kind`, from the GGUF `source` with llama.cpp's quantizer."""
    import ctypes

    from gguf import LlamaFileType

    llama = _verbose_runtime()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    parameters.nthread = os.cpu_count() or 1
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit("llama_model_quantize failed")


def inspect(file: str, texts: list[str]) -> dict[str, Any]:
    """What llama.cpp reads out of a GGUF without its weights: token ids of `texts`, special tokens, template.

    Control tokens in a text become tokens, as `tokenizer(text, add_special_tokens=False)` has it.
    """

    llama = _verbose_runtime()
    with _model(llama, file, vocab_only=True) as model:
        vocab = llama.llama_model_get_vocab(model)

        def ids(text: bytes) -> list[int]:
            room = (llama.llama_token * (len(text) + 8))()
            return list(room[: llama.llama_tokenize(vocab, text, len(text), room, len(room), False, True)])

        template = llama.llama_model_chat_template(model, None)
        return {
            "ids": [ids(text.encode()) for text in texts],
            "end": [
                token for token in range(llama.llama_vocab_n_tokens(vocab)) if llama.llama_vocab_is_eog(vocab, token)
            ],
            "eos": llama.llama_vocab_eos(vocab),
            "eot": llama.llama_vocab_eot(vocab),
            "adds_bos": llama.llama_vocab_get_add_bos(vocab),
            "template": template.decode() if template else None,
        }


def measure(file: str, samples: list[list[int]], reference: str) -> dict[str, float]:
    """How far a GGUF's next-token distributions are from `reference`, and how fast it is.

    `reference` is a .npy file of float32 logits (tokens of all samples × vocabulary) of the 16-bit model. Returns the
    mean Kullback-Leibler divergence in nats, the share of tokens with the same likeliest successor, both perplexities
    over the samples' own successors, and tokens a second reading a prompt and writing one token at a time.
    """
    import numpy as np

    llama = _verbose_runtime()
    expected = np.load(reference, mmap_mode="r")
    divergence, agreed, loss, expected_loss, scored, start = 0.0, 0, 0.0, 0.0, 0, 0
    with _model(llama, file) as model, _context(llama, model, max(map(len, samples))) as context:
        reading = time.perf_counter()
        spent = 0.0
        for number, ids in enumerate(samples, 1):
            reading = time.perf_counter()
            logits = _logits(llama, model, context, ids)
            spent += time.perf_counter() - reading
            for row in range(0, len(ids), 64):  # in small blocks: float64 of a large vocabulary
                ours = _log_softmax(logits[row : row + 64])
                theirs = _log_softmax(expected[start + row : start + row + len(ours), : ours.shape[1]])
                divergence += float((np.exp(theirs) * (theirs - ours)).sum())
                agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
                successors = np.array(ids[row + 1 : row + 1 + len(ours)], dtype=np.int64)
                places = np.arange(len(successors))
                loss -= float(ours[places, successors].sum())
                expected_loss -= float(theirs[places, successors].sum())
                scored += len(successors)
            start += len(ids)
            print(f"[{number}/{len(samples)}]", flush=True)
        written = _write_speed(llama, model, context, samples[0])
    return {
        "kl_divergence": divergence / start,
        "top1_agreement": agreed / start,
        "perplexity": float(np.exp(loss / scored)),
        "reference_perplexity": float(np.exp(expected_loss / scored)),
        "tokens": start,
        "prompt_tokens_per_second": start / spent,
        "tokens_per_second": written,
    }


def _verbose_runtime() -> Any:
    """The runtime with all its log on stderr, where `run` reads progress and the reason of a failure."""
    llama = runtime()

    @llama.llama_log_callback
    def log(level: int, text: bytes, data: Any) -> None:  # noqa: ARG001 - the library's signature
        sys.stderr.write(text.decode("utf-8", "replace"))

    llama.llama_log_set(log, None)
    _verbose_runtime.kept = log  # the library holds only a pointer
    llama.llama_backend_init()
    return llama


@contextlib.contextmanager
def _model(llama: Any, file: str, vocab_only: bool = False) -> Iterator[Any]:
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = vocab_only
    model = llama.llama_model_load_from_file(file.encode(), parameters)
    if not model:
        sys.exit(f"llama.cpp cannot load {file}")
    yield model
    llama.llama_model_free(model)


@contextlib.contextmanager
def _context(llama: Any, model: Any, length: int) -> Iterator[Any]:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = length + 64
    parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
    context = llama.llama_init_from_model(model, parameters)
    if not context:
        sys.exit("llama.cpp cannot make a context")
    yield context
    llama.llama_free(context)


def _logits(llama: Any, model: Any, context: Any, ids: list[int], position: int = 0) -> np.ndarray:
    """float32 (tokens × vocabulary); from position 0 on nothing of an earlier sample is seen."""
    import numpy as np

    if position == 0:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position + i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    status = llama.llama_decode(context, batch)
    llama.llama_batch_free(batch)
    if status:
        sys.exit(f"llama_decode failed with {status}")
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), size))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    import numpy as np
    from scipy.special import log_softmax

    return log_softmax(logits.astype(np.float64), axis=1)


def _write_speed(llama: Any, model: Any, context: Any, prompt: list[int], count: int = 48) -> float:
    """Tokens a second, one at a time, after a short prompt."""
    prompt = prompt[:32]
    token = int(_logits(llama, model, context, prompt)[-1].argmax())
    started = time.perf_counter()
    for position in range(len(prompt), len(prompt) + count):
        token = int(_logits(llama, model, context, [token], position)[-1].argmax())
    return count / (time.perf_counter() - started)


def main(argv: list[str]) -> None:
    if not argv:
        converter()
        print(quantizer() or library())
        return
    functions = {function.__name__: function for function in (convert, quantize, inspect, measure)}
    result = functions[argv[0]](**json.load(sys.stdin))
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    run_script(main)
