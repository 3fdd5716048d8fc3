"""``edgeseg bench``."""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import click

from edgeseg.arguments import INT32, SIZE, number, whole
from edgeseg.cli.output import console_reporter, echo, print_json, result_console, show
from edgeseg.cli.parameters import ANY_PATH, CountsType, KindType
from edgeseg.errors import SpecError
from edgeseg.evaluate.results import BASELINES, Layout, Resolution


@click.command("bench", short_help="Measure engines: latency, memory, power, profile, accuracy.")
@click.argument("engines", nargs=-1, required=True, type=ANY_PATH, metavar="ENGINE_DIR...")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice((*BASELINES, "none")),
    help="What to compare with, on the engine's device; repeatable, the first counts.  [default: pytorch]",
)
@click.option("--weights", type=ANY_PATH, help="The checkpoint, if it is no longer where the engine was built from.")
@click.option("--batch", "batches", type=CountsType(), default="1", show_default=True, help="Images of one call.")
@click.option("--threads", type=CountsType(), help="Threads of an engine.  [default: its own]")
@click.option(
    "--streams",
    type=CountsType(),
    default="1",
    show_default=True,
    help="Callers at the same time, among whom a CPU engine divides its threads.",
)
@click.option(
    "--duration-s",
    type=KindType(number(0, 86400, "seconds, from 0 to 86400")),
    default="3.0",
    show_default=True,
    help="Of each engine in each setting; 0: no latency.",
)
@click.option("--source-size", type=KindType(SIZE), help="Size of the images given.  [default: the engine's]")
@click.option(
    "--fresh-processes", type=click.IntRange(0, 100), default=3, show_default=True, help="For cold start and memory."
)
@click.option("--profile", is_flag=True, help="Also measure where the time goes, by module of the model.")
@click.option("--data", type=ANY_PATH, help="Labelled (or plain) images to judge accuracy on.")
@click.option(
    "--layout", type=click.Choice(get_args(Layout)), default="images-masks", show_default=True, help="Of --data."
)
@click.option("--split", default="val", show_default=True, help="Of --data, where the layout has splits.")
@click.option("--ignore-index", type=KindType(whole(-INT32, INT32, 255)), help="Mask value that counts for nothing.")
@click.option("--label-map", metavar="V=C,...", help="Mask value to class, such as 7=0,8=1,255=ignore.")
@click.option(
    "--resolution",
    type=click.Choice(get_args(Resolution)),
    default="source",
    show_default=True,
    help="Judge masks at this size.",
)
@click.option("--limit", type=click.IntRange(1, INT32), help="Judge so many images, evenly spread.")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes that judge images.")
@click.option(
    "--worst",
    type=click.IntRange(0, INT32),
    default=5,
    show_default=True,
    help="Worst images to save beside the report.",
)
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
    baselines: tuple[str, ...],
    weights: Path | None,
    batches: tuple[int, ...],
    threads: tuple[int, ...] | None,
    streams: tuple[int, ...],
    duration_s: float,
    source_size: tuple[int, int] | None,
    fresh_processes: int,
    profile: bool,
    data: Path | None,
    layout: str,
    split: str,
    ignore_index: int | None,
    label_map: str | None,
    resolution: Resolution,
    limit: int | None,
    jobs: int,
    worst: int,
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
    from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest
    from edgeseg.evaluate.accuracy.layouts import parse_label_map
    from edgeseg.evaluate.bench import BenchRequest, run_bench
    from edgeseg.evaluate.results import write_report
    from edgeseg.store.artifacts import engine_paths
    from edgeseg.store.outputs import check_outputs, is_stdout, is_stream

    require_page(html_path, shows)
    to_stdout = json_path is not None and is_stdout(json_path)
    outputs = [path for path in (json_path, html_path) if path is not None]
    if outputs:
        read = [path for folder in engines for path in engine_paths(folder)]
        check_outputs(outputs, force=force, inputs=[*read, *filter(None, (weights, data))])
    if to_stdout and (require is not None or (html_path is not None and is_stdout(html_path))):
        raise SpecError(
            "only one thing can be printed; give --json a file, or use edgeseg report for --html and --require"
        )
    if require is not None:
        Requirement.parse(require)
    if html_path is not None:
        from edgeseg.report.html import require_templates

        require_templates()
    request = BenchRequest(
        engines=engines,
        baselines=tuple(b for b in baselines or ("pytorch",) if b != "none"),
        weights=weights,
        batches=batches,
        threads=threads or (None,),
        streams=streams,
        duration_s=duration_s,
        source_size=source_size,
        fresh_processes=fresh_processes,
        profile=profile,
        command=shlex.join(["edgeseg", *sys.argv[1:]]),
    )
    scratch = tempfile.TemporaryDirectory(prefix="edgeseg-bench-") if html_path is not None else nullcontext("")
    with scratch as folder:
        images = None if html_path is None else Path(folder) / "images"
        if json_path is not None and not is_stream(json_path):
            images = json_path.with_name(f"{json_path.stem}-images")
        accuracy = None
        if data is not None:
            accuracy = AccuracyRequest(
                data=data,
                layout=layout,
                split=split,
                ignore_index=ignore_index,
                label_map=None if label_map is None else parse_label_map(label_map),
                limit=limit,
                resolution=resolution,
                jobs=jobs,
                worst=worst,
                images_folder=images,
            )
        with console_reporter() as reporter:
            report = run_bench(request, reporter, accuracy)
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
