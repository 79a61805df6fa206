"""What the pages of webui.py share: the two languages, the looks, and how a fault is shown."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from typing import Any

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS = {
    "Light or dark": "浅色或深色",
    "Try: {command}": "试试：{command}",
}


def translator(language: str, words: dict[str, str]) -> Callable[..., str]:
    """`t("{n} rows", n=3)`: the text in `language`, after the page's own table from English to Chinese.

    A text that the table lacks is a KeyError in both languages, so that none is forgotten.
    """

    def t(text: str, **values: Any) -> str:
        found = words[text]
        return (found if language == "zh" else text).format(**values) if values else found if language == "zh" else text

    return t


def header(language: str, title: str, line: str = "") -> None:
    """The top of a page: its title, a line below, and the switches for the language and for light and dark."""
    import gradio as gr

    t = translator(language, WORDS)
    other = next(name for name in LANGUAGES if name != language)
    gr.HTML(
        f'<div class="top"><div><h1>{html.escape(title)}</h1><p>{html.escape(line)}</p></div><nav>'
        f'<a class="language" href="../{other}/" hreflang="{other}">{LANGUAGES[other]}</a>'
        f'<button class="theme" title="{t("Light or dark")}" aria-label="{t("Light or dark")}" '
        'onclick="onecardTheme()"></button></nav></div>',
        elem_classes="top-block",
    )


def fault(error: object) -> str:
    """The HTML of what is wrong, in one box, for a gr.HTML; an empty text shows nothing."""
    text = html.escape(str(error)).replace("\n", "<br>")
    return f'<div class="fault" role="alert">{text}</div>' if text else ""


def note(text: str) -> str:
    """The HTML of a quiet remark."""
    return f'<div class="note">{html.escape(text).replace(chr(10), "<br>")}</div>' if text else ""


def empty(text: str) -> str:
    """The HTML of a place where nothing is yet, saying what would bring something there."""
    return f'<div class="empty">{html.escape(text)}</div>'


def theme() -> Any:
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


CSS = """
.dark { --color-accent: #2dd4bf; }
.gradio-container > main, .gradio-container .main { width: 100% !important; max-width: 1240px !important;
  margin: 0 auto !important; }
.gradio-container .main { padding: clamp(12px, 2.5vw, 20px) clamp(12px, 3vw, 32px) !important; }
.top-block { border: none !important; background: none !important; }
.top { display: flex; align-items: flex-start; justify-content: space-between; gap: 16px; padding: 4px 0 0; }
.top h1 { font-size: 22px; font-weight: 650; margin: 0; line-height: 1.3; overflow-wrap: anywhere; }
.top p { margin: 2px 0 0; color: var(--body-text-color-subdued); font-size: 14px; }
.top nav { display: flex; align-items: center; gap: 8px; flex: none; }
.top nav a, .top nav button { display: inline-flex; align-items: center; justify-content: center; height: 34px;
  min-width: 34px; padding: 0 10px; border: 1px solid var(--block-border-color); border-radius: 8px; font-size: 14px;
  color: var(--body-text-color); background: var(--block-background-fill); text-decoration: none; cursor: pointer; }
.top nav a:hover, .top nav button:hover { border-color: var(--color-accent); color: var(--color-accent); }
.top nav button.theme::before { content: "☾"; font-size: 17px; }
.dark .top nav button.theme::before { content: "☀"; }
.fault { border: 1px solid #e3a3a3; background: #fdf3f2; color: #8a1f1b; border-radius: 8px; padding: 10px 14px;
  line-height: 1.5; overflow-wrap: anywhere; }
.dark .fault { border-color: #7c3a38; background: #2c1a1b; color: #f3b4b1; }
.note { color: var(--body-text-color-subdued); font-size: 14px; line-height: 1.5; }
.top-block .html-container, .said .html-container { padding: 0 !important; }
.block.said { display: flex; flex-direction: column; font-size: 0; } .said .html-container { font-size: 14px; }
.said:not(:has(.fault)):not(:has(.note)):not(:has(.empty)) { display: none !important; }
.small-buttons { gap: 8px !important; } .small-buttons button { flex: 0 1 auto !important;
  width: auto !important; min-width: 0 !important; font-size: 13px !important; padding: 5px 12px !important; }
.empty { color: var(--body-text-color-subdued); border: 1px dashed var(--block-border-color); border-radius: 8px;
  padding: 28px 16px; text-align: center; }
footer { display: none !important; }
@media (max-width: 640px) {
  .tabitem { padding: 12px 0 !important; }
  .tab-container button { padding: 0 7px !important; }
  .top h1 { font-size: 19px; }
}
"""


def head(language: str) -> str:
    """The script that must run before Gradio's own: its language, the theme before the first paint, and Enter."""
    locale = json.dumps({"en": "en", "zh": "zh-CN"}[language])
    return f"""<script>
for (const key of ["language", "languages"])
  Object.defineProperty(navigator, key, {{get: () => key === "language" ? {locale} : [{locale}]}});
document.documentElement.lang = {locale};
document.cookie = "language={language}; path=/; max-age=31536000; SameSite=Strict";
(() => {{
  const url = new URL(location), chosen = localStorage.getItem("onecard-theme");
  if (chosen && !url.searchParams.has("__theme")) {{
    url.searchParams.set("__theme", chosen);
    history.replaceState(null, "", url);
  }}
}})();
// the open page stays open when it is loaded again, or in the other language
addEventListener("click", (event) => {{
  const tab = event.target.closest("[id^=tab-][id$=-button]"), link = event.target.closest("a.language");
  if (tab) history.replaceState(null, "", `#${{tab.id.slice(4, -7)}}`);
  if (link) link.hash = location.hash;
}}, true);
function onecardTab(name) {{
  document.getElementById(`tab-${{name}}-button`).click();
  scrollTo({{top: 0, behavior: "smooth"}});
}}
function onecardTheme() {{
  const dark = document.body.classList.toggle("dark"), url = new URL(location);
  localStorage.setItem("onecard-theme", dark ? "dark" : "light");
  url.searchParams.set("__theme", dark ? "dark" : "light");
  history.replaceState(null, "", url);
}}
// the Enter that ends a word of an input method sends no message
for (const kind of ["keydown", "keypress"])
  addEventListener(kind, (event) => (event.isComposing || event.keyCode === 229) && event.stopPropagation(), true);
</script>"""
