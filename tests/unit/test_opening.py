"""``--open``: the desktop's program is started, and a machine without a desktop is told where the result is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from bench_rows import report, row
from click.testing import CliRunner, Result
from memory_backend import write_memory_engine
from PIL import Image

from edgeseg.backends import BACKENDS
from edgeseg.cli.report import command as report_command
from edgeseg.cli.run import command as run_command
from edgeseg.evaluate.results import write_report
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="xdg-open is Linux's")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an ``xdg-open`` of ours was given, one line a call."""
    log, programs = tmp_path / "opened", tmp_path / "bin"
    programs.mkdir()
    program = programs / "xdg-open"
    program.write_text(f'#!/bin/sh\necho "$1" >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    # click starts it and goes on.
    from click import _termui_impl

    start = _termui_impl.open_url
    monkeypatch.setattr(_termui_impl, "open_url", lambda url, wait=False, locate=False: start(url, True, locate))
    return log


def segmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> Result:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    write_memory_engine(tmp_path / "engine", PipelineSpec(ModelSpec("custom", classes=4), InputSpec(16, 16, stride=1)))
    paths = [tmp_path / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    words = [str(tmp_path / "engine"), *map(str, paths), "--output", str(tmp_path / "out"), "--open"]
    return CliRunner().invoke(run_command, words, catch_exceptions=False)


@pytest.mark.parametrize(("count", "shown"), [(1, "out/masks/0.png"), (2, "out")])
def test_a_file_alone_is_shown_itself_and_several_as_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Path, count: int, shown: str
) -> None:
    assert segmented(tmp_path, monkeypatch, count).exit_code == 0
    assert opened.read_text().splitlines() == [str(tmp_path / shown)]


def test_without_a_display_the_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Path) -> None:
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    done = segmented(tmp_path, monkeypatch, 1)
    assert done.exit_code == 0
    assert done.stderr == f"not opened: no display here; the result is {tmp_path / 'out/masks/0.png'}\n"
    assert not opened.exists()


def test_without_a_program_the_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    done = segmented(tmp_path, monkeypatch, 1)
    assert done.exit_code == 0
    assert "not opened: no program for it (xdg-open); the result is" in done.stderr


def test_a_report_is_shown_as_its_page(tmp_path: Path, opened: Path) -> None:
    bench, page = tmp_path / "bench.json", tmp_path / "page.html"
    write_report(bench, report(row("pytorch", 30.0, is_baseline=True), row("fp32", 12.0)))
    refused = CliRunner().invoke(report_command, [str(bench), "--open"])
    assert str(refused.exception) == "--open shows the page of --html; give --html a file, too"
    CliRunner().invoke(report_command, [str(bench), "--html", str(page), "--open"])
    assert opened.read_text().splitlines() == [str(page)]
