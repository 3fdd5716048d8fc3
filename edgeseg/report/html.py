"""The report as one HTML file: no script, no network, pictures inside.

The template gets plain mappings and escapes every string; charts come from :mod:`edgeseg.report.charts`,
which escapes what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from edgeseg.decide.entries import Entry, MergedReport, Run
from edgeseg.decide.metrics import METRICS
from edgeseg.decide.verdict import DeviceVerdict, data_key
from edgeseg.errors import imported
from edgeseg.evaluate.tables import counted
from edgeseg.machine.record import Environment, MachineState
from edgeseg.report import cells
from edgeseg.report.charts import Point, Samples, distribution, legend_mark, scatter
from edgeseg.report.details import STAGES, Shown, engine_details, stage_lines, style_of
from edgeseg.version import __version__

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup


PRINTED = ("median_ms", "p99_ms", "speedup", "miou", "miou_drop", "size_mb")
"""Columns of the table that fit on a sheet of paper."""


def html(
    report: MergedReport,
    verdicts: Sequence[DeviceVerdict],
    *,
    title: str = "edgeseg report",
    failed: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole page. ``failed``: engines that gave no row, and why.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    return (
        _templates()
        .get_template("report.html.j2")
        .render(
            title=title,
            failed=failed,
            version=__version__,
            pages=[_page(report, verdict, f"d{k}") for k, verdict in enumerate(verdicts)],
            runs=[(run, environment_lines(run)) for run in report.runs],
            separate_devices=len(verdicts) > 1,
            metrics=list(METRICS.values()),
            heading=cells.heading,
            legend_mark=legend_mark,
            printed=PRINTED,
            counted=counted,
            stage_names=STAGES,
        )
    )


def require_templates() -> None:
    """Raise ``MissingDependencyError`` now, before minutes of measuring, if :func:`html` would."""
    _templates()


@cache
def _templates() -> jinja2.Environment:
    jinja2 = imported("jinja2", "report", "write an HTML report")
    return jinja2.Environment(  # type: ignore[no-any-return]
        loader=jinja2.PackageLoader("edgeseg.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page(report: MergedReport, verdict: DeviceVerdict, key: str) -> Shown:
    """What the template shows of one device; ``key`` is unique within the page, for ids."""
    group, metrics = verdict.group, cells.metrics_of(verdict.group.entries)
    return {
        "key": key,
        "verdict": verdict,
        "headline": cells.headline(verdict),
        "requirement": cells.requirement_line(verdict),
        "facts": _facts(verdict),
        "metrics": metrics,
        "lines": cells.lines(verdict, metrics),
        "failures": cells.failures(verdict),
        "close_calls": cells.close_calls(verdict),
        "charts": _charts(verdict, key),
        # Images a second against latency; none where no engine was driven in several ways.
        "throughput": _throughput(verdict, key),
        # Engines no other beats.
        "front": tuple(judged.entry.name for judged in verdict.judged if judged.is_on_front),
        "styles": tuple(dict.fromkeys(style_of(entry) for entry in group.entries)),
        "stages": stage_lines(group),
        "details": engine_details(report, group, verdict.deploy),
        # Rows whose run was flagged, and why.
        "noise": tuple(
            (entry.name, tuple(f"{flag.kind}: {flag.detail}" for flag in entry.row.latency.flags))
            for entry in group.entries
            if entry.row.latency is not None and entry.row.latency.flags
        ),
    }


def _facts(verdict: DeviceVerdict) -> tuple[tuple[str, str], ...]:
    """The figures of the engine to deploy that a reader looks for first."""
    if verdict.deploy is None:
        return ()
    shown = ("median_ms", "p99_ms", "speedup", "miou", "miou_drop", "agreement", "size_mb", "energy_per_image_j")
    values = [(METRICS[name], METRICS[name].value(verdict.deploy)) for name in shown]
    return tuple((metric.title, metric.with_unit(value)) for metric, value in values if value is not None)


def _charts(verdict: DeviceVerdict, key: str) -> list[Shown]:
    """Charts per way of driving the engines: a call of four images on the axis of one image would mislead.

    ``setting`` is ``""`` when there is only the plain one; accuracy against latency is one chart per data set, with the data in
    words.
    """
    by_setting: dict[tuple[int, int], list[Entry]] = {}
    for entry in verdict.group.entries:
        if entry.row.latency is not None:
            by_setting.setdefault((entry.row.setting.batch, entry.row.setting.streams), []).append(entry)
    charts = []
    for k, ((batch, streams), entries) in enumerate(by_setting.items()):
        parts = [f"batch {batch}"] if len(by_setting) > 1 or batch != 1 else []
        parts += [f"{streams} streams"] if streams != 1 else []
        setting = ", ".join(parts)
        where = verdict.group.label + (f", {setting}" if setting else "")
        charts.append(
            {
                "setting": setting,
                "paretos": _paretos(verdict, entries, where, f"{key}-s{k}"),
                "distribution": _distribution(entries, where, f"{key}-s{k}"),
            }
        )
    return charts


def _paretos(verdict: DeviceVerdict, entries: Sequence[Entry], where: str, key: str) -> tuple[tuple[str, Markup], ...]:
    metric = verdict.accuracy_metric
    if metric is None:
        return ()
    by_data: dict[str | None, list[Point]] = {}
    front: list[Point] = []
    words: dict[str | None, str] = {}
    for entry in entries:
        ms, score, accuracy = METRICS["median_ms"].value(entry), metric.value(entry), entry.row.accuracy
        if ms is None or score is None or accuracy is None:
            continue
        words[data_key(entry)] = f"{counted(accuracy.images, 'image')} of {accuracy.data}"
        point = Point(
            entry.number,
            f"{entry.name} ({entry.row.engine.backend}), {ms:.2f} ms, {metric.title} {score:.4f}",
            style_of(entry),
            ms,
            score,
            METRICS["median_ms"].interval(entry),
            metric.interval(entry),
        )
        by_data.setdefault(data_key(entry), []).append(point)
        if verdict.of(entry).is_on_front:
            front.append(point)
    front.sort(key=lambda point: point.x)
    return tuple(
        (
            words[data],
            scatter(
                points,
                [[point for point in front if point in points]],
                x_title="median milliseconds per call",
                y_title=metric.title,
                title=f"{metric.title} against latency on {where}",
                key=f"{key}-pareto{k}",
            ),
        )
        for k, (data, points) in enumerate(by_data.items())
    )


def _throughput(verdict: DeviceVerdict, key: str) -> Markup | None:
    """A line through the batch sizes and numbers of callers that an engine was driven with."""
    lines: dict[str, list[Point]] = {}
    for entry in verdict.group.entries:
        p99_ms, rate = METRICS["p99_ms"].value(entry), METRICS["images_per_s"].value(entry)
        if p99_ms is not None and rate is not None:
            label = f"{entry.name} ({entry.row.engine.backend}), p99 {p99_ms:.2f} ms, {rate:.1f} images/s"
            point = Point(entry.number, label, style_of(entry), p99_ms, rate)
            lines.setdefault(entry.row.engine.name, []).append(point)
    if all(len(line) < 2 for line in lines.values()):
        return None
    return scatter(
        [point for line in lines.values() for point in line],
        [sorted(line, key=lambda point: point.x) for line in lines.values()],
        x_title="p99 milliseconds per call",
        y_title="images per second",
        title=f"Throughput against latency on {verdict.group.label}",
        key=f"{key}-throughput",
        from_zero=True,
    )


def _distribution(entries: Sequence[Entry], where: str, key: str) -> Markup | None:
    lines = [
        Samples(
            entry.number,
            entry.name,
            f"{entry.name}: median {latency.end_to_end.median_ms:.2f} ms, p99 {latency.end_to_end.p99_ms:.2f} ms",
            style_of(entry),
            latency.samples_ms,
            latency.end_to_end.median_ms,
            latency.end_to_end.p99_ms,
        )
        for entry in entries
        if (latency := entry.row.latency) is not None and latency.samples_ms
    ]
    if not lines:
        return None
    return distribution(lines, title=f"Distribution of latency on {where}", key=f"{key}-latency")


def environment_lines(run: Run) -> tuple[tuple[str, str], ...]:
    """The machine of a run, one fact a line; what is not known is left out."""
    env: Environment = run.report.environment
    protocol = [f"{name} {value}" for name, value in run.report.protocol.items() if value is not None]
    gpus = [", ".join(filter(None, (gpu.name, gpu.driver and f"driver {gpu.driver}"))) for gpu in env.gpus]
    facts = [
        ("Device", env.device),
        ("JetPack", env.jetpack),
        ("Power mode", env.power_mode),
        ("CPU", f"{env.cpu}, {env.cores} cores" + (f", limited to {env.core_limit:g}" if env.core_limit else "")),
        ("CPU flags", ", ".join(env.cpu_flags)),
        ("GPU", "; ".join(gpus)),
        ("Memory", f"{env.memory_bytes / 1e9:.1f} GB" if env.memory_bytes else None),
        ("Clock governor", env.governor),
        ("System", f"{env.system}, Python {env.python}"),
        ("Thread variables", ", ".join(f"{name}={value}" for name, value in env.thread_variables.items())),
        ("Before", _state(env.before)),
        ("After", _state(env.after)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in env.versions.items())),
        ("Protocol", ", ".join(protocol)),
        ("Measured", f"{run.report.created_at} with edgeseg {run.report.edgeseg_version}"),
    ]
    return tuple((name, value) for name, value in facts if value)


def _state(state: MachineState) -> str:
    parts = []
    if state.cpu_mhz is not None:
        parts.append(f"CPU {state.cpu_mhz[0]:.0f} to {state.cpu_mhz[2]:.0f} MHz")
    parts += [f"{name} {mhz:.0f} MHz" for name, mhz in state.gpu_mhz.items()]
    if state.throttled:
        parts.append(f"throttled ({', '.join(state.throttled)})")
    if state.load is not None:
        parts.append(f"load {state.load[0]:.1f}")
    parts += [f"{sensor} {celsius:.0f} °C" for sensor, celsius in state.temperatures_c.items()]
    return ", ".join(parts)
