"""Two bench reports of the same engines, before and after: what got worse, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from edgeseg.arguments import one_of
from edgeseg.errors import GateError, InputError, SpecError
from edgeseg.evaluate.latency.batches import Estimate, bootstrap_interval, median_of
from edgeseg.evaluate.latency.protocol import percentile_of_rows
from edgeseg.evaluate.latency.statistics import paired_ratio
from edgeseg.evaluate.results import BenchReport, Row, at
from edgeseg.evaluate.tables import MISSING, FigureTable, milliseconds, number

METRICS = {
    "median_ms": ("median ms", "latency.end_to_end.median_ms"),
    "p99_ms": ("p99 ms", "latency.end_to_end.p99_ms"),
    "cold_start_ms": ("cold start ms", "cold_start.total_ms"),
    "peak_rss_bytes": ("peak RSS MB", "memory.peak_rss_bytes"),
    "size_bytes": ("size MB", "engine.size_bytes"),
    "miou": ("mIoU", "accuracy.truth.miou.value"),
}
"""What is compared: how a table calls it, and where it is in a row."""
# What differs from process to process by itself, percent: allocators round up, pages are shared or not; a cold start
# of which not every process's time is in both reports.
_NOISE = {"peak_rss_bytes": 2.0, "cold_start_ms": 10.0}

OTHER_DATA = "judged on other images or masks than before, or at another resolution"

Verdict = Literal["worse", "better", "no difference", "cannot tell", "not measured"]


@dataclass(frozen=True)
class Change:
    """One figure of one row in two reports.

    Attributes:
        row: the row's id.
        metric: of :data:`METRICS`.
        old, new: the figures; ``None``: not measured.
        percent: how much worse, in percent of the old; of ``miou``: in points (0.01 = 1). Negative is better.
        low, high: 95 % interval of ``percent`` (cold start: from the closest to the farthest processes), ``None`` for a
            figure without samples.
        verdict: ``no difference`` when the interval holds 0; of latency ``cannot tell`` when it also holds changes by more
            than :data:`~edgeseg.evaluate.latency.batches.SAME_WITHIN`.
        beside: id of the baseline's row that ``percent`` is relative to; ``None``: the bare figures are compared.
        is_baseline: the row is a baseline's; limits are for engines.
    """

    row: str
    metric: str
    old: float | None
    new: float | None
    percent: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "not measured"
    beside: str | None = None
    is_baseline: bool = False


def compare_reports(old: BenchReport, new: BenchReport, *, across_devices: bool = False) -> tuple[Change, ...]:
    """Compare the rows both reports have.

    Two runs are not measured in turns: between them the machine itself may have become slower or faster. Where both
    hold the same unchanged baseline in the same setting, an engine's latency is compared beside it, so that what hit
    both cancels; where not, the bare figures are compared, and :func:`remarks` says what that is worth.

    Raises:
        InputError: no row in common, or the reports are of different devices and ``across_devices`` is false.
    """
    first, second = old.environment, new.environment
    if not across_devices and (first.device, first.cpu) != (second.device, second.cpu):
        raise InputError(
            f"the reports are of different devices ({first.device} and {second.device}); a difference would say nothing "
            "about the engines: measure on one, or give --across-devices"
        )
    before = {row.id: row for row in old.rows}
    pairs = [(before[row.id], row) for row in new.rows if row.id in before]
    baselines = [pair for pair in pairs if pair[1].engine.is_baseline]
    if not pairs:
        raise InputError(f"no row in common: the old report has {', '.join(before) or 'none'}")
    changes = (
        _latency_change(a, b, metric, _baseline(baselines, b)) if metric in _LATENCY else _change(a, b, metric)
        for a, b in pairs
        for metric in METRICS
    )
    own = {new.id for _, new in baselines}
    return tuple(replace(change, is_baseline=change.row in own) for change in changes)


_LATENCY = ("median_ms", "p99_ms")


def _baseline(baselines: Sequence[tuple[Row, Row]], row: Row) -> tuple[Row, Row] | None:
    """The baseline's rows measured in turns with ``row``, if it is the same program in both reports."""
    if row.engine.is_baseline or row.latency is None or not row.latency.round_group:
        return None
    for old, new in baselines:
        a, b = old.engine, new.engine
        if new.latency is None or new.latency.round_group != row.latency.round_group:
            continue
        model = (b.arch, b.encoder, b.height, b.width)
        if model == (row.engine.arch, row.engine.encoder, row.engine.height, row.engine.width) and (
            (a.weights_sha256, a.options, a.versions) == (b.weights_sha256, b.options, b.versions)
        ):
            return old, new
    return None


