"""Pieces that several pages of the board are made of: tables, sizes, the state of a script, links to files of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

import common
from common import UserError
from runs import folder as folders
from runs.folder import run_folders
from web import jobs, theme

Translate = Callable[..., str]
OWN = ".web"  # the page's folder within a run folder
STATUSES = ("running", "finished", "interrupted", "failed")  # what train.py writes into run.json
LONGEST = 200  # bytes of a part of a run's name: file systems take 255, and a GGUF's name is the run's and more

# What of a run folder the page hands out; nothing else on this machine is.
SERVED = (".html", ".png", ".svg", ".gguf", ".Modelfile", ".json", ".jsonl", ".yaml", ".safetensors", ".jinja", ".md")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, first_left: int = 1) -> str:
    """An HTML table of cells that are HTML already; the first columns to the left, numbers to the right."""
    cells = ["".join(f'<th class="{_side(i, first_left)}">{cell}</th>' for i, cell in enumerate(head))]
    cells += ["".join(f'<td class="{_side(i, first_left)}">{cell}</td>' for i, cell in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells[1:])
    top = f"<thead><tr>{cells[0]}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table class="figures">{top}{body}</table></div>'


def _side(column: int, first_left: int) -> str:
    return "l" if column < first_left else "r"


def size(count: float) -> str:
    """Bytes for people: `271 MB`, `16.1 GB`."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """`0:01:40`, `63:09:48`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def link(path: Path, text: str, *, download: bool = False) -> str:
    """A link to a file of a run, which `serve_file` answers. The name of a picture carries its time: no old ones."""
    extra = " download" if download else ' target="_blank"'
    return f'<a href="{address(path)}"{extra}>{escape(text)}</a>'


def address(path: Path) -> str:
    return f"../files/{quote(path.as_posix())}?{path.stat().st_mtime_ns}"


def servable(path: str) -> Path | None:
    """The file that a page may show for this address, or None: only files of runs, of the kinds in SERVED."""
    file = Path(path)
    inside = file.resolve().is_relative_to(common.SAVES.resolve())
    hidden = any(part.startswith(".") for part in file.parts)
    return file if inside and not hidden and file.suffix in SERVED and file.is_file() else None


async def serve_file(request: Any) -> Any:
    """Answers `/files/PATH`. A report may run its own scripts, but is a stranger to the page's."""
    from starlette.responses import FileResponse, PlainTextResponse

    file = servable(request.path_params["path"])
    if file is None:
        return PlainTextResponse("there is no such file\n", 404)
    headers = {"Content-Security-Policy": "sandbox allow-scripts allow-popups", "X-Content-Type-Options": "nosniff"}
    kind = "text/plain; charset=utf-8" if file.suffix in (".Modelfile", ".yaml", ".jinja", ".md", ".jsonl") else None
    return FileResponse(file, headers=headers, media_type=kind)


def run_names() -> list[str]:
    """The runs below saves/, newest first, by the names that the pages use."""
    names = (folder.relative_to(common.SAVES).as_posix() for folder in run_folders())
    return [name for name in names if can_be_name(name)]


def can_be_name(name: str) -> bool:
    """Whether a run may be called so: its folder must stay below saves/, be no hidden one, and be possible."""
    parts = Path(name.strip()).parts
    odd = any(part in ("/", "uploads") or part[0] == "." or len(part.encode()) > LONGEST for part in parts)
    return bool(parts) and not odd and "\\" not in name and name.strip().isprintable()


def run_folder(name: str, t: Translate = str.format) -> Path:
    """The folder of a run; raises UserError, in the words of `t`, for what cannot be the name of one."""
    if not can_be_name(name):
        raise UserError(
            t(
                "{name} cannot be the name of a run: it is empty, longer than 66 Chinese or 200 Latin letters, has a "
                "backslash, or a part of it begins with a dot or is uploads; choose another",
                name=repr(name),
            )
        )
    return common.SAVES.joinpath(*Path(name.strip()).parts)


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder, or None where there is none that train.py has written."""
    try:
        run = folders.read_run(folder)
        datetime.fromisoformat(run["started"])
        return run if run["status"] in STATUSES else None
    except (UserError, KeyError, TypeError, ValueError):
        return None


def is_training(run: dict[str, Any] | None) -> bool:
    """Whether the process that run.json names is at work; a number that another program has by now is not it."""
    if not run or run["status"] != "running" or not jobs.is_alive(run.get("pid", 0), run.get("created")):
        return False
    try:
        return any("train.py" in part for part in psutil.Process(run["pid"]).cmdline())
    except psutil.Error:
        return False


def trained(names: Sequence[str]) -> list[str]:
    """Those runs that have an adapter."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    return [name for name in names if all((run_folder(name) / file).is_file() for file in files)]


