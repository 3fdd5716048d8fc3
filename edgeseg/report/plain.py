"""The report as Markdown, CSV and a terminal table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from edgeseg.console import markdown_text
from edgeseg.decide.entries import MergedReport
from edgeseg.decide.metrics import METRICS, WITH_INTERVAL
from edgeseg.decide.verdict import DeviceVerdict
from edgeseg.evaluate.tables import MISSING, FigureTable
from edgeseg.report.cells import (
    TEXT_COLUMNS,
    close_calls,
    failures,
    heading,
    headline,
    lines,
    metrics_of,
    requirement_line,
    texts_of,
    verdict_word,
)

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

TERMINAL = ("median_ms", "p99_ms", "miou", "speedup", "miou_drop", "agreement", "size_mb")
_FORMULA = frozenset("=+-@;\uff1d\uff0b\uff0d\uff20")
SEPARATE_DEVICES = "Each device has a table of its own: speeds of different devices are not ranked against each other."


def markdown(report: MergedReport, verdicts: Sequence[DeviceVerdict], failed: Sequence[tuple[str, str]] = ()) -> str:
    """The report for a README, an issue or a merge request: verdict, table and remarks per device."""
    parts = ["# edgeseg report"]
    if len(verdicts) > 1:
        parts.append(SEPARATE_DEVICES)
    for verdict in verdicts:
        metrics = metrics_of(verdict.group.entries)
        parts.append(f"## {markdown_text(verdict.group.label)}")
        parts.append(f"**{markdown_text(headline(verdict))}**: {markdown_text(verdict.reason)}.")
        parts.append(f"Judged by: {_code(requirement_line(verdict))}.")
        head = ["#", *TEXT_COLUMNS, "model (decoder, encoder)", *map(heading, metrics), "front", "verdict"]
        table = [_md_row(head), _md_row(["---:", *["---"] * 5, *["---:"] * len(metrics), "---", "---"], escape=False)]
        table += [
            _md_row(
                [
                    str(line.judged.entry.number),
                    *line.texts,
                    f"{line.judged.entry.row.engine.arch}, {line.judged.entry.row.engine.encoder}",
                    *line.figures,
                    "yes" if line.judged.is_on_front else "",
                    line.verdict,
                ]
            )
            for line in lines(verdict, metrics)
        ]
        parts.append("\n".join(table))
        parts.append("Intervals are 95 %; `-` was not measured; `front`: not beaten in both speed and accuracy.")
        parts += _md_list("Not met", [f"{name}: {'; '.join(missed)}" for name, missed in failures(verdict)])
        parts += _md_list("Close to a limit", close_calls(verdict))
        parts += _md_list("Remarks", verdict.remarks)
    parts += _md_list("Not built or not measured", [f"{name}: {reason}" for name, reason in failed])
    parts.append("## Runs")
    for run in report.runs:
        name = run.source or "this run"
        parts.append(f"{markdown_text(name)}, {markdown_text(run.report.created_at)}. To repeat it:")
        parts.append("\n".join(f"- {_code(command)}" for command in run.commands))
        parts += _md_list("Notes", run.report.notes)
    return "\n\n".join(parts) + "\n"


def _md_list(title: str, items: Iterable[str]) -> list[str]:
    listed = [f"- {markdown_text(item)}" for item in items]
    return [f"{title}:", "\n".join(listed)] if listed else []


def _md_row(cells: Iterable[str], *, escape: bool = True) -> str:
    return "| " + " | ".join(markdown_text(cell) if escape else cell for cell in cells) + " |"


def _code(text: str) -> str:
    flat = " ".join(text.split()).replace("`", "'")
    return f"`{flat}`" if flat else MISSING


def csv_text(report: MergedReport, verdicts: Sequence[DeviceVerdict]) -> str:
    """One line per row, every metric a column; empty where it was not measured. Numbers are not rounded."""
    bounds = [f"{metric.name}_{end}" for metric in WITH_INTERVAL for end in ("low", "high")]
    written = [
        _csv_line(["number", "device", *TEXT_COLUMNS, "arch", "encoder", *METRICS, *bounds, "on_front", "verdict"])
    ]
    for verdict in verdicts:
        for judged in verdict.judged:
            entry = judged.entry
            values = [metric.value(entry) for metric in METRICS.values()]
            ends: list[float | None] = []
            for metric in WITH_INTERVAL:
                ends += metric.interval(entry) or (None, None)
            cells = [
                entry.number,
                _spreadsheet(verdict.group.label),
                *map(_spreadsheet, texts_of(entry)),
                _spreadsheet(entry.row.engine.arch),
                _spreadsheet(entry.row.engine.encoder),
                *("" if value is None else repr(float(value)) for value in [*values, *ends]),
                "yes" if judged.is_on_front else "no",
                verdict_word(judged, verdict),
            ]
            written.append(_csv_line(cells))
    return "".join(written)


def _csv_line(cells: Sequence[object]) -> str:
    """One line. With a line end of "\\n" the writer would leave a "\\r" bare, and readers would begin a row there."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\r\n").writerow(cells)
    return stream.getvalue().removesuffix("\r\n") + "\n"


def _spreadsheet(text: str) -> str:
    """Spreadsheets execute cells that begin like a formula; an apostrophe makes them text (OWASP, CSV injection).

    So they do behind blanks and control characters, which some strip; behind a semicolon, where that separates cells; and
    with the full-width forms of the signs.
    """
    begins = text[:1]
    is_risky = begins in _FORMULA or not begins.isprintable() or begins.isspace()
    # Python 3.10 neither writes nor reads a cell with NUL in it.
    plain = text.replace("\0", "\ufffd")
    return f"'{plain}" if text and is_risky else plain


def terminal(verdicts: Sequence[DeviceVerdict], failed: Sequence[tuple[str, str]] = (), *, width: int) -> Group:
    """The report for a terminal of ``width`` columns: intervals only where there is room for them."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for verdict in verdicts:
        metrics = metrics_of(verdict.group.entries)
        shown = TERMINAL[: 3 if width < 100 else 6 if width < 140 else None]
        metrics = tuple(metric for metric in metrics if metric.name in shown)
        headings = (metric.title + (f"\n{metric.unit}" if metric.unit else "") for metric in metrics)
        table = FigureTable(
            (
                ("#", "figure"),
                ("engine", "name"),
                ("backend", "name"),
                ("prec.", "words"),
                *((heading, "figure") for heading in headings),
                ("verdict", "words"),
            ),
            title=verdict.group.label,
        )
        for line in lines(verdict, metrics, with_intervals=width >= 180):
            cells = (str(line.judged.entry.number), *line.texts[:3], *line.figures, line.verdict)
            table.add(*cells, style="bold" if line.is_deployed else None)
        parts += [table, Text(f"{headline(verdict)}: {verdict.reason}", style="bold")]
        parts.append(Text(f"judged by {requirement_line(verdict)}", style="dim"))
        parts += [Text(f"  {name}: {'; '.join(missed)}") for name, missed in failures(verdict)]
        parts += [Text(f"  close: {text}") for text in close_calls(verdict)]
        parts += [Text(f"  {remark}") for remark in verdict.remarks]
    if failed:
        parts.append(Text("Not built or not measured:", style="yellow"))
        parts += [Text(f"  {name}: {reason}") for name, reason in failed]
    if len(verdicts) > 1:
        parts.append(Text(SEPARATE_DEVICES, style="dim"))
    return Group(*parts)
