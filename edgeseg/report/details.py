"""What the page shows of one engine beyond its line in the table: stages, classes, confusion, modules, images."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeseg.decide.entries import DeviceGroup, Entry, MergedReport
from edgeseg.decide.verdict import data_key
from edgeseg.errors import one_line
from edgeseg.evaluate.results import Accuracy, Identity, Profile, Truth, WorstImage
from edgeseg.evaluate.summary import repair_rows, repairs_line, share
from edgeseg.evaluate.tables import counted, number
from edgeseg.report.charts import STYLES, bar
from edgeseg.runtime.overlay import legend_entries, mask_palette
from edgeseg.store.search import Search

MAX_IMAGE_BYTES = 8_000_000
"""A side-by-side picture above this is left out, and the page says so: a report has to stay one that can be mailed."""
PNG = b"\x89PNG\r\n\x1a\n"
MATRIX_LIMIT = 24
"""Up to so many classes the confusion difference is a matrix, above it a list of the largest changes."""
CHANGES_SHOWN = 20
STAGES = ("pre", "h2d", "compute", "d2h", "post")
DTYPES = ("int8", "fp16", "fp32")
PARTS = ("classes", "confusion", "modules", "sensitivity", "pictures", "repairs")


Shown = dict[str, Any]
"""What the page's template reads, by the names it has there."""


def style_of(entry: Entry) -> str:
    """The class of an entry's mark: its precision, or ``baseline``."""
    if entry.row.engine.is_baseline:
        return "baseline"
    return entry.row.engine.precision if entry.row.engine.precision in STYLES else "other"


def stage_lines(group: DeviceGroup) -> list[Shown]:
    """A line per row whose stages were measured: a bar on an axis all rows of the device share, and a text per stage."""
    measured = []
    for entry in group.entries:
        if entry.row.latency is None:
            continue
        values = [(name, getattr(entry.row.latency.stages, f"{name}_ms")) for name in STAGES]
        if any(value is not None for _, value in values):
            measured.append((entry, values))
    longest = max((sum(value or 0.0 for _, value in values) for _, values in measured), default=0.0)
    return [
        {
            "entry": entry,
            "bar": bar([(f"stage-{name}", value) for name, value in values if value], longest),
            "texts": ["-" if value is None else f"{value:.2f}" for _, value in values],
        }
        for entry, values in measured
    ]


def engine_details(report: MergedReport, group: DeviceGroup, chosen: Entry | None) -> list[Shown]:
    """One per engine of the device (not per setting: accuracy and profile are the engine's).

    ``chosen``, the engine to deploy, is shown unfolded; where there is none, all are. A part without lines was not measured; an
    engine of which no part was is left out.
    """
    seen: set[tuple[int, str]] = set()
    details_of_all = []
    for entry in group.engines:
        key = entry.run, entry.row.engine.name
        if key in seen:
            continue
        seen.add(key)
        is_open = chosen is None or key == (chosen.run, chosen.row.engine.name)
        details = _details(report, group, entry, is_open)
        if any(details[part] for part in PARTS):
            details_of_all.append(details)
    return details_of_all


def _details(report: MergedReport, group: DeviceGroup, entry: Entry, is_open: bool) -> Shown:
    accuracy, names = entry.row.accuracy, entry.row.engine.class_names
    baseline = _baseline(group, entry)
    truth = accuracy.truth if accuracy is not None else None
    reference = baseline.row.accuracy.truth if baseline is not None and baseline.row.accuracy is not None else None
    agreement = accuracy.agreement if accuracy is not None else None
    is_equal = agreement is not None and agreement.overall.value == 1.0
    confusion = [] if is_equal else _confusion(truth, reference, names)
    return {
        "entry": entry,
        "is_open": is_open,
        # Every mask is the baseline's: there is nothing to show of what it confuses or where it differs.
        "is_equal": is_equal,
        "baseline": baseline.row.engine.name if baseline is not None else None,
        "data": _data_line(accuracy) if accuracy is not None else None,
        "classes": _classes(truth, reference, names),
        "class_names": tuple(class_name(names, k) for k in range(len(confusion))),
        "confusion": confusion,
        "is_matrix": bool(confusion) and bool(confusion[0]["cells"]),
        "modules": _modules(entry.row.profile) if entry.row.profile is not None else (),
        "profile": entry.row.profile,
        "sensitivity": () if (search := entry.row.engine.search) is None else _sensitivity(search),
        "search_line": "" if search is None else _search_line(search),
        "pictures": tuple(_picture(worst, report.runs[entry.run].folder) for worst in accuracy.worst)
        if accuracy
        else (),
        # Class and CSS colour in the pictures.
        "colours": _colours(entry.row.engine),
        "repairs": tuple(repair_rows(entry.row.engine.repairs)),
        "repairs_note": repairs_line(entry.row.engine.repairs) if entry.row.engine.repairs else "",
    }


