"""ReduceMean over the image plane -> GlobalAveragePool.

The same mean. GlobalAveragePool has an INT8 kernel in ONNX Runtime, and TensorRT 8.6's parser ignores the axes of an
opset 18 ReduceMean: it would average over batch and channels too, silently.

Precondition: one 4-d value, axes 2 and 3, dimensions kept. Postcondition: no such ReduceMean is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.graph import constant, dims, emit, integer, nodes, reads, replace


def apply(model: ir.Model) -> int:
    """Rewrite; return how often."""
    found = _matches(model)
    for node in found:
        replace(node.outputs[0], emit(node, "GlobalAveragePool", [node.inputs[0]]))
    return len(found)


def leaves(model: ir.Model) -> int:
    """How many are left."""
    return len(_matches(model))


def _matches(model: ir.Model) -> list[ir.Node]:
    return [node for node in nodes(model, "ReduceMean") if _averages_the_plane(node)]


def _averages_the_plane(node: ir.Node) -> bool:
    shape, axes = dims(node.inputs[0]), constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or len(shape) != 4 or axes is None or not reads(node.outputs[0]):
        return False
    return {int(a) % 4 for a in axes} == {2, 3} and integer(node, "keepdims", 1) == 1