def _latency_change(old: Row, new: Row, metric: str, baseline: tuple[Row, Row] | None) -> Change:
    before, after = _figure(old, metric), _figure(new, metric)
    first, second = _estimate(old, metric), _estimate(new, metric)
    if before is None or after is None or first is None or second is None:
        return Change(new.id, metric, before, after)
    ratio, beside = second.over(first), None
    if baseline is not None:
        relative = [_beside(row, base, metric) for row, base in zip((old, new), baseline, strict=True)]
        if relative[0] is not None and relative[1] is not None:
            ratio, beside = relative[1].over(relative[0]), baseline[1].id
    percent, low, high = ((value - 1) * 100 for value in (ratio.value, ratio.low, ratio.high))
    verdict = _verdict(percent, low, high)
    if verdict == "no difference" and not ratio.is_same:
        verdict = "cannot tell"
    return Change(new.id, metric, before, after, percent, low, high, verdict, beside)


def _estimate(row: Row, metric: str) -> Estimate | None:
    """A row's median or p99 with its interval within the run."""
    if row.latency is None or len(row.latency.samples_ms) < 2:
        return None
    samples = np.asarray(row.latency.samples_ms, np.float64)
    value = float(getattr(row.latency.end_to_end, metric))
    return Estimate(
        value,
        *bootstrap_interval(samples, median_of if metric == "median_ms" else partial(percentile_of_rows, percent=99)),
    )


def _beside(row: Row, baseline: Row, metric: str) -> Estimate | None:
    """A row's figure as a multiple of the baseline's median in the same run: of medians from pairs taken in turns."""
    median = paired_ratio(row.latency, baseline.latency)
    if median is None or metric == "median_ms":
        return median
    figure, middle = _estimate(row, metric), _estimate(baseline, "median_ms")
    return None if figure is None or middle is None else figure.over(middle)


def _change(old: Row, new: Row, metric: str) -> Change:
    before, after = _figure(old, metric), _figure(new, metric)
    if before is None or after is None or (before == 0 and metric != "miou"):
        return Change(new.id, metric, before, after)
    if metric == "miou":
        same_data = {(a.data_sha256, a.resolution) for row in (old, new) if (a := row.accuracy) is not None}
        if len(same_data) > 1:
            return Change(new.id, metric, before, after)  # other images: not comparable
        # On the same images masks are deterministic: any change is one, and its size is what matters.
        percent = (before - after) * 100
        return Change(new.id, metric, before, after, percent, verdict=_verdict(percent))
    percent = (after / before - 1) * 100
    if metric == "cold_start_ms":
        low, high = _process_range(old, new)
        return Change(new.id, metric, before, after, percent, low, high, _verdict(percent, low, high, _NOISE[metric]))
    return Change(new.id, metric, before, after, percent, verdict=_verdict(percent, noise=_NOISE.get(metric, 0.0)))


def _process_range(old: Row, new: Row) -> tuple[float | None, float | None]:
    """A few fresh processes allow no interval: a change is one when the slowest of one run beats the other's fastest."""
    before = () if old.cold_start is None else old.cold_start.totals_ms
    after = () if new.cold_start is None else new.cold_start.totals_ms
    if len(before) < 2 or len(after) < 2:
        return None, None
    return (min(after) / max(before) - 1) * 100, (max(after) / min(before) - 1) * 100


def _verdict(percent: float, low: float | None = None, high: float | None = None, noise: float = 0.0) -> Verdict:
    if (low is not None and high is not None and low <= 0 <= high) or abs(percent) <= noise:
        return "no difference"
    return "worse" if percent > 0 else "better"


def _figure(row: Row, metric: str) -> float | None:
    value = at(row, METRICS[metric][1])
    return None if value is None else float(value)


