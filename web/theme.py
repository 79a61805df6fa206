"""The looks of the pages: the files of static/, and the colours, corners and fonts of Gradio's theme."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def static(name: str) -> str:
    """The text of a file of static/."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def gradio_theme() -> Any:
    """Colours, corners and fonts; only fonts of the system, so that no page asks the network for one."""
    import gradio as gr

    fonts = "system-ui, -apple-system, Segoe UI, PingFang SC, Microsoft YaHei, Noto Sans CJK SC, sans-serif"
    mono = "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, Noto Sans Mono CJK SC, monospace"
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=fonts.split(", "),
        font_mono=mono.split(", "),
    ).set(**json.loads(static("theme.json")))
