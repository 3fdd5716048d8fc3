"""A linear layer on flattened pixels -> 1x1 convolution.

``x.flatten(2).transpose(1, 2)`` -> MatMul (+ Add) -> ``transpose(1, 2).reshape(N, C, H, W)`` is a 1x1 convolution
of x. That is faster than two transpositions around a product everywhere, and other rewrites can then move and
compose it.

Precondition: Reshape(N,C,HW) + Transpose(0,2,1) before, Transpose(0,2,1) + Reshape to the same H and W after (known, or
looked up at a value that x is made from, or that is made from x, element by element), constant weight and bias, nothing
else reads the values between. Postcondition: no such MatMul is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.convolution import emit_pointwise
from edgeseg.graph.editing import constant_array, dims, maker, replace, sole_maker, sole_reader

_ELEMENTWISE = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu"}
    | {"Sigmoid", "Softplus", "Sub", "Tanh"}
)
_MOST_STEPS = 32


@dataclass(frozen=True)
class _Match:
    source: ir.Value
    matrix: NDArray[Any]
    bias: NDArray[Any] | None
    last: ir.Node


def _match(node: ir.Node) -> _Match | None:
    matrix = constant_array(node.inputs[1])
    source = _flattened(node.inputs[0])
    if source is None or matrix is None or matrix.ndim != 2:
        return None
    output, bias = node.outputs[0], None
    add = sole_reader(output, "Add")
    if add is not None:
        bias = constant_array(next(v for v in add.inputs if v is not output))
        if bias is None or bias.size != matrix.shape[1] or bias.shape[-1] != bias.size:
            return None
        output, bias = add.outputs[0], bias.reshape(-1)
    transpose = sole_reader(output, "Transpose")
    reshape = sole_reader(transpose.outputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or transpose.attributes.get_ints("perm", ()) != (0, 2, 1):
        return None
    before, after = dims(source), dims(reshape.outputs[0])
    if before is None or after is None or len(after) != 4 or not _same_plane(source, reshape):
        return None
    if before[0] != after[0] or after[1] != matrix.shape[1] or matrix.dtype != np.float32:
        return None
    return _Match(source, matrix, bias, reshape)


def _same_plane(source: ir.Value, reshape: ir.Node) -> bool:
    before, after = dims(source) or (), dims(reshape.outputs[0]) or ()
    if None not in after[2:]:
        return before[2:] == after[2:]
    other = _plane_of(reshape.inputs[1])
    # The Reshape keeps the number of elements, so the planes that broadcast to each other are one.
    return other is not None and _broadcasts_along(source, other)


def _flattened(value: ir.Value | None) -> ir.Value | None:
    transpose = sole_maker(value, "Transpose")
    if transpose is None or transpose.attributes.get_ints("perm", ()) != (0, 2, 1):
        return None
    reshape = maker(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    before, after = dims(reshape.inputs[0]), dims(reshape.outputs[0])
    if before is None or after is None or len(before) != 4 or len(after) != 3 or before[:2] != after[:2]:
        return None
    return reshape.inputs[0]


def _plane_of(shape: ir.Value | None) -> ir.Value | None:
    """The value whose height and width a Reshape to ``shape``, of four axes, gives its result; ``None`` if it is unlike that."""
    concat = maker(shape, "Concat")
    if concat is None or concat.attributes.get_int("axis", 0) != 0 or len(concat.inputs) < 2:
        return None
    both = maker(concat.inputs[-1], "Shape")
    if both is not None and _span(both) == (2, 4):
        return both.inputs[0]
    height = maker(concat.inputs[-2], "Shape")
    if both is None or height is None or height.inputs[0] is not both.inputs[0]:
        return None
    return both.inputs[0] if (_span(height), _span(both)) == ((2, 3), (3, 4)) else None


def _broadcasts_along(a: ir.Value, b: ir.Value) -> bool:
    """Whether one of two values is computed from the other element by element only.

    Then each side of the one is that of the other or 1: where, besides, both planes have as many elements, they are equal.
    """
    return a is b or _reaches(a, b) or _reaches(b, a)


def _reaches(late: ir.Value, early: ir.Value) -> bool:
    queue, seen = [late], {late}
    while queue and len(seen) <= _MOST_STEPS:
        node = queue.pop(0).producer()
        if node is None or node.op_type not in _ELEMENTWISE or node.domain not in ("", "ai.onnx"):
            continue
        for value in node.inputs:
            if value is early:
                return True
            if value is not None and value not in seen and len(dims(value) or ()) == len(dims(late) or ()):
                seen.add(value)
                queue.append(value)
    return False


def _span(shape: ir.Node) -> tuple[int, int]:
    return shape.attributes.get_int("start", 0), shape.attributes.get_int("end", -1)


def _rewrite(node: ir.Node, match: _Match) -> None:
    value = node.inputs[1]
    stem = ((value.name if value is not None else None) or "linear").removesuffix(".weight")
    if stem.startswith("val_") or not stem:
        stem = (node.name or "linear").rpartition("/")[0]
    replace(match.last.outputs[0], emit_pointwise(node, match.source, match.matrix.T, match.bias, stem))


REWRITE = Rewrite(each(_match, "MatMul"), _rewrite)
