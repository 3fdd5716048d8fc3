"""``edgeseg build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from edgeseg.backends import BACKENDS
from edgeseg.cli.parameters import ANY_PATH, BatchType, SizeType
from edgeseg.cli.shared_options import backend_options, model_options
from edgeseg.pipeline.request import MIN_INT8_SHARE, BuildRequest
from edgeseg.spec import (
    PRECISIONS,
    BatchRange,
    FitPolicy,
    ModelRequest,
    OutputKind,
    OutputSpec,
    Precision,
)


@click.command("build", short_help="Convert, quantize, build and verify an engine.")
@model_options
@click.option("--precision", type=click.Choice(PRECISIONS), default="int8", show_default=True)
@click.option("--size", type=SizeType(), help="Engine input size.  [default: the model's, else 256x256]")
@click.option("--batch", type=BatchType(), default="1", show_default=True, help="Batch size or range.")
@click.option("--dynamic-size", is_flag=True, help="Accept any size that is a multiple of the model's stride.")
@click.option(
    "--fit",
    type=click.Choice(get_args(FitPolicy)),
    default="resize",
    show_default=True,
    help="How images of another size are brought to the engine's.",
)
@click.option("--output-kind", type=click.Choice(get_args(OutputKind)), default="mask", show_default=True)
@click.option("--confidence", is_flag=True, help="Also return each pixel's probability of its class.")
@click.option("--threshold", type=float, default=0.5, show_default=True, help="For binary and multilabel masks.")
@click.option(
    "--calibration",
    metavar="DIR|GLOB|FILE",
    help="Images for int8: a folder, glob, list file, .npy, or a "
    "finished table (.json).  [default: the demo set, for a demo model only]",
)
@click.option("--calibration-method", help="minmax, moving-average, percentile, entropy or mse.")
@click.option("--calibration-limit", type=int, help="Use at most so many calibration images (a seeded subset).")
@click.option(
    "--validation",
    type=ANY_PATH,
    help="Folder with images/ and, for mIoU, masks/.  [default: images held out of --calibration]",
)
@click.option("--ignore-index", type=int, help="Mask value that counts for nothing.")
@click.option(
    "--target",
    type=click.Choice(("auto", *BACKENDS)),
    default="auto",
    show_default=True,
    help="auto measures the backends installed here and takes the fastest.",
)
@click.option("--scheme", help="Q/DQ scheme.  [default: what is fast on the target here]")
@backend_options
@click.option("--max-drop", type=float, help="Exit 3 when more mIoU is lost (0.01 = one point).")
@click.option("--min-agreement", type=float, help="Exit 3 when a smaller share of pixels agrees with PyTorch.")
@click.option(
    "--min-int8-share",
    type=float,
    default=MIN_INT8_SHARE,
    show_default=True,
    help="Fail when less of the work runs in int8.",
)
@click.option("--output", "folder", type=ANY_PATH, help="Engine folder.  [default: engines/ARCH-ENCODER-PRECISION]")
@click.option("--force", is_flag=True, help="Replace an existing engine folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead of a table.")
def command(
    model: ModelRequest,
    precision: Precision,
    size: tuple[int, int] | None,
    batch: BatchRange,
    dynamic_size: bool,
    fit: FitPolicy,
    output_kind: OutputKind,
    confidence: bool,
    threshold: float,
    calibration: str | None,
    calibration_method: str | None,
    calibration_limit: int | None,
    validation: Path | None,
    ignore_index: int | None,
    target: str,
    scheme: str | None,
    options: dict[str, Any],
    max_drop: float | None,
    min_agreement: float | None,
    min_int8_share: float,
    folder: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert, quantize, build and verify an engine.

    Without --weights the demo model of the architecture is built (unet, fpn, pspnet, deeplabv3plus).
    """
    request = BuildRequest(
        model=model,
        precision=precision,
        size=size,
        batch=batch,
        dynamic_size=dynamic_size,
        fit=fit,
        output=OutputSpec(output_kind, confidence, threshold),
        calibration=calibration,
        calibration_method=calibration_method,
        calibration_limit=calibration_limit,
        validation=validation,
        ignore_index=ignore_index,
        target=target,
        scheme=scheme,
        backend_options=options,
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_int8_share=min_int8_share,
        folder=folder,
        force=force,
    )
    _build_and_print(request, as_json)


def _build_and_print(request: BuildRequest, as_json: bool) -> None:
    from edgeseg.cli.output import console_reporter, print_json
    from edgeseg.pipeline.stages import run_build

    with console_reporter() as reporter:
        engine = run_build(request, model=None, reporter=reporter)
    if as_json:
        print_json(engine.manifest)
        return
    from edgeseg.cli.output import result_console
    from edgeseg.evaluate.summary import build_summary

    result_console().print(build_summary(engine))
    if engine.manifest.engine is None:
        target = engine.manifest.target
        click.echo(
            f"portable folder: {engine.folder}, no {target} engine yet: it is built on the device that runs it\n"
            f"on the device: edgeseg compile {engine.folder} --target {target}"
        )
        return
    from edgeseg.backends import get_backend

    if not get_backend(engine.manifest.target).status().available:
        click.echo(
            f"engine: {engine.folder}, built here for {engine.manifest.target}; it runs where there is a GPU for it"
        )
        return
    example: Any = "IMAGE..."
    click.echo(f"engine: {engine.folder}\nrun it: edgeseg run {engine.folder} {example} --output out --overlay")
