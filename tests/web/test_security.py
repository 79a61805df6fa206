"""Who may use the board, and that no file leaves or enters it beyond its folders."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from inference.api import guard
from web import security

OWN = {"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A client of the board as it is served on loopback, in a folder with a run and a secret beside saves/."""
    from web import app

    folder = tmp_path_factory.mktemp("board")
    (folder / "saves" / "mine").mkdir(parents=True)
    (folder / "saves" / "mine" / "report.html").write_text("<p>report</p>")
    (folder / "secret.html").write_text("hidden text")
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield TestClient(app.build(None, None, "127.0.0.1", ["board.example"]), base_url="http://127.0.0.1:7860")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:7860", "board.example"])
def test_names_of_this_machine_and_those_that_were_given_are_served(client, host: str) -> None:
    assert client.get("/en/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "[", ""])
@pytest.mark.parametrize("path", ["/en/", "/files/saves/mine/report.html", "/en/gradio_api/queue/join"])
def test_a_foreign_name_for_this_machine_is_refused(client, host: str, path: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 403
    assert client.post(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:8000", "http://localhost:7860", "null", "["]
)
@pytest.mark.parametrize("path", ["/en/gradio_api/queue/join", "/en/gradio_api/upload", "/en/gradio_api/call/x"])
def test_no_other_site_starts_anything(client, origin: str, path: str) -> None:
    """Another port of this machine is another site, too: a program there may be anybody's."""
    assert client.post(path, json={}, headers={**OWN, "origin": origin}).status_code == 403
    answer = client.options(path, headers={**OWN, "origin": origin, "access-control-request-method": "POST"})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_the_page_itself_and_a_proxy_of_a_given_name_may_start_something(client) -> None:
    for origin in (OWN["origin"], "https://board.example"):
        answer = client.post("/en/gradio_api/queue/join", json={}, headers={**OWN, "origin": origin})
        assert answer.status_code == 422  # it came as far as Gradio, which misses what to call


def test_no_other_site_shows_the_page_within_its_own(client) -> None:
    assert client.get("/en/").headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "path",
    [
        "/files/saves/../secret.html",
        "/files/saves/%2e%2e/secret.html",
        "/files//etc/passwd",
        "/files/secret.html",
        "/en/gradio_api/file={folder}/secret.html",
        "/en/gradio_api/file=secret.html",
        "/en/gradio_api/file=saves/mine/report.html",
        "/en/gradio_api/file=/etc/passwd",
        "/en/gradio_api/file={folder}/saves/../secret.html",
    ],
)
def test_no_file_beyond_its_folders_is_given_out(client, path: str) -> None:
    answer = client.get(path.format(folder=Path.cwd()))
    assert answer.status_code in (403, 404)
    assert "hidden text" not in answer.text and "root:" not in answer.text
    assert client.get("/files/saves/mine/report.html").text == "<p>report</p>"


def test_requests_of_any_size_or_without_an_end_are_refused(client, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts() -> Iterator[bytes]:
        while True:
            yield b" " * (1 << 20)

    path = "/en/gradio_api/queue/join"
    assert client.post(path, content=b" " * ((16 << 20) + 1), headers=OWN).status_code == 413
    monkeypatch.setattr(security, "MAX_BODY", 2 << 20)
    assert client.post(path, content=itertools.islice(parts(), 3), headers=OWN).status_code == 413

    async def receive() -> dict:
        await asyncio.sleep(9)

    async def send(message: dict) -> None:
        sent.append(message.get("status", 0))

    monkeypatch.setattr(guard, "PART_SECONDS", 0.1)
    sent: list[int] = []
    headers = [(name.encode(), text.encode()) for name, text in {**OWN, "content-type": "application/json"}.items()]
    scope = {"type": "http", "path": path, "method": "POST", "query_string": b"", "http_version": "1.1"}
    asyncio.run(client.app({**scope, "headers": headers, "root_path": "", "scheme": "http"}, receive, send))
    assert sent[0] == 408


def test_a_function_that_a_page_does_not_have_is_no_fault_of_the_server(client) -> None:
    asked = {"data": [], "fn_index": 9999, "session_hash": "x"}
    assert client.post("/en/gradio_api/queue/join", json=asked, headers=OWN).status_code == 404


def test_pages_that_are_closed_are_forgotten(client) -> None:
    from web import app

    (blocks,) = {mount.app.get_blocks() for mount in client.app.routes if getattr(mount, "path", "") == "/en"}
    for number in range(2 * app.MAX_SESSIONS):
        assert blocks.state_holder[f"session {number}"]
    assert len(blocks.state_holder.session_data) <= app.MAX_SESSIONS + 1


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Starlette:
    """A site behind the password `门 secret`."""
    monkeypatch.setattr(security, "WAIT_SECONDS", 0.2)
    site = Starlette(routes=[Route("/", lambda _: PlainTextResponse("inside"))])
    security.protect(site, "门 secret", "0.0.0.0")
    return site


def test_only_the_password_lets_in(guarded: Starlette) -> None:
    client = TestClient(guarded, base_url="http://192.168.0.7:7860", follow_redirects=False)
    assert client.get("/").status_code == 401
    assert client.post("/login", data={"password": "x" * 5000}).status_code == 413
    assert client.post("/login", data={"password": "guess"}).status_code == 403
    foreign = client.post("/login", data={"password": "门 secret"}, headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403 and not foreign.cookies
    entered = client.post("/login", data={"password": "门 secret"})
    assert entered.status_code == 303
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/").text == "inside"


def test_passwords_that_are_sent_at_once_are_tried_one_after_the_other(guarded: Starlette) -> None:
    async def guess() -> list[int]:
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://192.168.0.7") as client:
            tries = [client.post("/login", data={"password": f"guess {n}"}) for n in range(4)]
            return [answer.status_code for answer in await asyncio.gather(*tries)]

    start = time.monotonic()
    assert asyncio.run(guess()) == [403] * 4
    assert time.monotonic() - start >= 4 * 0.2


def test_both_servers_listen_on_this_machine_alone_unless_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import webui
    from inference.api.options import ServerOptions

    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert ServerOptions.from_environment({}).host == webui.parse([]).host == "127.0.0.1"


def test_the_password_is_not_passed_on_to_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    import webui

    monkeypatch.setenv("WEBUI_PASSWORD", "secret")
    assert webui.read_password(webui.parse([])) == "secret"
    assert "WEBUI_PASSWORD" not in os.environ