def _colours(engine: Identity) -> tuple[tuple[str, str], ...]:
    """What the colours of the pictures' masks mean: they are the runtime's own."""
    palette = mask_palette(engine.task, engine.classes, engine.class_names)
    names = [class_name(engine.class_names, k) for k in range(engine.classes)]
    listed = legend_entries(None, names, palette, binary=engine.task == "binary")
    return tuple((entry.name, "#{:02x}{:02x}{:02x}".format(*entry.colour)) for entry in listed)


def _baseline(group: DeviceGroup, entry: Entry) -> Entry | None:
    """The baseline that the masks were compared with, in the same run; none where nothing was compared."""
    accuracy = entry.row.accuracy
    named = {drop.baseline for drop in accuracy.truth.drops} if accuracy and accuracy.truth else set()
    if accuracy and accuracy.agreement:
        named.add(accuracy.agreement.baseline)
    for other in group.baselines:
        if other.run == entry.run and other.row.engine.name in named and data_key(other) == data_key(entry):
            return other
    return None


def _data_line(accuracy: Accuracy) -> str:
    size = "the size of the image files" if accuracy.resolution == "source" else "the engine's input size"
    ignored = f", {accuracy.ignored_share:.1%} of pixels ignored" if accuracy.ignored_share else ""
    return f"{counted(accuracy.images, 'image')} of {accuracy.data}, judged at {size}{ignored}"


def class_name(names: Sequence[str], index: int) -> str:
    """The class's name, else its index."""
    return names[index] if index < len(names) else str(index)


def _classes(truth: Truth | None, reference: Truth | None, names: Sequence[str]) -> list[Shown]:
    """IoU of each class, engine and baseline, and its bar; ``-`` for a class that did not occur."""
    if truth is None or all(value is None for value in truth.per_class_iou):
        return []
    before = reference.per_class_iou if reference is not None else ()
    lines = []
    for k, value in enumerate(truth.per_class_iou):
        base = before[k] if k < len(before) else None
        lines.append(
            {
                "name": class_name(names, k),
                "engine": share(value),
                "baseline": share(base),
                "difference": "-" if value is None or base is None else number(value - base, 4, signed=True),
                "bar": bar([("engine", value)] if value is not None else [], 1.0, tick=base),
            }
        )
    return lines


def _confusion(truth: Truth | None, reference: Truth | None, names: Sequence[str]) -> list[Shown]:
    """Engine minus baseline, each matrix as points (percent) of the true class's pixels.

    Rows of the matrix (``cells`` by predicted class), or, of many classes, the largest changes (``name`` says truth and
    prediction).
    """
    if truth is None or reference is None or truth.confusion is None or reference.confusion is None:
        return []
    if len(truth.confusion) != len(reference.confusion):
        return []
    after, before = _points(truth.confusion), _points(reference.confusion)
    size = len(after)
    changes = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(after, before, strict=True)]
    if size <= MATRIX_LIMIT:
        return [
            {"name": class_name(names, i), "cells": [_cell(changes[i][j], is_right=i == j) for j in range(size)]}
            for i in range(size)
        ]
    ranked = sorted(((changes[i][j], i, j) for i in range(size) for j in range(size)), key=lambda c: -abs(c[0]))
    return [
        {"name": f"{class_name(names, i)} taken for {class_name(names, j)}: {change:+.2f} points", "cells": []}
        for change, i, j in ranked[:CHANGES_SHOWN]
        if change
    ]


def _points(matrix: Sequence[Sequence[int]]) -> list[list[float]]:
    return [[100 * value / total if (total := sum(row)) else 0.0 for value in row] for row in matrix]


