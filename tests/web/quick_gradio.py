"""Imports Gradio as the board does, in half of the time: import this before the pages, which do so themselves."""

from web.imports import import_gradio

import_gradio()
