"""Rows of one or several bench reports, put below each other and grouped by device.

Milliseconds of two devices are never ranked against each other: whatever compares speeds works on one
:class:`DeviceGroup`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeseg.errors import InputError
from edgeseg.evaluate.latency import statistics
from edgeseg.evaluate.latency.batches import Estimate
from edgeseg.evaluate.results import BenchReport, Row, SpeedComparison, read_report
from edgeseg.machine.record import Environment


@dataclass(frozen=True)
class Run:
    """One bench report and where it came from.

    Attributes:
        report: as ``edgeseg bench`` wrote it.
        folder: paths of images in the report are relative to it; ``None`` for a report that was never a file.
        source: name of the file, for people.
    """

    report: BenchReport
    folder: Path | None = None
    source: str = ""

    @property
    def commands(self) -> tuple[str, ...]:
        """What to type to repeat the run: the builds of its engines, then the bench."""
        builds = (row.engine.build_command for row in self.report.rows)
        return (*dict.fromkeys(command for command in builds if command), self.report.command)


@dataclass(frozen=True)
class Entry:
    """One row of one run.

    Attributes:
        number: from 1, unique over all runs: how charts, tables and texts refer to the row.
        run: index of its run.
        row: what was measured.
        comparison: with the baseline of the same run and setting; ``None`` for a baseline and without one.
    """

    number: int
    run: int
    row: Row
    comparison: SpeedComparison | None = None

    @property
    def name(self) -> str:
        """Name of the engine and, where it is not the plain one, the setting: ``fpn-int8, batch 4``."""
        setting = self.row.setting
        parts = [self.row.engine.name]
        if setting.batch != 1:
            parts.append(f"batch {setting.batch}")
        if setting.threads is not None:
            parts.append(f"{setting.threads} threads" if setting.threads != 1 else "1 thread")
        if setting.streams != 1:
            parts.append(f"{setting.streams} streams")
        return ", ".join(parts)


@dataclass(frozen=True)
class DeviceGroup:
    """All rows of one device in one power mode; only within it are speeds compared."""

    label: str
    runs: tuple[int, ...]
    entries: tuple[Entry, ...]

    @cached_property
    def engines(self) -> tuple[Entry, ...]:
        """The entries that are no baselines."""
        return tuple(entry for entry in self.entries if not entry.row.engine.is_baseline)

    @cached_property
    def baselines(self) -> tuple[Entry, ...]:
        """The entries that are baselines."""
        return tuple(entry for entry in self.entries if entry.row.engine.is_baseline)


@dataclass(frozen=True)
class MergedReport:
    """Several runs as one."""

    runs: tuple[Run, ...]
    groups: tuple[DeviceGroup, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for group in self.groups for entry in group.entries)


def merge(runs: Sequence[Run]) -> MergedReport:
    """Group the rows of ``runs`` by device, devices and rows in the order given.

    Raises:
        InputError: no runs, or no run has a row.
    """
    if not any(run.report.rows for run in runs):
        raise InputError("nothing to report: no row in what was given; measure with: edgeseg bench ENGINE_DIR --json F")
    by_device: dict[str, list[tuple[int, Run]]] = {}
    for index, run in enumerate(runs):
        by_device.setdefault(device_label(run.report.environment), []).append((index, run))
    groups: list[DeviceGroup] = []
    number = 0
    for label, members in by_device.items():
        entries: list[Entry] = []
        for index, run in members:
            against = {comparison.row: comparison for comparison in run.report.comparisons}
            for row in run.report.rows:
                number += 1
                entries.append(Entry(number, index, row, against.get(row.id)))
        groups.append(DeviceGroup(label, tuple(index for index, _ in members), tuple(entries)))
    return MergedReport(tuple(runs), tuple(groups))


def failed_measurements(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    """What the runs could not measure: the engine (with its report's name where there are several) and why."""
    return tuple(
        (
            failure.engine + (f" ({run.source})" if len(runs) > 1 and run.source else ""),
            failure.reason if failure.what == "load" else f"{failure.what}: {failure.reason}",
        )
        for run in runs
        for failure in run.report.failed
    )


def read_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """Read bench reports. Raises ``ArtifactError`` for a file that is none, ``InputError`` for one given twice."""
    # Path.resolve() raises what is no OSError for a link to itself.
    places = [os.path.realpath(path) for path in paths]
    for number, path in enumerate(paths):
        if places[number] in places[:number]:
            raise InputError(f"{path} was given twice; give each report once")
    return tuple(Run(read_report(path), path.parent, path.name) for path in paths)


def device_label(environment: Environment) -> str:
    """``Jetson Orin Nano (15W)``: the device, and what makes the same device another machine."""
    extras = [environment.power_mode] if environment.power_mode else []
    if environment.core_limit is not None and environment.core_limit < environment.cores:
        extras.append(f"limited to {environment.core_limit:g} cores")
    return environment.device + (f" ({', '.join(extras)})" if extras else "")


def paired_ratio(slow: Entry, fast: Entry) -> Estimate | None:
    """How many times faster ``fast`` is than ``slow``; ``None`` unless their samples were taken in turns."""
    return None if slow.run != fast.run else statistics.paired_ratio(slow.row.latency, fast.row.latency)


def speed_ratio(slow: Entry, fast: Entry) -> Estimate | None:
    """How many times faster ``fast`` is than ``slow``; ``None`` where one has no latency.

    Of samples taken in turns the paired ratio, else what follows from the intervals of both medians.
    """
    if (paired := paired_ratio(slow, fast)) is not None:
        return paired
    a, b = (None if entry.row.latency is None else entry.row.latency.end_to_end for entry in (slow, fast))
    if a is None or b is None:
        return None
    return Estimate(a.median_ms, a.median_low_ms, a.median_high_ms).over(
        Estimate(b.median_ms, b.median_low_ms, b.median_high_ms)
    )
