"""Segmentation-aware graph rewrites, one a file, in the order they run.

Each keeps every output equal, for every input, up to float32 rounding; each states what it needs and what it
leaves. They come after onnxsim, which has folded constants and batch normalization by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeseg.convert.rewrites import (
    attention_scale,
    channel_swap,
    class_token,
    compose_concat,
    compose_conv,
    conv_concat,
    conv_resize,
    conv_sum,
    global_pool,
    layout,
    linear_conv,
    qkv,
    readout,
    reshape_channels,
    reshape_twice,
    resize_scales,
    resize_sum,
    shape_spans,
    slices,
    stacked_sum,
    subpixel,
    token_slices,
    tokens,
)
from edgeseg.convert.rewrites.graph import tidy
from edgeseg.errors import ExportError


@dataclass(frozen=True)
class Rewrite:
    """A graph rewrite.

    Attributes:
        name: its file's name, for the report.
        apply: changes the model in place and returns how often it applied.
        leaves: postcondition: how many of its patterns stand; 0 after ``apply``.
    """

    name: str
    apply: Callable[[ir.Model], int]
    leaves: Callable[[ir.Model], int]


REWRITES: tuple[Rewrite, ...] = (
    Rewrite("channel_swap", channel_swap.apply, channel_swap.leaves),
    Rewrite("global_pool", global_pool.apply, global_pool.leaves),
    Rewrite("stacked_sum", stacked_sum.apply, stacked_sum.leaves),
    Rewrite("class_token", class_token.apply, class_token.leaves),
    Rewrite("token_slices", token_slices.apply, token_slices.leaves),
    Rewrite("slices", slices.apply, slices.leaves),
    Rewrite("qkv", qkv.apply, qkv.leaves),
    Rewrite("readout", readout.apply, readout.leaves),
    Rewrite("linear_conv", linear_conv.apply, linear_conv.leaves),
    Rewrite("attention_scale", attention_scale.apply, attention_scale.leaves),
    Rewrite("tokens", tokens.apply, tokens.leaves),
    Rewrite("reshape_twice", reshape_twice.apply, reshape_twice.leaves),
    Rewrite("layout", layout.apply, layout.leaves),
    Rewrite("reshape_channels", reshape_channels.apply, reshape_channels.leaves),
    Rewrite("shape_spans", shape_spans.apply, shape_spans.leaves),
    Rewrite("resize_scales", resize_scales.apply, resize_scales.leaves),
    Rewrite("resize_sum", resize_sum.apply, resize_sum.leaves),
    Rewrite("conv_sum", conv_sum.apply, conv_sum.leaves),
    Rewrite("conv_resize", conv_resize.apply, conv_resize.leaves),
    Rewrite("conv_concat", conv_concat.apply, conv_concat.leaves),
    Rewrite("compose_concat", compose_concat.apply, compose_concat.leaves),
    Rewrite("compose_conv", compose_conv.apply, compose_conv.leaves),
    Rewrite("subpixel", subpixel.apply, subpixel.leaves),
)
"""The rewrites and their order: what uncovers a pattern comes before what looks for it."""

Check = Callable[[ir.Model, ir.Model, Rewrite], None]


def apply_rewrites(
    model: ir.Model, rewrites: Sequence[Rewrite] = REWRITES, check: Check | None = None
) -> dict[str, int]:
    """Run ``rewrites`` in order on ``model``, in place.

    Args:
        model: shapes inferred.
        rewrites: which, in order.
        check: called with a copy from before, the model after and the rewrite, for each that applied; raises if they
            differ.

    Returns:
        how often each applied, those at 0 left out.

    Raises:
        ExportError: a rewrite left one of its own patterns behind.
    """
    applied: dict[str, int] = {}
    for rewrite in rewrites:
        before = model.clone() if check is not None else None
        count = rewrite.apply(model)
        if not count:
            continue
        tidy(model)
        applied[rewrite.name] = count
        if remaining := rewrite.leaves(model):
            raise ExportError(f"rewrite {rewrite.name} left {remaining} of its patterns; please report the model")
        if check is not None and before is not None:
            check(before, model, rewrite)
    return applied
