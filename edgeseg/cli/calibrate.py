"""``edgeseg calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeseg.cli.output import console_reporter, echo
from edgeseg.cli.parameters import ANY_PATH, PATH_AS_TYPED
from edgeseg.cli.shared_options import argument_names, request_options
from edgeseg.errors import SpecError
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import ModelRequest


@click.command("calibrate", short_help="Make a calibration table by itself.")
@click.argument("images", type=PATH_AS_TYPED, metavar="IMAGES")
@click.option("--output", type=ANY_PATH, required=True, help="The table to write, a .json file.")
@request_options(
    *argument_names(ModelRequest),
    "size",
    "fit",
    "calibration_method",
    "equalize",
    "calibration_limit",
    flags={"calibration_method": "--method", "calibration_limit": "--limit"},
)
@click.option("--force", is_flag=True, help="Replace an existing table.")
def command(given: dict[str, Any], images: str, output: Path, force: bool) -> None:
    """Collect activation ranges over IMAGES (a folder, glob, list file or .npy) into a readable table.

    Give the same model options to `edgeseg build --calibration TABLE.json`: a table of another model is refused.
    """
    from edgeseg.store.files import check_outputs, is_stdout, is_stream

    if output.suffix.lower() != ".json" and not is_stream(output):
        raise SpecError(f"--output is {output}; a table is a .json file, by which --calibration tells it from images")
    request = BuildRequest.of({**given, "calibration": images})
    check_outputs([output], force=force, inputs=request.files())
    from edgeseg.pipeline.calibration import run_calibration

    with console_reporter() as reporter:
        table = run_calibration(request, output, reporter)
    echo(
        f"table: {output} ({len(table.ranges)} tensors, {table.method} over {table.images} images)",
        err=is_stdout(output),
    )
