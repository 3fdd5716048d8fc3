"""``edgeseg report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeseg.cli.output import echo, print_json, result_console
from edgeseg.cli.parameters import ANY_PATH

if TYPE_CHECKING:
    from edgeseg.decide.entries import Run
    from edgeseg.decide.verdict import DeviceVerdict


@click.command("report", short_help="Decide what to deploy; write HTML, Markdown and CSV.")
@click.argument("reports", nargs=-1, required=True, type=ANY_PATH, metavar="BENCH.json...")
@click.option("--html", "html_path", type=ANY_PATH, metavar="FILE", help="Write one self-contained HTML page.")
@click.option("--markdown", "markdown_path", type=ANY_PATH, metavar="FILE", help="Write Markdown.")
@click.option("--csv", "csv_path", type=ANY_PATH, metavar="FILE", help="Write one line per row, every figure a column.")
@click.option(
    "--require",
    metavar="EXPRESSION",
    help='What an engine must keep, such as "p99_ms<=33 and miou>=0.68 and size_mb<=20". Exit 3 when none does on some '
    "device, or when it was not measured.",
)
@click.option("--title", default="edgeseg report", show_default=True, help="Of the HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON instead of tables.")
def command(
    reports: tuple[Path, ...],
    html_path: Path | None,
    markdown_path: Path | None,
    csv_path: Path | None,
    require: str | None,
    title: str,
    as_json: bool,
) -> None:
    """Put what edgeseg bench measured, on one device or several, into one report and decide what to deploy.

    Needs no PyTorch; --html needs the extra edgeseg[report].
    """
    from edgeseg.decide.entries import read_runs

    sys.exit(write_reports(read_runs(reports), html_path, markdown_path, csv_path, require, title, as_json))


def write_reports(
    runs: tuple[Run, ...],
    html_path: Path | None,
    markdown_path: Path | None,
    csv_path: Path | None,
    require: str | None,
    title: str,
    as_json: bool,
    failed: Sequence[tuple[str, str]] = (),
) -> int:
    """Decide, write the files asked for, print the result, and return the exit code: 3 when ``require`` is not met.

    ``failed``: engines that were never measured, and why; those the runs could not measure are added.
    """
    from edgeseg.decide.entries import failed_measurements, merge
    from edgeseg.decide.requirement import Requirement
    from edgeseg.decide.verdict import decide
    from edgeseg.report import plain
    from edgeseg.store.artifacts import write_text

    requirement = None if require is None else Requirement.parse(require)
    report = merge(runs)
    verdicts = decide(report, requirement)
    failed = (*failed, *failed_measurements(runs))
    if html_path is not None:
        from edgeseg.report.html import html

        write_text(html_path, html(report, verdicts, title=title, failed=failed))
    if markdown_path is not None:
        write_text(markdown_path, plain.markdown(report, verdicts, failed))
    if csv_path is not None:
        write_text(csv_path, plain.csv_text(report, verdicts))
    if as_json:
        print_json(plain.json_value(report, verdicts, failed))
    else:
        _print_tables(verdicts, failed)
        for path in filter(None, (html_path, markdown_path, csv_path)):
            echo(f"written: {path}")
    return 3 if require is not None and any(verdict.answer != "deploy" for verdict in verdicts) else 0


def _print_tables(verdicts: tuple[DeviceVerdict, ...], failed: Sequence[tuple[str, str]]) -> None:
    from edgeseg.report.plain import terminal

    console = result_console()
    console.print(terminal(verdicts, failed, width=console.width))
