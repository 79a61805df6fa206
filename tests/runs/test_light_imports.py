"""Packages that a process never uses are missing while it imports the large libraries, and only then."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import sys

import pytest

from runs.imports import light_imports, paused_garbage_collection


def test_a_package_is_missing_in_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tabulate", raising=False)
    distributions = importlib.metadata.packages_distributions
    with light_imports(["tabulate", "json"]):
        assert importlib.util.find_spec("tabulate") is None
        with pytest.raises(ImportError):
            import tabulate
        import json  # was imported already

        assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
    import tabulate

    assert json.loads("1") == 1 and tabulate.tabulate
    assert importlib.metadata.packages_distributions is distributions


def test_models_can_be_imported_without_their_list() -> None:
    with light_imports([]):
        from transformers import AutoModelForCausalLM
    from transformers import LlamaForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    assert Qwen3RMSNorm and LlamaForCausalLM in AutoModelForCausalLM._model_mapping.values()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_if_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with paused_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
