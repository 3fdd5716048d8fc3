"""The figures a requirement may name and a table may show: one name, one unit, one place it is read from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgeseg.decide.entries import Entry
from edgeseg.decide.noise import of_mean, of_percentile, of_processes, of_rate
from edgeseg.evaluate.intervals import MIN_IMAGES
from edgeseg.evaluate.results import Row
from edgeseg.evaluate.tables import MISSING, number

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
        better: which direction is better; ``None`` for settings.
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
    better: Literal["lower", "higher"] | None
    digits: int
    title: str
    help: str
    get: Getter
    interval: IntervalGetter = _no_interval
    noise: IntervalGetter = _no_interval

    def value(self, entry: Entry) -> float | None:
        """The figure, or ``None`` when it was not measured (a NaN counts as such)."""
        found = self.get(entry)
        return None if found is None or math.isnan(found) else float(found)

    def text(self, value: float | None) -> str:
        """The figure without its unit; ``-`` when it was not measured."""
        return MISSING if value is None else number(value, self.digits)

    def with_unit(self, value: float | None) -> str:
        """The figure with its unit; ``-`` when it was not measured."""
        if value is None or not self.unit:
            return self.text(value)
        return f"{self.text(value)}{'' if self.unit == 'x' else ' '}{self.unit}"


def _latency(field: str) -> Getter:
    def get(entry: Entry) -> float | None:
        latency = entry.row.latency
        return None if latency is None else getattr(latency.end_to_end, field)

    return get


def _stage(field: str) -> Getter:
    def get(entry: Entry) -> float | None:
        latency = entry.row.latency
        return None if latency is None else getattr(latency.stages, field)

    return get


def _truth(field: str) -> Getter:
    def get(entry: Entry) -> float | None:
        accuracy = entry.row.accuracy
        return None if accuracy is None or accuracy.truth is None else getattr(accuracy.truth, field)

    return get


def _optional(part: str, field: str, scale: float = 1.0) -> Getter:
    def get(entry: Entry) -> float | None:
        owner = getattr(entry.row, part)
        value = None if owner is None else getattr(owner, field)
        return None if value is None else value * scale

    return get


def _miou(entry: Entry) -> float | None:
    interval = _miou_estimate(entry.row)
    return None if interval is None else interval[0]


def _miou_estimate(row: Row) -> tuple[float, float, float] | None:
    if row.accuracy is None or row.accuracy.truth is None or row.accuracy.truth.miou is None:
        return None
    miou = row.accuracy.truth.miou
    return miou.value, miou.low, miou.high


def _miou_interval(entry: Entry) -> tuple[float, float] | None:
    found = _miou_estimate(entry.row)
    return None if found is None else found[1:]


def _dice_loss(entry: Entry) -> float | None:
    dice = _truth("dice")(entry)
    return None if dice is None else 1.0 - dice


def _drop(entry: Entry) -> tuple[float, float, float] | None:
    accuracy = entry.row.accuracy
    if accuracy is None or accuracy.truth is None:
        return None
    for drop in accuracy.truth.drops:
        if drop.metric == "miou":
            return drop.drop.value, drop.drop.low, drop.drop.high
    return None


def _drop_value(entry: Entry) -> float | None:
    found = _drop(entry)
    return None if found is None else found[0]


def _drop_interval(entry: Entry) -> tuple[float, float] | None:
    found = _drop(entry)
    return None if found is None else found[1:]


def _agreement(entry: Entry) -> float | None:
    accuracy = entry.row.accuracy
    return None if accuracy is None or accuracy.agreement is None else accuracy.agreement.overall.value


def _agreement_interval(entry: Entry) -> tuple[float, float] | None:
    accuracy = entry.row.accuracy
    if accuracy is None or accuracy.agreement is None:
        return None
    return accuracy.agreement.overall.low, accuracy.agreement.overall.high


def _boundary_agreement(entry: Entry) -> float | None:
    accuracy = entry.row.accuracy
    return None if accuracy is None or accuracy.agreement is None else accuracy.agreement.boundary


def _median_interval(entry: Entry) -> tuple[float, float] | None:
    latency = entry.row.latency
    return None if latency is None else (latency.end_to_end.median_low_ms, latency.end_to_end.median_high_ms)


def _speedup(entry: Entry) -> float | None:
    return None if entry.comparison is None else entry.comparison.ratio


def _speedup_interval(entry: Entry) -> tuple[float, float] | None:
    return None if entry.comparison is None else (entry.comparison.low, entry.comparison.high)


_CALL = "of one call, decoded image(s) to mask(s)"

_ALL = (
    Metric(
        "median_ms",
        "ms",
        "lower",
        2,
        "Median",
        f"median {_CALL}",
        _latency("median_ms"),
        _median_interval,
        _median_interval,
    ),
    Metric(
        "mean_ms",
        "ms",
        "lower",
        2,
        "Mean",
        f"mean {_CALL}",
        _latency("mean_ms"),
        noise=of_mean,
    ),
    Metric("min_ms", "ms", "lower", 2, "Min", f"shortest {_CALL}", _latency("min_ms")),
    Metric(
        "p90_ms",
        "ms",
        "lower",
        2,
        "p90",
        f"90 % percentile {_CALL}",
        _latency("p90_ms"),
        noise=of_percentile(90),
    ),
    Metric(
        "p95_ms",
        "ms",
        "lower",
        2,
        "p95",
        f"95 % percentile {_CALL}",
        _latency("p95_ms"),
        noise=of_percentile(95),
    ),
    Metric(
        "p99_ms",
        "ms",
        "lower",
        2,
        "p99",
        f"99 % percentile {_CALL}",
        _latency("p99_ms"),
        noise=of_percentile(99),
    ),
    Metric("max_ms", "ms", "lower", 2, "Max", f"longest {_CALL}", _latency("max_ms")),
    Metric("compute_ms", "ms", "lower", 2, "Compute", "median of the engine alone", _stage("compute_ms")),
    Metric(
        "images_per_s",
        "images/s",
        "higher",
        1,
        "Throughput",
        "images over wall-clock time of all callers",
        _optional("latency", "images_per_s"),
        noise=of_rate,
    ),
    Metric(
        "speedup",
        "x",
        "higher",
        2,
        "Speed-up",
        "times as fast as the baseline, paired in the same run",
        _speedup,
        _speedup_interval,
        _speedup_interval,
    ),
    Metric(
        "cold_start_ms",
        "ms",
        "lower",
        0,
        "Cold start",
        "load to first mask in a fresh process",
        _optional("cold_start", "total_ms"),
        noise=of_processes,
    ),
    Metric(
        "size_mb",
        "MB",
        "lower",
        2,
        "Size",
        "engine file, millions of bytes",
        lambda entry: entry.row.engine.size_bytes / 1e6,
    ),
    Metric(
        "peak_rss_mb",
        "MB",
        "lower",
        0,
        "Peak RSS",
        "resident memory at most, millions of bytes",
        _optional("memory", "peak_rss_bytes", 1e-6),
    ),
    Metric(
        "activation_mb",
        "MB",
        "lower",
        0,
        "Activations",
        "growth of the peak while running",
        _optional("memory", "activation_bytes", 1e-6),
    ),
    Metric(
        "gpu_mb",
        "MB",
        "lower",
        0,
        "GPU memory",
        "device memory of the process",
        _optional("memory", "gpu_bytes", 1e-6),
    ),
    Metric("mean_w", "W", "lower", 2, "Power", "mean power while measured", _optional("power", "mean_w")),
    Metric(
        "energy_per_image_j",
        "J",
        "lower",
        3,
        "Energy",
        "energy of one image",
        _optional("power", "energy_per_image_j"),
    ),
    Metric("miou", "", "higher", 4, "mIoU", "mean intersection over union against masks, 0..1", _miou, _miou_interval),
    Metric("dice", "", "higher", 4, "Dice", "mean Dice score against masks, 0..1", _truth("dice")),
    Metric(
        "loss",
        "",
        "lower",
        4,
        "Loss",
        "SMP's DiceLoss of the probabilities, at the engine's size; engines that return masks have none",
        _truth("loss"),
    ),
    Metric(
        "cross_entropy",
        "",
        "lower",
        4,
        "Cross-entropy",
        "mean over labelled pixels, nats, at the engine's size; engines that return masks have none",
        _truth("cross_entropy"),
    ),
    Metric("dice_loss", "", "lower", 4, "Dice loss", "1 - Dice of the masks (not of soft probabilities)", _dice_loss),
    Metric("pixel_accuracy", "", "higher", 4, "Pixel acc.", "share of pixels that are right", _truth("pixel_accuracy")),
    Metric("boundary_iou", "", "higher", 4, "Boundary IoU", "IoU near class boundaries", _truth("boundary_iou")),
    Metric("boundary_f", "", "higher", 4, "Boundary F", "F-score of class boundaries", _truth("boundary_f")),
    Metric(
        "miou_drop",
        "",
        "lower",
        4,
        "mIoU drop",
        "mIoU lost against the baseline (0.01 = one point)",
        _drop_value,
        _drop_interval,
    ),
    Metric(
        "agreement",
        "",
        "higher",
        4,
        "Agreement",
        "share of pixels that equal the baseline's",
        _agreement,
        _agreement_interval,
    ),
    Metric(
        "boundary_agreement",
        "",
        "higher",
        4,
        "Bound. agr.",
        "agreement near class boundaries",
        _boundary_agreement,
    ),
    Metric(
        "int8_share",
        "",
        None,
        3,
        "in int8",
        "share of multiply-accumulates executed in int8",
        lambda entry: entry.row.engine.mac_share.get("int8", 0.0) if entry.row.engine.mac_share else None,
    ),
    Metric("batch", "", None, 0, "Batch", "images of one call", lambda entry: entry.row.setting.batch),
    Metric("threads", "", None, 0, "Threads", "threads of one inference", lambda entry: entry.row.setting.threads),
    Metric("streams", "", None, 0, "Streams", "callers at the same time", lambda entry: entry.row.setting.streams),
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
            return (
                f"{accuracy.images} images were judged, a drop needs at least {MIN_IMAGES}: raise --limit, or give more"
            )
    if name in AGAINST_BASELINE:
        return "there is no baseline of the same model in the run"
    return None


def listed() -> str:
    """All names with their units, for messages: ``median_ms (ms), ..., miou``."""
    return ", ".join(name + (f" ({metric.unit})" if metric.unit else "") for name, metric in METRICS.items())
