"""Which values of a graph are never negative, by the operators that make them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import constant_array, data_inputs
from edgeseg.graph.proto import REARRANGES

# Every value of the result is one of the first input's.
MOVES = REARRANGES | {
    "Slice",
    "Split",
    "Gather",
    "Expand",
    "Tile",
    "MaxPool",
    "DepthToSpace",
    "SpaceToDepth",
    "Identity",
}
_NOT_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs"})
# Not negative where no input is.
_KEEP_SIGN = MOVES | {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Clip", "Pad"}


def clamp_limits(node: ir.Node) -> tuple[float, float]:
    """Smallest and largest output of a Relu or of a Clip with constant bounds."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    bounds = [constant_array(v) for v in node.inputs[1:]] + [None, None]
    low, high = bounds[:2]
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def not_negative(graph: ir.Graph) -> set[ir.Value]:
    """Values that no input can make negative."""
    known: set[ir.Value] = set()
    for node in graph:
        keeps = node.op_type in _KEEP_SIGN or (
            node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "cubic"
        )
        kept = keeps and all(
            value in known or ((array := constant_array(value)) is not None and bool(np.all(array >= 0)))
            for value in data_inputs(node)
        )
        is_clipped = node.op_type == "Clip" and clamp_limits(node)[0] >= 0
        if node.op_type in _NOT_NEGATIVE or kept or is_clipped:
            known.update(node.outputs)
    return known
