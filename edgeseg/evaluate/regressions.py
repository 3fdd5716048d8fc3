"""Two bench reports of the same engines, before and after: what got worse, and whether that is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import GateError, InputError, SpecError
from edgeseg.evaluate.results import BenchReport, Row
from edgeseg.evaluate.summary import MISSING
from edgeseg.spec import one_of

if TYPE_CHECKING:
    from rich.table import Table

METRICS = ("median_ms", "p99_ms", "cold_start_ms", "peak_rss_bytes", "size_bytes", "miou")
RESAMPLES = 1000

Verdict = Literal["worse", "better", "no difference", "not measured"]


@dataclass(frozen=True)
class Change:
    """One figure of one row in two reports.

    Attributes:
        row: the row's id.
        metric: of :data:`METRICS`.
        old, new: the figures; ``None``: not measured.
        percent: how much worse, in percent of the old; of ``miou``: in points (0.01 = 1). Negative is better.
        low, high: 95 % interval of ``percent``, ``None`` for a figure without samples.
        verdict: ``no difference`` when the interval holds 0.
    """

    row: str
    metric: str
    old: float | None
    new: float | None
    percent: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "not measured"


def compare_reports(old: BenchReport, new: BenchReport, *, across_devices: bool = False) -> tuple[Change, ...]:
    """Compare the rows both reports have.

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
    if not pairs:
        raise InputError(f"no row in common: the old report has {', '.join(before) or 'none'}")
    return tuple(_change(a, b, metric) for a, b in pairs for metric in METRICS)


def _change(old: Row, new: Row, metric: str) -> Change:
    before, after = _figure(old, metric), _figure(new, metric)
    if before is None or after is None or (before == 0 and metric != "miou"):
        return Change(new.id, metric, before, after)
    if metric == "miou":
        percent, low, high = (before - after) * 100, None, None
        same_data = {row.accuracy.data_sha256 for row in (old, new) if row.accuracy is not None}
        if len(same_data) > 1:
            return Change(new.id, metric, before, after)  # other images: not comparable
        # On the same images masks are deterministic: any change is one, and its size is what matters.
    else:
        percent = (after / before - 1) * 100
        low, high = _interval(old, new, metric)
    return Change(new.id, metric, before, after, percent, low, high, _verdict(percent, low, high))


def _verdict(percent: float, low: float | None, high: float | None) -> Verdict:
    if (low is not None and high is not None and low <= 0 <= high) or percent == 0:
        return "no difference"
    return "worse" if percent > 0 else "better"


def _figure(row: Row, metric: str) -> float | None:
    if metric in ("median_ms", "p99_ms"):
        return None if row.latency is None else float(getattr(row.latency.end_to_end, metric))
    if metric == "cold_start_ms":
        return None if row.cold_start is None else row.cold_start.total_ms
    if metric == "peak_rss_bytes":
        return None if row.memory is None or row.memory.peak_rss_bytes is None else float(row.memory.peak_rss_bytes)
    if metric == "size_bytes":
        return float(row.engine.size_bytes)
    truth = None if row.accuracy is None else row.accuracy.truth
    return None if truth is None or truth.miou is None else truth.miou.value


def _interval(old: Row, new: Row, metric: str) -> tuple[float | None, float | None]:
    """Bootstrap of the ratio of two samples that were not taken in turns."""
    if metric not in ("median_ms", "p99_ms") or old.latency is None or new.latency is None:
        return None, None
    before, after = (np.asarray(row.latency.samples_ms) for row in (old, new) if row.latency is not None)
    if not len(before) or not len(after):
        return None, None
    rng = np.random.default_rng(0)
    ratios = _resampled(after, metric, rng) / _resampled(before, metric, rng)
    low, high = np.percentile((ratios - 1) * 100, [2.5, 97.5])
    return float(low), float(high)


def _resampled(samples: NDArray[np.float64], metric: str, rng: np.random.Generator) -> NDArray[np.float64]:
    found = []
    step = max(1, 2_000_000 // len(samples))
    for start in range(0, RESAMPLES, step):
        picks = samples[rng.integers(0, len(samples), (min(step, RESAMPLES - start), len(samples)))]
        if metric == "median_ms":
            found.append(np.median(picks, axis=1))
        else:
            place = max(len(samples) - 1 - int(len(samples) / 100), 0)  # trtexec's p99
            found.append(np.sort(picks, axis=1)[:, place])
    return np.concatenate(found)


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """``("5", "miou=0.5")`` -> ``{"median_ms": 5.0, "miou": 0.5}``. Raises ``SpecError``."""
    limits: dict[str, float] = {}
    for text in texts:
        metric, separator, value = text.rpartition("=")
        name = metric if separator else "median_ms"
        one_of("metric", name, METRICS)
        try:
            limit = float(value.rstrip("%"))
        except ValueError:
            limit = math.nan
        if not (math.isfinite(limit) and limit >= 0):
            raise SpecError(f"limit {text!r} is not PERCENT or METRIC=PERCENT, such as 5 or p99_ms=10 or miou=0.5")
        limits[name] = limit
    return limits


def check_limits(changes: Sequence[Change], limits: Mapping[str, float]) -> None:
    """Raise unless every row keeps the limits; a change inside the noise keeps them, one not measured does not.

    Raises:
        GateError: names every row and figure that got worse by more than its limit.
    """
    failed = []
    for change in changes:
        if change.metric not in limits:
            continue
        limit, unit = limits[change.metric], " points" if change.metric == "miou" else " %"
        if change.percent is None:
            failed.append(f"{change.row}: {change.metric} is not in both reports, so its limit could not be checked")
        elif change.verdict == "worse" and change.percent > limit:
            failed.append(f"{change.row}: {change.metric} is {change.percent:.1f}{unit} worse, {limit:g}{unit} allowed")
    if failed:
        raise GateError("; ".join(failed))


def change_table(changes: Sequence[Change]) -> Table:
    """One line per row and figure that was measured in both reports."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "old", "new", "change", "95 %"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    row = None
    for change in changes:
        if change.percent is None:
            continue
        if change.row != row:
            table.add_row(change.row, style="bold")
            row = change.row
        unit = "points" if change.metric == "miou" else "%"
        shown = 0.0 - change.percent if change.metric == "miou" else change.percent
        bounds = MISSING if change.low is None or change.high is None else f"{change.low:+.1f} to {change.high:+.1f}"
        old, new = (_shown(change.metric, value) for value in (change.old, change.new))
        table.add_row(f"  {_NAMES[change.metric]}", old, new, f"{shown:+.1f} {unit}", bounds, change.verdict)
    return table


_NAMES = {
    "median_ms": "median ms",
    "p99_ms": "p99 ms",
    "cold_start_ms": "cold start ms",
    "peak_rss_bytes": "peak RSS MB",
    "size_bytes": "size MB",
    "miou": "mIoU",
}


def _shown(metric: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if metric.endswith("_bytes"):
        return f"{value / 1e6:.1f}"
    return f"{value:.4f}" if metric == "miou" else f"{value:.2f}"
