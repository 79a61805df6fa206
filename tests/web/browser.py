"""A real headless Chromium for the tests of webui.py, and a server of the kit on a free port.

with serving("--chat", "saves/NAME") as server, browsing() as browser:
    page = browser.page(server.url + "/en/")
    ...
    browser.foreign      requests that left this machine: must stay empty
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
START = 180  # seconds that a server may take to start: imports are slow on a busy machine
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1", "")


def chromium() -> str:
    """The path of Chromium or Chrome; installed by apt-get where it is missing and this may be done."""
    from filelock import FileLock

    (ROOT / ".cache").mkdir(exist_ok=True)
    with FileLock(ROOT / ".cache" / "chromium.lock"):  # both workers of `make test` want it
        if not _found() and shutil.which("apt-get") and os.geteuid() == 0:
            for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-noto-cjk"]):
                subprocess.run(
                    ["apt-get", "-q", *command],
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                    stdout=subprocess.DEVNULL,
                    check=False,
                )
    if found := _found():
        return found
    raise RuntimeError(
        "the pages are tested in Chromium or Chrome, and neither is on this machine; install one: "
        "apt-get install chromium fonts-noto-cjk (or set CHROMIUM to its path)"
    )


def _found() -> str | None:
    named = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else []
    places = [*named, *(shutil.which(name) for name in NAMES), *PLACES]
    return next((place for place in places if place and Path(place).is_file()), None)


@dataclass
class Server:
    """A running webui.py."""

    process: subprocess.Popen[str]
    url: str  # without a slash at its end
    log: Path

    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def serving(
    *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None, script: str = "webui.py"
) -> Iterator[Server]:
    """`python webui.py --port 0 ARGUMENTS` in `cwd`, ready to answer; it is ended with the block.

    Stop and start it again with the same `cwd` to see what survives a restart.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, str(ROOT / script), "--port", "0", *arguments]
        settings = {"ONECARD_LANG": "en", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        variables = {**os.environ, **settings, **(env or {})}
        with open(log, "w", encoding="utf-8") as out:
            process = subprocess.Popen(
                command, cwd=cwd, env=variables, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            yield Server(process, _wait_for_url(process, log), log)
        finally:
            end(process)


def _wait_for_url(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^open (http://\S+)", text, re.MULTILINE):
            return found[1].replace("0.0.0.0", "127.0.0.1")
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}:\n{text}")
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start in {START} s:\n{log.read_text(encoding='utf-8')}")


def end(process: subprocess.Popen[str]) -> None:
    """Ctrl-C, and harder where that does not help."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Browser:
    """A headless Chromium, and what its pages did that they should not."""

    chromium: Any  # playwright's Browser
    foreign: list[str] = field(default_factory=list)  # addresses off this machine that a page asked for
    faults: list[str] = field(default_factory=list)  # errors of the pages' scripts

    def page(self, url: str = "", width: int = 1280, height: int = 800, language: str = "en-US", **options: Any) -> Any:
        """A new page in a profile of its own (playwright's Page); `options` are those of `new_context`.

        For example `color_scheme="dark"`, or `width=390, is_mobile=True`.
        """
        viewport = {"width": width, "height": height}
        context = self.chromium.new_context(viewport=viewport, locale=language, accept_downloads=True, **options)
        page = context.new_page()
        page.on("request", self._note_request)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.set_default_timeout(60_000)
        if url:
            page.goto(url)
        return page

    def _note_request(self, request: Any) -> None:
        if request.url.startswith("http") and urlsplit(request.url).hostname not in LOOPBACK:
            self.foreign.append(request.url)


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    """A headless Chromium, closed with the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            yield Browser(browser)
        finally:
            browser.close()


def screenshot(page: Any, file: Path, limit: int = 150_000, full_page: bool = True) -> Path:
    """A PNG of the page of at most `limit` bytes: fewer colours first, as a page of text has few anyway."""
    from PIL import Image

    page.screenshot(path=str(file), full_page=full_page, animations="disabled", caret="hide")
    for colours in (256, 96, 32):
        if file.stat().st_size <= limit:
            break
        with Image.open(file) as picture:
            few = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        few.save(file, optimize=True)
    return file
