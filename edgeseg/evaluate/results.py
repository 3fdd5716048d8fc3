"""What ``edgeseg bench`` measured, as it is written to JSON: schema version 1.

``docs/bench-report.md`` describes the file for readers of other languages; this module and
:mod:`edgeseg.evaluate.rows`, whose names it repeats, are what decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from edgeseg.artifacts import read_json, write_json
from edgeseg.errors import ArtifactError
from edgeseg.evaluate.rows import (
    Accuracy,
    AccuracyVerdict,
    Agreement,
    ColdStart,
    Count,
    Distribution,
    Drop,
    Finite,
    Identity,
    Interval,
    Latency,
    Memory,
    ModuleTime,
    NoiseFlag,
    NoiseKind,
    Power,
    Profile,
    Ratio,
    Resolution,
    Row,
    Setting,
    StageSplit,
    Truth,
    WorstImage,
)

SCHEMA_VERSION = 1

SpeedVerdict: TypeAlias = Literal["faster", "slower", "no difference", "cannot tell"]

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "AccuracyVerdict",
    "Agreement",
    "BenchReport",
    "ColdStart",
    "Distribution",
    "Drop",
    "Environment",
    "FailedMeasurement",
    "Gpu",
    "Identity",
    "Interval",
    "Latency",
    "MachineState",
    "Memory",
    "ModuleTime",
    "NoiseFlag",
    "NoiseKind",
    "Power",
    "Profile",
    "Resolution",
    "Row",
    "Setting",
    "SpeedComparison",
    "SpeedVerdict",
    "StageSplit",
    "Truth",
    "WorstImage",
    "read_report",
    "row_id",
    "write_report",
]


@dataclass(frozen=True)
class SpeedComparison:
    """How many times faster ``row`` is than ``baseline`` (row ids) in the same setting.

    ``ratio``: median of the paired ratios; ``low``, ``high``: its 95 % interval, over up to ten stretches of the run;
    ``verdict`` is ``no difference`` when the interval holds 1 and no ratio beyond 1.1, ``cannot tell`` when it holds both.
    """

    baseline: str
    row: str
    ratio: Ratio
    low: Ratio
    high: Ratio
    pairs: Count
    verdict: SpeedVerdict


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it."""

    name: str
    memory_bytes: Count | None = None
    driver: str | None = None
    power_limit_w: Finite | None = None


@dataclass(frozen=True)
class MachineState:
    """What changes while measuring; taken before and after.

    ``cpu_mhz``: least, median and most over the cores; ``gpu_mhz``: by GPU or its clock domain; ``temperatures_c``: by
    sensor; ``load``: 1, 5 and 15 minutes; ``throttled``: why the machine holds its clocks back right now, a line each.
    """

    cpu_mhz: tuple[Finite, Finite, Finite] | None = None
    temperatures_c: dict[str, Finite] = field(default_factory=dict)
    load: tuple[Finite, Finite, Finite] | None = None
    memory_available_bytes: Count | None = None
    gpu_mhz: dict[str, Finite] = field(default_factory=dict)
    throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """The machine. ``device`` is its short name in tables: the board's, else GPU or CPU.

    ``power_mode``: of nvpmodel, on a Jetson; ``thread_variables``: those of ``OMP_NUM_THREADS`` and the like that are set.
    """

    device: str
    system: str
    python: str
    cpu: str
    cores: Count
    cpu_flags: tuple[str, ...] = ()
    core_limit: Finite | None = None
    board: str | None = None
    gpus: tuple[Gpu, ...] = ()
    memory_bytes: Count | None = None
    governor: str | None = None
    cpu_max_mhz: Finite | None = None
    power_mode: str | None = None
    thread_variables: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    before: MachineState = field(default_factory=MachineState)
    after: MachineState = field(default_factory=MachineState)


@dataclass(frozen=True)
class FailedMeasurement:
    """Something that was asked for and could not be measured, while the rest was.

    Attributes:
        engine: its name, as in the rows it would have had.
        folder: as given on the command line; ``None`` for a baseline.
        what: ``load``: it has no row; ``latency b<batch> t<threads or -> s<streams>``: that row is missing; ``accuracy``:
            its rows have none.
        reason: the error, one line.
    """

    engine: str
    folder: str | None
    what: str
    reason: str


@dataclass(frozen=True)
class BenchReport:
    """A whole run of ``edgeseg bench``.

    Attributes:
        created_at: ISO 8601, UTC.
        command: to repeat it, ``edgeseg bench ...``.
        protocol: settings of the latency protocol.
        comparisons: of every row with the baseline's row of the same setting.
        notes: what this machine or the request left unmeasured, and why.
        failed: what went wrong; empty when all is well.
    """

    schema_version: int
    edgeseg_version: str
    created_at: str
    command: str
    environment: Environment
    rows: tuple[Row, ...]
    comparisons: tuple[SpeedComparison, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: tuple[FailedMeasurement, ...] = ()

    def row(self, row_id: str) -> Row:
        """The row of that id. Raises ``KeyError``."""
        for row in self.rows:
            if row.id == row_id:
                return row
        raise KeyError(row_id)


@dataclass(frozen=True)
class _Versioned:
    schema_version: Count


def write_report(path: Path, report: BenchReport) -> None:
    """Write a report as JSON, atomically. Raises ``ArtifactError`` when the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    except OSError as exc:
        raise ArtifactError(f"cannot write {path}: {exc.strerror}; give another --json FILE") from exc


def read_report(path: Path) -> BenchReport:
    """Read and check a report.

    Raises:
        ArtifactError: missing, damaged, of another schema version, no report at all, or one whose rows do not fit
            together; says which field.
    """
    version = read_json(path, _Versioned, "bench report").schema_version
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}, this edgeseg reads {SCHEMA_VERSION}; "
            + ("upgrade edgeseg" if version > SCHEMA_VERSION else "measure again with: edgeseg bench")
        )
    report = read_json(path, BenchReport, "bench report")
    known = {row.id for row in report.rows}
    if len(known) != len(report.rows):
        raise ArtifactError(f"{path}: two rows have the same id; the file was edited or merged wrongly")
    for comparison in report.comparisons:
        if missing := {comparison.baseline, comparison.row} - known:
            raise ArtifactError(f"{path}: a comparison names {missing.pop()!r}, which is no row of the report")
    return report


def row_id(name: str, setting: Setting) -> str:
    """``fpn-int8 b1 t- s1``."""
    return f"{name} b{setting.batch} t{'-' if setting.threads is None else setting.threads} s{setting.streams}"
