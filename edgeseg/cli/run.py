"""``edgeseg run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from edgeseg.arguments import INT32, request_of
from edgeseg.cli.output import echo, print_json, show
from edgeseg.cli.parameters import ENGINE, PATH_AS_TYPED, PLACE
from edgeseg.cli.shared_options import request_options
from edgeseg.runtime.raster import RasterOptions
from edgeseg.runtime.run import RunSettings, run_inputs, streams_of

_LIVE_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "rtp://", "srt://", "udp://", "tcp://")


@click.command("run", short_help="Segment images, folders, videos or a camera.")
@click.argument("folder", type=ENGINE, metavar="ENGINE_DIR")
@click.argument("inputs", nargs=-1, type=PATH_AS_TYPED, required=True, metavar="INPUT...")
@click.option("--output", type=PLACE, required=True, help="Folder for masks, overlays and videos.")
@request_options(of=RunSettings)
@request_options(
    "raster", "bands", "overview", "resolution", "nodata", "probabilities", of=RasterOptions, into="rasters"
)
@click.option("--frame-masks", is_flag=True, help="Also write the index mask of every video frame.")
@click.option(
    "--with",
    "ensemble",
    multiple=True,
    type=ENGINE,
    metavar="ENGINE_DIR",
    help="Average the probabilities with those of this engine; repeatable.",
)
@click.option("--limit", type=click.IntRange(1, INT32), help="Stop after so many images or frames.")
@click.option("--force", is_flag=True, help="Replace files that exist in --output.")
@click.option("--open", "shows", is_flag=True, help="Show the result when it is done.")
@click.option("--recompile", is_flag=True, help="Build the engine again if it was built for another device or version.")
@click.option("--executor", type=click.Choice(("local", "ray")), default="local", show_default=True)
@click.option(
    "--ray-address",
    help="Of a Ray cluster; local for one of this run's own.  [default: RAY_ADDRESS, else one on this machine, else local]",
)
@click.option(
    "--jobs", type=click.IntRange(1, 65536), help="Workers on the cluster.  [default: as many as it has room for]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folder: Path,
    inputs: tuple[str, ...],
    output: str | Path,
    given: dict[str, Any],
    rasters: dict[str, Any],
    frame_masks: bool,
    ensemble: tuple[Path, ...],
    limit: int | None,
    force: bool,
    shows: bool,
    recompile: bool,
    executor: Literal["local", "ray"],
    ray_address: str | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Segment images, folders, globs, video files or a camera (its index) with ENGINE_DIR.

    Masks are PNG files of class indices with a palette: read them with Pillow; OpenCV returns the palette's colours.

    With --executor ray images go to the workers of a cluster, INPUT and --output may be URLs (s3://bucket/photos), and a second
    run does only what is missing.
    """
    settings = RunSettings(rasters=request_of(RasterOptions, "run", rasters), **given)
    has_urls = any("://" in str(place) for place in (*inputs, output))
    if executor == "local" and (jobs is not None or ray_address is not None):
        raise click.UsageError(
            "--jobs and --ray-address go with --executor ray, which makes processes of one machine too"
        )
    if executor == "ray" and settings.threads is not None:
        raise click.UsageError(
            "--threads goes with a run on this machine; on a cluster --jobs says how many workers there are"
        )
    live = next((place for place in inputs if place.lower().startswith(_LIVE_SCHEMES)), None)
    if live is not None:
        raise click.UsageError(
            f"{live} is a stream of the network, which is not opened here; in Python give edgeseg.stream the frames of "
            "cv2.VideoCapture, and edgeseg.load channel_order='bgr'"
        )
    if executor == "local" and has_urls:
        raise click.UsageError("URLs go with --executor ray, on one machine too")
    if shows and "://" in str(output):
        raise click.UsageError("--open shows what is on this machine; leave it out, or give a folder as --output")
    if executor == "ray":
        from edgeseg.cluster.run import run_on_cluster

        summary = run_on_cluster(
            folder,
            inputs,
            output,
            settings,
            ensemble=ensemble,
            workers=jobs,
            address=ray_address,
            recompile=recompile,
            limit=limit,
            overwrite=force,
        )
    else:
        from edgeseg.runtime.segmenter import load

        with load(
            folder,
            fit=settings.fit,
            tile_overlap=settings.tile_overlap,
            recompile=recompile,
            streams=streams_of(inputs, settings),
            threads=settings.threads,
            tta=settings.tta,
            ensemble=ensemble,
        ) as segmenter:
            summary = run_inputs(
                segmenter,
                inputs,
                output,
                settings,
                frame_masks=frame_masks,
                limit=limit,
                overwrite=force,
            )
    if as_json:
        print_json(summary)
    else:
        for path in summary.written:
            echo(path)
    if shows and summary.written:
        show(Path(summary.written[0]) if len(summary.written) == 1 else Path(output))
    if summary.failed:
        sys.exit(1)
