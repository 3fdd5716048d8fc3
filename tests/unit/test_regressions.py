"""Two reports, before and after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_rows import row_of
from click.testing import CliRunner

from edgeseg.cli.app import cli
from edgeseg.errors import GateError, InputError, SpecError
from edgeseg.evaluate.latency.statistics import distribution
from edgeseg.evaluate.regressions import change_table, check_limits, compare_reports, parse_limits, remarks
from edgeseg.evaluate.results import BenchReport, read_report, write_report

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"
ROW = "fpn-int8 b1 t- s1"


def slowed(report: BenchReport, factor: float, *, every: bool = False) -> BenchReport:
    """One row, or with ``every`` the whole machine, takes ``factor`` times as long."""
    rows = []
    for row in report.rows:
        assert row.latency is not None
        samples = tuple(ms * factor for ms in row.latency.samples_ms)
        latency = replace(row.latency, samples_ms=samples, end_to_end=distribution(samples))
        rows.append(replace(row, latency=latency) if every or row.id == ROW else row)
    return replace(report, rows=tuple(rows))


def changes(new: BenchReport, **options: Any) -> dict[str, Any]:
    return {c.metric: c for c in compare_reports(read_report(EXAMPLE), new, **options) if c.row == ROW}


def test_the_same_report_shows_no_difference() -> None:
    seen = changes(read_report(EXAMPLE))
    assert {c.verdict for c in seen.values()} == {"no difference"}
    check_limits(tuple(seen.values()), dict.fromkeys(seen, 0.0))


def test_a_slower_engine_is_found_and_gated() -> None:
    seen = changes(slowed(read_report(EXAMPLE), 1.2))
    assert seen["median_ms"].verdict == "worse"
    assert seen["median_ms"].percent == pytest.approx(20.0)
    assert seen["median_ms"].low > 10
    check_limits(tuple(seen.values()), {"median_ms": 25.0})
    with pytest.raises(GateError, match=r"fpn-int8 b1 t- s1: median_ms is 20\.0 % worse, 5 % allowed"):
        check_limits(tuple(seen.values()), {"median_ms": 5.0})
    assert changes(slowed(read_report(EXAMPLE), 0.8))["median_ms"].verdict == "better"


def test_a_slower_machine_is_no_slower_engine() -> None:
    old = read_report(EXAMPLE)
    seen = changes(slowed(old, 1.3, every=True))
    for metric in ("median_ms", "p99_ms"):
        assert seen[metric].new == pytest.approx(1.3 * seen[metric].old)
        assert seen[metric].percent == pytest.approx(0.0, abs=1e-9)
        assert (seen[metric].verdict, seen[metric].beside) == ("no difference", "pytorch b1 t- s1")
    both = changes(slowed(slowed(old, 1.3, every=True), 1.2))
    assert both["median_ms"].percent == pytest.approx(20.0)
    assert both["median_ms"].verdict == "worse"
    (words,) = remarks(old, old, tuple(seen.values()))
    assert "beside pytorch b1 t- s1" in words


def test_limits_are_for_engines() -> None:
    """A machine that became slower fails no gate: all rows of its report, the baseline's with them, are within it."""
    old = read_report(EXAMPLE)
    every = compare_reports(old, slowed(old, 1.3, every=True))
    slower = {change.row for change in every if change.metric == "median_ms" and change.verdict == "worse"}
    baselines = {row.id for row in old.rows if row.engine.is_baseline}
    assert slower == baselines == {change.row for change in every if change.is_baseline}
    check_limits(every, {"median_ms": 5.0, "p99_ms": 5.0})
    renamed = tuple(row if row.engine.is_baseline else replace(row, id="new " + row.id) for row in old.rows)
    with pytest.raises(GateError, match="no engine is in both reports"):
        check_limits(compare_reports(old, replace(old, rows=renamed)), {"median_ms": 5.0})
    check_limits(compare_reports(old, replace(old, rows=renamed)), {})


def test_without_an_unchanged_baseline_the_bare_figures_are_compared_and_it_is_said() -> None:
    old = read_report(EXAMPLE)
    rows = tuple(
        replace(row, engine=replace(row.engine, versions={"torch": "another"})) if row.engine.is_baseline else row
        for row in old.rows
    )
    new = slowed(replace(old, rows=rows), 1.3, every=True)
    seen = changes(new)
    assert (seen["median_ms"].verdict, seen["median_ms"].beside) == ("worse", None)
    assert seen["median_ms"].percent == pytest.approx(30.0)
    (words,) = remarks(old, new, compare_reports(old, new))
    assert "no unchanged baseline in both reports for" in words and ROW in words
    fewer = replace(new, rows=(row_of(new, ROW),))
    (missing,) = remarks(old, fewer, ())
    assert "only in the old report" in missing and "pytorch b1 t- s1" in missing


def test_cold_start_is_worse_when_its_fastest_process_is_slower_than_the_slowest_before() -> None:
    report = read_report(EXAMPLE)
    row = row_of(report, ROW)
    assert row.cold_start is not None

    def started(*totals_ms: float) -> BenchReport:
        cold = replace(row.cold_start, total_ms=sorted(totals_ms)[1], totals_ms=totals_ms)
        return replace(report, rows=(replace(row, cold_start=cold),))

    def verdict(old: BenchReport, new: BenchReport) -> str:
        return next(c.verdict for c in compare_reports(old, new) if c.metric == "cold_start_ms")

    assert verdict(started(100, 110, 130), started(120, 125, 128)) == "no difference"
    assert verdict(started(100, 110, 130), started(131, 150, 155)) == "worse"
    assert verdict(started(131, 150, 155), started(100, 110, 130)) == "better"


