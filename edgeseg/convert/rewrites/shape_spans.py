"""Height and width looked up one by one -> both at once.

A graph of dynamic size resizes to ``Concat(batch and channels, Shape(x)[2:3], Shape(x)[3:4])``. TensorRT's parser makes
three layers of each Shape.

Precondition: a Concat along axis 0 with neighbours that are Shapes of one value, the second starting where the first ends;
nothing else reads one of the two alone, or they would stay. Postcondition: no such neighbours are left.
"""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import emit, maker


def _match(node: ir.Node) -> int | None:
    """Index of the first of two inputs to join."""
    if node.attributes.get_int("axis", 0) != 0:
        return None
    for index, (left, right) in enumerate(pairwise(node.inputs)):
        if _are_neighbours(left, right) and _always_together(left, right):
            return index
    return None


def _are_neighbours(left: ir.Value | None, right: ir.Value | None) -> bool:
    first, second = _span(left), _span(right)
    return first is not None and second is not None and first[0] is second[0] and first[2] == second[1]


def _always_together(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether all that reads one of them is a Concat along axis 0 that has the other beside it."""
    readers = {use.node for value in (left, right) if value is not None for use in value.uses()}
    return all(
        node.op_type == "Concat"
        and node.attributes.get_int("axis", 0) == 0
        and all((a is left) == (b is right) for a, b in pairwise((None, *node.inputs, None)))
        for node in readers
    )


def _span(value: ir.Value | None) -> tuple[ir.Value | None, int, int] | None:
    shape = maker(value, "Shape")
    if shape is None or "end" not in shape.attributes:
        return None
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 0)
    return (shape.inputs[0], start, end) if 0 <= start < end else None


def _rewrite(node: ir.Node, index: int) -> None:
    left, right = (maker(node.inputs[i], "Shape") for i in (index, index + 1))
    assert left is not None
    assert right is not None
    span = {"start": left.attributes.get_int("start", 0), "end": right.attributes.get_int("end", 0)}
    both = emit(node, "Shape", [left.inputs[0]], span, shape=(span["end"] - span["start"],))
    both.dtype = ir.DataType.INT64
    inputs = [*node.inputs[:index], both, *node.inputs[index + 2 :]]
    node.resize_inputs(len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(i, value)


REWRITE = Rewrite(each(_match, "Concat"), _rewrite)
