"""The project's own promises: layout rules, changelog, packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgeseg

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "edgeseg").rglob("*.py"))


def test_changelog_has_the_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == edgeseg.__version__


def test_modules_are_named_for_what_they_hold() -> None:
    assert len(SOURCES) > 100
    assert not {"utils", "util", "helpers", "helper", "common", "misc", "manager"} & {path.stem for path in SOURCES}


def test_no_class_has_a_marker_that_python_310_takes_for_a_field() -> None:
    """There msgspec cannot read a type with ``_: KW_ONLY`` in it: no engine loaded."""
    marked = re.compile(r"^\s+\w+: (dataclasses\.)?KW_ONLY\b", re.MULTILINE)
    assert [path for path in SOURCES if marked.search(path.read_text(encoding="utf-8"))] == []


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "edgeseg" / "runtime").glob("*.py")), ids=lambda p: p.name)
def test_runtime_imports_neither_torch_nor_onnx(path: Path) -> None:
    assert not imported(path) & {"torch", "onnx", "onnxruntime", "segmentation_models_pytorch"}


def test_importing_edgeseg_imports_nothing_heavy() -> None:
    code = (
        "import sys, edgeseg; "
        "assert not {'torch', 'onnx', 'numpy', 'PIL', 'click', 'rich'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lazy_names_are_what_they_say() -> None:
    assert set(edgeseg.__all__) <= set(dir(edgeseg))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = edgeseg.no_such_name


def test_only_two_files_write_to_the_terminal() -> None:
    """What a terminal would obey is written out there; whoever prints elsewhere goes around it."""
    allowed = {"cli/output.py": "click.echo", "cli/app.py": "click.echo", "console.py": "Console("}
    # Pass on what another process of ours has printed, and answer one.
    allowed |= {"cli/__init__.py": "sys.stderr.write"}  # before there is anything else to say it with
    allowed |= {"sweep/run.py": "sys.stderr.write", "evaluate/latency/fresh.py": "print("}
    for path in SOURCES:
        printing = set(
            re.findall(r"(?<![\w.])print\(|click\.echo|\bConsole\(|sys\.std(?:out|err)\.write", path.read_text())
        )
        place = path.relative_to(ROOT / "edgeseg").as_posix()
        assert printing <= {allowed.get(place)}, place
