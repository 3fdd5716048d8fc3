"""``torch.stack(x).sum(dim)``: Unsqueeze + Concat + ReduceSum -> a chain of Add.

The stack copies every input and reads the copy back; Adds do neither, fuse with what follows in TensorRT, and
have an INT8 kernel in ONNX Runtime. The order of summation is the same.

Precondition: every Concat input is an Unsqueeze along the concatenated axis, which is the axis summed and
dropped. Postcondition: no such ReduceSum is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_input, emit_sum, maker, replace, sole_maker


def _terms(node: ir.Node) -> list[ir.Value] | None:
    concat = sole_maker(node.inputs[0], "Concat")
    axes = constant_input(node, 1)
    if concat is None or axes is None or axes.size != 1 or node.attributes.get_int("keepdims", 1) != 0:
        return None
    axis = concat.attributes.get_int("axis", 0)
    terms = []
    for value in concat.inputs:
        stacked = maker(value, "Unsqueeze")
        if stacked is None or stacked.inputs[0] is None:
            return None
        where = constant_input(stacked, 1)
        rank = stacked.inputs[0].shape.rank() + 1 if stacked.inputs[0].shape is not None else 0
        if rank == 0 or where is None or where.size != 1:
            return None
        if len({int(where.item()) % rank, axis % rank, int(axes.item()) % rank}) != 1:
            return None
        terms.append(stacked.inputs[0])
    shapes = {tuple(t.shape) if t.shape is not None else None for t in terms}
    return terms if len(shapes) == 1 and None not in shapes else None


def _rewrite(node: ir.Node, terms: list[ir.Value]) -> None:
    replace(node.outputs[0], emit_sum(node, terms, shape=terms[0].shape))


REWRITE = Rewrite(each(_terms, "ReduceSum"), _rewrite)
