"""Small terms, such as the epsilon of a norm, kept from the exporter's optimizer.

onnxscript's rules for ``x + 0`` and ``x - 0`` compare with a tolerance of 1e-8: it leaves such an epsilon out, and a graph whose
norm is 0 somewhere divides by 0 there. No rule of it knows Sum.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.graph.editing import constant_array, emit, given, maker, nodes

_TAKEN_FOR_ZERO = 1e-8


def hide_small_terms(model: ir.Model) -> None:
    """Write additions and subtractions of a scalar that is small, and not 0, as Sum."""
    for node in nodes(model, "Add", "Sub"):
        if node.op_type == "Add" and any(map(_is_small, node.inputs)):
            node.op_type = "Sum"
        elif node.op_type == "Sub" and _is_small(node.inputs[1]):
            node.replace_input_with(1, emit(node, "Neg", [given(node, 1)]))
            node.op_type = "Sum"


def show_small_terms(model: ir.Model) -> None:
    """Write the Sums of two as additions again."""
    for node in nodes(model, "Sum"):
        if len(node.inputs) == 2:
            node.op_type = "Add"


def _is_small(value: ir.Value | None) -> bool:
    while (passed := maker(value, "Cast", "CastLike", "Identity")) is not None:
        value = passed.inputs[0]
    array = constant_array(value)
    # A little above: what is 1e-8 as a float32 and as a float64 are two numbers.
    return array is not None and array.ndim == 0 and 0 < abs(array.item()) <= 1.01 * _TAKEN_FOR_ZERO
