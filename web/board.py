"""The board's pages: Model and data, Train, Evaluate, Chat, Export. What they do is what the scripts do.

A page writes a recipe, starts a script as a process of its own and reads the run folder; nothing is trained here, and
nothing that matters is kept here.
"""

from __future__ import annotations

from typing import Any

from common import OPTIONS, Config
from runs import charts
from web import theme, widgets
from web.pages import data as data_page
from web.pages import evaluate as evaluate_page
from web.pages import export as export_page
from web.pages import train as train_page
from web.words import GROUPS, HELP, WORDS

CSS = widgets.CSS + charts.css() + data_page.CSS + train_page.CSS + evaluate_page.CSS


def pages(language: str) -> None:
    """The tabs of the board, inside an open gr.Tabs."""
    import gradio as gr
    import transformers
    from gradio.context import Context

    from training import callbacks  # noqa: F401
    from web.pages import chat as chat_page

    # Now, in one thread: visitors' threads that import it at the same time would find it half made.
    assert transformers.AutoTokenizer

    t = theme.translator(language, WORDS)
    options: dict[str, Any] = {}  # the name of a setting → the component that holds it, on whatever page it stands

    def help_of(option: str) -> str:
        english = OPTIONS[option].metadata["help"]
        return HELP.get(option, english) if language == "zh" else english

    def group_of(title: str) -> str:
        return GROUPS[title] if language == "zh" else title[:1].upper() + title[1:]

    def read(*values: Any) -> Config:
        return train_page.settle(dict(zip(options, values, strict=True)), "looked-at", t).config

    connects = []
    with gr.Tab(t("Model and data"), id="data", elem_id="tab-data", elem_classes="board") as tab:
        connects.append((tab, data_page.page(t, options, read)))
    with gr.Tab(t("Train"), id="train", elem_id="tab-train", elem_classes="board") as tab:
        connects.append((tab, train_page.page(t, help_of, group_of, options)))
    with gr.Tab(t("Evaluate"), id="evaluate", elem_id="tab-evaluate", elem_classes="board") as tab:
        connects.append((tab, evaluate_page.page(t)))
    with gr.Tab(t("Chat"), id="chat", elem_id="tab-chat") as tab:
        chat_page.page(language, tab=tab)
    with gr.Tab(t("Export"), id="export", elem_id="tab-export", elem_classes="board") as tab:
        connects.append((tab, export_page.export_page(t)))
    for tab, connect in connects:
        connect(tab)
    # see theme.head
    Context.root_block.load(js="() => document.getElementById(`tab-${location.hash.slice(1)}-button`)?.click()")


def add_routes(app: Any) -> None:
    """Answers /files/PATH with a file of a run."""
    app.add_route("/files/{path:path}", widgets.serve_file)
