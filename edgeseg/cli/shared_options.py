"""Options that several verbs take: which model, and how a backend builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args

import click

from edgeseg.cli.parameters import NamesType, NumbersType, parse_key_values
from edgeseg.spec import ChannelOrder, ModelRequest, Task

P = ParamSpec("P")
R = TypeVar("R")


def model_options(command: Callable[P, R]) -> Callable[..., R]:
    """Add the options that say which model; the command gets them as ``model``, one :class:`ModelRequest`."""

    @click.option(
        "--arch",
        help="unet, unetplusplus, manet, linknet, fpn, pspnet, deeplabv3, deeplabv3plus, pan, upernet, "
        "segformer or dpt.  [default: what the checkpoint says]",
    )
    @click.option("--encoder", help="SMP encoder; tu-NAME for timm's.  [default: the checkpoint's, else resnet34]")
    @click.option(
        "--weights",
        metavar="PATH|imagenet|random",
        help="Checkpoint (.safetensors, .pt, .pth, .ckpt) or save_pretrained folder.  "
        "[default: the demo model of --arch]",
    )
    @click.option("--weights-key", help="Where the state dict is in a checkpoint with several, such as state_dict_ema.")
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
    @click.option(
        "--mean", type=NumbersType(), help="Of pixels scaled to 0..1.  [default: the checkpoint's or encoder's]"
    )
    @click.option(
        "--std", type=NumbersType(), help="Of pixels scaled to 0..1.  [default: the checkpoint's or encoder's]"
    )
    @click.option(
        "--channel-order", type=click.Choice(get_args(ChannelOrder)), help="Order the network was trained with."
    )
    @wraps(command)
    def with_model(
        arch: str | None,
        encoder: str | None,
        weights: str | None,
        weights_key: str | None,
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
        *args: P.args,
        **others: P.kwargs,
    ) -> R:
        others["model"] = ModelRequest(
            arch=arch,
            encoder=encoder,
            weights=weights,
            weights_key=weights_key,
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
        )
        return command(*args, **others)

    return with_model


def backend_options(command: Callable[P, R]) -> Callable[..., R]:
    """Add the backend's own settings; the command gets them as ``options``, a dict."""

    @click.option(
        "--backend-option",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Setting of the backend, such as threads=2; repeatable.",
    )
    @click.option("--sm", help="Compute capabilities for tensorrt-rtx, such as 86,89,120; one engine holds them all.")
    @wraps(command)
    def with_options(settings: tuple[str, ...], sm: str | None, *args: P.args, **others: P.kwargs) -> R:
        options: dict[str, Any] = parse_key_values("--backend-option", settings)
        if sm is not None:
            options["sm"] = sm
        others["options"] = options
        return command(*args, **others)

    return with_options
