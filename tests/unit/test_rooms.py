"""The order of the rooms: a module imports from its own room or from one below, lazily or for types no less than openly."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the ground up. What stands on one line could stand in any order.
ROOMS = (
    *("closing", "version", "console", "silence", "errors"),
    *("arguments", "progress"),
    *("spec", "machine", "demo"),
    "store",
    *("images", "graph"),
    *("convert", "quantize"),
    "backends",
    "runtime",
    "evaluate",
    "mixed",
    *("decide", "pipeline"),
    "handover",
    "report",
    "cluster",
    "sweep",
    "cli",
)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the edgeseg modules it imports, wherever in its text."""
    paths = {_module(path): path for path in (ROOT / "edgeseg").rglob("*.py")}
    known: dict[str, set[str]] = {}
    for name, path in paths.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: absolute imports only"
                module = str(node.module)
                wanted |= {m if (m := f"{module}.{a.name}") in paths else module for a in node.names}
        known[name] = {w for w in wanted if w.split(".")[0] == "edgeseg"} - {name}
        assert known[name] <= paths.keys(), f"{path} imports what is not there: {known[name] - paths.keys()}"
    return known


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_is_in_a_room() -> None:
    assert {room(m) for m in imports() if m.count(".")} - {"__main__"} == set(ROOMS)


def test_imports_only_go_down() -> None:
    floor = {name: index for index, name in enumerate(ROOMS)}
    upward = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        if module.count(".") and room(module) != "__main__"
        for target in targets
        if target == "edgeseg" or floor[room(target)] > floor[room(module)]
    ]
    assert upward == []


def test_no_circle_of_files() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
