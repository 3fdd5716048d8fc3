"""An average that counts its padding, where windows reach beyond that -> a Pad, and an average that counts no padding.

ONNX Runtime's integer AveragePool and OpenVINO's take what lies beyond the padding for padding, too, and divide by it. The
constant is not zero for the reason of :mod:`~edgeseg.convert.rewrites.padded_pool`.

Precondition: an AveragePool with ceil_mode and count_include_pad; with pads, of a known size in which no window begins in them,
for such a window is left out. Postcondition: no such AveragePool is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.convert.rewrites.padded_pool import SMALLEST
from edgeseg.graph.editing import dims, emit, given, weight


def _match(node: ir.Node) -> tuple[int, ...] | None:
    """Its pads: top, left, bottom, right."""
    had = node.attributes
    kernel, pads = had.get_ints("kernel_shape", ()), tuple(had.get_ints("pads", (0, 0, 0, 0)))
    if len(kernel) != 2 or not had.get_int("ceil_mode", 0) or not had.get_int("count_include_pad", 0):
        return None
    if not any(pads):
        return pads
    if set(had.get_ints("dilations", (1, 1))) != {1}:
        return None
    shape, strides = dims(given(node)) or (None,) * 4, had.get_ints("strides", (1, 1))
    for side, extent, stride, before, after in zip(shape[2:], kernel, strides, pads[:2], pads[2:], strict=True):
        if side is None or -(-(side + before + after - extent) // stride) * stride >= side + before:
            return None
    return pads


def _rewrite(node: ir.Node, pads: tuple[int, ...]) -> None:
    node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    if any(pads):
        top, left, bottom, right = pads
        around = weight(node, np.array([0, 0, top, left, 0, 0, bottom, right], np.int64), "pads")
        padded = emit(node, "Pad", [given(node), around, weight(node, np.array(SMALLEST, np.float32), "smallest")])
        node.replace_input_with(0, padded)
        node.attributes.pop("pads")


REWRITE = Rewrite(each(_match, "AveragePool"), _rewrite)
