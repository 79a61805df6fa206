"""The libraries that take seconds to import: torch only once a page needs it, so that the first page comes soon and a
server that only watches a training stays small."""

from __future__ import annotations

import inspect
import threading
from typing import Any

_lock = threading.Lock()


def import_libraries() -> None:
    """Imports transformers and torch. Threads that would import them at the same time would find them half made:
    call this before whatever uses them."""
    with _lock:
        import transformers

        assert transformers.AutoTokenizer  # which transformers imports when it is asked for
        assert transformers.AutoModelForCausalLM


def import_gradio() -> None:
    """Imports Gradio without the stub files for editors that it writes for each of its components: half of its time.

    It leaves out a component whose source has no file; see create_or_modify_pyi in gradio/component_meta.py.
    """
    find_file = inspect.getfile

    def no_file_for_components(found: Any) -> str:
        if isinstance(found, type) and found.__module__.startswith("gradio."):
            raise OSError("no stub is wanted")
        return find_file(found)

    inspect.getfile = no_file_for_components
    try:
        import gradio  # noqa: F401
    finally:
        inspect.getfile = find_file
