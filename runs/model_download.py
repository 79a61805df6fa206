"""Fetches a model of the Hugging Face hub, of a mirror, or of ModelScope: complete and verified, or not at all.

What has arrived is kept beside the model's folder until all is there, and the next call goes on from it.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common import Message, UserError, nearest_word
from runs.files import check_free_space, on_disk_full, read_json, write_json
from runs.network import check_environment
from runs.target import missing_from_model

RECORD = "download.json"  # in each finished folder: which model it is, from where, at which revision


def is_downloaded(folder: Path, model: str, revision: str | None) -> bool:
    """Whether `folder` holds the complete model. UserError for anything else: nothing is ever overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if folder.is_mount():
            raise UserError("{folder} is the root of a disk; name a folder inside it with --local-dir", folder=folder)
        return False
    record = read_json(folder / RECORD, {}) if folder.is_dir() else {}
    text = "{folder} holds {held} already; name another folder with --local-dir, or delete it"
    if not (isinstance(record, dict) and {"model", "revision", "asked"} <= record.keys()):
        raise UserError(text, folder=folder, held=Message("something else"))
    if record["model"] != model or revision not in (None, record["revision"], record["asked"]):
        raise UserError(text, folder=folder, held=f"{record['model']} ({record['revision']})")
    if missing := missing_from_model(folder):
        text = "{folder} has lost {missing}; delete it, and the same command fetches it again"
        raise UserError(text, folder=folder, missing=missing)
    return True


def write_record(folder: Path, model: str, source: str, revision: str, asked: str | None) -> None:
    write_json(folder / RECORD, {"model": model, "source": source, "revision": revision, "asked": asked})


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `checksum`, where the source has one: "sha256" or "git", and the hash as hex digits."""

    name: str
    size: int
    url: str
    checksum: tuple[str, str] | None


# What a source has of a model: the revision, its files, and the headers that fetching them needs.
Listing = tuple[str, list[RemoteFile], dict[str, str]]


def download(
    model: str, folder: Path, *, mirror: str | None = None, modelscope: bool = False, revision: str | None = None
) -> None:
    """Fetches a model's files beside `folder`, verifies them, and puts them in its place.

    What has arrived stays in `.ORG--NAME.partial` until then, and the next call goes on from it. (huggingface_hub's
    own snapshot_download drops a half-fetched file when it stops, so a file of 5 GB would start again.)
    """
    check_environment()
    hub = mirror or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    source = (os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn") if modelscope else hub).rstrip("/")
    source = source if "://" in source else f"https://{source}"
    with hub_errors(model, source):
        found, files, headers = (modelscope_files if modelscope else hub_files)(source, model, revision)
        files = choose_files(files, model)
        partial = folder.parent / f".{model.replace('/', '--')}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        total, here = sum(file.size for file in files), sum(path.stat().st_size for path in partial.iterdir())
        text = "{model} at {revision}: {files} file{files:plural}, {size}, from {source}"
        print(Message(text, model=model, revision=found, files=len(files), size=human(total), source=source))
        if here:
            print(Message("{size} have arrived earlier: going on", size=human(here)))
        check_free_space(folder, total - here)
        with on_disk_full(folder, total - here):
            fetch_all(files, headers, partial)
    for path in {*partial.iterdir()} - {partial / file.name for file in files}:
        path.unlink()  # of an earlier revision
    if missing := missing_from_model(partial):
        raise UserError("{model} cannot be trained: its repository lacks {missing}", model=model, missing=missing)
    write_record(partial, model, source, found, revision)
    move_into_place(partial, folder)
    print(Message("{folder} is complete: {size}, every file verified.", folder=folder, size=human(total)))


def move_into_place(new: Path, folder: Path) -> None:
    """Renames a finished folder to its name, where nothing or an empty folder stands."""
    try:
        os.replace(new, folder)
    except OSError:  # another process may have been faster, with the same result
        if missing_from_model(folder):
            raise


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
        text = "there is no model {model} at {source}, or it is private{near:suggestion}"
        raise UserError(text, model=model, source=source, near=nearest_model(api, model)) from None
    files = []
    for file in info.siblings:
        url = hf_hub_url(model, file.rfilename, revision=info.sha, endpoint=source)
        checksum = ("sha256", file.lfs.sha256) if file.lfs else ("git", file.blob_id)
        files.append(RemoteFile(file.rfilename, file.size, url, checksum))
    return info.sha, files, build_hf_headers()


def nearest_model(api: Any, model: str) -> str | None:
    """The nearest name among the author's models and those of a similar name."""
    import httpx

    author, _, name = model.rpartition("/")
    try:
        found = [*api.list_models(search=name, limit=30), *api.list_models(author=author or None, limit=300)]
    except httpx.HTTPError:
        return None
    return nearest_word(model, [info.id for info in found])


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
        text = "{source} has no {model} ({revision}) for you; a private model needs MODELSCOPE_API_TOKEN"
        raise UserError(text, model=model, revision=revision, source=source)
    hf_raise_for_status(response)
    files = []
    for file in response.json()["Data"]["Files"]:
        url = f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(file['Path'], safe='')}"
        checksum = ("sha256", file["Sha256"]) if file.get("Sha256") else None
        if file["Type"] != "tree":
            files.append(RemoteFile(file["Path"], file["Size"], url, checksum))
    return revision, files, headers


