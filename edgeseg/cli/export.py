"""``edgeseg export``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeseg.cli.output import echo, print_json
from edgeseg.cli.parameters import ANY_PATH, ENGINE


@click.command("export", short_help="Write an engine as another host takes it.")
@click.argument("folder", type=ENGINE, metavar="ENGINE_DIR")
@click.option(
    "--to",
    "host",
    type=click.Choice(("triton", "hub", "deepness", "deepstream", "isaac-ros", "jetson-inference")),
    required=True,
    help="The host.",
)
@click.option("--output", type=ANY_PATH, help="Folder to write.  [default: ENGINE_DIR-HOST]")
@click.option("--license", "licence", metavar="ID", help="hub: licence of the weights, such as apache-2.0.")
@click.option("--picture", type=ANY_PATH, metavar="IMAGE", help="hub: an image to show with its mask.")
@click.option(
    "--resolution", "resolution_cm", type=float, metavar="CM", help="deepness: of the training images, per pixel."
)
@click.option("--force", is_flag=True, help="Replace a folder that was exported before.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    folder: Path,
    host: str,
    output: Path | None,
    licence: str | None,
    picture: Path | None,
    resolution_cm: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the engine in ENGINE_DIR as HOST takes it: a folder with a README that says how it is started.

    triton: a model repository of NVIDIA's Triton. hub: a folder to upload to the Hugging Face hub, with a model card.
    deepness: a model for the QGIS plug-in. deepstream: a configuration for nvinfer and its graph.
    isaac-ros: a launch file, its parameters and a graph. jetson-inference: a graph, labels and colours for segnet.
    """
    from edgeseg.handover.folder import export_engine, next_step

    beside = folder if folder.name not in ("", "..") else folder.resolve()
    target = output or Path(f"{beside}-{host}")
    listing = export_engine(
        folder, host, target, licence=licence, picture=picture, resolution_cm=resolution_cm, force=force
    )
    if as_json:
        print_json(listing)
        return
    echo(f"written: {target} ({len(listing.files)} files)")
    echo(f"next: {next_step(host, target)}")
