"""The bench report's file: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from edgeseg.errors import ArtifactError
from edgeseg.evaluate.results import BenchReport, Setting, read_report, row_id, write_report

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "data" / "bench-report-example.json"


def changed(tmp_path: Path, change: dict[str, Any]) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(EXAMPLE.read_text()), **change}))
    return path


def test_the_example_is_read_and_written_the_same(tmp_path: Path) -> None:
    report = read_report(EXAMPLE)
    write_report(tmp_path / "deep" / "copy.json", report)
    assert json.loads((tmp_path / "deep" / "copy.json").read_text()) == json.loads(EXAMPLE.read_text())
    assert "made up" in report.notes[0]


def test_a_row_is_found_by_its_id() -> None:
    report = read_report(EXAMPLE)
    assert report.row(row_id("fpn-int8", Setting(4))).engine.precision == "int8"
    with pytest.raises(KeyError):
        report.row("nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "upgrade edgeseg"),
        ({"schema_version": 0}, "measure again"),
        ({"rows": [{}]}, r"\$\.rows\[0\]"),
        ({"rows": []}, "no row of the report"),
        ({"created_at": 5}, "created_at"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_report(changed(tmp_path, change))


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    rows = json.loads(EXAMPLE.read_text())["rows"]
    with pytest.raises(ArtifactError, match="same id"):
        read_report(changed(tmp_path, {"rows": [*rows, rows[0]]}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArtifactError, match="schema_version"):
        read_report(tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="cannot read"):
        read_report(tmp_path / "missing.json")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_report(tmp_path / "file" / "report.json", read_report(EXAMPLE))


def test_the_page_names_every_top_level_and_row_field() -> None:
    page = (ROOT / "docs" / "bench-report.md").read_text()
    row = read_report(EXAMPLE).rows[0]
    assert row.latency is not None
    for value in (BenchReport, type(row), type(row.engine), type(row.latency), type(row.latency.end_to_end)):
        for field in dataclasses.fields(value):
            assert field.name in page or field.name.endswith("_sha256"), field.name
