"""Uploading, by the real huggingface_hub client, to a stand-in for the hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import stand_in
from conftest import refused, run, says
from stand_in import StandIn, serving

SCRIPT = """
import sys, common
from export import hub
from pathlib import Path
def main(arguments):
    folder, repo, overwrite = arguments
    hub.check_access(repo, overwrite == "True")
    print(hub.upload(Path(folder), repo, ignore=["merge.json"], delete=["model*.safetensors"]))
common.run_script(main)
"""


class Hub(StandIn):
    """As much of the hub's API as an upload needs: who am I, create, list, preupload, LFS, commit."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.lfs: dict[str, bytes] = {}
        self.broken = False


class Handler(stand_in.Handler):
    server: Hub

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me", "orgs": [{"name": "us"}], "auth": {}})
        repo = "/".join(self.path.split("/")[3:5])
        if repo not in self.server.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        files = self.server.repos[repo]
        return self.answer(
            [{"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for p, b in files.items()]
        )

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.lfs[self.path.removeprefix("/lfs/")] = body
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.split("?")[0].split("/")
        if self.server.broken and "commit" in parts:
            return self.answer({"error": "out of order"}, 418)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            status = 409 if repo in self.server.repos else 200
            self.server.repos.setdefault(repo, {".gitattributes": b""})
            return self.answer({"url": f"{self.server.url}/{repo}"}, status)
        if parts[-2] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 1000 else "regular"} for f in files]
            return self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if parts[-1] == "batch":
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if parts[-2] == "commit":
            repo = "/".join(parts[3:5])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    assert hashlib.sha256(self.server.lfs[value["oid"]]).hexdigest() == value["oid"]
                    self.server.repos[repo][value["path"]] = self.server.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del self.server.repos[repo][value["path"]]
            return self.answer(
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.url}/{repo}/commit/1"}
            )
        return self.answer({"errors": [], "warnings": []})  # validate-yaml


@pytest.fixture
def standin() -> Iterator[Hub]:
    with serving(Hub()) as server:
        yield server


def hub_environment(server: Hub, home: Path, token: str | None = "right") -> dict[str, str]:
    """An environment in which the real client talks to the stand-in, by LFS."""
    values = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    rest = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return {**rest, **values, **({"HF_TOKEN": token} if token else {})}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run" / "merged"
    made.mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: apache-2.0\n---\n中文\n", encoding="utf-8")
    (made / "model.safetensors").write_bytes(os.urandom(5000))
    (made / "merge.json").write_text("{}")
    return made


def push(server: Hub, folder: Path, repo: str, *, overwrite: bool = False, token: str | None = "right"):
    script = folder.parent / "push.py"
    script.write_text(SCRIPT)
    root = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent.parent)}
    environment = {**hub_environment(server, folder.parent / "home", token), **root}
    return run(str(script), str(folder), repo, str(overwrite), env=environment)


def test_uploads_every_byte_into_a_private_repository_once(standin: Hub, folder: Path) -> None:
    result = push(standin, folder, "me/merged")
    assert (result.returncode, result.stdout) == (0, f"{standin.url}/me/merged/commit/1\n"), result.stderr
    sent = standin.repos["me/merged"]
    assert {name: sent[name] for name in sent if name != ".gitattributes"} == {
        name: (folder / name).read_bytes() for name in ("README.md", "model.safetensors")
    }
    assert standin.private["me/merged"] is True

    (folder / "README.md").write_text("changed")
    again = push(standin, folder, "me/merged")
    assert again.returncode == 2
    assert again.error.sentence == says("add --overwrite")
    assert sent["README.md"] != b"changed"
    sent |= {"model-00001-of-00002.safetensors": b"of an earlier upload", "LICENSE": b"the user's"}
    assert push(standin, folder, "me/merged", overwrite=True).returncode == 0
    assert sent["README.md"] == b"changed"
    assert sent.keys() == {".gitattributes", "LICENSE", "README.md", "model.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo", "token", "code"),
    [
        ("you/merged", "right", says("the owners")),
        ("merged", "right", says("the owners")),
        ("me/mer ged", "right", says("{reason}; name it")),
        ("me/merged", "wrong", says("a token that may write")),
        ("me/merged", None, says("not logged in")),
    ],
)
def test_refused_in_one_sentence(standin: Hub, folder: Path, repo: str, token: str | None, code: str) -> None:
    result = push(standin, folder, repo, token=token)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.error.sentence == code
    assert "Traceback" not in result.stderr
    assert standin.repos == {}


@pytest.mark.slow
def test_hub_that_fails_or_is_not_there(standin: Hub, folder: Path) -> None:
    standin.broken = True
    result = push(standin, folder, "us/merged")
    assert result.returncode == 2
    assert (result.error.sentence, result.error.fields["status"]) == (says("all files are kept"), 418)
    standin.url = "http://127.0.0.1:9"
    refused(push(standin, folder, "us/merged"), "hub cannot be")
