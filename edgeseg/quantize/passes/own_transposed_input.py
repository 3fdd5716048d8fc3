"""Give a transposed convolution a value of its own to read, where others read the same.

OpenVINO chooses one integer type for all readers of a quantized value. A convolution takes unsigned integers with a zero
point, a transposed one runs in float when it meets one: as the only reader of an Identity it gets signed integers.

Precondition: ConvTranspose with constant weight whose input something else reads as well.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array
from edgeseg.quantize.observed import Observed, each


def _match(node: ir.Node) -> ir.Value | None:
    """What is read."""
    source = node.inputs[0] if node.op_type == "ConvTranspose" else None
    return None if source is None or constant_array(node.inputs[1]) is None or len(source.uses()) < 2 else source


def _replace(graph: ir.Graph, node: ir.Node, source: ir.Value, observed: Observed) -> None:
    own = Editor(graph, node, node.name).op("input", "Identity", [source], shape=source.shape)
    observed.copy(source, own)
    node.replace_input_with(0, own)


own_transposed_input = each(_match, _replace)
