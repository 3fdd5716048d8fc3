"""Resize to a constant size -> Resize by an exact scale; a Resize to its own size goes away.

A size carries batch and channels, so with a dynamic batch it is computed from Shape nodes at run time, and a
Resize moved to other channels would need another. A scale does neither. The value is the same where the ratio is
exact.

Precondition: spatial Resize given by sizes, planes static, ratios whole numbers or their inverse. Postcondition:
no such Resize is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import dims, replace, weight
from edgeseg.graph.resize import Resizing, resizing


def _ratios(node: ir.Node) -> tuple[float, float] | None:
    resized = resizing(node)
    if resized is None or (resized.scales is not None and resized.scales != (1.0, 1.0, 1.0, 1.0)):
        return None
    before, after = dims(resized.source), dims(resized.output)
    if before is None or after is None or None in (*before[2:], *after[2:]):
        return None
    ratios = []
    for old, new in zip(before[2:], after[2:], strict=True):
        if not old or not new or (new % old and old % new):
            return None
        ratio = new / old
        # floor(old * scale) in float32 must be the size again
        if int(np.floor(np.float32(old) * np.float32(ratio))) != new:
            return None
        ratios.append(ratio)
    return ratios[0], ratios[1]


def _rewrite(node: ir.Node, ratios: tuple[float, float]) -> None:
    if ratios == (1.0, 1.0):
        replace(node.outputs[0], Resizing(node).source)
        return
    scales = weight(node, np.array([1.0, 1.0, *ratios], np.float32), "resize_scales")
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)


REWRITE = Rewrite(each(_ratios, "Resize"), _rewrite)
