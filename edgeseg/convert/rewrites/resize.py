"""Resize nodes as linear maps of the image plane, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgeseg.convert.rewrites.graph import constant, dims, emit, integer, ints, word


@dataclass(frozen=True)
class Resizing:
    """A Resize of the last two axes of an ``(N, C, H, W)`` value by a mode whose weights sum to 1.

    Such a Resize commutes with anything that acts on each pixel's channels linearly, bias included.
    """

    node: ir.Node

    @property
    def source(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def grows(self) -> bool | None:
        """True when the output has more pixels, ``None`` when not known before run time."""
        before, after = dims(self.source), dims(self.output)
        scales = constant(self.node.inputs[2]) if len(self.node.inputs) > 2 else None
        if scales is not None and scales.size:
            return bool(scales.prod() > 1)
        if before is None or after is None or None in (*before[2:], *after[2:]):
            return None
        return (after[2] or 0) * (after[3] or 0) > (before[2] or 0) * (before[3] or 0)


def resizing(node: ir.Node | None) -> Resizing | None:
    """Read a spatial Resize; ``None`` if it touches batch or channels, extrapolates, or is no Resize."""
    if node is None or node.op_type != "Resize" or ints(node, "axes"):
        return None
    if word(node, "mode", "nearest") not in ("nearest", "linear", "cubic"):
        return None
    if word(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return None
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None or len(before) != 4 or before[1] is None or before[1] != after[1]:
        return None
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size and (scales[:2] != 1).any():
        return None
    return Resizing(node)


def emit_resize(before: ir.Node, x: ir.Value, like: Resizing, channels: int) -> ir.Value | None:
    """Insert ``like``'s Resize on ``x``, which has ``channels`` channels; ``None`` when its target size is not constant."""
    node = like.node
    inputs: list[ir.Value | None] = [x, None]
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size:
        inputs.append(node.inputs[2])
    else:
        after = dims(like.output)
        if after is None or None in after:
            return None
        inputs += [None, _sizes(before, [after[0] or 0, channels, after[2] or 0, after[3] or 0])]
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    old = like.output.shape
    shape = None if old is None else [old[0], channels, old[2], old[3]]
    assert integer(node, "antialias", 0) in (0, 1)
    return emit(before, "Resize", inputs, attributes, shape=shape)


def _sizes(before: ir.Node, sizes: list[int]) -> ir.Value:
    import numpy as np

    from edgeseg.convert.rewrites.graph import weight

    return weight(before, np.array(sizes, np.int64), "resize_sizes")
