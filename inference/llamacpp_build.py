"""llama.cpp's library for this kit: fetched and built once into the cache.

Its source comes inside the Python package llama-cpp-python: llama.cpp's own converter (no build needed), the library
(quantizer and runtime, built here) and the Python binding of the same revision. What the user has is used instead:
`LLAMA_CPP_DIR` names a folder of llama.cpp, or `llama-quantize` is on the path; `CMAKE_ARGS` is passed to the build
(`-DGGML_CUDA=OFF` keeps it off the card, for which it is built where there are one and CUDA's compiler).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from common import CACHE, Gpu, Message, UserError, find_gpu
from inference.child_process import run_child
from runs.files import unfinished, write_text

VERSION = "0.3.36"  # of llama-cpp-python; its llama.cpp is 0.5.0
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
HOME = CACHE / f"llamacpp-{VERSION}"
# What is unpacked of the archive (39 of 210 MB): the binding, the converter, and what the library is built from.
_UNPACKED = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "CMakeLists.txt", "cmake", "include", "src", "ggml")
_UNPACKED += ("vendor", "LICENSE", "licenses")
# Without llama.cpp's code for AMX, which crashes at the first reply: compilers optimize the configuration of the tiles
# away, and its threads lack the permission for them (pull request 26954 there).
_NO_AMX = "-U__AMX_INT8__"
# The library alone: no programs, tests or server. Built for this machine's CPU, as fast as it can be on it.
_CMAKE = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    "CMAKE_C_FLAGS": f"{os.environ.get('CFLAGS', '')} {_NO_AMX}".strip(),
    "CMAKE_CXX_FLAGS": f"{os.environ.get('CXXFLAGS', '')} {_NO_AMX}".strip(),
    **{f"LLAMA_BUILD_{part}": "OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP", "MTMD")},
}


def own_folder() -> Path | None:
    """The user's folder of llama.cpp (`LLAMA_CPP_DIR`), or None. Raises UserError where it is no folder."""
    named = os.environ.get("LLAMA_CPP_DIR")
    if named and not Path(named).is_dir():
        raise UserError("LLAMA_CPP_DIR={folder} is no folder; name the folder of llama.cpp, or unset it", folder=named)
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
            with unfinished(folder) as beside:
                archive = _fetch(beside)
                top = f"llama_cpp_python-{VERSION}"
                wanted = (f"{top}/llama_cpp/", *(f"{top}/vendor/llama.cpp/{name}" for name in _UNPACKED))
                with tarfile.open(archive) as file:
                    members = [member for member in file.getmembers() if member.name.startswith(wanted)]
                    file.extractall(beside, members=members, filter="data")
                os.replace(beside / top, folder)
    return folder


def _fetch(folder: Path) -> Path:
    """The archive, by pip and from the package index that pip is set up with; its hash is checked by pip."""
    print(Message("fetching llama.cpp (77 MB, once)"), file=sys.stderr)
    pinned = folder / "pinned.txt"
    write_text(pinned, f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    done = subprocess.run([*command, "--dest", str(folder), "-r", str(pinned)], capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise UserError(
            "llama.cpp cannot be fetched ({reason}); check that pip reaches a package index, or name a llama.cpp "
            "that you have: LLAMA_CPP_DIR=folder",
            reason=reason.removeprefix("ERROR: "),
        )
    return folder / f"llama_cpp_python-{VERSION}.tar.gz"


def _locked() -> BaseFileLock:
    """One process at a time fetches or builds; the others wait for it."""
    HOME.mkdir(parents=True, exist_ok=True)
    return FileLock(HOME / "lock")


def missing() -> Message | None:
    """Why there is no library and none can be built here; None where there is one, or one can be built."""
    if _found() or (_cmake() and any(map(shutil.which, ("c++", "g++", "clang++")))):
        return None
    return Message(
        "quantizing and checking a GGUF need llama.cpp's library, and cmake and a C++ compiler to build it once; "
        "install them (apt install cmake g++), or name a llama.cpp that you have: LLAMA_CPP_DIR=folder"
    )


def library() -> Path:
    """Folder of libllama: the user's own where the binding fits it, else the cache's, built the first time (2-3 min).

    Raises UserError where there is neither a library nor a compiler.
    """
    if found := _found():
        return found
    if lacking := missing():
        raise UserError.from_message(lacking)
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
    """A hash of what a build depends on: the CPU's abilities, the card, CMAKE_ARGS. Machines may share one cache."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = re.search(r"^(flags|Features)\s*:.*", cpu, re.MULTILINE)
    text = platform.machine() + (flags.group() if flags else cpu) + os.environ.get("CMAKE_ARGS", "")
    text += _NO_AMX if "amx_int8" in text else ""  # earlier builds had it
    if card := _card():
        text += f"CUDA {card.compute}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _card() -> Gpu | None:
    """The card that the library is built for; None where there is none, or no CUDA compiler."""
    return find_gpu() if shutil.which("nvcc") else None


def _same_interface(header: Path) -> bool:
    """Whether the structs of a llama.h are those that the binding was written for; other ones would crash it."""

    def structs(path: Path) -> dict[str, str]:
        text = re.sub(r"//[^\n]*|\s+", " ", path.read_text(encoding="utf-8"))
        return dict(re.findall(r"struct (llama_\w+) \{(.*?)\}", text))

    ours = source() / "vendor" / "llama.cpp" / "include" / "llama.h"
    return header.is_file() and structs(header) == structs(ours)


def _build(target: Path) -> None:
    """Builds the library alone into the folder `target`, which appears complete."""
    cuda = {"GGML_CUDA": "ON"} if _card() else {}
    settings = [f"-D{key}={value}" for key, value in (_CMAKE | cuda).items()] + os.environ.get("CMAKE_ARGS", "").split()
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    tree, jobs = str(HOME / "source" / "vendor" / "llama.cpp"), str(os.cpu_count() or 1)
    with unfinished(target) as beside:
        run_child(
            [_cmake(), "-S", tree, "-B", str(beside), *ninja, *settings], Message("configuring llama.cpp's build")
        )
        run_child(
            [_cmake(), "--build", str(beside), "--target", "llama", "--parallel", jobs],
            Message("building llama.cpp (once; it takes minutes)"),
        )
        libraries = beside / "libraries"
        shutil.copytree(beside / "bin", libraries, symlinks=True)
        os.replace(libraries, target)


def runtime() -> Any:
    """The module `llama_cpp` with its library loaded; llama.cpp may abort the whole process, so use a child process."""
    os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(library().resolve()))
    if str(source()) not in sys.path:
        sys.path.insert(0, str(source()))
    import llama_cpp

    return llama_cpp
