"""``edgeseg bench``."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from edgeseg.arguments import request_of
from edgeseg.cli.output import console_reporter, echo, print_json, result_console, show
from edgeseg.cli.parameters import ANY_PATH, ENGINE
from edgeseg.cli.shared_options import request_options
from edgeseg.errors import SpecError
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest
from edgeseg.evaluate.bench import BenchRequest, run_bench


@click.command("bench", short_help="Measure engines: latency, memory, power, profile, accuracy.")
@click.argument("engines", nargs=-1, required=True, type=ENGINE, metavar="ENGINE_DIR...")
@request_options(of=BenchRequest, into="speed")
@request_options(of=AccuracyRequest, into="accuracy")
@click.option("--json", "json_path", metavar="FILE", type=ANY_PATH, help="Write the report there; - prints it.")
@click.option("--html", "html_path", metavar="FILE", type=ANY_PATH, help="Write what edgeseg report --html would, too.")
@click.option(
    "--require",
    metavar="EXPRESSION",
    help='What an engine must keep, such as "p99_ms<=33 and miou>=0.68", as in edgeseg report. Exit 3 when none does.',
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--open", "shows", is_flag=True, help="Show the page of --html when it is written.")
def command(
    engines: tuple[Path, ...],
    speed: dict[str, Any],
    accuracy: dict[str, Any],
    json_path: Path | None,
    html_path: Path | None,
    require: str | None,
    force: bool,
    shows: bool,
) -> None:
    """Measure engines beside the PyTorch model they came from, in turns, so that drift hits all alike.

    Latency is end to end: decoded image in memory to mask in memory. Counts are comma-separated: --batch
    1,4,8. An engine that fails does not stop the others; it is named, and the exit code is 1.

    One command from engines to a page and an answer: --html and --require. --html needs the extra edgeseg[report].
    """
    from edgeseg.cli.report import require_page, write_reports
    from edgeseg.decide.entries import Run
    from edgeseg.decide.requirement import Requirement
    from edgeseg.evaluate.results import write_report
    from edgeseg.store.engine import engine_paths
    from edgeseg.store.files import check_outputs, is_stdout, is_stream

    require_page(html_path, shows)
    to_stdout = json_path is not None and is_stdout(json_path)
    outputs = [path for path in (json_path, html_path) if path is not None]
    if outputs:
        read = [path for folder in engines for path in engine_paths(folder)]
        check_outputs(outputs, force=force, inputs=[*read, *filter(None, (speed["weights"], accuracy["data"]))])
    if to_stdout and (require is not None or (html_path is not None and is_stdout(html_path))):
        raise SpecError(
            "only one thing can be printed; give --json a file, or use edgeseg report for --html and --require"
        )
    if require is not None:
        Requirement.parse(require)
    if html_path is not None:
        from edgeseg.report.html import require_templates

        require_templates()
    request = dataclasses.replace(
        request_of(BenchRequest, "bench", speed), engines=engines, command=shlex.join(["edgeseg", *sys.argv[1:]])
    )
    scratch = tempfile.TemporaryDirectory(prefix="edgeseg-bench-") if html_path is not None else nullcontext("")
    with scratch as folder:
        images = None if html_path is None else Path(folder) / "images"
        if json_path is not None and not is_stream(json_path):
            images = json_path.with_name(f"{json_path.stem}-images")
        judging = None
        if accuracy["data"] is not None:
            judging = dataclasses.replace(request_of(AccuracyRequest, "bench", accuracy), images_folder=images)
        with console_reporter() as reporter:
            report = run_bench(request, reporter, judging)
        if json_path is not None and not to_stdout:
            write_report(json_path, report)
            echo(f"report: {json_path}", err=True)
        if to_stdout:
            print_json(report)
        elif html_path is None or not is_stdout(html_path):
            from edgeseg.evaluate.bench_table import bench_summary

            result_console().print(bench_summary(report))
        decided = 0
        if html_path is not None or require is not None:
            beside = None if images is None else images.parent
            run = Run(report, beside, "" if json_path is None else json_path.name)
            decided = write_reports(
                (run,), html_path, None, None, require, "edgeseg bench", as_json=False, tables=require is not None
            )
    if shows and html_path is not None:
        show(html_path)
    sys.exit(1 if report.failed else decided if require is not None else 0)
