"""A last convolution of classes that fill whole blocks: ONNX Runtime's integer kernels want a multiple of four, at least 16.

With 11, 19 or 21 classes they take up to twice the time they take with 16, 20 or 24 (x86 with VNNI, ONNX Runtime 1.31). So
classes are added that never win: the first one again, one less. Where both are rounded to the same integer, ArgMax takes the
first.

Precondition: Conv of one group, with constant weight and bias, whose result goes into an ArgMax over its channels only; more
than eight classes, since an ArgMax of 16 takes longer than one of eight.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array, constant_input, given_array, sole_reader
from edgeseg.quantize.observed import Observed, each

BLOCK, LEAST, FEWEST = 4, 16, 9


def _missing(node: ir.Node) -> int | None:
    """Classes to add."""
    weight = constant_array(node.inputs[1]) if node.op_type == "Conv" else None
    decided = sole_reader(node.outputs[0], "ArgMax")
    if weight is None or decided is None or node.attributes.get_int("group", 1) != 1:
        return None
    if decided.attributes.get_int("axis", 0) != 1 or decided.attributes.get_int("select_last_index", 0) != 0:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant_array(node.inputs[2]) is None:
        return None
    classes = len(weight)
    missing = max(LEAST, -(-classes // BLOCK) * BLOCK) - classes
    return missing if missing and classes >= FEWEST else None


def _replace(graph: ir.Graph, node: ir.Node, missing: int, _: Observed) -> None:
    weight, bias = given_array(node), constant_input(node, 2)
    bias = np.zeros(len(weight), weight.dtype) if bias is None else bias
    editor = Editor(graph, node, f"{node.name}/wide_head")
    node.replace_input_with(1, editor.constant("weight", np.concatenate([weight, weight[:1].repeat(missing, 0)])))
    node.resize_inputs(3)
    node.replace_input_with(2, editor.constant("bias", np.concatenate([bias, bias[:1].repeat(missing) - 1])))
    scores = node.outputs[0]
    if scores.shape is not None:
        scores.shape = ir.Shape([scores.shape[0], len(weight) + missing, *scores.shape[2:]])


wide_head = each(_missing, _replace)
