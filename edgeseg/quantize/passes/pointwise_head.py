"""The last 1x1 convolution as a matrix product: integer inputs, float logits.

ONNX Runtime's integer convolution writes 8-bit results; logits of 8 bits move class boundaries and make ties. Its
integer matrix product can write float, and in NHWC a 1x1 convolution is one.

Precondition: 1x1 Conv, stride and group 1, no padding, constant weight, with no other convolution or weighted matrix
product behind it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.convolution import Convolution, pointwise
from edgeseg.graph.editing import Editor, constant_input, replace_value
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.placement import tail


def pointwise_head(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns how many convolutions it replaced."""
    heads = [conv for node in tail(model.graph) if (conv := pointwise(node)) is not None]
    for conv in heads:
        _replace(model.graph, conv)
    return len(heads)


def _replace(graph: ir.Graph, conv: Convolution) -> None:
    node, bias = conv.node, constant_input(conv.node, 2)
    editor = Editor(graph, node, node.name)
    pixels = editor.op("nhwc", "Transpose", [node.inputs[0]], perm=[0, 2, 3, 1])
    matrix = editor.constant("matrix", np.ascontiguousarray(conv.weight[:, :, 0, 0].T))
    logits = editor.op("MatMul", "MatMul", [pixels, matrix])
    if bias is not None:
        # As a subtraction: ONNX Runtime merges MatMul and Add into a float Gemm before it looks for integer products.
        logits = editor.op("bias", "Sub", [logits, editor.constant("negative_bias", -bias)])
    replace_value(graph, node.outputs[0], editor.op("nchw", "Transpose", [logits], perm=[0, 3, 1, 2]))
