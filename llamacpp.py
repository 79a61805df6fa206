"""llama.cpp for this kit: fetched and built once into the cache, and run in child processes, because it can abort.

Its source comes inside the Python package llama-cpp-python: llama.cpp's own converter (no build needed), the library
(quantizer and runtime, built here) and the Python binding of the same revision. What the user has is used instead:
`LLAMA_CPP_DIR` names a folder of llama.cpp, or `llama-quantize` is on the path; `CMAKE_ARGS` is passed to the build
(`-DGGML_CUDA=OFF` keeps it off the card, for which it is built where there are one and CUDA's compiler).

`python llamacpp.py` fetches and builds; `python llamacpp.py FUNCTION` is how `call` runs a function in a child.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import CACHE, UserError, find_gpu, run_script, write_text

if TYPE_CHECKING:
    import numpy as np

    from common import Gpu

VERSION = "0.3.36"  # of llama-cpp-python; its llama.cpp is 0.5.0
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
HOME = CACHE / f"llamacpp-{VERSION}"

# What is unpacked of the archive (39 of 210 MB): the binding, the converter, and what the library is built from.
_UNPACKED = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "CMakeLists.txt", "cmake", "include", "src", "ggml")
_UNPACKED += ("vendor", "LICENSE", "licenses")

# The library alone: no programs, tests or server. Built for this machine's CPU, as fast as it can be on it.
_CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    **{f"LLAMA_BUILD_{part}": "OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP", "MTMD")},
}


# ---------------------------------------------------------------------------------------------------------------------
# Fetching and building


def own_folder() -> Path | None:
    """The user's folder of llama.cpp (`LLAMA_CPP_DIR`), or None."""
    named = os.environ.get("LLAMA_CPP_DIR")
    if named and not Path(named).is_dir():
        raise UserError(f"LLAMA_CPP_DIR={named} is no folder; name the folder of llama.cpp, or unset it")
    return Path(named) if named else None


def _own_file(name: str) -> Path | None:
    folder = own_folder()
    places = [folder / sub / name for sub in ("", "bin", "build/bin", "lib")] if folder else []
    return next((place for place in places if place.is_file()), None)


def quantizer() -> str | None:
    """The user's own `llama-quantize`, or None: then the library quantizes."""
    own = _own_file("llama-quantize")
    return str(own) if own else shutil.which("llama-quantize")


def converter() -> Path:
    """convert_hf_to_gguf.py: the user's own, else that of the archive."""
    return _own_file("convert_hf_to_gguf.py") or source() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"


def source() -> Path:
    """The unpacked archive: `llama_cpp/` (the binding) and `vendor/llama.cpp/`. Fetched by pip the first time."""
    folder = HOME / "source"
    with _locked():
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=HOME, prefix=".fetch-") as beside:
                archive = _fetch(Path(beside))
                top = f"llama_cpp_python-{VERSION}"
                wanted = (f"{top}/llama_cpp/", *(f"{top}/vendor/llama.cpp/{name}" for name in _UNPACKED))
                with tarfile.open(archive) as file:
                    members = [member for member in file.getmembers() if member.name.startswith(wanted)]
                    file.extractall(beside, members=members, filter="data")
                os.replace(Path(beside) / top, folder)
    return folder


