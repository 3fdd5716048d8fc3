"""1x1 convolution of a Concat of 1x1 convolutions -> one 1x1 convolution of their inputs.

Part by part, the product of the two matrices; biases add up (see compose_conv for the plain chain).

Precondition: the Concat is along channels and read by this convolution only, nothing else reads the part, and the
part's product needs fewer multiply-accumulates. Postcondition: no such part is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each, pays
from edgeseg.graph.convolution import Convolution, concat_channels, emit_concat, emit_pointwise, pointwise
from edgeseg.graph.editing import given, replace, sole_maker


def _match(node: ir.Node) -> tuple[Convolution, ir.Node, list[Convolution | None]] | None:
    conv, concat = pointwise(node), sole_maker(node.inputs[0], "Concat")
    if conv is None or concat is None or concat_channels(concat) is None:
        return None
    outputs = conv.weight.shape[0]
    parts: list[Convolution | None] = []
    for value in concat.inputs:
        part = pointwise(sole_maker(value, "Conv"))
        if part is not None:
            middle, inputs = part.weight.shape[:2]
            part = part if pays(outputs * inputs, middle * inputs + outputs * middle) else None
        parts.append(part)
    return (conv, concat, parts) if any(parts) else None


def _rewrite(node: ir.Node, match: tuple[Convolution, ir.Node, list[Convolution | None]]) -> int:
    """Returns how many convolutions went away."""
    conv, concat, parts = match
    matrix, bias = conv.weight[:, :, 0, 0].astype(np.float64), conv.bias.astype(np.float64)
    blocks, sources, start = [], [], 0
    for index, (channels, part) in enumerate(zip(concat_channels(concat) or (), parts, strict=True)):
        block, source = matrix[:, start : start + channels], given(concat, index)
        if part is not None:
            bias = bias + block @ part.bias.astype(np.float64)
            block = block @ part.weight[:, :, 0, 0].astype(np.float64)
            source = given(part.node)
        blocks.append(block)
        sources.append(source)
        start += channels
    joined = np.concatenate(blocks, axis=1).astype(np.float32)
    whole = emit_concat(node, sources, joined.shape[1])
    replace(node.outputs[0], emit_pointwise(node, whole, joined, bias.astype(np.float32), conv.stem))
    return sum(part is not None for part in parts)


REWRITE = Rewrite(each(_match, "Conv"), _rewrite)