def choose_files(files: list[RemoteFile], model: str) -> list[RemoteFile]:
    """The files that training needs: safetensors once, configuration, tokenizer, licence; never pickles."""
    top = [file for file in files if "/" not in file.name]  # below are second copies: original/, onnx/
    tensors = [file for file in top if file.name.endswith(".safetensors")]
    plain = [file for file in tensors if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file.name)]
    weights = plain or [file for file in tensors if not file.name.startswith("consolidated")]
    names = {file.name for file in files}
    if "adapter_config.json" in names and "config.json" not in names:
        raise UserError("{model} is an adapter; download the base model that it belongs to", model=model)
    if not weights:
        kinds = sorted({Path(name).suffix for name in names} & {".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack"})
        text = "{model} has no safetensors weights (only: {kinds}); look for a copy that has"
        raise UserError(text, model=model, kinds=kinds)
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
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds between updates of the bar
    total = sum(file.size for file in files)
    try:
        with (
            FileLock(folder / ".lock", timeout=0),
            tqdm(total=total, unit="B", unit_scale=True, mininterval=interval, desc="fetching") as bar,
            ThreadPool(4) as pool,
        ):
            for _ in pool.imap_unordered(lambda file: fetch(file, headers, folder, bar), files):
                pass
    except Timeout:
        raise UserError("another download.py is at work in {folder}; wait for it", folder=folder) from None


def fetch(file: RemoteFile, headers: dict[str, str], folder: Path, bar: Any) -> None:
    """Fetches one file, going on from what is there, and verifies it; if damaged, once more from the start."""
    path, part = folder / file.name, folder / f"{file.name}.part"
    if path.exists():
        os.replace(path, part)  # of an earlier call: verified again
    for _ in range(2):
        fetch_part(file, headers, part, bar)
        if part.stat().st_size == file.size and _matches(part, file.checksum):
            os.replace(part, path)
            return
        bar.update(-part.stat().st_size)
        part.unlink()
    raise UserError("{file} arrives damaged (its size or hash differs); try later, or another mirror", file=file.name)


def _matches(path: Path, checksum: tuple[str, str] | None) -> bool:
    if checksum is None:
        return True
    kind, expected = checksum
    blob = f"blob {path.stat().st_size}\0".encode()  # git names a file's content by the SHA-1 of this and the content
    found = hashlib.sha1(blob, usedforsecurity=False) if kind == "git" else hashlib.sha256()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: found).hexdigest() == expected


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


def human(size: float) -> str:
    """A count of bytes for people: GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def hub_errors(model: str, source: str) -> Iterator[None]:
    """What can go wrong with a hub or the network, as a UserError."""
    import httpx
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    try:
        yield
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE forbids to download; unset it") from None
    except GatedRepoError:
        text = "{model} is gated: accept its terms on {source}/{model} and log in with `hf auth login`"
        raise UserError(text, model=model, source=source) from None
    except RevisionNotFoundError:
        raise UserError("{model} has no such revision; leave --revision out for the newest", model=model) from None
    except HfHubHTTPError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}"
        text = "{source} answered {status} for {model}; check the address and your token, or try again later"
        raise UserError(text, source=source, status=status, model=model) from None
    except (httpx.RequestError, httpx.InvalidURL) as error:
        text = "{source} cannot be reached ({problem}); try --mirror https://hf-mirror.com or --modelscope"
        raise UserError(text, source=source, problem=str(error) or type(error).__name__) from None
    except ValueError as error:
        text = "{source} does not answer like a hub ({problem}); check the address"
        raise UserError(text, source=source, problem=str(error)) from None
