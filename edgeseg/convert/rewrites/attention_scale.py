"""Attention's ``q * scale`` -> into the columns of the linear layer that makes q.

One multiplication of the query per attention block goes away; exact where the scale is a power of two (a head of
64).

Precondition: a product with a constant scalar of one part of a Split of a linear layer (MatMul by a constant
matrix, with or without a constant bias), only moved in between; nothing else reads the values. Postcondition: no
such product is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.graph import constant, dims, integer, maker, nodes, reads, replace, sole_maker, weight


@dataclass(frozen=True)
class _Match:
    moved: ir.Value
    scale: float
    columns: slice
    product: ir.Node
    matrix: NDArray[Any]
    add: ir.Node | None


def apply(model: ir.Model) -> int:
    """Rewrite; return how often."""
    count = 0
    for node in nodes(model, "Mul"):
        match = _match(node)
        if match is None:
            continue
        _scale_columns(match)
        replace(node.outputs[0], match.moved)
        count += 1
    return count


def leaves(model: ir.Model) -> int:
    """How many are left."""
    return sum(_match(node) is not None for node in nodes(model, "Mul"))


def _match(node: ir.Node) -> _Match | None:
    moved, scale = node.inputs[0], constant(node.inputs[1])
    if moved is None or scale is None or scale.size != 1 or not reads(node.outputs[0]) or reads(moved) != 1:
        return None
    value: ir.Value | None = moved
    while (move := sole_maker(value, "Reshape", "Transpose")) is not None:
        value = move.inputs[0]
    split = maker(value, "Split")
    if split is None or value is None or reads(value) != 1 or split.inputs[0] is None or reads(split.inputs[0]) != 1:
        return None
    shape = dims(split.inputs[0])
    widths = [(dims(v) or (None,))[-1] for v in split.outputs]
    if shape is None or None in widths or integer(split, "axis", 0) % len(shape) != len(shape) - 1:
        return None
    start = sum(w or 0 for w in widths[: value.index() or 0])
    columns = slice(start, start + (widths[value.index() or 0] or 0))
    add = maker(split.inputs[0], "Add")
    product = sole_maker(_variable(add), "MatMul") if add is not None else maker(split.inputs[0], "MatMul")
    matrix = constant(product.inputs[1]) if product is not None else None
    if product is None or matrix is None or matrix.ndim != 2 or matrix.shape[1] != sum(w or 0 for w in widths):
        return None
    if add is not None and any(b is not None and b.shape[-1:] != matrix.shape[1:] for b in map(constant, add.inputs)):
        return None
    return _Match(moved, float(scale.item()), columns, product, matrix, add)


def _variable(add: ir.Node) -> ir.Value | None:
    """The input of a bias Add that is no constant."""
    constants = [constant(v) for v in add.inputs]
    if (constants[0] is None) == (constants[1] is None):
        return None
    return add.inputs[0] if constants[0] is None else add.inputs[1]


def _scale_columns(match: _Match) -> None:
    def scaled(old: ir.Value | None, array: NDArray[Any], near: ir.Node) -> ir.Value:
        array = array.copy()
        array[..., match.columns] *= np.float32(match.scale)
        return weight(near, array, f"{(old.name if old is not None else None) or 'linear'}_scaled")

    match.product.replace_input_with(1, scaled(match.product.inputs[1], match.matrix, match.product))
    if match.add is not None:
        for index, value in enumerate(match.add.inputs):
            bias = constant(value)
            if bias is not None:
                match.add.replace_input_with(index, scaled(value, bias, match.add))
