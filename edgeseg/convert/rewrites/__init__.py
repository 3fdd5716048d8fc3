"""Segmentation-aware graph rewrites, one a file, in the order they run.

Each keeps every output equal, for every input, up to float32 rounding; each states what it needs and what it
leaves. They come after onnxsim, which has folded constants and batch normalization by then.
"""

from __future__ import annotations

from edgeseg.convert.rewrites import (
    attention_scale,
    ceil_pool,
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
    padded_pool,
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
from edgeseg.convert.rewrites.driver import Rewrite

REWRITES: tuple[Rewrite, ...] = (
    channel_swap.REWRITE,
    padded_pool.REWRITE,
    ceil_pool.REWRITE,
    global_pool.REWRITE,
    stacked_sum.REWRITE,
    class_token.REWRITE,
    token_slices.REWRITE,
    slices.REWRITE,
    qkv.REWRITE,
    readout.REWRITE,
    linear_conv.REWRITE,
    attention_scale.REWRITE,
    tokens.REWRITE,
    reshape_twice.REWRITE,
    layout.REWRITE,
    reshape_channels.REWRITE,
    shape_spans.REWRITE,
    resize_scales.REWRITE,
    resize_sum.REWRITE,
    conv_sum.REWRITE,
    conv_resize.REWRITE,
    conv_concat.REWRITE,
    compose_concat.REWRITE,
    compose_conv.REWRITE,
    subpixel.REWRITE,
)
"""The rewrites and their order: what uncovers a pattern comes before what looks for it."""