def remarks(old: BenchReport, new: BenchReport, changes: Sequence[Change]) -> tuple[str, ...]:
    """What a reader has to know: how latency was compared, and rows that only one report has."""
    lines = []
    names = sorted({change.beside for change in changes if change.beside is not None})
    if names:
        lines.append(
            f"* latency is compared beside {', '.join(names)}, which did not change: what made the machine itself slower "
            "or faster between the two runs cancels"
        )
    bare = {
        c.row
        for c in changes
        if c.metric in _LATENCY and c.percent is not None and c.beside is None and not c.is_baseline
    }
    if bare:
        lines.append(
            f"no unchanged baseline in both reports for {', '.join(sorted(bare))}: a machine that became slower between "
            "the runs looks like a slower engine; measure both with the same --baseline, or both engines in one bench"
        )
    other = sorted(change.row for change in changes if _is_of_other_data(change))
    if other:
        lines.append(f"{OTHER_DATA}, so mIoU is not compared: {', '.join(other)}")
    ids = [{row.id for row in report.rows} for report in (old, new)]
    for words, only in (("old", ids[0] - ids[1]), ("new", ids[1] - ids[0])):
        if only:
            lines.append(f"only in the {words} report, not compared: {', '.join(sorted(only))}")
    return tuple(lines)


def _is_of_other_data(change: Change) -> bool:
    return change.metric == "miou" and change.percent is None and change.old is not None and change.new is not None


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """``("5", "miou=0.5")`` -> ``{"median_ms": 5.0, "miou": 0.5}``. Raises ``SpecError``."""
    limits: dict[str, float] = {}
    for text in texts:
        metric, separator, value = text.rpartition("=")
        name = metric if separator else "median_ms"
        one_of("metric", name, tuple(METRICS))
        try:
            limit = float(value.rstrip("%"))
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit >= 0):
            raise SpecError(f"limit {text!r} is not PERCENT or METRIC=PERCENT, such as 5 or p99_ms=10 or miou=0.5")
        limits[name] = limit
    return limits


def check_limits(changes: Sequence[Change], limits: Mapping[str, float]) -> None:
    """Raise unless every engine keeps the limits; a change inside the noise keeps them, one not measured, or so noisy that it
    cannot be told, does not. What a baseline does by itself is the machine's or PyTorch's matter.

    Raises:
        GateError: names every row and figure that got worse by more than its limit, or of which that cannot be told; no
            engine is in both reports.
    """
    failed = []
    if limits and all(change.is_baseline for change in changes):
        failed.append("no engine is in both reports, so no limit could be checked")
    for change in changes:
        if change.metric not in limits or change.is_baseline:
            continue
        limit, unit = limits[change.metric], " points" if change.metric == "miou" else " %"
        if change.percent is None:
            why = f"was {OTHER_DATA}" if _is_of_other_data(change) else "is not in both reports"
            failed.append(f"{change.row}: {change.metric} {why}, so its limit could not be checked")
        elif (
            change.verdict == "cannot tell"
            and change.low is not None
            and change.high is not None
            and change.high > limit
        ):
            failed.append(
                f"{change.row}: cannot tell whether {change.metric} keeps {limit:g}{unit} ({change.low:+.1f} to "
                f"{change.high:+.1f}{unit}); measure longer"
            )
        elif change.verdict == "worse" and change.percent > limit:
            failed.append(f"{change.row}: {change.metric} is {change.percent:.1f}{unit} worse, {limit:g}{unit} allowed")
    if failed:
        raise GateError("; ".join(failed), changes)


def change_table(changes: Sequence[Change]) -> FigureTable:
    """One line per row and figure that was measured in both reports."""
    figures = ("old", "new", "change", "95 %", "verdict")
    table = FigureTable.of("", *figures)
    row = None
    for change in changes:
        if change.percent is None or change.old is None or change.new is None:
            continue
        if change.row != row:
            table.add(change.row, style="bold")
            row = change.row
        unit = "points" if change.metric == "miou" else "%"
        shown = number(-change.percent if change.metric == "miou" else change.percent, 1, signed=True)
        bounds = MISSING
        if change.low is not None and change.high is not None:
            bounds = " to ".join(number(bound, 1, signed=True) for bound in (change.low, change.high))
        star = "" if change.beside is None else "*"
        old, new = (_shown(change.metric, value) for value in (change.old, change.new))
        table.add(f"  {METRICS[change.metric][0]}", old, new, f"{shown} {unit}{star}", bounds, change.verdict)
    return table


def _shown(metric: str, value: float) -> str:
    if metric.endswith("_bytes"):
        return f"{value / 1e6:.1f}"
    return f"{value:.4f}" if metric == "miou" else milliseconds(value)
