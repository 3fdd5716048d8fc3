"""Give a matrix product its batch axis back where its result, without a bias, goes straight to a Reshape that has one.

OpenVINO computes the product on integers and moves the scales, one per output channel, behind what follows. Behind a Reshape
of ``(tokens, channels)`` to ``(batch, N, ...)`` it puts them along N, once N is at least as many as the channels and the batch
is not known: wrong values, or an exception. With three axes, ``(batch, N, channels)``, it does that right.

Precondition: MatMul of a constant weight on two axes of which the first is not known; between it and a Reshape to a known N
only ReLU, Clip or a factor, each without another reader.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import Editor, beside_constant, constant_array, dims, given, sole_maker
from edgeseg.quantize.observed import Observed, each

Match = tuple[list[ir.Node], int]


def _match(node: ir.Node) -> Match | None:
    """The nodes from the product to the one in front of the Reshape ``node``, and N."""
    target = constant_array(node.inputs[1]) if node.op_type == "Reshape" else None
    if target is None or len(target) < 3 or target[0] != -1 or target[1] < 1:
        return None
    chain: list[ir.Node] = []
    value = node.inputs[0]
    while (before := sole_maker(value, "MatMul", "Relu", "Clip", "Mul")) is not None:
        chain.insert(0, before)
        if before.op_type == "MatMul":
            shape, kernel = dims(before.inputs[0]), constant_array(before.inputs[1])
            if kernel is None or kernel.ndim != 2 or kernel.shape[1] != np.prod(target[2:]):
                return None
            return (chain, int(target[1])) if shape == (None, kernel.shape[0]) else None
        beside = beside_constant(before) if before.op_type == "Mul" else (given(before), np.zeros(()))
        if beside is None or beside[1].ndim > 1:
            return None
        value = beside[0]
    return None


def _replace(graph: ir.Graph, node: ir.Node, match: Match, observed: Observed) -> None:
    chain, tokens = match
    product = chain[0]
    source, channels = given(product), (dims(product.inputs[0]) or ())[-1]
    editor = Editor(graph, product, product.name)
    shape = editor.constant("batched_shape", np.array([-1, tokens, channels], np.int64))
    batched = editor.op("batched", "Reshape", [source, shape], shape=(None, tokens, channels))
    observed.copy(source, batched)
    product.replace_input_with(0, batched)
    for link in chain:
        output = link.outputs[0]
        output.shape = ir.Shape([None, tokens, (dims(output) or (None,))[-1]])


batched_tokens = each(_match, _replace)
