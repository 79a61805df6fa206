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
from pathlib import Path
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

    load = gguf.SpecialVocab._load

    def load_and_end(self: Any, path: Path) -> None:
        load(self, path)
        self.special_token_ids |= {"eos": end, "eot": end}

    gguf.SpecialVocab._load = load_and_end
    gguf.Metadata.load_model_card = staticmethod(lambda path=None: card)  # noqa: ARG005 - the converter's signature
    sys.argv = [str(script), folder, "--outfile", target, "--outtype", kind, "--model-name", name]
    runpy.run_path(str(script), run_name="__main__")


def quantize(source: str, target: str, kind: str, matrix: str | None) -> None:
    """Writes `target`, a GGUF of type `kind`, from the GGUF `source` with llama.cpp's quantizer."""
    import ctypes

    from gguf import LlamaFileType

    llama = _verbose_runtime()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]
    parameters.nthread = os.cpu_count() or 1
    if matrix:
        rows = list(_read_matrix(Path(matrix)))
        entries = (llama.llama_model_imatrix_data * (len(rows) + 1))()  # the last one stays empty: the end
        for entry, (name, values) in zip(entries, rows, strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        sys.exit("llama_model_quantize failed")


def inspect(file: str, texts: list[str]) -> dict[str, Any]:
    """What llama.cpp reads out of a GGUF without its weights: token ids of `texts`, special tokens, metadata.

    Control tokens in a text become tokens, as `tokenizer(text, add_special_tokens=False)` has it.
    """
    import ctypes

    llama = _verbose_runtime()
    with _model(llama, file, vocab_only=True) as model:
        vocab = llama.llama_model_get_vocab(model)

        def ids(text: bytes) -> list[int]:
            room = (llama.llama_token * (len(text) + 8))()
            return list(room[: llama.llama_tokenize(vocab, text, len(text), room, len(room), False, True)])

        def value(key: str) -> str | None:
            buffer = ctypes.create_string_buffer(1 << 16)
            size = llama.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
            return buffer.value.decode() if size >= 0 else None

        template = llama.llama_model_chat_template(model, None)
        keys = ("general.name", "general.license", "general.base_model.0.name", "general.architecture")
        return {
            "ids": [ids(text.encode()) for text in texts],
            "end": [
                token for token in range(llama.llama_vocab_n_tokens(vocab)) if llama.llama_vocab_is_eog(vocab, token)
            ],
            "bos": llama.llama_vocab_bos(vocab),
            "eos": llama.llama_vocab_eos(vocab),
            "eot": llama.llama_vocab_eot(vocab),
            "adds_bos": llama.llama_vocab_get_add_bos(vocab),
            "template": template.decode() if template else None,
            "metadata": {key: value(key) for key in keys},
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


def importance(file: str, samples: list[list[int]], target: str) -> int:
    """Writes the importance matrix: for each weight matrix the sums of its input's squares, column by column.

    The file has the form of llama.cpp's own tool, after its `tools/imatrix` (dense and expert matrices); returns the
    count of matrices.
    """
    import gguf

    llama = _verbose_runtime()
    watch, sums = _watch_inputs(llama)
    with _model(llama, file) as model, _context(llama, model, max(map(len, samples)), watch) as context:
        for number, ids in enumerate(samples, 1):
            _logits(llama, model, context, ids)
            print(f"[{number}/{len(samples)}]", flush=True)
    writer = gguf.GGUFWriter(target, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["the run's training data"])
    writer.add_uint32("imatrix.chunk_count", len(samples))
    writer.add_uint32("imatrix.chunk_size", max(map(len, samples)))
    for name, (squares, counts) in sorted(sums.items()):
        writer.add_tensor(f"{name}.in_sum2", squares.astype("float32"))
        writer.add_tensor(f"{name}.counts", counts.astype("float32")[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(sums)


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
def _context(llama: Any, model: Any, length: int, watch: Any = None) -> Iterator[Any]:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = length + 64
    parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
    if watch:
        parameters.cb_eval = watch
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
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
            token,
            position + i,
            1,
            0,
            1,
        )
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


def _tensor_struct() -> Any:
    """The head of llama.cpp's struct ggml_tensor (ggml.h of the pinned revision)."""
    import ctypes

    class Tensor(ctypes.Structure):
        pass

    Tensor._fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # sizes, fastest first
        ("nb", ctypes.c_size_t * 4),  # strides in bytes
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.POINTER(Tensor) * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]
    return Tensor


def _ggml() -> Any:
    """The library below llama.cpp, with the types of what is called in it."""
    import ctypes

    ggml = ctypes.CDLL(str(next(Path(os.environ["LLAMA_CPP_LIB_PATH"]).glob("libggml-base.*"))))
    ggml.ggml_op_name.restype = ctypes.c_char_p
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return ggml


def _values(ggml: Any, tensor: Any, kind: type) -> np.ndarray:
    """A tensor's values, slowest size first, copied out of whatever memory it is in."""
    import ctypes

    import numpy as np

    strides, shape = tuple(tensor.nb)[::-1], tuple(tensor.ne)[::-1]
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + np.dtype(kind).itemsize
    raw = np.empty(size, dtype=np.uint8)
    ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), raw.ctypes.data, 0, size)
    return np.ndarray(shape, dtype=kind, buffer=raw, strides=strides)


def _watch_inputs(llama: Any) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A callback for the runtime, and the sums it fills: matrix → (squares (matrices × columns), counts (matrices))."""
    import numpy as np

    struct, ggml = _tensor_struct(), _ggml()
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @llama.ggml_backend_sched_eval_callback
    def watch(address: int, asking: bool, data: Any) -> bool:  # noqa: ARG001 - the library's signature
        tensor = struct.from_address(address)
        operation = ggml.ggml_op_name(tensor.op)
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not asking
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode().split("#")[-2 if b"#" in weight.name else 0]  # "CPU#blk.0.attn_q.weight#0"
        if not name.startswith("blk.") or inputs.type != 0:  # 0: float32
            return not asking
        if not asking:
            squares, counts = sums.setdefault(name, (np.zeros((weight.ne[2], weight.ne[0])), np.zeros(weight.ne[2])))
            rows = np.square(_values(ggml, inputs, np.float32)[0].astype(np.float64))  # tokens × used experts × columns
            if operation == b"MUL_MAT":
                squares += rows.reshape(-1, rows.shape[-1]).sum(0)
                counts += rows.shape[0] * rows.shape[1]
            else:
                chosen = _values(ggml, tensor.src[2].contents, np.int32)[0, 0]  # tokens × used experts
                for slot in range(chosen.shape[1]):
                    np.add.at(squares, chosen[:, slot], rows[:, slot % rows.shape[1]])
                    np.add.at(counts, chosen[:, slot], 1)
        return True

    return watch, sums


def _read_matrix(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(matrix, mean squares as flat float32) of an importance matrix; an expert never used counts as 1 everywhere."""
    import gguf
    import numpy as np

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, squares in tensors.items():
        if name.endswith(".in_sum2"):
            matrix = name.removesuffix(".in_sum2")
            counts = tensors[f"{matrix}.counts"].reshape(-1, 1)
            means = np.where(counts > 0, squares.reshape(len(counts), -1) / np.maximum(counts, 1), 1)
            yield matrix, np.ascontiguousarray(means, dtype=np.float32).reshape(-1)


def main(argv: list[str]) -> None:
    if not argv:
        converter()
        print(quantizer() or library())
        return
    functions = {function.__name__: function for function in (convert, quantize, inspect, measure, importance)}
    result = functions[argv[0]](**json.load(sys.stdin))
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    run_script(main)
