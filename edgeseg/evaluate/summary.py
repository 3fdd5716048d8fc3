"""What a person sees at the end of a build: PyTorch beside the engine, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgeseg.console import printable
from edgeseg.evaluate.tables import MISSING, FigureTable, counted, number
from edgeseg.spec import FULL_SCALE
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import AccuracyFigures, PrecisionReport, Repair, Verification
from edgeseg.store.search import (
    Estimate,
    ModuleSensitivity,
    Search,
    SearchCandidate,
    SensitivityReport,
)

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from edgeseg.spec import InputDtype, InputSpec, PipelineSpec, Preprocess


_FITTED = {"resize": "resized", "letterbox": "letterboxed", "tile": "tiled"}


def input_line(spec: PipelineSpec, *, is_default_size: bool) -> str:
    """``256x256 RGB, resized; mean ... std ... (from ...)``: what the engine takes and what is done with it."""
    image, preprocess = spec.input, spec.preprocess
    parts = [f"{image.height}x{image.width} {image.pixel_words}"]
    if image.dynamic_size:
        parts.append(f"or any multiple of {image.stride}")
    if str(image.batch) != "1":
        parts.append(f"batch {image.batch}")
    parts.append(fit_words(image))
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    values = values_words(preprocess, image.dtype)
    clip = "" if preprocess.clip is None else "clipped to {:g}..{:g}; ".format(*preprocess.clip)
    order = "" if preprocess.channel_order == "rgb" else f", {preprocess.channel_order.upper()} inside"
    line = f"{', '.join(parts)}; {clip}mean {mean} std {std} of {values}{order} (from {preprocess.source})"
    return line + ("; the size is only a default, give --size" if is_default_size else "")


def values_words(preprocess: Preprocess, dtype: InputDtype) -> str:
    """What mean and std are of: ``0..1``, ``0..255``, ``0..65535`` or, of float32, ``pixel values``."""
    if preprocess.scale == 1:
        return "pixel values" if dtype == "float32" else f"0..{FULL_SCALE[dtype]}"
    is_unit = dtype != "float32" and preprocess.scale == 1 / FULL_SCALE[dtype]
    return "0..1" if is_unit else f"pixel values times {preprocess.scale:.4g}"


def fit_words(image: InputSpec) -> str:
    """``resized``; ``letterboxed (cubic), padded around with 128``: how other sizes are brought to the engine's."""
    words = _FITTED[image.fit] + ("" if image.interpolation == "linear" else f" ({image.interpolation})")
    padding = image.padding
    if padding is None or image.fit == "resize":
        return words
    where = "around" if padding.position == "center" else "right and below"
    border = f"with {','.join(map(str, padding.value))}" if padding.border == "constant" else f"by {padding.border}"
    return f"{words}, padded {where} {border}"


def build_summary(engine: Engine) -> Group:
    """Everything a build ends with: the comparison, what it was measured on, the precision delivered, and notes."""
    from rich.console import Group
    from rich.text import Text

    manifest = engine.manifest
    parts: list[RenderableType] = []
    if (verification := manifest.verification) is None:
        parts.append(Text("not verified: no images were given (--validation DIR)", style="yellow"))
    else:
        parts.append(verification_table(verification, f"{manifest.name} ({manifest.target})"))
        parts += [Text(line, style="yellow") for line in noise_lines(verification)]
        if verification.engine_accuracy == AccuracyFigures():
            judged = f"no masks: only the agreement with {verification.reference} was judged"
            parts.append(Text(f"{judged} (--validation DIR with masks/)"))
        parts.append(Text(f"measured on {verification.data}", style="dim"))
    parts.append(Text(precision_line(manifest.precision)))
    if manifest.candidates:
        listed = ", ".join(f"{name} {ms:.1f} ms" for name, ms in manifest.candidates.items())
        parts.append(Text(f"target auto measured {listed} and took {manifest.target}"))
    if manifest.search is not None:
        parts += [
            Text(),
            front_table(manifest.search),
            *(Text(line, style="dim") for line in front_lines(manifest.search)),
        ]
    return Group(*parts)


def sensitivity_table(modules: Sequence[ModuleSensitivity]) -> FigureTable:
    """A line per module: what INT8 of it alone loses and saves."""
    table = FigureTable.of("INT8 of", "MACs", "agreement", "mIoU drop", "worst\nclass", "saves\nms")
    for module in modules:
        known = [drop for drop in module.class_drops if drop is not None]
        table.add(
            module.module,
            f"{module.mac_share:.1%}",
            MISSING if module.agreement is None else share(module.agreement.value),
            estimate_words(module.miou_drop),
            number(max(known), 4) if known else MISSING,
            MISSING if module.saved_ms is None else number(module.saved_ms, 2),
        )
    return table


def sensitivity_lines(report: SensitivityReport) -> list[str]:
    """What :func:`sensitivity_table` was measured on."""
    lines = [f"judged on {counted(report.images, 'image')}: {report.data}"]
    if report.latency_source is not None:
        lines.append(f"milliseconds: {report.latency_source}, scheme {report.scheme}")
    return lines