def _fetch(folder: Path) -> Path:
    """The archive, by pip and from the package index that pip is set up with; its hash is checked by pip."""
    print("fetching llama.cpp (77 MB, once)", file=sys.stderr)
    pinned = folder / "pinned.txt"
    write_text(pinned, f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    done = subprocess.run([*command, "--dest", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise UserError(
            f"llama.cpp cannot be fetched ({reason.removeprefix('ERROR: ')}); "
            "see that pip reaches a package index, or name a llama.cpp you have: LLAMA_CPP_DIR=folder"
        )
    return folder / f"llama_cpp_python-{VERSION}.tar.gz"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time fetches or builds; the others wait for it."""
    HOME.mkdir(parents=True, exist_ok=True)
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing() -> str | None:
    """Why there is no library and none can be built here, with what to do; None where all is well."""
    if _found() or (_cmake() and any(map(shutil.which, ("c++", "g++", "clang++")))):
        return None
    return (
        "quantizing and proving a GGUF need llama.cpp's library, and cmake and a C++ compiler to build it once; "
        "install them (apt install cmake g++), or name a llama.cpp you have: LLAMA_CPP_DIR=folder"
    )


def library() -> Path:
    """Folder of libllama: the user's own where the binding fits it, else the cache's, built the first time (2-3 min).

    Raises UserError where there is neither a library nor a compiler.
    """
    if found := _found():
        return found
    if lacking := missing():
        raise UserError(lacking)
    source()
    with _locked():
        if not _built().exists():
            _build(_built())
    return _built()


def _found() -> Path | None:
    """Folder of a library that is there already."""
    if named := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(named)
    own = _own_file("libllama.dylib" if sys.platform == "darwin" else "libllama.so")
    if own and _same_interface(own_folder() / "include" / "llama.h"):
        return own.parent
    return _built() if _built().exists() else None


def _built() -> Path:
    return HOME / f"lib-{_machine()}"


def _cmake() -> str | None:
    """cmake, also where pip has put it."""
    return shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))


def _machine() -> str:
    """What a build depends on: this CPU's abilities, the card and CMAKE_ARGS; a shared cache may serve several."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = re.search(r"^(flags|Features)\s*:.*", cpu, re.MULTILINE)
    text = platform.machine() + (flags.group() if flags else cpu) + os.environ.get("CMAKE_ARGS", "")
    if card := _card():
        text += f"CUDA {card.compute}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _card() -> Gpu | None:
    """The card that the library is built for; None where there is none, or no CUDA compiler."""
    return find_gpu() if shutil.which("nvcc") else None


def _same_interface(header: Path) -> bool:
    """Whether the structs of a llama.h are those the binding was written for; a wrong guess would crash."""

    def structs(path: Path) -> dict[str, str]:
        text = re.sub(r"//[^\n]*|\s+", " ", path.read_text(encoding="utf-8"))
        return dict(re.findall(r"struct (llama_\w+) \{(.*?)\}", text))

    ours = source() / "vendor" / "llama.cpp" / "include" / "llama.h"
    return header.is_file() and structs(header) == structs(ours)


def _build(target: Path) -> None:
    """Builds the library alone into the folder `target`, which appears whole."""
    cuda = {"GGML_CUDA": "ON"} if _card() else {}
    settings = [f"-D{key}={value}" for key, value in (_CMAKE | cuda).items()] + os.environ.get("CMAKE_ARGS", "").split()
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    tree, jobs = str(HOME / "source" / "vendor" / "llama.cpp"), str(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=HOME, prefix=".build-") as beside:
        run([_cmake(), "-S", tree, "-B", beside, *ninja, *settings], "setting up llama.cpp's build")
        run([_cmake(), "--build", beside, "--target", "llama", "--parallel", jobs], "building llama.cpp (once)")
        libraries = Path(beside) / "libraries"
        shutil.copytree(Path(beside) / "bin", libraries, symlinks=True)
        os.replace(libraries, target)


# ---------------------------------------------------------------------------------------------------------------------
# Running it


_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]|\[?\s*(\d+)%")
_TELLING = re.compile(r"error|assert|abort|failed|not supported|unknown|invalid|unable|cannot", re.IGNORECASE)
_RESULT = "RESULT "


def run(command: list[str], doing: str, environment: dict[str, str] | None = None, told: str = "") -> str:
    """Runs a program, `told` on its standard input, with a progress bar read off its output; returns its RESULT.

    Raises UserError with the line of its output that tells most when it fails or dies by a signal.
    """
    from tqdm import tqdm

    lines: deque[str] = deque(maxlen=2000)
    result = ""
    child = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        child.stdin.write(told)
        child.stdin.close()
        with tqdm(desc=doing, total=100, bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}") as bar:
            for line in child.stdout:  # a carriage return ends a line here too: the children's own bars come through
                if line.startswith(_RESULT):
                    result = line.removeprefix(_RESULT)
                elif match := _PROGRESS.search(line):
                    done, total, percent = match.groups()
                    bar.update(max(0, (100 * int(done) / int(total) if done else int(percent)) - bar.n))
                else:
                    lines.append(line.strip())
            if child.wait() == 0:
                bar.update(100 - bar.n)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        raise UserError(f"{doing} failed: {_explain(list(filter(None, lines)), child.returncode)}")
    return result


def _explain(lines: list[str], status: int) -> str:
    """One sentence out of a failed program's output."""
    if any("pre-tokenizer was not recognized" in line for line in lines):
        return (
            "llama.cpp does not know this model's tokenizer (its pre-tokenizer is in no list of its converter); "
            "train a base model that llama.cpp supports, or name a newer llama.cpp: LLAMA_CPP_DIR=folder"
        )
    telling = [line for line in lines if _TELLING.search(line)] or lines or ["it said nothing"]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{telling[-1][:400]} ({how}); this is llama.cpp's own word"


def call(function: Callable[..., Any], doing: str, **arguments: Any) -> Any:
    """Runs a function of this room in a child process, as llama.cpp may abort; its result comes back as JSON."""
    # a thread that waits for the others spins; on a busy machine that costs nine tenths of the speed and more
    environment = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # files are measured on the CPU: the card's memory is torch's
    if function is not convert:
        environment["LLAMA_CPP_LIB_PATH"] = str(library().resolve())
    command = [sys.executable, str(Path(__file__).resolve()), function.__name__]
    return json.loads(run(command, doing, environment, json.dumps(arguments, default=str)))


def runtime() -> Any:
    """The module `llama_cpp` with its library loaded into this process; what calls it had better be a child."""
    os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(library().resolve()))
    if str(source()) not in sys.path:
        sys.path.insert(0, str(source()))
    import llama_cpp

    return llama_cpp


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


def quantize(source: str, target: str, ftype: int, matrix: str | None) -> None:
    """Writes `target` from the GGUF `source` with llama.cpp's quantizer; `ftype` is its enum llama_ftype."""
    import ctypes

    llama = _verbose_runtime()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = ftype
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

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _write_speed(llama: Any, model: Any, context: Any, prompt: list[int], count: int = 48) -> float:
    """Tokens a second, one at a time, after a short prompt."""
    prompt = prompt[:32]
    token = int(_logits(llama, model, context, prompt)[-1].argmax())
    started = time.perf_counter()
    for position in range(len(prompt), len(prompt) + count):
        token = int(_logits(llama, model, context, [token], position)[-1].argmax())
    return count / (time.perf_counter() - started)


def _watch_inputs(llama: Any) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A callback for the runtime, and the sums it fills: matrix → (squares (matrices × columns), counts (matrices))."""
    import ctypes

    import numpy as np

    class Tensor(ctypes.Structure):
        """The head of llama.cpp's struct ggml_tensor (ggml.h of the pinned revision)."""

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
    base = next(Path(os.environ["LLAMA_CPP_LIB_PATH"]).glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(base))
    ggml.ggml_op_name.restype = ctypes.c_char_p
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def array(tensor: Any, kind: type) -> np.ndarray:
        """The tensor's values, slowest size first, copied out of whatever memory it is in."""
        strides, shape = tuple(tensor.nb)[::-1], tuple(tensor.ne)[::-1]
        size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + np.dtype(kind).itemsize
        raw = np.empty(size, dtype=np.uint8)
        get = ggml.ggml_backend_tensor_get
        get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        get(ctypes.addressof(tensor), raw.ctypes.data, 0, size)
        return np.ndarray(shape, dtype=kind, buffer=raw, strides=strides)

    @llama.ggml_backend_sched_eval_callback
    def watch(address: int, asking: bool, data: Any) -> bool:  # noqa: ARG001 - the library's signature
        tensor = Tensor.from_address(address)
        operation = ggml.ggml_op_name(tensor.op)
        if operation not in (b"MUL_MAT", b"MUL_MAT_ID"):
            return not asking
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        name = weight.name.decode().split("#")[-2 if b"#" in weight.name else 0]  # "CPU#blk.0.attn_q.weight#0"
        if not name.startswith("blk.") or inputs.type != 0:  # 0: float32
            return not asking
        if not asking:
            squares, counts = sums.setdefault(name, (np.zeros((weight.ne[2], weight.ne[0])), np.zeros(weight.ne[2])))
            rows = np.square(array(inputs, np.float32)[0].astype(np.float64))  # (tokens × used experts × columns)
            if operation == b"MUL_MAT":
                squares += rows.reshape(-1, rows.shape[-1]).sum(0)
                counts += rows.shape[0] * rows.shape[1]
            else:
                chosen = array(tensor.src[2].contents, np.int32)[0, 0]  # (tokens × used experts)
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
    print(_RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    run_script(main)
