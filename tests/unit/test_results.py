"""The bench report's file: what is written is read again, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from edgeseg.decide.entries import Run, merge
from edgeseg.decide.verdict import decide
from edgeseg.errors import ArtifactError
from edgeseg.evaluate.bench_table import bench_summary
from edgeseg.evaluate.regressions import change_table, compare_reports
from edgeseg.evaluate.results import BenchReport, read_report, write_report
from edgeseg.report.decision import decision_of
from edgeseg.report.html import html
from edgeseg.report.plain import csv_text, markdown, terminal

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests" / "data" / "bench-report-example.json"


def test_the_example_is_read_and_written_the_same(tmp_path: Path) -> None:
    report = read_report(EXAMPLE)
    write_report(tmp_path / "deep" / "copy.json", report)
    assert json.loads((tmp_path / "deep" / "copy.json").read_text()) == json.loads(EXAMPLE.read_text())
    assert "made up" in report.notes[0]


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


def places(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Where the numbers of a JSON value are, one of each list of numbers."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*path, name))
    elif isinstance(value, list) and value:
        for index in range(len(value) if isinstance(value[0], dict) else 1):
            yield from places(value[index], (*path, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


NUMBERS: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
"""Of each number a report has: its places, one a row."""
for _place in places(json.loads(EXAMPLE.read_text())):
    NUMBERS.setdefault(tuple("*" if isinstance(step, int) else step for step in _place), []).append(_place)


def put(value: Any, place: tuple[Any, ...], number: float) -> None:
    for step in place[:-1]:
        value = value[step]
    value[place[-1]] = number


@pytest.mark.parametrize("number", [0, -1, 10**400, 5e-324, 1e15], ids=lambda n: f"{str(n)[:5]}-{len(str(n))}")
def test_a_number_that_cannot_be_is_refused_and_any_other_is_harmless(tmp_path: Path, number: float) -> None:
    """Every number of a report in turn: refused in one line, or all that reads the report can live with it."""
    assert len(NUMBERS) > 90
    path = tmp_path / "r.json"
    accepted = []
    for same in NUMBERS.values():
        value = json.loads(EXAMPLE.read_text())
        put(value, same[-1], number)
        path.write_text(json.dumps(value))
        try:
            read_report(path)
        except ArtifactError as exc:
            assert "\n" not in str(exc) and len(str(exc)) < 400
        else:
            accepted.extend(same)
    value = json.loads(EXAMPLE.read_text())
    for place in accepted:
        put(value, place, number)
    path.write_text(json.dumps(value))
    good, odd = read_report(EXAMPLE), read_report(path)
    for old, new in ((good, odd), (odd, good), (odd, odd)):
        Console(file=io.StringIO(), width=80).print(change_table(compare_reports(old, new)))
    Console(file=io.StringIO(), width=80).print(bench_summary(odd))
    together = merge([Run(odd)])
    verdicts = decide(together)
    assert all((html(together, verdicts), markdown(together, verdicts), csv_text(together, verdicts)))
    msgspec.json.encode(decision_of(together, verdicts))
    Console(file=io.StringIO(), width=80).print(terminal(verdicts, width=80))
