"""``edgeseg sensitivity``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeseg.arguments import arguments_of
from edgeseg.cli.output import console_reporter, echo, result_console
from edgeseg.cli.parameters import ANY_PATH, ENGINE
from edgeseg.cli.shared_options import argument_names, request_options
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import ModelRequest


@click.command("sensitivity", short_help="What INT8 of each module loses and saves.")
@click.argument("folder", type=ENGINE, metavar="[ENGINE_DIR]", required=False)
@request_options(
    *argument_names(ModelRequest),
    "size",
    "fit",
    "calibration",
    "calibration_method",
    "equalize",
    "calibration_limit",
    "validation",
    "ignore_index",
    "target",
    "scheme",
    "latency_from",
    flags={"validation": "--data"},
)
@click.option("--limit", type=click.IntRange(min=1), default=64, show_default=True, help="Judge on so many images.")
@click.option("--json", "json_path", type=ANY_PATH, help="Write the figures to this file; - is standard output.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(folder: Path | None, given: dict[str, Any], limit: int, json_path: Path | None, force: bool) -> None:
    """Judge INT8 of one module of the network after the other, all others in float.

    The network is that of ENGINE_DIR, with the calibration table in it, or what the options of a build say.

    Says what each loses (agreement with the float network, mIoU where --data has masks/) and what it saves in milliseconds. An
    ended run goes on where it was.
    """
    from edgeseg.store.engine import engine_paths
    from edgeseg.store.files import check_outputs, is_stdout

    request = BuildRequest.of(given) if folder is None else _of_folder(folder, given)
    if json_path is not None:
        check_outputs([json_path], force=force, inputs=[*request.files(), *(engine_paths(folder) if folder else ())])
    from edgeseg.pipeline.sensitivity import run_sensitivity

    with console_reporter() as reporter:
        report = run_sensitivity(request, reporter, limit)
    if json_path is not None:
        from edgeseg.store.documents import write_json

        if is_stdout(json_path):
            from edgeseg.cli.output import print_json

            print_json(report)
            return
        write_json(json_path, report)
    from edgeseg.evaluate.summary import sensitivity_lines, sensitivity_table

    result_console().print(sensitivity_table(report.modules))
    for line in sensitivity_lines(report):
        echo(line)
    if json_path is not None:
        echo(f"figures: {json_path}")


def _of_folder(folder: Path, given: dict[str, Any]) -> BuildRequest:
    """The request for an engine folder's network; of the options only what it is judged on and timed by."""
    from edgeseg.errors import SpecError
    from edgeseg.store.engine import open_engine

    arguments = {argument.name: argument for argument in arguments_of(BuildRequest).values()}
    own = ("validation", "ignore_index", "latency_from")
    asked, default = BuildRequest.of(given), BuildRequest()
    for name, argument in arguments.items():
        if name in given and name not in own and getattr(asked, argument.field) != getattr(default, argument.field):
            raise SpecError(f"{folder} says what its network is; leave out {argument.flag}, or ENGINE_DIR")
    return BuildRequest.of_engine(open_engine(folder), **{name: getattr(asked, name) for name in own})
