"""What every form of the report shows of a row: the same columns, the same texts, ``-`` for what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeseg.decide.entries import Entry
from edgeseg.decide.metrics import METRICS, Metric
from edgeseg.decide.verdict import DeviceVerdict, Judged
from edgeseg.evaluate.tables import MISSING

ALWAYS = ("median_ms", "p99_ms", "miou", "size_mb")
"""Shown even where no row has them, so that their absence is seen; the others only where one was measured."""
ORDER = (
    "median_ms",
    "p99_ms",
    "speedup",
    "miou",
    "miou_drop",
    "agreement",
    "size_mb",
    "dice",
    "loss",
    "cross_entropy",
    "pixel_accuracy",
    "boundary_iou",
    "images_per_s",
    "int8_share",
    "cold_start_ms",
    "peak_rss_mb",
    "gpu_mb",
    "mean_w",
    "energy_per_image_j",
)
TEXT_COLUMNS = ("engine", "backend", "precision", "input")


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        judged: the row and its verdict.
        texts: engine, backend, precision, input size.
        figures: one text per metric of the table, intervals included.
        verdict: ``deploy``, ``fits``, ``fails``, ``cannot tell``, ``not measured``, ``baseline`` or ``-``.
        is_deployed: it is the engine to deploy.
    """

    judged: Judged
    texts: tuple[str, ...]
    figures: tuple[str, ...]
    verdict: str
    is_deployed: bool


def metrics_of(entries: Sequence[Entry]) -> tuple[Metric, ...]:
    """The metrics worth a column: the core ones, and every other that some row has."""
    metrics = (METRICS[name] for name in ORDER)
    return tuple(m for m in metrics if m.name in ALWAYS or any(m.value(entry) is not None for entry in entries))


def heading(metric: Metric) -> str:
    """``p99 (ms)``."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def lines(verdict: DeviceVerdict, metrics: Sequence[Metric], *, with_intervals: bool = True) -> tuple[Line, ...]:
    """One line per row of a device, in the order measured."""
    return tuple(
        Line(
            judged,
            texts_of(judged.entry),
            tuple(figure(metric, judged.entry, with_interval=with_intervals) for metric in metrics),
            verdict_word(judged, verdict),
            judged.entry is verdict.deploy,
        )
        for judged in verdict.judged
    )


def texts_of(entry: Entry) -> tuple[str, str, str, str]:
    """Engine (with its setting), backend, precision, input size."""
    engine = entry.row.engine
    return entry.name, engine.backend, engine.precision_words, f"{engine.height}x{engine.width}"


def figure(metric: Metric, entry: Entry, *, with_interval: bool = True) -> str:
    """``12.97 [12.89, 13.04]``: the figure and its 95 % interval where one was measured; no unit."""
    value = metric.value(entry)
    if value is None:
        return MISSING
    interval = metric.interval(entry) if with_interval else None
    text = metric.text(value)
    if interval is None:
        return text
    return f"{text} [{metric.text(interval[0])}, {metric.text(interval[1])}]"


def verdict_word(judged: Judged, verdict: DeviceVerdict) -> str:
    """One word or two on how a row fares."""
    if judged.entry.row.engine.is_baseline:
        return "baseline"
    if judged.entry is verdict.deploy:
        return "deploy"
    if judged.status is None:
        return MISSING
    return {"pass": "fits", "fail": "fails"}.get(judged.status, judged.status)


def headline(verdict: DeviceVerdict) -> str:
    """The decision in one line, without its reason."""
    if verdict.answer == "deploy" and verdict.deploy is not None:
        return f"Deploy {verdict.deploy.name}"
    return {"none fits": "No engine fits", "cannot tell": "Cannot tell which to deploy"}.get(
        verdict.answer, "Not decided: not measured"
    )


def requirement_line(verdict: DeviceVerdict) -> str:
    """What rows were judged by, and whose requirement it is."""
    if verdict.requirement is None:
        return "no requirement, and no accuracy to judge by"
    whose = "edgeseg's default, none was given" if verdict.is_default else "as required"
    return f"{verdict.requirement.text} ({whose})"


def failures(verdict: DeviceVerdict) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Every engine that does not pass: its name, and each comparison it misses and by how much."""
    return tuple(
        (judged.entry.name, tuple(check.text for check in judged.outcome.missed))
        for judged in verdict.judged
        if judged.outcome is not None and judged.status != "pass" and not judged.entry.row.engine.is_baseline
    )


def close_calls(verdict: DeviceVerdict) -> tuple[str, ...]:
    """Passing engines with a figure whose interval over images holds its limit: other images could say the opposite."""
    return tuple(
        f"{judged.entry.name}: {check.text}"
        for judged in verdict.judged
        if judged.outcome is not None and judged.status == "pass" and not judged.entry.row.engine.is_baseline
        for check in judged.outcome.checks
        if check.is_close
    )