def at_work(t: Translate) -> str:
    """What has the device's memory now, as a sentence: a training, also one of a terminal, or a script of a page."""
    for path in common.SAVES.rglob(f"{OWN}/*/job.json"):
        job = jobs.find(path.parent)
        if job and path.parent.name != "train" and jobs.state(job) == "running":
            return t("{script} is still at work; wait for it, or stop it", script=job.shown)
        if job and jobs.state(job) == "running":
            return _is_training(path.parents[2], t)
    running = (run_folder(name) for name in run_names() if is_training(read_run(run_folder(name))))
    return next((_is_training(folder, t) for folder in running), "")


def _is_training(folder: Path, t: Translate) -> str:
    name = folder.relative_to(common.SAVES).as_posix()
    return t("{name} is training; one run at a time: wait for it, pause it or abort it", name=name)


def refuse_at_work(t: Translate) -> None:
    """Raises UserError where something has the device's memory: two of a kind would not fit on one card."""
    if busy := at_work(t):
        raise UserError(busy)


def start_script(folder: Path, command: list[str], t: Translate) -> jobs.Job:
    """Starts a script that needs all of the device's memory, also what the chat's model holds; see jobs.start.

    Raises UserError where another such script is at work.
    """
    refuse_at_work(t)
    if chat := sys.modules.get("web.pages.chat"):
        chat.make_room()
    return jobs.start(folder, command, t)


def job_box(job: jobs.Job | None, t: Translate) -> str:
    """A script as HTML: its command, how far it is, its fault in one sentence, and what it printed, folded."""
    if job is None:
        return ""
    state = jobs.state(job)
    words = {
        "running": t("running"),
        "done": t("done"),
        "failed": t("failed"),
        "stopped": t("stopped"),
        "killed": t("ended from outside"),
    }
    head = f'<div class="job"><code>{escape(job.shown)}</code> {badge(state, words[state])}</div>'
    parts = [head, theme.fault(jobs.fault(job, t))]
    if state == "running":
        percent, said = jobs.progress(job.log) or (None, "")
        parts.append(bar(percent, said or last_line(job)))
    if said := jobs.tail(job.log):
        opened = " open" if state == "running" else ""
        parts.append(f"<details{opened}><summary>{t('What it says')}</summary>{log_box(said)}</details>")
    return "".join(parts)


def next_steps(t: Translate, *tabs: tuple[str, str]) -> str:
    """What one does now, as buttons that open a page: (its name in the page's language, its id)."""
    buttons = "".join(f"<button onclick=\"onecardTab('{tab}')\">{escape(name)} →</button>" for name, tab in tabs)
    return f'<div class="next"><span>{t("Next:")}</span>{buttons}</div>'


def train_first(t: Translate) -> str:
    """Where there is no trained run yet."""
    return theme.empty(t("No trained run yet. Train one first.")) + next_steps(t, (t("Train"), "train"))


def last_line(job: jobs.Job) -> str:
    return next((line for line in reversed(jobs.lines(job.log)) if line.strip()), "")


def log_box(text: str) -> str:
    """The end of a log; it opens at its end, as the last lines stand first in a reversed column."""
    return f'<div class="log"><pre>{escape(text)}</pre></div>'


