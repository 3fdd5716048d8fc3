"""The figures a requirement may name and a table may show: one name, one unit, one place it is read from.

And in which interval a figure could come out if the run were made again, on the same machine and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.decide.entries import Entry
from edgeseg.evaluate.intervals import MIN_IMAGES
from edgeseg.evaluate.latency.batches import bootstrap_interval
from edgeseg.evaluate.latency.protocol import percentile_of_rows
from edgeseg.evaluate.results import Interval, at
from edgeseg.evaluate.tables import MISSING, counted, number

Getter = Callable[[Entry], "float | None"]
IntervalGetter = Callable[[Entry], "tuple[float, float] | None"]


def _no_interval(entry: Entry) -> None:
    return None


@dataclass(frozen=True)
class Metric:
    """One figure of a row.

    Attributes:
        name: as requirements, CSV and JSON spell it; the unit is in it.
        unit: for people; ``""`` for a share or a count.
        digits: after the decimal point.
        title: column heading.
        help: what it is.
        get: reads it; ``None`` when it was not measured.
        interval: reads its 95 % interval, where one was measured.
        noise: the 95 % interval another run of the same engine on the same data could fall in; ``None`` for figures that
            come out the same each time, and where it is not known.
    """

    name: str
    unit: str
    digits: int
    title: str
    help: str
    get: Getter
    interval: IntervalGetter = _no_interval
    noise: IntervalGetter = _no_interval

    def value(self, entry: Entry) -> float | None:
        """The figure, or ``None`` when it was not measured (a NaN counts as such)."""
        figure = self.get(entry)
        return None if figure is None or math.isnan(figure) else float(figure)

    def text(self, value: float | None) -> str:
        """The figure without its unit; ``-`` when it was not measured."""
        return MISSING if value is None else number(value, self.digits)

    def with_unit(self, value: float | None) -> str:
        """The figure with its unit; ``-`` when it was not measured."""
        if value is None or not self.unit:
            return self.text(value)
        return f"{self.text(value)}{'' if self.unit == 'x' else ' '}{self.unit}"


def _at(path: str, per: float = 1.0) -> Getter:
    """Reads ``latency.stages.pre_ms`` of an entry's row; ``None`` where a part of the way was not measured."""

    def get(entry: Entry) -> float | None:
        value = at(entry.row, path)
        return None if value is None else value / per

    return get


def _bounds(of: Callable[[Entry], Any]) -> IntervalGetter:
    """Reads the ends of what has ``low`` and ``high``."""

    def get(entry: Entry) -> tuple[float, float] | None:
        estimate = of(entry)
        return None if estimate is None else (estimate.low, estimate.high)

    return get


def of_mean(entry: Entry) -> tuple[float, float] | None:
    """Of the mean of a call, milliseconds; ``None`` without raw samples."""
    return _of_samples(entry, lambda samples: np.asarray(samples.mean(axis=1)))


def of_percentile(percent: float) -> Callable[[Entry], tuple[float, float] | None]:
    """Reads that of a percentile of a call, milliseconds."""
    return partial(_of_samples, statistic=partial(percentile_of_rows, percent=percent))


def of_rate(entry: Entry) -> tuple[float, float] | None:
    """Of images per second, as the mean of a call lets them vary."""
    latency, mean_ms = entry.row.latency, of_mean(entry)
    if latency is None or mean_ms is None:
        return None
    images_in_mean = latency.images_per_s * latency.end_to_end.mean_ms
    return images_in_mean / mean_ms[1], images_in_mean / mean_ms[0]


def of_processes(entry: Entry) -> tuple[float, float] | None:
    """Of a cold start: from the fastest to the slowest of a few fresh processes, which are too few for an interval."""
    cold = entry.row.cold_start
    return None if cold is None or len(cold.totals_ms) < 2 else (min(cold.totals_ms), max(cold.totals_ms))


