"""What a person sees at the end of a bench: one line per engine and setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeseg.backends import GPU_TARGETS
from edgeseg.console import printable
from edgeseg.evaluate.results import BenchReport, Drop, Identity, Profile, Row, SpeedComparison
from edgeseg.evaluate.summary import share
from edgeseg.evaluate.tables import MISSING, FigureTable, counted, milliseconds, number

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def bench_summary(report: BenchReport) -> Group:
    """Speed, memory, accuracy, profiles and notes of a report, for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(report.environment.device, style="bold")]
    if any(row.latency is not None for row in report.rows):
        parts.append(_speed_table(report))
    parts.append(_engine_table(report.rows))
    judged = [row.accuracy for row in report.rows if row.accuracy is not None]
    if any(accuracy.truth is not None or accuracy.agreement is not None for accuracy in judged):
        parts.append(_accuracy_table(report.rows))
    if judged:
        parts += [Text(line) for line in _drop_lines(report.rows)]
    for row in _one_per_engine(report.rows):
        if row.profile is not None:
            parts.append(_profile_table(row.engine.name, row.profile))
    parts += [Text(line, style="yellow") for line in _noise_lines(report.rows)]
    parts += [Text(f"failed: {f.engine} ({f.what}): {f.reason}", style="bold red") for f in report.failed]
    return Group(*parts)


def _speed_table(report: BenchReport) -> FigureTable:
    metered = any(row.power is not None for row in report.rows)
    energy = ("J/image",) if metered else ()
    table = FigureTable.of("end to end, ms", "median", "p90", "p99", "images/s", *energy, "vs baseline")
    against = {c.row: c for c in report.comparisons}
    engines = {row.id: row.engine for row in report.rows}
    for row in report.rows:
        if row.latency is None:
            continue
        d = row.latency.end_to_end
        noisy = " *" if row.latency.flags else ""
        joules = MISSING if row.power is None else f"{row.power.energy_per_image_j:.3f}"
        table.add(
            row.id + noisy,
            *map(milliseconds, (d.median_ms, d.p90_ms, d.p99_ms)),
            f"{row.latency.images_per_s:.1f}",
            *((joules,) if metered else ()),
            ratio_words(against.get(row.id)) + _on_the_cpu(row, against.get(row.id), engines),
        )
    return table


def _on_the_cpu(row: Row, comparison: SpeedComparison | None, engines: Mapping[str, Identity]) -> str:
    """The baseline's name, where it does not run on the engine's device: such a ratio is never shown without."""
    baseline = None if comparison is None else engines.get(comparison.baseline)
    if baseline is None or row.engine.backend not in GPU_TARGETS or baseline.options.get("device", "cpu") != "cpu":
        return ""
    return f" of {baseline.name}"


def ratio_words(comparison: SpeedComparison | None) -> str:
    """``6.50x (6.31-6.62)``, above 1 is faster; ``no difference``; ``cannot tell``; ``-`` without a comparison."""
    if comparison is None:
        return MISSING
    if comparison.verdict in {"no difference", "cannot tell"}:
        return comparison.verdict
    return f"{comparison.ratio:.2f}x ({comparison.low:.2f}-{comparison.high:.2f})"


def _noise_lines(rows: Sequence[Row]) -> list[str]:
    """One line per kind of noise, with the first row that shows it."""
    seen: dict[str, list[str]] = {}
    for row in rows:
        for flag in row.latency.flags if row.latency is not None else ():
            seen.setdefault(flag.kind, []).append(f"{row.id}: {flag.detail}")
    if not seen:
        return []
    lines = ["* noisy, read with care:"]
    for first, *others in seen.values():
        lines.append(f"  {first}" + (f" (and {counted(len(others), 'more row')})" if others else ""))
    return lines


def _engine_table(rows: Sequence[Row]) -> FigureTable:
    table = FigureTable(
        (
            ("engine", "name"),
            ("backend", "words"),
            ("executed", "words"),
            *((heading, "figure") for heading in ("MB", "load ms", "RSS MB", "activ. MB")),
        )
    )
    for row in _one_per_engine(rows):
        engine, memory = row.engine, row.memory
        executed = ", ".join(f"{value:.0%}\u00a0{dtype}" for dtype, value in sorted(engine.mac_share.items()))
        table.add(
            engine.name,
            engine.backend,
            executed or engine.precision,
            f"{engine.size_bytes / 1e6:.1f}",
            MISSING if row.cold_start is None else f"{row.cold_start.total_ms:.0f}",
            _megabytes(None if memory is None else memory.peak_rss_bytes),
            _megabytes(None if memory is None else memory.activation_bytes),
        )
    return table


def _accuracy_table(rows: Sequence[Row]) -> FigureTable:
    table = FigureTable.of("accuracy", "mIoU", "95 %", "Dice", "pixels", "bound. F", "agrees", "edges")
    for row in _one_per_engine(rows):
        accuracy = row.accuracy
        if accuracy is None:
            continue
        truth, agreement = accuracy.truth, accuracy.agreement
        miou = None if truth is None else truth.miou
        table.add(
            row.engine.name,
            share(None if miou is None else miou.value),
            MISSING if miou is None else f"{miou.low:.3f}-{miou.high:.3f}",
            share(None if truth is None else truth.dice),
            share(None if truth is None else truth.pixel_accuracy),
            share(None if truth is None else truth.boundary_f),
            share(None if agreement is None else agreement.overall.value),
            share(None if agreement is None else agreement.boundary),
        )
    return table


def _drop_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in _one_per_engine(rows):
        if row.accuracy is not None and row.accuracy.truth is not None:
            lines += [
                f"{row.engine.name}: {drop_words(drop)}" for drop in row.accuracy.truth.drops if drop.metric == "miou"
            ]
    first = next((row.accuracy for row in rows if row.accuracy is not None), None)
    if first is not None:
        lines.append(f"judged on {counted(first.images, 'image')} of {first.data}, at {first.resolution} resolution")
    return lines


def drop_words(drop: Drop) -> str:
    """One line about a drop, and what it comes to."""
    d = drop.drop
    change, low, high = (number(-value, 4, signed=True) for value in (d.value, d.high, d.low))
    words = f"{drop.metric} {change} against {drop.baseline} (95 %: {low} to {high})"
    more = ", judge more images" if drop.verdict == "cannot tell" else ""
    return f"{words}: {drop.verdict}{more}"


def _profile_table(name: str, profile: Profile) -> FigureTable:
    table = FigureTable.of(f"{printable(name)}, by module", "nodes", "ms", "share", "dtypes")
    for module in profile.modules:
        dtypes = ", ".join(f"{value:.0%} {dtype}" for dtype, value in module.dtypes.items())
        table.add(module.module, str(module.nodes), f"{module.time_ms:.3f}", f"{module.share:.1%}", dtypes or MISSING)
    return table


def _one_per_engine(rows: Sequence[Row]) -> list[Row]:
    return list({row.engine.name: row for row in reversed(rows)}.values())[::-1]


def _megabytes(size_bytes: int | None) -> str:
    return MISSING if size_bytes is None else f"{size_bytes / 1e6:.0f}"
