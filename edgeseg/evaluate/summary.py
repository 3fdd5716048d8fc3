"""What a person sees at the end of a build: PyTorch beside the engine, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeseg.store.artifacts import Engine, PrecisionReport, Verification

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from edgeseg.spec import PipelineSpec

MISSING = "-"
"""Printed for what was not measured; never 0."""


_FITTED = {"resize": "resized", "letterbox": "letterboxed", "tile": "tiled"}


def input_line(spec: PipelineSpec, *, is_default_size: bool) -> str:
    """``256x256 RGB, resized; mean ... std ... (from ...)``: what the engine takes and what is done with it."""
    image, preprocess = spec.input, spec.preprocess
    colours = {1: "grey", 3: "RGB"}.get(image.channels, f"{image.channels} channels")
    parts = [f"{image.height}x{image.width} {colours}"]
    if image.dynamic_size:
        parts.append(f"or any multiple of {image.stride}")
    if str(image.batch) != "1":
        parts.append(f"batch {image.batch}")
    parts.append(_FITTED[image.fit])
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    values = "0..1" if preprocess.scale != 1 else "0..255"
    order = "" if preprocess.channel_order == "rgb" else f", {preprocess.channel_order.upper()} inside"
    line = f"{', '.join(parts)}; mean {mean} std {std} of {values}{order} (from {preprocess.source})"
    return line + ("; the size is only a default, give --size" if is_default_size else "")


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
    """A line per figure, PyTorch beside the engine; what was not measured is ``-``. Fits 80 columns."""
    from rich import box
    from rich.table import Table

    v = verification
    before, after = v.pytorch_accuracy, v.engine_accuracy
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("PyTorch", justify="right", no_wrap=True)
    table.add_column(engine_name, justify="right", overflow="fold", style="bold")
    table.add_column("difference", justify="right", no_wrap=True)
    for name, first, second in (
        ("mIoU", before.miou, after.miou),
        ("Dice", before.dice, after.dice),
        ("pixel accuracy", before.pixel_accuracy, after.pixel_accuracy),
    ):
        table.add_row(name, share(first), share(second), _points(first, second))
    table.add_row("agreement with PyTorch", MISSING, share(v.agreement), "")
    table.add_row("  near class boundaries", MISSING, share(v.boundary_agreement), "")
    table.add_row("mIoU, PyTorch's as truth", MISSING, share(v.miou_vs_pytorch), "")
    table.add_row("median ms", *_milliseconds(v, "median_ms"), _speed_up(speed_up(v)))
    table.add_row("p99 ms", *_milliseconds(v, "p99_ms"), "")
    sizes = v.pytorch_size_bytes, v.engine_size_bytes
    table.add_row(
        "size", *(f"{size / 1e6:.1f} MB" for size in sizes), f"{sizes[1] / sizes[0]:.2f}x" if sizes[0] else MISSING
    )
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
    """``executed: 6.38 GMAC, 98.4% in int8, 1.6% in fp32``, beginning with what the shares stand on."""
    shares = sorted(report.mac_share.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{value:.1%} in {dtype}" for dtype, value in shares)
    line = f"{report.evidence}: {report.macs / 1e9:.2f} GMAC, {listed or MISSING}"
    if report.requested == "int8" and report.float_layers:
        names = ", ".join(list(report.float_layers)[:3])
        line += f"; float: {names}" + (
            f" and {len(report.float_layers) - 3} more" if len(report.float_layers) > 3 else ""
        )
    return line


def time_line(report: PrecisionReport) -> str:
    """``time: 71.2% in int8, 28.8% in fp32``, by the backend's profiler when the engine was built; ``time: -`` without."""
    shares = sorted((report.time_share or {}).items(), key=lambda item: -item[1])
    return f"time: {', '.join(f'{value:.1%} in {dtype}' for dtype, value in shares) or MISSING}"


def speed_up(verification: Verification) -> float | None:
    """How many times faster the engine's median is than PyTorch's."""
    if verification.pytorch_latency is None or verification.engine_latency is None:
        return None
    return verification.pytorch_latency.median_ms / verification.engine_latency.median_ms


def share(value: float | None) -> str:
    """A share with four digits, or ``-``."""
    return MISSING if value is None else f"{value:.4f}"


def _points(before: float | None, after: float | None) -> str:
    return MISSING if before is None or after is None else f"{after - before:+.4f}"


def _milliseconds(verification: Verification, figure: str) -> list[str]:
    both = (verification.pytorch_latency, verification.engine_latency)
    return [MISSING if latency is None else f"{getattr(latency, figure):.1f}" for latency in both]


def _speed_up(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.1f}x faster" if value >= 1 else f"{1 / value:.1f}x slower"