def test_lost_accuracy_and_larger_files_count() -> None:
    report = read_report(EXAMPLE)
    row = row_of(report, ROW)
    assert row.accuracy is not None and row.accuracy.truth is not None and row.accuracy.truth.miou is not None
    miou = replace(row.accuracy.truth.miou, value=row.accuracy.truth.miou.value - 0.02)
    worse = replace(
        row,
        accuracy=replace(row.accuracy, truth=replace(row.accuracy.truth, miou=miou)),
        engine=replace(row.engine, size_bytes=row.engine.size_bytes * 2),
    )
    seen = changes(replace(report, rows=(worse,)))
    assert seen["miou"].percent == pytest.approx(2.0)
    assert seen["size_bytes"].percent == pytest.approx(100.0)
    with pytest.raises(GateError, match=r"size_bytes.*; .*miou is 2\.0 points worse"):
        check_limits(tuple(seen.values()), {"miou": 1.0, "size_bytes": 10.0})
    other_data = replace(worse, accuracy=replace(row.accuracy, data_sha256="other"))
    elsewhere = replace(report, rows=(other_data,))
    seen = changes(elsewhere)
    assert seen["miou"].verdict == "not measured"
    with pytest.raises(
        GateError, match="miou was judged on other images or masks than before, or at another resolution, so"
    ):
        check_limits(tuple(seen.values()), {"miou": 1.0})
    words = remarks(report, elsewhere, tuple(seen.values()))
    assert (
        f"judged on other images or masks than before, or at another resolution, so mIoU is not compared: {ROW}"
        in words
    )


def test_a_limit_that_cannot_be_checked_is_not_kept() -> None:
    report = read_report(EXAMPLE)
    bare = replace(report, rows=(replace(row_of(report, ROW), latency=None),))
    with pytest.raises(GateError, match="could not be checked"):
        check_limits(tuple(changes(bare).values()), {"median_ms": 5.0})


def test_devices_are_not_mixed_and_rows_must_meet() -> None:
    report = read_report(EXAMPLE)
    other = replace(report, environment=replace(report.environment, device="another"))
    with pytest.raises(InputError, match="different devices"):
        compare_reports(report, other)
    assert compare_reports(report, other, across_devices=True)
    with pytest.raises(InputError, match="no row in common"):
        compare_reports(report, replace(report, rows=()))


def test_limits() -> None:
    assert parse_limits(("5", "miou=0.5", "p99_ms=10%")) == {"median_ms": 5.0, "miou": 0.5, "p99_ms": 10.0}
    with pytest.raises(SpecError, match="did you mean 'median_ms'"):
        parse_limits(("median=5",))
    with pytest.raises(SpecError, match="METRIC=PERCENT"):
        parse_limits(("miou=-1",))


def test_the_table_fits_80_columns_and_names_every_row() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(change_table(compare_reports(read_report(EXAMPLE), slowed(read_report(EXAMPLE), 1.2))))
        text = console.export_text()
    assert ROW in text
    assert "+20.0 %*" in text
    assert "worse" in text


@pytest.mark.parametrize("form", ["table", "json"])
def test_the_remarks_fit_the_terminal(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = read_report(EXAMPLE)
    renamed = replace(new, rows=tuple(replace(row, id=f"{row.id} x") for row in new.rows[1:]))
    write_report(tmp_path / "new.json", replace(new, rows=(new.rows[0], *renamed.rows), comparisons=()))
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(
        cli, ["compare", str(EXAMPLE), str(tmp_path / "new.json"), *["--json"] * (form == "json")]
    )
    assert done.exit_code == 0, done.output
    told = done.stderr if form == "json" else done.output
    assert "only in the old report, not compared" in told.replace("\n", " ")
    assert max(map(len, told.splitlines())) <= 80


def test_a_change_that_noise_hides_is_no_pass() -> None:
    """The engine's calls take 10 or 30 ms in spells: twice as slow or as fast would look the same."""
    old = read_report(EXAMPLE)
    row = row_of(old, ROW)
    assert row.latency is not None

    def spells(*ms: float) -> BenchReport:
        samples = tuple(value for value in ms for _ in range(8))
        latency = replace(row.latency, samples_ms=samples, end_to_end=distribution(samples))
        return replace(old, rows=(replace(row, latency=latency),))

    noisy = spells(10, 30, 11, 29, 10, 31, 30, 12, 30, 10), spells(30, 10, 12, 28, 31, 10, 30, 11, 10, 30)
    medians = [c for c in compare_reports(*noisy) if c.metric == "median_ms"]
    assert [c.verdict for c in medians] == ["cannot tell"]
    with pytest.raises(GateError, match=r"cannot tell whether median_ms keeps 5 % \(-.*; measure longer"):
        check_limits(medians, {"median_ms": 5.0})
    check_limits(medians, {"median_ms": 1000.0})
    steady = spells(*[10.0] * 10), spells(*[10.1] * 10)
    assert [c.verdict for c in compare_reports(*steady) if c.metric == "median_ms"] == ["worse"]