def _of_samples(
    entry: Entry, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> tuple[float, float] | None:
    latency = entry.row.latency
    if latency is None or len(latency.samples_ms) < 2:
        return None
    return bootstrap_interval(np.asarray(latency.samples_ms, np.float64), statistic)


def _dice_loss(entry: Entry) -> float | None:
    dice = _at("accuracy.truth.dice")(entry)
    return None if dice is None else 1.0 - dice


def _drop(entry: Entry) -> Interval | None:
    drops = at(entry.row, "accuracy.truth.drops") or ()
    return next((drop.drop for drop in drops if drop.metric == "miou"), None)


def _median_interval(entry: Entry) -> tuple[float, float] | None:
    latency = entry.row.latency
    return None if latency is None else (latency.end_to_end.median_low_ms, latency.end_to_end.median_high_ms)


def _int8_share(entry: Entry) -> float | None:
    shares = entry.row.engine.mac_share
    return shares.get("int8", 0.0) if shares else None


def _call(field: str, title: str, which: str, noise: IntervalGetter = _no_interval) -> Metric:
    """A figure of the times of one call."""
    what = f"{which} of one call, decoded image(s) to mask(s)"
    return Metric(field, "ms", 2, title, what, _at(f"latency.end_to_end.{field}"), noise=noise)


def _score(name: str, title: str, what: str) -> Metric:
    """A figure of accuracy against masks."""
    return Metric(name, "", 4, title, what, _at(f"accuracy.truth.{name}"))


def _memory(name: str, title: str, what: str, field: str) -> Metric:
    return Metric(name, "MB", 0, title, what, _at(f"memory.{field}", 1e6))


def _setting(name: str, title: str, what: str) -> Metric:
    return Metric(name, "", 0, title, what, _at(f"setting.{name}"))


_OF_SCORES = "at the engine's size; engines that return masks have none"
_ALL = (
    replace(_call("median_ms", "Median", "median", _median_interval), interval=_median_interval),
    _call("mean_ms", "Mean", "mean", of_mean),
    _call("min_ms", "Min", "shortest"),
    _call("p90_ms", "p90", "90 % percentile", of_percentile(90)),
    _call("p95_ms", "p95", "95 % percentile", of_percentile(95)),
    _call("p99_ms", "p99", "99 % percentile", of_percentile(99)),
    _call("max_ms", "Max", "longest"),
    Metric("compute_ms", "ms", 2, "Compute", "median of the engine alone", _at("latency.stages.compute_ms")),
    Metric(
        "images_per_s",
        "images/s",
        1,
        "Throughput",
        "images over wall-clock time of all callers",
        _at("latency.images_per_s"),
        noise=of_rate,
    ),
    Metric(
        "speedup",
        "x",
        2,
        "Speed-up",
        "times as fast as the baseline, paired in the same run",
        lambda entry: at(entry, "comparison.ratio"),
        _bounds(lambda entry: entry.comparison),
        _bounds(lambda entry: entry.comparison),
    ),
    Metric(
        "cold_start_ms",
        "ms",
        0,
        "Cold start",
        "load to first mask in a fresh process",
        _at("cold_start.total_ms"),
        noise=of_processes,
    ),
    Metric("size_mb", "MB", 2, "Size", "engine file, millions of bytes", _at("engine.size_bytes", 1e6)),
    _memory("peak_rss_mb", "Peak RSS", "resident memory at most, millions of bytes", "peak_rss_bytes"),
    _memory("activation_mb", "Activations", "growth of the peak while running", "activation_bytes"),
    _memory("gpu_mb", "GPU memory", "device memory of the process", "gpu_bytes"),
    Metric("mean_w", "W", 2, "Power", "mean power while measured", _at("power.mean_w")),
    Metric("energy_per_image_j", "J", 3, "Energy", "energy of one image", _at("power.energy_per_image_j")),
    Metric(
        "miou",
        "",
        4,
        "mIoU",
        "mean intersection over union against masks, 0..1",
        _at("accuracy.truth.miou.value"),
        _bounds(lambda entry: at(entry.row, "accuracy.truth.miou")),
    ),
    _score("dice", "Dice", "mean Dice score against masks, 0..1"),
    _score("loss", "Loss", f"SMP's DiceLoss of the probabilities, {_OF_SCORES}"),
    _score("cross_entropy", "Cross-entropy", f"mean over labelled pixels, nats, {_OF_SCORES}"),
    Metric("dice_loss", "", 4, "Dice loss", "1 - Dice of the masks (not of soft probabilities)", _dice_loss),
    _score("pixel_accuracy", "Pixel acc.", "share of pixels that are right"),
    _score("boundary_iou", "Boundary IoU", "IoU near class boundaries"),
    _score("boundary_f", "Boundary F", "F-score of class boundaries"),
    Metric(
        "miou_drop",
        "",
        4,
        "mIoU drop",
        "mIoU lost against the baseline (0.01 = one point)",
        lambda entry: at(_drop(entry), "value"),
        _bounds(_drop),
    ),
    Metric(
        "agreement",
        "",
        4,
        "Agreement",
        "share of pixels that equal the baseline's",
        _at("accuracy.agreement.overall.value"),
        _bounds(lambda entry: at(entry.row, "accuracy.agreement.overall")),
    ),
    Metric(
        "boundary_agreement",
        "",
        4,
        "Bound. agr.",
        "agreement near class boundaries",
        _at("accuracy.agreement.boundary"),
    ),
    Metric("int8_share", "", 3, "in int8", "share of multiply-accumulates executed in int8", _int8_share),
    _setting("batch", "Batch", "images of one call"),
    _setting("threads", "Threads", "threads of the engine"),
    _setting("streams", "Streams", "callers at the same time"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
AGAINST_MASKS = frozenset(
    ["miou", "dice", "loss", "cross_entropy", "dice_loss", "pixel_accuracy", "boundary_iou", "boundary_f", "miou_drop"]
)
AGAINST_BASELINE = frozenset(("miou_drop", "agreement", "boundary_agreement", "speedup"))
WITH_INTERVAL = tuple(metric for metric in _ALL if metric.interval is not _no_interval)


def why_missing(name: str, entry: Entry) -> str | None:
    """Why a row lacks a figure and what brings it, in words; ``None`` where the row does not tell."""
    accuracy = entry.row.accuracy
    if name in AGAINST_MASKS or name in {"agreement", "boundary_agreement"}:
        if accuracy is None:
            return "no accuracy was judged: bench with --data"
        if name in AGAINST_MASKS and accuracy.truth is None:
            return f"{accuracy.data} has no masks"
        if name == "miou_drop" and accuracy.images < MIN_IMAGES:
            judged = counted(accuracy.images, "image was", "images were")
            return f"{judged} judged, a drop needs at least {MIN_IMAGES}: raise --limit, or give more"
    if name in AGAINST_BASELINE:
        return "there is no baseline of the same model in the run"
    return None


def listed() -> str:
    """All names with their units, for messages: ``median_ms (ms), ..., miou``."""
    return ", ".join(name + (f" ({metric.unit})" if metric.unit else "") for name, metric in METRICS.items())