def _cell(change: float, *, is_right: bool) -> Shown:
    """Points of the truth's pixels; ``level`` -4..4 chooses the colour."""
    # Colour by consequence, not by sign: more on the diagonal is good, more elsewhere is bad.
    good = change if is_right else -change
    strength = next((k for k, limit in ((4, 2.0), (3, 0.5), (2, 0.1), (1, 0.005)) if abs(good) >= limit), 0)
    text = f"{change:+.2f}" if abs(change) >= 0.005 else "0"
    return {"text": text, "level": strength if good > 0 else -strength}


def _modules(profile: Profile) -> list[Shown]:
    """Time of each module and the dtypes it runs in."""
    longest = max((module.share for module in profile.modules), default=0.0)
    lines = []
    for module in profile.modules:
        dtypes = sorted(module.dtypes.items(), key=lambda item: -item[1])
        parts = [(f"dtype-{name if name in DTYPES else 'other'}", part * module.share) for name, part in dtypes]
        lines.append(
            {
                "name": module.module,
                "nodes": module.nodes,
                "time": f"{module.time_ms:.3f}",
                "share": f"{100 * module.share:.1f}",
                "dtypes": ", ".join(f"{name} {part:.0%}" for name, part in dtypes) or "-",
                "bar": bar(parts or [("dtype-other", module.share)], longest),
            }
        )
    return lines


def _sensitivity(search: Search) -> list[Shown]:
    """What INT8 of each module alone costs and saves, and what the module is in this engine."""
    chosen = search.candidates[search.chosen]
    changes = {m.module: 1.0 - m.agreement.value for m in search.modules if m.agreement is not None}
    most = max(changes.values(), default=0.0)
    lines = []
    for module in search.modules:
        change = changes.get(module.module)
        is_float = chosen.precision != "int8" or module.module in chosen.float_modules
        drop, saved = module.miou_drop, module.saved_ms
        lines.append(
            {
                "name": module.module,
                "changed": "-" if change is None else f"{100 * change:.2f}",
                "drop": "-" if drop is None else number(drop.value, 4),
                "saved": "-" if saved is None else number(saved, 3),
                "macs": f"{100 * module.mac_share:.1f}",
                "here": "float" if is_float else "int8",
                "bar": bar([("dtype-fp32" if is_float else "dtype-int8", change)] if change else [], most),
            }
        )
    return lines


def _search_line(search: Search) -> str:
    limits = (("mIoU drop", "at most", search.max_drop), ("agreement", "at least", search.min_agreement))
    goal = " and ".join(f"{name} {bound} {limit:g}" for name, bound, limit in limits if limit is not None)
    return f"Goal: {goal}; {len(search.candidates)} engines judged on {counted(search.images, 'image')}."


def _picture(worst: WorstImage, folder: Path | None) -> Shown:
    """A worst image: its PNG as a data URI, or why it is not shown."""
    miou = f", mIoU {worst.miou:.3f} against the mask" if worst.miou is not None else ""
    caption = f"{worst.name}: {worst.agreement:.1%} of pixels agree{miou}"
    alt = f"{worst.name}, four pictures from left to right: image, baseline's mask, engine's mask, where they differ"
    data_uri, missing = _data_uri(worst.side_by_side, folder)
    return {"name": worst.name, "caption": caption, "alt": alt, "data_uri": data_uri, "missing": missing}


def _data_uri(name: str | None, folder: Path | None) -> tuple[str | None, str | None]:
    """The picture for an ``<img>``, or why there is none. A report from elsewhere must not reach other files."""
    if name is None or folder is None:
        return None, "no picture was saved"
    try:
        return _picture_data(name, folder)
    except (OSError, ValueError) as exc:  # a name that is too long, or holds a NUL
        return None, f"{name} cannot be read ({one_line(exc)}): not shown"


def _picture_data(name: str, folder: Path) -> tuple[str | None, str | None]:
    relative = Path(name)
    path = folder / relative
    if relative.is_absolute() or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return None, "the report names a picture outside its own folder: not shown"
    if not path.is_file():
        return None, f"{name} is not beside the report"
    if path.stat().st_size > MAX_IMAGE_BYTES:
        return None, f"{name} is larger than {MAX_IMAGE_BYTES / 1e6:.0f} MB: not embedded"
    data = path.read_bytes()
    if not data.startswith(PNG):
        return None, f"{name} is no PNG: not shown"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}", None
