"""Attention's ``q * scale`` -> into the columns of the linear layer that makes q.

One multiplication of the query per attention block goes away; exact where the scale is a power of two (a head of
64).

Precondition: a product with a constant scalar of one part of a linear layer (MatMul by a constant matrix, with or without
a constant bias), only moved in between; the part is an output of a Split of the columns, or a Gather from a Reshape of
them; nothing else reads the values. Postcondition: no such product is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import (
    beside_constant,
    constant_array,
    dims,
    given,
    maker,
    reads,
    replace,
    sole_maker,
    weight,
)


@dataclass(frozen=True)
class _Match:
    moved: ir.Value
    scale: float
    columns: slice
    product: ir.Node
    matrix: NDArray[Any]
    add: ir.Node | None


def _match(node: ir.Node) -> _Match | None:
    moved, scale = node.inputs[0], constant_array(node.inputs[1])
    if moved is None or scale is None or scale.size != 1 or reads(moved) != 1:
        return None
    value: ir.Value | None = moved
    while (move := sole_maker(value, "Reshape", "Transpose")) is not None:
        value = move.inputs[0]
    part = _part(value)
    if part is None:
        return None
    linear, columns, width = part
    add = maker(linear, "Add")
    computed = beside_constant(add) if add is not None else None
    product = maker(linear, "MatMul") if add is None else sole_maker(computed and computed[0], "MatMul")
    matrix = constant_array(product.inputs[1]) if product is not None else None
    if product is None or matrix is None or matrix.ndim != 2 or matrix.shape[1] != width:
        return None
    if computed is not None and computed[1].shape[-1:] != matrix.shape[1:]:
        return None
    return _Match(moved, float(scale.item()), columns, product, matrix, add)


def _part(value: ir.Value | None) -> tuple[ir.Value, slice, int] | None:
    """What ``value`` is a part of along the last axis, the columns it holds, and how many there are in all."""
    if value is None or reads(value) != 1:
        return None
    split = maker(value, "Split")
    if split is None:
        return _gathered(value)
    whole = split.inputs[0]
    shape = dims(whole)
    widths = [(dims(v) or (None,))[-1] for v in split.outputs]
    if whole is None or shape is None or None in widths or reads(whole) != 1:
        return None
    if split.attributes.get_int("axis", 0) % len(shape) != len(shape) - 1:
        return None
    start = sum(w or 0 for w in widths[: value.index() or 0])
    return whole, slice(start, start + (widths[value.index() or 0] or 0)), sum(w or 0 for w in widths)


def _gathered(value: ir.Value) -> tuple[ir.Value, slice, int] | None:
    """A part taken by Gather(Transpose(Reshape(whole))) of the first of the factors of the last axis."""
    gather = maker(value, "Gather")
    index = constant_array(gather.inputs[1]) if gather is not None else None
    transpose = maker(gather.inputs[0], "Transpose") if gather is not None else None
    reshape = sole_maker(transpose.inputs[0], "Reshape") if transpose is not None else None
    if gather is None or transpose is None or reshape is None or index is None or index.ndim or index < 0:
        return None
    whole, before, after = reshape.inputs[0], dims(reshape.inputs[0]), dims(reshape.outputs[0])
    if whole is None or before is None or after is None or reads(whole) != 1 or not _is_the_only(gather, int(index)):
        return None
    factor = len(before) - 1
    axis = transpose.attributes.get_ints("perm", ())[gather.attributes.get_int("axis", 0) % len(after)]
    # One unknown axis before the last one: the others tell that the Reshape keeps them all, and splits the last.
    kept = before[:factor].count(None) <= 1 and before[:factor] == after[:factor]
    factors = [d for d in after[factor:] if d is not None]
    if not kept or axis != factor or len(factors) != len(after) - factor or before[factor] != math.prod(factors):
        return None
    size = math.prod(factors[1:])
    return whole, slice(int(index) * size, (int(index) + 1) * size), math.prod(factors)


def _is_the_only(gather: ir.Node, index: int) -> bool:
    """Whether nothing but Gathers of other parts reads what ``gather`` takes its part of."""
    whole = given(gather)
    axis = gather.attributes.get_int("axis", 0)
    others = [use.node for use in whole.uses() if use.node is not gather]
    parts = [
        constant_array(n.inputs[1]) for n in others if n.op_type == "Gather" and n.attributes.get_int("axis", 0) == axis
    ]
    apart = all(p is not None and not p.ndim and 0 <= p != index for p in parts)
    return apart and len(parts) == len(others) and not whole.is_graph_output()


def _scale_columns(match: _Match) -> None:
    def scaled(old: ir.Value | None, array: NDArray[Any], near: ir.Node) -> ir.Value:
        array = array.copy()
        array[..., match.columns] *= np.float32(match.scale)
        return weight(near, array, f"{(old.name if old is not None else None) or 'linear'}_scaled")

    match.product.replace_input_with(1, scaled(match.product.inputs[1], match.matrix, match.product))
    if match.add is not None:
        for index, value in enumerate(match.add.inputs):
            bias = constant_array(value)
            if bias is not None:
                match.add.replace_input_with(index, scaled(value, bias, match.add))


def _rewrite(node: ir.Node, match: _Match) -> None:
    _scale_columns(match)
    replace(node.outputs[0], match.moved)


REWRITE = Rewrite(each(_match, "Mul"), _rewrite)
