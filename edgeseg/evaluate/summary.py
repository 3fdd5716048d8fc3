"""What a person sees at the end of a build: PyTorch beside the engine, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeseg.artifacts import AccuracyFigures, Engine, LatencyFigures, PrecisionReport, Verification

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

MISSING = "-"
"""Printed for what was not measured; never 0."""


def build_summary(engine: Engine) -> Group:
    """Everything a build ends with: the comparison, what it was measured on, the precision delivered, and notes."""
    from rich.console import Group
    from rich.text import Text

    manifest = engine.manifest
    parts: list[RenderableType] = []
    if manifest.verification is None:
        parts.append(Text("not verified: no images were given (--validation DIR)", style="yellow"))
    else:
        parts.append(verification_table(manifest.verification, f"{manifest.name} ({manifest.target})"))
        parts.append(Text(f"measured on {manifest.verification.data}", style="dim"))
    parts.append(Text(precision_line(manifest.precision)))
    if manifest.candidates:
        listed = ", ".join(f"{name} {ms:.1f} ms" for name, ms in manifest.candidates.items())
        parts.append(Text(f"target auto measured {listed} and took {manifest.target}"))
    return Group(*parts)


def verification_table(verification: Verification, engine_name: str) -> Table:
    """One row for PyTorch, one for the engine; figures that were not measured are ``-``."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("mIoU", "Dice", "pixel acc.", "agreement", "at boundaries", "median ms", "speed-up", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    v = verification
    table.add_row(
        "PyTorch",
        *_accuracy_cells(v.pytorch_accuracy),
        MISSING,
        MISSING,
        _ms(v.pytorch_latency),
        _speed_up(1.0 if v.pytorch_latency else None),
        _size(v.pytorch_size_bytes),
    )
    table.add_row(
        engine_name,
        *_accuracy_cells(v.engine_accuracy),
        share(v.agreement),
        share(v.boundary_agreement),
        _ms(v.engine_latency),
        _speed_up(speed_up(v)),
        _size(v.engine_size_bytes),
        style="bold",
    )
    if v.miou_drop is not None:
        table.add_row("difference", *_differences(v.pytorch_accuracy, v.engine_accuracy), *[""] * 5, style="dim")
    return table


def class_table(verification: Verification, class_names: Sequence[str]) -> Table | None:
    """IoU per class of both, or ``None`` where there were no masks."""
    from rich import box
    from rich.table import Table

    reference, engine = verification.pytorch_accuracy.per_class_iou, verification.engine_accuracy.per_class_iou
    if not reference or all(value is None for value in reference):
        return None
    table = Table("class", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("PyTorch IoU", "engine IoU", "difference"):
        table.add_column(name, justify="right")
    for index, (before, after) in enumerate(zip(reference, engine, strict=True)):
        name = class_names[index] if index < len(class_names) else str(index)
        table.add_row(name, share(before), share(after), _points(before, after))
    return table


def precision_line(report: PrecisionReport) -> str:
    """``executed: 98.4 % of 6.38 GMAC in int8, 1.6 % in fp32``."""
    shares = sorted(report.mac_share.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{value:.1%} in {dtype}" for dtype, value in shares)
    line = f"executed: {report.macs / 1e9:.2f} GMAC, {listed or MISSING}"
    if report.requested == "int8" and report.float_layers:
        names = ", ".join(list(report.float_layers)[:3])
        line += f"; float: {names}" + (
            f" and {len(report.float_layers) - 3} more" if len(report.float_layers) > 3 else ""
        )
    return line


def speed_up(verification: Verification) -> float | None:
    """How many times faster the engine's median is than PyTorch's."""
    if verification.pytorch_latency is None or verification.engine_latency is None:
        return None
    return verification.pytorch_latency.median_ms / verification.engine_latency.median_ms


def share(value: float | None) -> str:
    """A share with four digits, or ``-``."""
    return MISSING if value is None else f"{value:.4f}"


def _accuracy_cells(figures: AccuracyFigures) -> tuple[str, str, str]:
    return share(figures.miou), share(figures.dice), share(figures.pixel_accuracy)


def _differences(before: AccuracyFigures, after: AccuracyFigures) -> list[str]:
    pairs = ((before.miou, after.miou), (before.dice, after.dice), (before.pixel_accuracy, after.pixel_accuracy))
    return [_points(first, second) for first, second in pairs]


def _points(before: float | None, after: float | None) -> str:
    return MISSING if before is None or after is None else f"{after - before:+.4f}"


def _ms(figures: LatencyFigures | None) -> str:
    return MISSING if figures is None else f"{figures.median_ms:.1f}"


def _speed_up(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}x"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
