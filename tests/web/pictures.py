"""Takes the pictures of the pages for the READMEs, in English and in Chinese; run it where the run's saves/ is.

python tests/web/pictures.py chat saves/NAME    docs/chat-*.png: a conversation beside the model before training
python tests/web/pictures.py board NAME         docs/board-*-*.png: the other pages, that run evaluated and exported
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from browser import ROOT, Browser, browsing, screenshot, serving

TALKS = {
    "en": ("Stop", "Send", ["Who are you?", "What is the capital of France?"]),
    "zh": ("停止", "发送", ["你是谁？", "你是谁开发的？"]),
}
CHOOSERS = {"train": "#run", "evaluate": "#eval-run", "export": "#export-run"}


def main() -> None:
    what, target = sys.argv[1:]
    flags = {"chat": ("--chat", target, "temperature=0", "max_new_tokens=100"), "board": ()}[what]
    with serving(*flags, cwd=Path.cwd()) as server, browsing() as browser:
        for language in TALKS:
            if what == "chat":
                take_chat(browser, server.url, language)
            else:
                take_board(browser, server.url, language, target)


def take_chat(browser: Browser, url: str, language: str) -> None:
    stop, send, questions = TALKS[language]
    page = browser.page(f"{url}/{language}/")
    page.set_default_timeout(180_000)
    page.locator("#chat-with-base input").check()
    page.locator("#chat-base").wait_for()
    for question in questions:
        page.locator("#chat-box textarea").fill(question)
        page.locator("#chat-box textarea").press("Enter")
        page.locator("#chat-box button", has_text=stop).wait_for()
        page.locator("#chat-box button", has_text=send).wait_for()
    keep(page, f"chat-{language}")


def take_board(browser: Browser, url: str, language: str, run: str) -> None:
    page = browser.page(f"{url}/{language}/")
    page.click("#check-data")
    page.locator("#samples .sample").first.wait_for()
    keep(page, f"board-data-{language}")
    for tab, chooser in CHOOSERS.items():
        page.click(f"#tab-{tab}-button")
        page.wait_for_function(f"document.querySelector('{chooser} input').value")
        page.locator(f"{chooser} input").click()
        page.get_by_role("option", name=run, exact=True).click()
        page.mouse.move(0, 0)
        page.wait_for_timeout(3000)  # the page looks at the run every two seconds
        keep(page, f"board-{tab}-{language}")


def keep(page: Any, name: str) -> None:
    page.wait_for_timeout(500)  # scrolling has an end
    print(screenshot(page, ROOT / "docs" / f"{name}.png"))


if __name__ == "__main__":
    main()
