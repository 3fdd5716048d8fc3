"""``edgeseg calibrate``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeseg.api import BuildRequest
from edgeseg.cli.parameters import ANY_PATH, NumbersType, SizeType, parse_key_values
from edgeseg.spec import ChannelOrder, FitPolicy, ModelRequest, Task


@click.command("calibrate", short_help="Make a calibration table by itself.")
@click.argument("images", metavar="IMAGES")
@click.option("--output", type=ANY_PATH, required=True, help="The table to write, a .json file.")
@click.option("--arch", help="As for build.")
@click.option("--encoder", help="As for build.")
@click.option("--weights", metavar="PATH|imagenet|random", help="As for build.")
@click.option("--classes", type=int, help="As for build.")
@click.option("--task", type=click.Choice(("multiclass", "binary", "multilabel")), help="As for build.")
@click.option("--in-channels", type=int, help="As for build.")
@click.option("--activation", help="As for build.")
@click.option("--model-arg", "model_args", multiple=True, metavar="KEY=VALUE", help="As for build.")
@click.option("--mean", type=NumbersType(), help="As for build.")
@click.option("--std", type=NumbersType(), help="As for build.")
@click.option("--channel-order", type=click.Choice(("rgb", "bgr")), help="As for build.")
@click.option("--size", type=SizeType(), help="As for build.")
@click.option("--fit", type=click.Choice(("resize", "letterbox", "tile")), default="resize", show_default=True)
@click.option("--method", help="minmax, moving-average, percentile, entropy or mse.")
@click.option("--limit", type=int, help="Use at most so many images (a seeded subset).")
@click.option("--force", is_flag=True, help="Replace an existing table.")
def command(
    images: str,
    output: Path,
    arch: str | None,
    encoder: str | None,
    weights: str | None,
    classes: int | None,
    task: Task | None,
    in_channels: int | None,
    activation: str | None,
    model_args: tuple[str, ...],
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    channel_order: ChannelOrder | None,
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
        model=ModelRequest(
            arch=arch,
            encoder=encoder,
            weights=weights,
            classes=classes,
            task=task,
            in_channels=in_channels,
            activation=activation,
            model_args=parse_key_values("--model-arg", model_args),
            mean=mean,
            std=std,
            channel_order=channel_order,
        ),
        size=size,
        fit=fit,
        calibration=images,
        calibration_method=method,
        calibration_limit=limit,
    )
    from edgeseg.cli.output import console_reporter
    from edgeseg.pipeline import run_calibration

    with console_reporter() as reporter:
        table = run_calibration(request, output, reporter)
    click.echo(f"table: {output} ({len(table.ranges)} tensors, {table.method} over {table.images} images)")
