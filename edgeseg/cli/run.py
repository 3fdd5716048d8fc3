"""``edgeseg run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import click

from edgeseg.arguments import INT32, number
from edgeseg.cli.output import echo, print_json, show
from edgeseg.cli.parameters import ANY_PATH, PLACE, BandsType, KindType, NodataType
from edgeseg.errors import SpecError
from edgeseg.spec import FitPolicy

if TYPE_CHECKING:
    from edgeseg.runtime.averaging import Augmentation
    from edgeseg.runtime.raster import ProbabilityType


@click.command("run", short_help="Segment images, folders, videos or a camera.")
@click.argument("folder", type=ANY_PATH, metavar="ENGINE_DIR")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--output", type=PLACE, required=True, help="Folder for masks, overlays and videos.")
@click.option("--overlay", is_flag=True, help="Also write colour overlays with a legend.")
@click.option(
    "--alpha",
    type=KindType(number(0, 1, "an opacity from 0 to 1")),
    default="0.5",
    show_default=True,
    help="Opacity of the overlay.",
)
@click.option("--frame-masks", is_flag=True, help="Also write the index mask of every video frame.")
@click.option(
    "--fit",
    type=click.Choice(get_args(FitPolicy)),
    help="How images of another size are brought to the engine's.  [default: as built]",
)
@click.option(
    "--tile-overlap",
    type=KindType(number(0, 0.9, "a share from 0 to 0.9")),
    default="0.25",
    show_default=True,
    help="Share of a tile that its neighbour covers too, with --fit tile.",
)
@click.option(
    "--tta",
    type=click.Choice(("flips", "d4")),
    help="Average the probabilities of the image and its mirror images (flips: 4 runs), of quarter turns too (d4: 8 runs).",
)
@click.option(
    "--with",
    "ensemble",
    multiple=True,
    type=ANY_PATH,
    metavar="ENGINE_DIR",
    help="Average the probabilities with those of this engine; repeatable.",
)
@click.option(
    "--raster/--no-raster",
    default=None,
    help="Segment TIFF and JPEG 2000 files window by window, and keep where they lie; or never.  [default: those that are "
    "georeferenced or too large to be read whole]",
)
@click.option("--bands", type=BandsType(), help="Bands of a raster, from 1, in the model's order, such as 4,3,2.")
@click.option("--overview", type=click.IntRange(2, INT32), help="Read the overview that is so many times smaller.")
@click.option(
    "--resolution",
    type=KindType(number(1e-9, 1e9, "the size of a pixel on the ground, such as 0.5")),
    help="Ground size of a pixel, in a raster's own units: coarser than its own, as the model was trained.",
)
@click.option(
    "--nodata",
    type=NodataType(),
    help="Value of a raster's pixels without data, in place of the one it names; none: no value is.",
)
@click.option(
    "--probabilities",
    type=click.Choice(("uint8", "float32")),
    help="Also write a raster's probabilities, a band per class; uint8: 254 is 1.",
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
    overlay: bool,
    alpha: float,
    frame_masks: bool,
    fit: FitPolicy | None,
    tile_overlap: float,
    tta: Augmentation | None,
    ensemble: tuple[Path, ...],
    raster: bool | None,
    bands: tuple[int, ...] | None,
    overview: int | None,
    resolution: float | None,
    nodata: float | Literal["none"] | None,
    probabilities: ProbabilityType | None,
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

    With --executor ray images go to the workers of a cluster, INPUT and --output may be URLs (s3://bucket/photos), and a second
    run does only what is missing.
    """
    from edgeseg.runtime.raster import RasterOptions

    rasters = RasterOptions(
        use=raster,
        bands=bands,
        overview=overview,
        resolution=resolution,
        nodata=nodata,
        probabilities=probabilities,
    )
    has_urls = any("://" in str(place) for place in (*inputs, output))
    if executor == "local" and (jobs is not None or ray_address is not None):
        raise click.UsageError(
            "--jobs and --ray-address go with --executor ray, which makes processes of one machine too"
        )
    if executor == "local" and has_urls:
        raise click.UsageError("URLs go with --executor ray, on one machine too")
    if shows and "://" in str(output):
        raise click.UsageError("--open shows what is on this machine; leave it out, or give a folder as --output")
    if executor == "ray":
        from edgeseg.cluster.run import run_on_cluster
        from edgeseg.cluster.worker import Settings

        summary = run_on_cluster(
            folder,
            inputs,
            output,
            Settings(fit, tile_overlap, overlay, alpha, tta, rasters),
            ensemble=ensemble,
            workers=jobs,
            address=ray_address,
            recompile=recompile,
            limit=limit,
            overwrite=force,
        )
    else:
        from edgeseg.runtime.run import has_rasters, run_inputs, streams_of
        from edgeseg.runtime.segmenter import load

        streams = streams_of(inputs, rasters)
        if fit not in (None, "tile") and has_rasters(inputs, rasters):
            raise SpecError(f"rasters are cut into tiles; leave out --fit {fit}, or give --no-raster")
        with load(
            folder,
            fit=fit,
            tile_overlap=tile_overlap,
            recompile=recompile,
            streams=streams,
            tta=tta,
            ensemble=ensemble,
        ) as segmenter:
            summary = run_inputs(
                segmenter,
                inputs,
                output,
                overlay=overlay,
                alpha=alpha,
                frame_masks=frame_masks,
                limit=limit,
                overwrite=force,
                rasters=rasters,
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
