"""BGR models: the channel swap before the first convolution goes into its weight.

Reversing the input channels is the same as reversing the weight's input channels; exact.

Precondition: Gather or Slice that reverses axis 1, read by convolutions of one group with constant weights.
Postcondition: no such swap is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.convolution import convolution
from edgeseg.convert.rewrites.graph import constant, dims, integer, nodes, replace, weight


def apply(model: ir.Model) -> int:
    """Rewrite; return how often."""
    found = _matches(model)
    for node in found:
        for use in list(node.outputs[0].uses()):
            conv = convolution(use.node)
            assert conv is not None
            conv.node.replace_input_with(1, weight(conv.node, conv.weight[:, ::-1], f"{conv.stem}.weight"))
        source = node.inputs[0]
        assert source is not None
        replace(node.outputs[0], source)
    return len(found)


def leaves(model: ir.Model) -> int:
    """How many are left."""
    return len(_matches(model))


def _matches(model: ir.Model) -> list[ir.Node]:
    candidates = (*nodes(model, "Gather"), *nodes(model, "Slice"))
    return [node for node in candidates if _reverses(node) and _all_read_by_convolutions(node)]


def _reverses(node: ir.Node) -> bool:
    shape = dims(node.inputs[0])
    if shape is None or len(shape) != 4 or shape[1] is None or shape[1] < 2:
        return False
    values = [constant(v) for v in node.inputs[1:]]
    if any(v is None for v in values):
        return False
    if node.op_type == "Gather":
        indices = values[0]
        return integer(node, "axis", 0) == 1 and indices is not None and indices.tolist() == list(range(shape[1]))[::-1]
    if len(values) != 4 or any(v is None or v.size != 1 for v in values):
        return False
    start, end, axis, step = (int(v.item()) for v in values if v is not None)
    return axis % 4 == 1 and step == -1 and start in (-1, shape[1] - 1) and end < -shape[1]


def _all_read_by_convolutions(node: ir.Node) -> bool:
    output = node.outputs[0]
    uses = output.uses()
    return (
        bool(uses)
        and not output.is_graph_output()
        and all(convolution(u.node) is not None and u.idx == 0 and integer(u.node, "group", 1) == 1 for u in uses)
    )
