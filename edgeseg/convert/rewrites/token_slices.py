"""The first cell of an axis, and all but the first, of a value with a size known at run time only -> Gather and Pad.

``x[:, :1]`` and ``x[:, 1:]`` take the class token off a ViT's tokens. Where batch or tokens are dynamic, TensorRT's parser
makes 28 layers of such a Slice and 11 of a Split into both; 3 of a Gather and 7 of a Pad by minus one.

Precondition: a Slice along one axis, step 1, of ``[0, 1)`` or from 1 to the end, of a value with an axis of unknown size;
there is at least one cell, as every image makes. Postcondition: no such Slice is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import dims, emit, replace, slice_bounds, weight

_END = np.iinfo(np.int32).max
"""Exporters write "to the end" as this or more."""


def _match(node: ir.Node) -> tuple[int, bool] | None:
    """The axis, and whether it is the first cell that is taken."""
    shape = dims(node.inputs[0]) or ()
    start, end, axis, step = slice_bounds(node) or (0, 0, 0, 0)
    if None not in shape or step != 1:
        return None
    if (start, end) == (0, 1):
        return axis, True
    return (axis, False) if start == 1 and end >= (shape[axis] or _END) else None


def _rewrite(node: ir.Node, match: tuple[int, bool]) -> None:
    axis, first = match
    value = node.inputs[0]
    if first:
        # int32: TensorRT's parser converts int64 indices by a layer of their own
        new = emit(node, "Gather", [value, weight(node, np.zeros(1, np.int32), "first")], {"axis": axis})
    else:
        cropped = np.zeros(2 * len(dims(value) or ()), np.int64)
        cropped[axis] = -1
        new = emit(node, "Pad", [value, weight(node, cropped, "without_first")])
    replace(node.outputs[0], new)


REWRITE = Rewrite(each(_match, "Slice"), _rewrite)
