"""Who may import whom: every folder imports only folders below it, nobody imports a command, and there is no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# From the bottom up; folders of one level do not know each other. The commands at the root stand above all.
LEVELS = [["common"], ["runs"], ["preprocessing"], ["training", "inference"], ["evaluation", "export"], ["web"]]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMANDS = ["api", "chat", "download", "evaluate", "merge", "preview", "quantize", "train", "webui"]


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """The kit's own modules, and which others of them each imports."""
    files = [*ROOT.glob("*.py"), *(file for name in LEVEL for file in (ROOT / name).rglob("*.py"))]
    known = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {module: imported(module, known) for module in known}


def imported(module: str, known: dict[str, Path]) -> set[str]:
    """The kit's modules that a module imports, also inside functions and for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written from the root"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in known and name != module}


def may_import(module: str, other: str) -> bool:
    folder, others = module.partition(".")[0], other.partition(".")[0]
    if folder == others and "." in module:
        return True
    return others in LEVEL and LEVEL[others] < LEVEL.get(folder, len(LEVELS))


def test_only_the_commands_and_common_stand_at_the_root():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == sorted([*COMMANDS, "common"])


def test_imports_point_one_way(imports: dict[str, set[str]]):
    wrong = [f"{a} -> {b}" for a, others in imports.items() for b in others if not may_import(a, b)]
    assert wrong == []


def test_there_is_no_circle_of_imports(imports: dict[str, set[str]]):
    left = dict(imports)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}
