"""Which values have one height and width, where both are known at run time only."""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.graph.editing import dims, integer, maker

_ELEMENTWISE = frozenset(
    {"Add", "BatchNormalization", "Clip", "Div", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu"}
    | {"Sigmoid", "Softplus", "Sub", "Tanh"}
)
_MOST_STEPS = 32


def plane_of(shape: ir.Value | None) -> ir.Value | None:
    """The value whose height and width a Reshape to ``shape``, of four axes, gives its result; ``None`` if it is unlike that."""
    concat = maker(shape, "Concat")
    if concat is None or integer(concat, "axis", 0) != 0 or len(concat.inputs) < 2:
        return None
    both = maker(concat.inputs[-1], "Shape")
    if both is not None and _span(both) == (2, 4):
        return both.inputs[0]
    height = maker(concat.inputs[-2], "Shape")
    if both is None or height is None or height.inputs[0] is not both.inputs[0]:
        return None
    return both.inputs[0] if (_span(height), _span(both)) == ((2, 3), (3, 4)) else None


def broadcasts_along(a: ir.Value, b: ir.Value) -> bool:
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
    return integer(shape, "start", 0), integer(shape, "end", -1)
