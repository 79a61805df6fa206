"""The looks of the pages: the files of static/, and the colours, corners and fonts of Gradio's theme."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


@functools.cache
def static(name: str) -> str:
    """The text of a file of static/."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def gradio_theme() -> Any:
    """Colours, corners and fonts; only fonts of the system, so that no page asks the network for one."""
    import gradio as gr

    fonts = [
        "system-ui",
        "-apple-system",
        "Segoe UI",
        "PingFang SC",
        "Microsoft YaHei",
        "Noto Sans CJK SC",
        "sans-serif",
    ]
    mono = [
        "ui-monospace",
        "SFMono-Regular",
        "Menlo",
        "Consolas",
        "DejaVu Sans Mono",
        "Noto Sans Mono CJK SC",
        "monospace",
    ]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=fonts,
        font_mono=mono,
    ).set(
        body_text_color_subdued="#566472",
        body_text_color_subdued_dark="#9eabb8",
        block_info_text_color="#566472",
        block_info_text_color_dark="#9eabb8",
        color_accent="*primary_700",
        checkbox_background_color_selected="*primary_700",
        checkbox_background_color_selected_dark="*primary_600",
        checkbox_background_color_dark="#12161b",
        button_large_text_size="*text_md",
        button_large_text_weight="550",
        button_large_padding="8px 16px",
        body_background_fill="#f7f8f9",
        body_background_fill_dark="#12161b",
        background_fill_primary_dark="#1a2027",
        background_fill_secondary_dark="#151a20",
        code_background_fill_dark="#12161b",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1a2027",
        block_border_color="#e3e7ea",
        block_border_color_dark="#2b333c",
        block_radius="10px",
        input_radius="8px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#12161b",
        input_border_color="#d5dbe0",
        input_border_color_dark="#38424d",
        input_border_width="1px",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#eef2f4",
        button_secondary_background_fill_dark="#232b33",
        button_secondary_background_fill_hover_dark="#2d3741",
        button_secondary_border_color="#d5dbe0",
        button_secondary_border_color_dark="#38424d",
        button_border_width="1px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="#ffffff",
    )
