"""ReduceMean over the image plane -> GlobalAveragePool.

The same mean. GlobalAveragePool has an INT8 kernel in ONNX Runtime, and TensorRT 8.6's parser ignores the axes of an
opset 18 ReduceMean: it would average over batch and channels too, silently.

Precondition: one 4-d value, axes 2 and 3, dimensions kept. Postcondition: no such ReduceMean is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_input, dims, emit, replace


def _match(node: ir.Node) -> ir.Value | None:
    """What is averaged."""
    shape, axes = dims(node.inputs[0]), constant_input(node, 1)
    if shape is None or len(shape) != 4 or axes is None:
        return None
    averages = {int(a) % 4 for a in axes} == {2, 3} and node.attributes.get_int("keepdims", 1) == 1
    return node.inputs[0] if averages else None


def _rewrite(node: ir.Node, source: ir.Value) -> None:
    replace(node.outputs[0], emit(node, "GlobalAveragePool", [source]))


REWRITE = Rewrite(each(_match, "ReduceMean"), _rewrite)
