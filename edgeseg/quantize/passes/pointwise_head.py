"""The last 1x1 convolution as a matrix product: integer inputs, float logits.

ONNX Runtime's integer convolution writes 8-bit results; logits of 8 bits move class boundaries and make ties. Its
integer matrix product can write float, and in NHWC a 1x1 convolution is one.

Precondition: 1x1 Conv, stride and group 1, no padding, constant weight, with no other convolution or weighted matrix
product behind it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array, constant_input, given_array, replace_value
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.placement import tail


def pointwise_head(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns how many convolutions it replaced."""
    count = 0
    for node in list(tail(model.graph)):
        if _is_pointwise(node):
            _replace(model.graph, node)
            count += 1
    return count


def _is_pointwise(node: ir.Node) -> bool:
    weight = constant_array(node.inputs[1]) if node.op_type == "Conv" else None
    return (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and node.attributes.get_int("group", 1) == 1
        and tuple(node.attributes.get_ints("strides", (1, 1))) == (1, 1)
        and not any(node.attributes.get_ints("pads", (0, 0, 0, 0)))
        and (len(node.inputs) < 3 or constant_array(node.inputs[2]) is not None)
    )


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    weight, bias = given_array(node), constant_input(node, 2)
    editor = Editor(graph, node, node.name)
    pixels = editor.op("nhwc", "Transpose", [node.inputs[0]], perm=[0, 2, 3, 1])
    matrix = editor.constant("matrix", np.ascontiguousarray(weight[:, :, 0, 0].T))
    logits = editor.op("MatMul", "MatMul", [pixels, matrix])
    if bias is not None:
        # As a subtraction: ONNX Runtime merges MatMul and Add into a float Gemm before it looks for integer products.
        logits = editor.op("bias", "Sub", [logits, editor.constant("negative_bias", -bias)])
    replace_value(graph, node.outputs[0], editor.op("nchw", "Transpose", [logits], perm=[0, 3, 1, 2]))