def front_table(search: Search) -> FigureTable:
    """The engines a search saw that no other beats in accuracy and time at once, fastest first; the chosen one marked."""
    drops = any(candidate.miou_drop is not None for candidate in search.candidates)
    several = len({candidate.target for candidate in search.candidates}) > 1
    table = FigureTable(
        (
            ("", "words"),
            ("in float", "name"),
            *((("backend", "words"),) if several else ()),
            ("int8", "figure"),
            ("agreement", "figure"),
            *((("mIoU drop", "figure"),) if drops else ()),
            ("ms", "figure"),
            ("size", "figure"),
            ("goal", "words"),
        )
    )
    for candidate in pareto_front(search):
        mark = "*" if candidate is search.candidates[search.chosen] else ""
        table.add(
            mark,
            float_words(candidate),
            *((candidate.target,) if several else ()),
            f"{candidate.mac_share.get('int8', 0.0):.1%}",
            share(candidate.agreement.value),
            *((estimate_words(candidate.miou_drop),) if drops else ()),
            time_words(candidate),
            f"{candidate.size_bytes / 1e6:.1f} MB",
            "met" if candidate.meets_goal else "missed",
        )
    return table


def front_lines(search: Search) -> list[str]:
    """How to read :func:`front_table`."""
    chosen = search.candidates[search.chosen]
    lines = [f"{len(search.candidates)} engines judged on {counted(search.images, 'image')}; * is this one"]
    if not search.is_complete:
        lines[0] += "; the search ended at its time limit"
    if chosen.float_modules:
        lines.append(f"in float: {', '.join(chosen.float_modules)}")
    if any(c.median_ms is None and c.estimated_ms is not None for c in pareto_front(search)):
        lines.append(f"~: the sum of its modules' times, from {search.latency_source}")
    return lines


def pareto_front(search: Search) -> list[SearchCandidate]:
    """Candidates that no other beats; by time where it was measured, else by the share in int8.

    The chosen one and the ends, plain INT8 and what is float throughout, are there in any case.
    """

    def cost(candidate: SearchCandidate) -> float:
        if candidate.median_ms is not None:
            return candidate.median_ms
        return 1.0 - candidate.mac_share.get("int8", 0.0)

    def loss(candidate: SearchCandidate) -> float:
        drop = candidate.miou_drop if search.max_drop is not None else None
        return 1.0 - candidate.agreement.value if drop is None else drop.value

    chosen = search.candidates[search.chosen]
    candidates = [c for c in search.candidates if c.median_ms is not None] or list(search.candidates)
    points = [(cost(c), loss(c)) for c in candidates]
    front = [
        candidate
        for candidate, (ms, lost) in zip(candidates, points, strict=True)
        if candidate is chosen
        or not candidate.float_modules
        or not any(a <= ms and b <= lost and (a, b) != (ms, lost) for a, b in points)
    ]
    return sorted(front, key=cost)


def float_words(candidate: SearchCandidate) -> str:
    """``none``, ``all (fp32)``, or how many modules."""
    if candidate.precision != "int8":
        return f"all ({candidate.precision})"
    count = len(candidate.float_modules)
    return {0: "none", 1: candidate.float_modules[0] if count else ""}.get(count, f"{count} modules")


def time_words(candidate: SearchCandidate) -> str:
    """Measured milliseconds, else the estimate with a ``~``, else ``-``."""
    if candidate.median_ms is not None:
        return f"{candidate.median_ms:.1f}"
    return MISSING if candidate.estimated_ms is None else f"~{candidate.estimated_ms:.1f}"


def estimate_words(estimate: Estimate | None) -> str:
    """``0.0031 ±0.0022``: the figure and how far its interval reaches."""
    if estimate is None:
        return MISSING
    text = number(estimate.value, 4)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ±{max(estimate.high - estimate.value, estimate.value - estimate.low):.4f}"


def verification_table(verification: Verification, engine_name: str) -> FigureTable:
    """A line per figure that was measured, PyTorch beside the engine; ``-`` where one of both has none."""
    v = verification
    before, after = v.pytorch_accuracy, v.engine_accuracy
    table = FigureTable(
        (("", "words"), (printable(v.reference), "figure"), (printable(engine_name), "name"), ("difference", "figure"))
    )
    noisy = " *" if noise_lines(v) else ""
    for name, first, second, difference in (
        *(
            (name, share(one), share(other), _points(one, other))
            for name, one, other in (
                ("mIoU", before.miou, after.miou),
                ("Dice", before.dice, after.dice),
                ("pixel accuracy", before.pixel_accuracy, after.pixel_accuracy),
            )
        ),
        (f"agreement with {printable(v.reference)}", MISSING, share(v.agreement), ""),
        ("  near class boundaries", MISSING, share(v.boundary_agreement), ""),
        (f"mIoU, {printable(v.reference)}'s as truth", MISSING, share(v.miou_vs_pytorch), ""),
        ("median ms", *_milliseconds(v, "median_ms"), speed_words(v) + noisy),
        ("p99 ms", *_milliseconds(v, "p99_ms"), ""),
    ):
        if (first, second) != (MISSING, MISSING):
            table.add(name, first, second, difference)
    sizes = v.pytorch_size_bytes, v.engine_size_bytes
    table.add(
        "size", *(f"{size / 1e6:.1f} MB" for size in sizes), f"{sizes[1] / sizes[0]:.2f}x" if sizes[0] else MISSING
    )
    return table


