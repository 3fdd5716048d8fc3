"""The command line: exit codes, one-line errors, nothing heavy imported for help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeseg
from edgeseg.arguments import parse_settings
from edgeseg.cli.app import VERBS
from edgeseg.errors import SpecError

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "edgeseg", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['edgeseg', '--help']\n"
        "from edgeseg.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: edgeseg")


def test_version() -> None:
    assert run("--version").stdout.strip() == f"edgeseg, version {edgeseg.__version__}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["biuld"], 2, "did you mean 'build'"),
        (["build", "--precision", "int4"], 2, "int4"),
        (["build", "--arch", "fpn", "--batch", "0"], 2, "MIN"),
        (["build", "--arch", "fpn", "--size", "big"], 2, "HEIGHTxWIDTH"),
        (["build", "--arch", "fpn", "--mean", "a,b"], 2, "list of numbers"),
        (["build", "--arch", "fpn", "--max-drop", "7"], 2, "between 0 and 1"),
        (["build", "--arch", "fpn", "--model-arg", "depth"], 2, "key=value"),
        (["inspect", "no-such-folder"], 1, "no such folder"),
        (["run", "no-such-folder", "x.png", "--output", "out"], 1, "no such folder"),
        (["compile", "no-such-folder"], 1, "no such folder"),
        (["bench", "no-such-folder"], 1, "no such folder"),
        (["bench", "x", "--batch", "1,0"], 2, "different counts"),
        (["bench", "x", "--baseline", "keras"], 2, "keras"),
        (["compare", "old.json", "new.json"], 1, "cannot read bench report old.json"),
        (["compare", "old.json", "new.json", "--max-regression", "fps=3"], 2, "unknown metric 'fps'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("inspect", "no-such-folder", "--debug").stderr


def test_doctor_prints_only_json_with_json() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_key_values() -> None:
    pairs = ("depth=4", "channels=[64,32]", "kind=scse", "batchnorm=True", "x=None", 'name="a=b"')
    assert parse_settings(pairs) == {
        "depth": 4,
        "channels": [64, 32],
        "kind": "scse",
        "batchnorm": True,
        "x": None,
        "name": "a=b",
    }
    for bad in (("depth",), ("=4",), ("a=1", "a=2")):
        with pytest.raises(SpecError):
            parse_settings(bad)


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes [void] for a style and drops it; extras and class names have brackets."""
    from rich.table import Table

    from edgeseg.cli.output import result_console

    table = Table("name")
    table.add_row("pip install 'edgeseg[tensorrt]' [bold]x")
    result_console().print(table)
    assert "edgeseg[tensorrt]' [bold]x" in capsys.readouterr().out
