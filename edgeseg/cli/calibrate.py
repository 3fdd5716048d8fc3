"""``edgeseg calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from edgeseg.cli.parameters import ANY_PATH, SizeType
from edgeseg.cli.shared_options import model_options
from edgeseg.pipeline.request import BuildRequest
from edgeseg.spec import FitPolicy, ModelRequest


@click.command("calibrate", short_help="Make a calibration table by itself.")
@click.argument("images", metavar="IMAGES")
@click.option("--output", type=ANY_PATH, required=True, help="The table to write, a .json file.")
@model_options
@click.option("--size", type=SizeType(), help="Engine input size.  [default: the model's, else 256x256]")
@click.option(
    "--fit",
    type=click.Choice(get_args(FitPolicy)),
    default="resize",
    show_default=True,
    help="How images of another size are brought to the engine's.",
)
@click.option("--method", help="minmax, moving-average, percentile, entropy or mse.")
@click.option("--limit", type=int, help="Use at most so many images (a seeded subset).")
@click.option("--force", is_flag=True, help="Replace an existing table.")
def command(
    model: ModelRequest,
    images: str,
    output: Path,
    size: tuple[int, int] | None,
    fit: FitPolicy,
    method: str | None,
    limit: int | None,
    force: bool,
) -> None:
    """Collect activation ranges over IMAGES (a folder, glob, list file or .npy) into a readable table.

    Give the same model options to `edgeseg build --calibration TABLE.json`: a table of another model is refused.
    """
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists; give --force to replace it, or another --output")
    request = BuildRequest(
        model=model,
        size=size,
        fit=fit,
        calibration=images,
        calibration_method=method,
        calibration_limit=limit,
    )
    from edgeseg.cli.output import console_reporter
    from edgeseg.pipeline.stages import run_calibration

    with console_reporter() as reporter:
        table = run_calibration(request, output, reporter)
    click.echo(f"table: {output} ({len(table.ranges)} tensors, {table.method} over {table.images} images)")
