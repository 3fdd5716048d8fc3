"""``edgeseg report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeseg.cli.output import echo, print_json, result_console, show
from edgeseg.cli.parameters import ANY_PATH
from edgeseg.errors import SpecError

if TYPE_CHECKING:
    from edgeseg.decide.entries import Run


@click.command("report", short_help="Decide what to deploy; write HTML, Markdown and CSV.")
@click.argument("reports", nargs=-1, required=True, type=ANY_PATH, metavar="BENCH.json...")
@click.option("--html", "html_path", type=ANY_PATH, metavar="FILE", help="Write one self-contained HTML page.")
@click.option("--markdown", "markdown_path", type=ANY_PATH, metavar="FILE", help="Write Markdown.")
@click.option("--csv", "csv_path", type=ANY_PATH, metavar="FILE", help="Write one line per row, every figure a column.")
@click.option(
    "--require",
    metavar="EXPRESSION",
    help='What an engine must keep, such as "p99_ms<=33 and miou>=0.68 and size_mb<=20". Exit 3 when none does on some '
    "device, when it was not measured, or when noise could turn the verdict.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--open", "shows", is_flag=True, help="Show the page of --html when it is written.")
@click.option("--title", default="edgeseg report", show_default=True, help="Of the HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON instead of tables.")
def command(
    reports: tuple[Path, ...],
    html_path: Path | None,
    markdown_path: Path | None,
    csv_path: Path | None,
    require: str | None,
    force: bool,
    shows: bool,
    title: str,
    as_json: bool,
) -> None:
    """Put what edgeseg bench measured, on one device or several, into one report and decide what to deploy.

    Needs no PyTorch; --html needs the extra edgeseg[report]. A FILE of - is standard output.
    """
    from edgeseg.decide.entries import read_runs
    from edgeseg.store.files import check_outputs

    check_outputs(list(filter(None, (html_path, markdown_path, csv_path))), force=force, inputs=reports)
    require_page(html_path, shows)
    code = write_reports(read_runs(reports), html_path, markdown_path, csv_path, require, title, as_json)
    if shows and html_path is not None:
        show(html_path)
    sys.exit(code)


def require_page(html_path: Path | None, shows: bool) -> None:
    """Refuse, before the work, to show a page that no file will hold."""
    from edgeseg.store.files import is_stream

    if shows and (html_path is None or is_stream(html_path)):
        raise SpecError("--open shows the page of --html; give --html a file, too")


def write_reports(
    runs: tuple[Run, ...],
    html_path: Path | None,
    markdown_path: Path | None,
    csv_path: Path | None,
    require: str | None,
    title: str,
    as_json: bool,
    failed: Sequence[tuple[str, str]] = (),
    *,
    tables: bool = True,
) -> int:
    """Decide, write the files asked for, print the result, and return the exit code: 3 when ``require`` is not met, or when
    another run could say something else, whether anything was required or not.

    ``failed``: engines that were never measured, and why; those the runs could not measure are added. ``tables``: print the
    decision.
    """
    from edgeseg.decide.entries import failed_measurements, merge
    from edgeseg.decide.requirement import Requirement
    from edgeseg.decide.verdict import decide
    from edgeseg.report import plain
    from edgeseg.report.decision import decision_of
    from edgeseg.store.documents import write_text
    from edgeseg.store.files import is_stdout

    files = list(filter(None, (html_path, markdown_path, csv_path)))
    printed = [path for path in files if is_stdout(path)]
    if len(printed) + as_json > 1:
        raise SpecError("only one of --json and the files given as - can be printed; give the others a name")
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
        print_json(decision_of(report, verdicts, failed))
    else:
        if tables and not printed:
            console = result_console()
            console.print(plain.terminal(verdicts, failed, width=console.width))
        for path in files:
            if path not in printed:
                echo(f"written: {path}", err=bool(printed))
    answers = {verdict.answer for verdict in verdicts}
    return 3 if "cannot tell" in answers or (require is not None and answers != {"deploy"}) else 0