def class_table(verification: Verification, class_names: Sequence[str]) -> FigureTable | None:
    """IoU per class of both, or ``None`` where there were no masks; a class that neither shows has no line."""
    reference, engine = verification.pytorch_accuracy.per_class_iou, verification.engine_accuracy.per_class_iou
    if not reference or not engine or all(value is None for value in reference):
        return None
    table = FigureTable.of("class", f"{printable(verification.reference)} IoU", "engine IoU", "difference")
    for index, (before, after) in enumerate(zip(reference, engine, strict=True)):
        name = class_names[index] if index < len(class_names) else str(index)
        if before is not None or after is not None:
            table.add(name, share(before), share(after), _points(before, after))
    return table


REPAIRS = {
    "bias-correction": "biases corrected",
    "equalization": "channels equalized",
    "calibration-method": "range methods chosen",
}
"""What was done, in words, by :attr:`edgeseg.store.manifest.Repair.name`."""


def repair_rows(repairs: Sequence[Repair]) -> list[tuple[str, str, str, str]]:
    """By repair: what was done, to how many of what, and the agreement before and after; ``-`` where it was not measured."""
    return [
        (
            REPAIRS[repair.name],
            ", ".join(f"{count:,} {what}" for what, count in repair.changed.items()),
            share(repair.agreement_before),
            share(repair.agreement_after),
        )
        for repair in repairs
    ]


def repair_table(repairs: Sequence[Repair]) -> FigureTable:
    """A line per repair, each on top of those before it."""
    table = FigureTable(
        (("done for int8", "words"), ("changed", "words"), ("agreement before", "figure"), ("after", "figure"))
    )
    for row in repair_rows(repairs):
        table.add(*row)
    return table


def repairs_line(repairs: Sequence[Repair]) -> str:
    """What the agreement of :func:`repair_table` is that of."""
    images = counted(repairs[0].images, "image")
    return f"agreement with the float graph in scheme {repairs[0].scheme}, on {images} of the calibration set"


def precision_line(report: PrecisionReport) -> str:
    """``executed: 6.38 GMAC, 98.4% in int8, 1.6% in fp32``, beginning with what the shares stand on."""
    line = f"{report.evidence}: {report.macs / 1e9:.2f} GMAC, {_by_dtype(report.mac_share) or MISSING}"
    if report.requested == "int8" and report.float_layers:
        names = ", ".join(list(report.float_layers)[:3])
        line += f"; float: {names}" + (
            f" and {len(report.float_layers) - 3} more" if len(report.float_layers) > 3 else ""
        )
    return line


def time_line(report: PrecisionReport) -> str | None:
    """``time: 71.2% in int8, 28.8% in fp32``, by the backend's profiler when the engine was built; ``None`` without."""
    return f"time: {_by_dtype(report.time_share)}" if report.time_share else None


def _by_dtype(shares: Mapping[str, float]) -> str:
    """The largest first."""
    return ", ".join(f"{value:.1%} in {dtype}" for dtype, value in sorted(shares.items(), key=lambda item: -item[1]))


def speed_words(verification: Verification) -> str:
    """``5.0x faster``, ``2.0x slower``, ``no difference``, ``cannot tell``, or ``-`` where latency was not measured."""
    speedup = verification.speedup
    if speedup is None:
        return MISSING
    if speedup.verdict not in {"faster", "slower"}:
        return speedup.verdict
    ratio = speedup.ratio
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def noise_lines(verification: Verification) -> list[str]:
    """Why the times are to be read with care, a line each; empty for a quiet run."""
    both = ((printable(verification.reference), verification.pytorch_latency), ("engine", verification.engine_latency))
    seen: dict[str, list[str]] = {}
    for name, latency in both:
        for detail in () if latency is None else latency.noise:
            seen.setdefault(detail, []).append(name)
    lines = [f"  {' and '.join(names)}: {detail}" for detail, names in seen.items()]
    if lines and (ratio := verification.speedup) is not None:
        lines.append(f"  speed-up {ratio.ratio:.1f}x (95 %: {ratio.low:.1f} to {ratio.high:.1f})")
    return ["* times are noisy, read with care (edgeseg bench measures longer):", *lines] if lines else []


def share(value: float | None) -> str:
    """A share with four digits, or ``-``."""
    return MISSING if value is None else f"{value:.4f}"


def _points(before: float | None, after: float | None) -> str:
    return MISSING if before is None or after is None else number(after - before, 4, signed=True)


def _milliseconds(verification: Verification, figure: str) -> list[str]:
    both = (verification.pytorch_latency, verification.engine_latency)
    return [MISSING if latency is None else f"{getattr(latency, figure):.1f}" for latency in both]
