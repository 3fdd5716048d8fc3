"""Bench reports made by hand for tests of decisions and reports: every figure is given by the test."""

from __future__ import annotations

from dataclasses import replace

from edgeseg.decide.entries import MergedReport, Run, merge
from edgeseg.evaluate.results import (
    SCHEMA_VERSION,
    Accuracy,
    Agreement,
    BenchReport,
    Distribution,
    Drop,
    Identity,
    Interval,
    Latency,
    Row,
    Setting,
    SpeedComparison,
    StageSplit,
    Truth,
)
from edgeseg.machine.record import Environment


def row_of(report: BenchReport, row_id: str) -> Row:
    return next(row for row in report.rows if row.id == row_id)


def row(
    name: str,
    median_ms: float | None = 10.0,
    *,
    miou: float | None = None,
    drop: float | None = None,
    agreement: float | None = None,
    precision: str = "fp32",
    batch: int = 1,
    samples_ms: tuple[float, ...] = (),
    is_baseline: bool = False,
    size_bytes: int = 1_000_000,
    class_names: tuple[str, ...] = ("road", "sky"),
    data: str = "d",
) -> Row:
    """A row; ``None`` is not measured. Intervals are the figure plus and minus 0.01 (milliseconds: 0.1)."""
    latency = None
    if median_ms is not None:
        m = median_ms
        spread = Distribution(len(samples_ms) or 9, m, m, m, m + 1, m + 2, m + 3, m + 4, m - 0.1, m + 0.1, 0.5)
        stages = StageSplit(pre_ms=0.5, compute_ms=m - 1, post_ms=0.5)
        latency = Latency(spread, stages, 1000 * batch / m, 5, samples_ms=samples_ms, round_group="together")
    accuracy = None
    if miou is not None or agreement is not None:
        drops = () if drop is None else (Drop("pytorch", "miou", Interval(drop, drop - 0.01, drop + 0.01), "loss"),)
        truth = agreed = None
        if miou is not None:
            confusion = ((90, 10), (20, 80))
            scores = (miou, miou)
            truth = Truth(
                Interval(miou, miou - 0.01, miou + 0.01),
                0.8, 0.9, 0.5, 0.6, scores, scores, scores, scores, confusion, drops,
            )  # fmt: skip
        if agreement is not None:
            interval = Interval(agreement, agreement - 0.01, agreement + 0.01)
            agreed = Agreement("pytorch", interval, 0.9, 0.99, (agreement, agreement), 2)
        accuracy = Accuracy(data, data, 4, "source", truth=truth, agreement=agreed)
    return Row(
        id=f"{name} b{batch} t- s1",
        engine=Identity(
            name, "pytorch" if is_baseline else "onnxruntime", "fpn", "resnet18", "multiclass", 2, 64, 64, precision,
            size_bytes, class_names=class_names, is_baseline=is_baseline, folder=f"engines/{name}",
        ),
        setting=Setting(batch=batch),
        latency=latency,
        accuracy=accuracy,
    )  # fmt: skip


def report(*rows: Row, device: str = "board", comparisons: tuple[SpeedComparison, ...] = ()) -> BenchReport:
    environment = Environment(device, "Linux", "3.11", "some CPU", 2)
    return BenchReport(
        SCHEMA_VERSION, "0", "2026-01-01T00:00:00+00:00", "edgeseg bench ...", environment, rows, comparisons
    )


def merged(*rows: Row, device: str = "board") -> MergedReport:
    return merge([Run(report(*rows, device=device))])


def on(bench: BenchReport, **changes: object) -> BenchReport:
    """The report with other facts of its environment."""
    return replace(bench, environment=replace(bench.environment, **changes))  # type: ignore[arg-type]
