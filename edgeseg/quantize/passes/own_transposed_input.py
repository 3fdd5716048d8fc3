"""Give a transposed convolution a value of its own to read, where others read the same.

OpenVINO chooses one integer type for all readers of a quantized value. A convolution takes unsigned integers with a zero
point, a transposed one runs in float when it meets one: as the only reader of an Identity it gets signed integers.

Precondition: ConvTranspose with constant weight whose input something else reads as well.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array
from edgeseg.quantize.observed import Observed


def own_transposed_input(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns how many transposed convolutions it changed."""
    count = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.op_type == "ConvTranspose" else None
        if source is None or constant_array(node.inputs[1]) is None or len(list(source.uses())) < 2:
            continue
        own = Editor(model.graph, node, node.name).op("input", "Identity", [source], shape=source.shape)
        observed.copy_range(source.name, own)
        if source.name in observed.channel_means:
            observed.channel_means[str(own.name)] = observed.channel_means[source.name]
        node.replace_input_with(0, own)
        count += 1
    return count
