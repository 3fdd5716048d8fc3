"""What a terminal of 80 columns shows: whole figures, names that wrap at hyphens, no sign on zero."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench_rows import merged, row
from hypothesis import given
from hypothesis import strategies as st

from edgeseg.console import plain_console
from edgeseg.decide.verdict import decide
from edgeseg.evaluate.bench_table import bench_summary
from edgeseg.evaluate.latency.statistics import distribution
from edgeseg.evaluate.regressions import change_table, compare_reports
from edgeseg.evaluate.results import BenchReport, read_report
from edgeseg.evaluate.tables import FigureTable, counted, number, wrapped
from edgeseg.report.plain import terminal

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"
LONG = "deeplabv3plus-tu-tf_efficientnet_lite0-demo-int8"


def printed(renderable: object, width: int = 80) -> list[str]:
    stream = io.StringIO()
    console = plain_console()
    console.file, console.width = stream, width
    console.print(renderable)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_words_that_are_longer_than_the_terminal_are_all_shown() -> None:
    path = "/data/" + "abcdefghij" * 30 + ".pth"
    table = FigureTable((("", "words"), ("", "words")), has_header=False)
    table.add("normalization", "mean (0.485, 0.456, 0.406)")
    table.add("to repeat", f"edgeseg build --weights {path} --size 64x96")
    lines = printed(table, width=80)
    assert max(map(len, lines)) <= 80
    assert path in "".join("".join(lines).split())
    assert "mean (0.485, 0.456, 0.406)" in "".join(lines)


def test_on_the_tools_console_a_wrapped_name_has_lines_and_its_own_line_ends_are_written_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = FigureTable((("engine", "name"), ("Median\nms", "figure")))
    table.add("an-engine-with-a-name-that-is-long\x1b[2J", "12.34")
    table.add("two\nlines", "5.00")
    plain_console().print(table)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:3] == [["Median"], ["engine", "ms"]]
    assert lines[4:7] == [["an-engine-with-a-name-that-is-", "12.34"], [r"long\x1b[2J"], [r"two\nlines", "5.00"]]


def slow_with_long_names(report: BenchReport, factor: float) -> BenchReport:
    """Latencies of seconds, and engines with names as long as real ones."""
    rows, names = [], {}
    for one in report.rows:
        name = one.engine.name if one.engine.is_baseline else f"{LONG}-{one.engine.name}"
        names[one.id] = one.id.replace(one.engine.name, name)
        assert one.latency is not None
        samples = tuple(ms * factor for ms in one.latency.samples_ms)
        latency = replace(one.latency, samples_ms=samples, end_to_end=distribution(samples))
        rows.append(replace(one, id=names[one.id], engine=replace(one.engine, name=name), latency=latency))
    comparisons = tuple(replace(c, row=names[c.row], baseline=names[c.baseline]) for c in report.comparisons)
    return replace(report, rows=tuple(rows), comparisons=comparisons)


def test_compare_shows_every_figure_whole_at_80_columns() -> None:
    report = read_report(EXAMPLE)
    old, new = slow_with_long_names(report, 230.0), slow_with_long_names(report, 251.0)
    changes = compare_reports(old, new)
    text = "\n".join(printed(change_table(changes)))
    assert "\u2026" not in text
    for change in changes:
        if change.metric == "median_ms":
            (line,) = [
                line for line in text.splitlines() if f" {change.old:.0f} " in line or f" {change.old:.2f} " in line
            ]
            assert change.verdict in line
    # The name can be put together again from its lines.
    assert f"{LONG}-fpn-int8b1t-s1" in re.sub(r"\s", "", text)


def test_bench_and_report_split_names_at_hyphens_only() -> None:
    report = slow_with_long_names(read_report(EXAMPLE), 230.0)
    for lines in (printed(bench_summary(report)), printed(terminal(decide(merged(*report.rows)), width=80))):
        assert not any("\u2026" in line for line in lines)
        ends = [m[1] for line in lines if (m := re.match(r" *(?:\d+  )?(deeplabv3plus\S*)", line))]
        assert ends and all(re.search(r"[-_:]$|int8|fp32", end) for end in ends)


def test_a_word_is_not_split_where_it_fits() -> None:
    table = FigureTable.of("engine", "median", "p99")
    table.add("fpn-resnet18-demo-int8", "2327.10", "12345.67")
    lines = printed(table, 36)
    assert [line.split() for line in lines[-3:-1]] == [["fpn-resnet18-", "2327.10", "12345.67"], ["demo-int8"]]


def test_line_ends_of_headings_hold_and_those_of_names_are_written_out() -> None:
    table = FigureTable.of("engine", "median\nms")
    table.add("two\nlines", "1.00")
    lines = [line.split() for line in printed(table) if line.strip()]
    assert lines[:2] + lines[3:] == [["median"], ["engine", "ms"], ["two\\nlines", "1.00"]]


@given(st.text("ab1-_/, .", max_size=60), st.integers(1, 30))
def test_wrapping_keeps_every_character_and_the_width(name: str, width: int) -> None:
    lines = wrapped(name, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")


def test_a_column_nobody_measured_is_left_out() -> None:
    table = FigureTable.of("engine", "ms", "RSS MB")
    table.add("a", "1.00", "-")
    table.add("b", "-", "-")
    text = "\n".join(printed(table))
    assert "RSS" not in text and re.search(r"b +-", text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.00001, "0.0000"), (0.00001, "0.0000"), (-0.0, "0.0000"), (-0.00006, "-0.0001"), (0.25, "+0.2500")],
)
def test_zero_has_no_sign(value: float, text: str) -> None:
    assert number(value, 4, signed=True) == text
    assert number(value, 4) == text.lstrip("+")


def test_a_drop_of_nothing_is_zero_in_the_report() -> None:
    one = row("e", 5.0, miou=0.7, drop=-0.000001)
    lines = printed(terminal(decide(merged(one)), width=140), width=140)
    assert any(" 0.0000 " in line for line in lines) and not any("-0.0000" in line for line in lines)


def test_one_is_no_plural() -> None:
    assert (counted(1, "more row"), counted(2, "more row"), counted(0, "row")) == (
        "1 more row",
        "2 more rows",
        "0 rows",
    )


def test_a_terminal_that_says_it_has_no_columns_shows_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    plain_console().print("the result")
    assert capsys.readouterr().out == "the result\n"
