"""``edgeseg build``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from edgeseg.api import MIN_INT8_SHARE, BuildRequest
from edgeseg.backends import BACKENDS
from edgeseg.cli.parameters import ANY_PATH, BatchType, NamesType, NumbersType, SizeType, parse_key_values
from edgeseg.spec import (
    PRECISIONS,
    BatchRange,
    ChannelOrder,
    FitPolicy,
    ModelRequest,
    OutputKind,
    OutputSpec,
    Precision,
    Task,
)


@click.command("build", short_help="Convert, quantize, build and verify an engine.")
@click.option(
    "--arch",
    help="unet, unetplusplus, manet, linknet, fpn, pspnet, deeplabv3, deeplabv3plus, pan, upernet, "
    "segformer or dpt.  [default: what the checkpoint says]",
)
@click.option("--precision", type=click.Choice(PRECISIONS), default="int8", show_default=True)
@click.option("--encoder", help="SMP encoder; tu-NAME for timm's.  [default: the checkpoint's, else resnet34]")
@click.option(
    "--weights",
    metavar="PATH|imagenet|random",
    help="Checkpoint (.safetensors, .pt, .pth, .ckpt) or save_pretrained folder.  [default: the demo model of --arch]",
)
@click.option("--classes", type=int, help="Output channels.  [default: what the checkpoint says]")
@click.option("--class-names", type=NamesType(), default=(), help="One name per class.")
@click.option("--task", type=click.Choice(get_args(Task)), help="[default: binary for 1 class, else multiclass]")
@click.option("--in-channels", type=int, help="Image channels.  [default: 3]")
@click.option("--activation", help="SMP's activation argument: softmax, sigmoid, none, ...")
@click.option(
    "--model-arg",
    "model_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other argument of the SMP constructor, value as JSON; repeatable.",
)
@click.option("--keep-aux", is_flag=True, help="Keep the auxiliary classification head as a second output.")
@click.option("--mean", type=NumbersType(), help="Of pixels scaled to 0..1.  [default: the checkpoint's or encoder's]")
@click.option("--std", type=NumbersType(), help="Of pixels scaled to 0..1.  [default: the checkpoint's or encoder's]")
@click.option("--channel-order", type=click.Choice(get_args(ChannelOrder)), help="Order the network was trained with.")
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
@click.option(
    "--backend-option",
    "backend_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Setting of the backend, such as threads=2; repeatable.",
)
@click.option("--sm", help="Compute capabilities for tensorrt-rtx, such as 86,89,120; one engine holds them all.")
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
    arch: str | None,
    precision: Precision,
    encoder: str | None,
    weights: str | None,
    classes: int | None,
    class_names: tuple[str, ...],
    task: Task | None,
    in_channels: int | None,
    activation: str | None,
    model_args: tuple[str, ...],
    keep_aux: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    channel_order: ChannelOrder | None,
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
    backend_options: tuple[str, ...],
    sm: str | None,
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
    options = parse_key_values("--backend-option", backend_options)
    if sm is not None:
        options["sm"] = sm
    request = BuildRequest(
        model=ModelRequest(
            arch=arch,
            encoder=encoder,
            weights=weights,
            classes=classes,
            class_names=class_names,
            task=task,
            in_channels=in_channels,
            activation=activation,
            model_args=parse_key_values("--model-arg", model_args),
            keep_aux=keep_aux,
            mean=mean,
            std=std,
            channel_order=channel_order,
        ),
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
    from edgeseg.pipeline import run_build

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
