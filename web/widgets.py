"""Parts that several pages are made of, as HTML: tables, sizes, the state of a command, links to files of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response

import common
from common import Message, UserError
from runs.texts import Translator
from web import jobs

# What of a run folder the board hands out; nothing else on this machine is.
SERVED = (".html", ".png", ".svg", ".gguf", ".Modelfile", ".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".md")
QUIET = {"show_progress": "hidden"}  # of an event that needs no progress bar
TEXT_FILES = (".Modelfile", ".yaml", ".jinja", ".md", ".jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def fault(error: UserError | Message | str | None, t: Translator) -> str:
    """The HTML of what is wrong, in one box, for a gr.HTML; nothing shows nothing."""
    text = escape(t.message(error or "")).replace("\n", "<br>")
    return f'<div class="fault" role="alert">{text}</div>' if text else ""


def note(text: str) -> str:
    """The HTML of a quiet remark."""
    return f'<div class="note">{escape(text).replace(chr(10), "<br>")}</div>' if text else ""


def empty(text: str) -> str:
    """The HTML of a place where nothing is yet, with what would bring something there."""
    return f'<div class="empty">{escape(text)}</div>'


def heading(text: str, below: str = "") -> str:
    """The HTML of a heading, with HTML below it."""
    return f"<h3>{escape(text)}</h3>{below}"


def header(t: Translator, title: str, line: str = "") -> None:
    """The top of a page: its title, a line below, and the switches for the language and for light and dark."""
    other, name = {"en": ("zh", "中文"), "zh": ("en", "English")}[t.language]
    gr.HTML(
        f'<div class="top"><div><h1>{escape(title)}</h1><p>{escape(line)}</p></div><nav>'
        f'<a class="language" href="../{other}/" hreflang="{other}">{name}</a>'
        f'<button class="theme" title="{t("Light or dark")}" aria-label="{t("Light or dark")}" '
        'onclick="onecardTheme()"></button></nav></div>',
        elem_classes="top-block",
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first_left: int = 1) -> str:
    """An HTML table of cells that are HTML already; the first 1, 2 or 4 columns to the left, numbers to the right."""
    top = f"<thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead>" if any(head) else ""
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f'<div class="scroll"><table class="figures left-{first_left}">{top}{body}</table></div>'


def size(count: float) -> str:
    """Bytes as people read them: `271 MB`, `16.1 GB`."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,.0f} B"


def count(number: int) -> str:
    """`135 M`, `8.0 B`."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M" if number >= 1e6 else f"{number:,}"


def badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def bar(percent: float | None, text: str) -> str:
    """A progress bar; without a percentage it only moves."""
    inner = f'<i style="width:{percent:.1f}%"></i>' if percent is not None else '<i class="moving"></i>'
    return f'<div class="bar">{inner}</div><div class="note">{escape(text)}</div>'


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Figures with their names, side by side."""
    cells = "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in figures)
    return f'<div class="tiles">{cells}</div>'


def log_box(text: str) -> str:
    """The end of a log; it opens at its end, as the last lines stand first in a reversed column."""
    return f'<div class="log"><pre>{escape(text)}</pre></div>'


def next_steps(t: Translator, *tabs: tuple[str, str]) -> str:
    """What one does now, as buttons that open a page: (its name in the page's language, its id)."""
    buttons = "".join(f"<button onclick=\"onecardTab('{tab}')\">{escape(name)} →</button>" for name, tab in tabs)
    return f'<div class="next"><span>{t("Next:")}</span>{buttons}</div>'


def train_first(t: Translator) -> str:
    """Where there is no trained run yet."""
    return empty(t("No trained run yet. Train one first.")) + next_steps(t, (t("Train"), "train"))


def job_box(job: jobs.Job | None, t: Translator) -> str:
    """A command as HTML: its line, its progress, its error in one sentence, and what it printed, folded."""
    if job is None:
        return ""
    state = jobs.state(job)
    names = {"running": t("running"), "done": t("done"), "failed": t("failed"), "stopped": t("stopped")}
    names["killed"] = t("ended from outside")
    head = f'<div class="job"><code>{escape(job.shell_line)}</code> {badge(state, names[state])}</div>'
    parts = [head, fault(jobs.error(job), t)]
    if state == "running":
        percent, text = jobs.progress(job.log) or (None, "")
        parts.append(bar(percent, text or jobs.last_line(job.log)))
    if printed := jobs.tail(job.log):
        opened = " open" if state == "running" else ""
        parts.append(f"<details{opened}><summary>{t('Output')}</summary>{log_box(printed)}</details>")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run


def link(path: Path, text: str, *, download: bool = False) -> str:
    """A link to a file of a run, which `serve_file` answers."""
    extra = " download" if download else ' target="_blank"'
    return f'<a href="{address(path)}"{extra}>{escape(text)}</a>'


def address(path: Path) -> str:
    """The address of a file of a run; it carries the file's time, so that no browser shows an older one."""
    return f"../files/{quote(path.as_posix())}?{path.stat().st_mtime_ns}"


def servable(path: str) -> Path | None:
    """The file that a page may show for this address, or None: only files of runs, of the kinds in SERVED.

    Symbolic links are followed first: one that leads out of saves/ or to a hidden file is not served.
    """
    try:
        file, saves = Path(path).resolve(), common.SAVES.resolve()
        if not file.is_relative_to(saves) or file.suffix not in SERVED or not file.is_file():
            return None
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return None
    return None if any(part.startswith(".") for part in file.relative_to(saves).parts) else file


async def serve_file(request: Request) -> Response:
    """Answers `/files/PATH`. A report may run its own scripts, but not as a part of the board."""
    file = servable(request.path_params["path"])
    if file is None:
        return PlainTextResponse("there is no such file\n", 404)
    headers = {"Content-Security-Policy": "sandbox allow-scripts allow-popups", "X-Content-Type-Options": "nosniff"}
    kind = "text/plain; charset=utf-8" if file.suffix in TEXT_FILES else None
    return FileResponse(file, headers=headers, media_type=kind)


# ---------------------------------------------------------------------------------------------------------------------
# Bringing a page up to date


def changes(shown: dict[Any, Any], now: dict[Any, Any], held: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """What to send to a page that shows `shown` already, and then shows `now` (component → value or gr.update).

    What is the same is skipped: a page that looks every two seconds would redraw what one is reading. `held` has what
    visitors chose in dropdowns: it is not sent back to them, as they may be choosing now.
    """
    sent = {}
    for component, update in now.items():
        if shown.get(component._id) != update:
            shown[component._id] = update
            same = held and component in held and update["value"] == held[component]
            sent[component] = {key: part for key, part in update.items() if key != "value"} if same else update
    return sent


def attempt(t: Translator, function: Callable[..., Any], *arguments: Any) -> float:
    """For a button: calls `function`; its UserError is shown for half a minute.

    The time is new at each call: a page that shows the runs looks again where it changes.
    """
    try:
        function(*arguments)
    except UserError as error:
        gr.Warning(escape(t.message(error)), duration=30, title=t("Not started"))
    return time.time()