def badge(kind: str, text: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def bar(percent: float | None, said: str) -> str:
    """A progress bar; without a percentage it only moves."""
    inner = f'<i style="width:{percent:.1f}%"></i>' if percent is not None else '<i class="moving"></i>'
    return f'<div class="bar">{inner}</div><div class="note">{escape(said)}</div>'


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Figures with their names, side by side."""
    cells = "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in figures)
    return f'<div class="tiles">{cells}</div>'


def only_changes(shown: dict[str, Any], **now: Any) -> list[Any]:
    """The values to send to a page that shows `shown` already (and is brought up to date): what is the same is skipped.

    Without this a page that looks every two seconds would redraw what one is reading.
    """
    import gradio as gr

    sent = [gr.skip() if shown.get(name) == value else value for name, value in now.items()]
    shown.update(now)
    return sent


def outdated(busy: Any) -> Any:
    """What to send to the place of a refusal, given what `only_changes` made of `at_work`: nothing once that ended."""
    import gradio as gr

    return "" if busy == "" else gr.skip()


def offer(names: list[str], chosen: str | None, held: str | None) -> Any:
    """A dropdown's new choices; its value only where it is no more what it `held`: the visitor may be choosing now."""
    import gradio as gr

    return gr.Dropdown(choices=names) if chosen == held else gr.Dropdown(choices=names, value=chosen)


CSS = """
.board .html-container { padding: 0 !important; }
.scroll { overflow-x: auto; }
.board table.figures { border: none; border-collapse: collapse; margin: 4px 0 10px; font-size: 14px; width: 100%;
  font-variant-numeric: tabular-nums; }
.board table.figures th { font-weight: 600; color: var(--body-text-color-subdued); font-size: 13px;
  vertical-align: bottom; white-space: normal; }
.board table.figures tr { border: none; }
.board table.figures th, .board table.figures td { padding: 6px 10px; border: none;
  border-bottom: 1px solid var(--block-border-color); }
.board table.figures td { white-space: nowrap; }
.board table.figures .l { text-align: left; } .board table.figures .r { text-align: right; }
.board table.figures td.l { white-space: normal; overflow-wrap: anywhere; min-width: 90px; }
.board a { padding: 0 !important; color: var(--color-accent); text-decoration: underline; text-underline-offset: 4px; }
.job { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 8px; }
.job code, .command { font-family: var(--font-mono); font-size: 13px; overflow-wrap: anywhere; }
.badge { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 13px; white-space: nowrap;
  background: #e7ebee; color: #36434e; }
.badge.running { background: #d5f2ec; color: #0b5a52; }
.badge.done, .badge.finished { background: #dcf3dd; color: #1d5b22; }
.badge.failed, .badge.killed { background: #fbe0de; color: #8a1f1b; }
.badge.stopped { background: #fdeccf; color: #774a05; }
.dark .badge { background: #2b343d; color: #c6d0d8; }
.dark .badge.running { background: #0f3d38; color: #7ee8d8; }
.dark .badge.done { background: #17391b; color: #93dd9a; }
.dark .badge.finished { background: #17391b; color: #93dd9a; }
.dark .badge.failed { background: #43201f; color: #f3b4b1; }
.dark .badge.killed { background: #43201f; color: #f3b4b1; }
.dark .badge.stopped { background: #42300f; color: #f2cd8a; }
.next { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 10px 0 4px; font-size: 14px; }
.next button { border: 1px solid var(--color-accent); color: var(--color-accent); background: none; cursor: pointer;
  border-radius: 8px; padding: 5px 12px; margin: 0; font-weight: 550; }
.next button:hover { background: var(--color-accent); color: var(--block-background-fill); }
.bar { height: 8px; border-radius: 99px; background: var(--block-border-color); overflow: hidden; margin: 8px 0 6px; }
.bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 99px; transition: width .5s; }
.bar i.moving { width: 30%; animation: moving 1.6s ease-in-out infinite alternate; }
@keyframes moving { from { margin-left: 0 } to { margin-left: 70% } }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin: 10px 0 2px; }
@media (max-width: 640px) {
  .tiles { grid-template-columns: repeat(2, 1fr); }
  .board table.figures th, .board table.figures td { padding: 6px 5px; }
  .board table.figures small { display: block; margin: 0; }
}
.tiles div { border: 1px solid var(--block-border-color); border-radius: 8px; padding: 7px 10px; min-width: 0; }
.tiles span { display: block; font-size: 12px; color: var(--body-text-color-subdued); }
.tiles b { font-weight: 600; font-size: 16px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.log { max-height: 240px; overflow: auto; display: flex; flex-direction: column-reverse; border-radius: 8px;
  border: 1px solid var(--block-border-color); background: var(--background-fill-secondary); }
.log pre { margin: 0; padding: 10px 12px; font-family: var(--font-mono); font-size: 12px; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; background: none; }
.board details summary { cursor: pointer; font-size: 14px; margin: 8px 0 6px; color: var(--body-text-color-subdued); }
.board h3 { font-size: 15px; font-weight: 600; margin: 2px 0 8px; } .board .scroll + h3 { margin-top: 20px; }
.board p + h3 { margin-top: 16px; } .board .pictures + h3 { margin-top: 20px; }
.board .fault { margin: 6px 0; }
.board .block:has(> .html-container > .prose:empty) { display: none; }
.board .when-run { transition: none; } .board:has(#status .empty) .when-run { display: none; }
"""
