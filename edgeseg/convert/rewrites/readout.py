"""A linear layer of ``concat(x, expand(token))`` -> linear(x) + linear(token), the token's part computed once.

DPT's readout glues the class token to every patch before a linear layer. The token's half of that product is the
same for every patch: half the multiply-accumulates, the Expand and the Concat go away.

Precondition: MatMul by a constant matrix of a Concat, along the last axis, of values of which one is an Expand
along another axis only. Postcondition: no such MatMul is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_array, dims, emit, emit_sum, given_array, replace, sole_maker, weight


def _concat(node: ir.Node) -> ir.Node | None:
    concat = sole_maker(node.inputs[0], "Concat")
    matrix = constant_array(node.inputs[1])
    if concat is None or matrix is None or matrix.ndim != 2:
        return None
    shapes = [dims(v) for v in concat.inputs]
    if any(s is None or s[-1] is None for s in shapes):
        return None
    rank = len(shapes[0] or ())
    if concat.attributes.get_int("axis", 0) % rank != rank - 1:
        return None
    expands = [sole_maker(v, "Expand") for v in concat.inputs]
    broadcasts = any(e is not None and _broadcasts(e) for e in expands)
    # one plain value must carry the full shape, or broadcasting would lose the expanded axis
    plain = any(e is None or not _broadcasts(e) for e in expands)
    return concat if broadcasts and plain else None


def _broadcasts(expand: ir.Node) -> bool:
    before, after = dims(expand.inputs[0]), dims(expand.outputs[0])
    if before is None or after is None or len(before) != len(after) or before[-1] is None:
        return False
    return before[-1] == after[-1] and 1 in before[:-1]


def _stem(node: ir.Node) -> str:
    return (node.name or "linear").rpartition("/")[0] or "linear"


def _rewrite(node: ir.Node, concat: ir.Node) -> None:
    matrix, products, row = given_array(node), [], 0
    for value in concat.inputs:
        expand = sole_maker(value, "Expand")
        source = expand.inputs[0] if expand is not None and _broadcasts(expand) else value
        width = (dims(value) or (0,))[-1] or 0
        part = weight(node, matrix[row : row + width], f"{_stem(node)}.weight")
        row += width
        products.append(emit(node, "MatMul", [source, part]))
    replace(node.outputs[0], emit_sum(node, products))


REWRITE = Rewrite(each(_concat, "MatMul"), _rewrite)
