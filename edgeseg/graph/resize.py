"""Resize nodes as linear maps of the image plane, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import constant_input, dims, emit, given, weight


@dataclass(frozen=True)
class Resizing:
    """A Resize of the last two axes of an ``(N, C, H, W)`` value by a mode whose weights sum to 1.

    Such a Resize commutes with anything that acts on each pixel's channels linearly, bias included.
    """

    node: ir.Node

    @property
    def source(self) -> ir.Value:
        return given(self.node)

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def scales(self) -> tuple[float, ...] | None:
        """The constant scales, when it is given by scales."""
        scales = constant_input(self.node, 2)
        return tuple(float(s) for s in scales) if scales is not None and scales.size else None

    @property
    def repeats_pixels(self) -> bool:
        """By whole factors, each pixel equally often; other rules than these two shift the image."""
        rule = (
            self.node.attributes.get_string("mode", "nearest"),
            self.node.attributes.get_string("coordinate_transformation_mode", "half_pixel"),
            self.node.attributes.get_string("nearest_mode", "round_prefer_floor"),
        )
        return rule in {("nearest", "asymmetric", "floor"), ("nearest", "half_pixel", "round_prefer_floor")}

    @property
    def growth(self) -> float | None:
        """Output pixels per input pixel, ``None`` when not known before run time."""
        if self.scales is not None:
            return self.scales[2] * self.scales[3]
        before, after = dims(self.source), dims(self.output)
        if before is None or after is None:
            return None
        old_h, old_w, new_h, new_w = *before[2:], *after[2:]
        if old_h is None or old_w is None or new_h is None or new_w is None:
            return None
        return new_h * new_w / (old_h * old_w)

    @property
    def can_move(self) -> bool:
        """It can be written again for a value of other channels: its target does not come from a computed shape."""
        after = dims(self.output)
        return self.scales is not None or (after is not None and None not in after)


def resizing(node: ir.Node | None) -> Resizing | None:
    """Read a spatial Resize; ``None`` if it touches batch or channels, extrapolates, or is no Resize."""
    if node is None or node.op_type != "Resize" or "axes" in node.attributes:
        return None
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return None
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != 4 or before[1] is None or before[1] != after[1]:
        return None
    resized = Resizing(node)
    if resized.scales is not None and resized.scales[:2] != (1.0, 1.0):
        return None
    return resized


def emit_resize(before: ir.Node, x: ir.Value, like: Resizing) -> ir.Value:
    """Insert ``like``'s Resize, which ``can_move``, on ``x`` of the same plane and its own channels."""
    node = like.node
    channels = (dims(x) or ())[1]
    inputs: list[ir.Value | None] = [x, None]
    if like.scales is not None:
        inputs.append(node.inputs[2])
    else:
        after = dims(like.output) or ()
        sizes = [d if d is not None else 0 for d in (after[0], channels, *after[2:])]
        inputs += [None, weight(before, np.array(sizes, np.int64), "resize_sizes")]
    old = like.output.shape
    shape = None if old is None else [old[0], channels, old[2], old[3]]
    return emit(before, "Resize", inputs, node.attributes, shape=shape)
