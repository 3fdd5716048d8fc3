"""What ``report --json`` and ``sweep --json`` print: the decision for programs, as types, so that its schema is theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeseg.decide.entries import MergedReport
from edgeseg.decide.metrics import METRICS
from edgeseg.decide.requirement import Status
from edgeseg.decide.verdict import Answer, DeviceVerdict, Judged

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Source:
    """A bench report the decision is made of; ``file`` is ``None`` for the run that printed it."""

    file: str | None
    created_at: str
    command: str


@dataclass(frozen=True)
class Failure:
    """An engine that was not built or not measured, and why."""

    engine: str
    reason: str


@dataclass(frozen=True)
class CheckedLimit:
    """One comparison of the requirement; ``is_close``: a 95 % interval of the figure holds the limit."""

    comparison: str
    value: float | None
    status: Status
    is_close: bool


@dataclass(frozen=True)
class DecidedRow:
    """One row of one report: its figures by metric, ``None`` where not measured, and how it fares."""

    number: int
    source: str | None
    id: str
    is_baseline: bool
    on_front: bool
    status: Status | None
    figures: dict[str, float | None]
    checks: tuple[CheckedLimit, ...]


@dataclass(frozen=True)
class DeviceDecision:
    """What to deploy on one device: the row's id and the engine's folder, ``None`` where there is none."""

    device: str
    answer: Answer
    deploy: str | None
    folder: str | None
    reason: str
    requirement: str | None
    requirement_is_default: bool
    remarks: tuple[str, ...]
    rows: tuple[DecidedRow, ...]


@dataclass(frozen=True)
class Decision:
    """The whole answer."""

    schema_version: int
    sources: tuple[Source, ...]
    failed: tuple[Failure, ...]
    devices: tuple[DeviceDecision, ...]


def decision_of(
    report: MergedReport, verdicts: Sequence[DeviceVerdict], failed: Sequence[tuple[str, str]] = ()
) -> Decision:
    """The decision for programs: per device the answer, the engine, and every row's figures and checks."""
    return Decision(
        schema_version=SCHEMA_VERSION,
        sources=tuple(Source(run.source, run.report.created_at, run.report.command) for run in report.runs),
        failed=tuple(Failure(name, reason) for name, reason in failed),
        devices=tuple(_device(report, verdict) for verdict in verdicts),
    )


def _device(report: MergedReport, verdict: DeviceVerdict) -> DeviceDecision:
    deploy = verdict.deploy
    return DeviceDecision(
        device=verdict.group.label,
        answer=verdict.answer,
        deploy=None if deploy is None else deploy.row.id,
        folder=None if deploy is None else deploy.row.engine.folder,
        reason=verdict.reason,
        requirement=None if verdict.requirement is None else verdict.requirement.text,
        requirement_is_default=verdict.is_default,
        remarks=verdict.remarks,
        rows=tuple(_row(report, judged) for judged in verdict.judged),
    )


def _row(report: MergedReport, judged: Judged) -> DecidedRow:
    entry = judged.entry
    checks = () if judged.outcome is None else judged.outcome.checks
    return DecidedRow(
        number=entry.number,
        source=report.runs[entry.run].source,
        id=entry.row.id,
        is_baseline=entry.row.engine.is_baseline,
        on_front=judged.is_on_front,
        status=judged.status,
        figures={name: metric.value(entry) for name, metric in METRICS.items()},
        checks=tuple(CheckedLimit(c.comparison.text, c.value, c.status, c.is_close) for c in checks),
    )
