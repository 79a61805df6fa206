"""The libraries that take seconds to import: only once a page needs them, so that the first page comes soon and a
server that only watches a training stays small."""

from __future__ import annotations

import threading

_lock = threading.Lock()


def import_libraries() -> None:
    """Imports transformers and torch. Threads that would import them at the same time would find them half made:
    call this before whatever uses them."""
    with _lock:
        import transformers

        assert transformers.AutoTokenizer  # which transformers imports when it is asked for
        assert transformers.AutoModelForCausalLM
