"""webui.py: what it refuses, what it imports, and the servers that it starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from browser import serving
from conftest import ROOT, refused, run, says


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--host", "0.0.0.0"], says("others reach")),
        (["--port", "x"], says("a port; give")),
        (["learning_rate=1"], says("board, where")),
        (["--prot", "9000"], says("see --help")),
        (["--host", "256.1.1.1", "--password"], says("cannot listen")),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(arguments: list[str], code: str) -> None:
    result = run("webui.py", *arguments, input="secret\n")
    assert (result.returncode, result.stdout, result.error.sentence) == (2, "", code)
    assert result.stderr == f"error: {result.error}\n"


@pytest.mark.parametrize("target", ["nowhere", "x.gguf"])
def test_a_model_that_is_not_there_is_refused_at_once(target: str) -> None:
    result = run("webui.py", "--chat", target)
    assert (result.returncode, result.stdout) == (2, "") and target in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("webui.py", "--port", str(taken.getsockname()[1]))
    refused(result, "cannot listen")
    assert "choose another port: --port" in result.stderr


@pytest.mark.parametrize("module", ["torch", "transformers", "peft", "matplotlib", "datasets"])
def test_the_board_starts_without_what_only_a_training_or_a_chat_needs(module: str, built_board: str) -> None:
    assert module not in built_board.split()


@pytest.fixture(scope="module")
def built_board(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The packages that are imported once the board could be served."""
    code = "import sys; from web import app; app.build(None, None, '127.0.0.1'); print(*sys.modules)"
    folder, path = tmp_path_factory.mktemp("board"), {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=path, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_servers_answer_at_their_address_and_to_the_password(tiny_model: Path) -> None:
    with serving("--chat", str(tiny_model), "--host", "127.0.0.2", env={"WEBUI_PASSWORD": "门 secret"}) as server:
        assert server.url.startswith("http://127.0.0.2:")
        for path in ("/en/", "/en/config", "/zh/gradio_api/info", "/en/gradio_api/queue/join", "/files/run.json"):
            assert httpx.get(server.url + path).status_code in (303, 401), path
            assert httpx.post(server.url + path, json={}).status_code in (303, 401), path
        with httpx.Client(base_url=server.url, follow_redirects=True) as client:
            assert "The password is wrong." in client.post("/login", data={"password": "guess"}).text
            client.post("/login", data={"password": "门 secret"})
            assert "onecard" in client.get("/en/").text
