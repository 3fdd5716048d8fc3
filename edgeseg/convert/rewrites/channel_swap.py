"""BGR models: the channel swap before the first convolution goes into its weight.

Reversing the input channels is the same as reversing the weight's input channels; exact.

Precondition: Gather or Slice that reverses axis 1, read by convolutions of one group with constant weights.
Postcondition: no such swap is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.convolution import convolution
from edgeseg.graph.editing import constant_array, dims, replace, slice_bounds, weight


def _match(node: ir.Node) -> ir.Value | None:
    """What is swapped."""
    return node.inputs[0] if _reverses(node) and _all_read_by_convolutions(node) else None


def _reverses(node: ir.Node) -> bool:
    shape = dims(node.inputs[0])
    if shape is None or len(shape) != 4 or shape[1] is None or shape[1] < 2:
        return False
    if node.op_type == "Gather":
        indices = constant_array(node.inputs[1])
        return (
            node.attributes.get_int("axis", 0) == 1
            and indices is not None
            and indices.tolist() == list(range(shape[1]))[::-1]
        )
    start, end, axis, step = slice_bounds(node) or (0, 0, 0, 0)
    return axis == 1 and step == -1 and start in (-1, shape[1] - 1) and end < -shape[1]


def _all_read_by_convolutions(node: ir.Node) -> bool:
    output = node.outputs[0]
    uses = output.uses()
    return (
        bool(uses)
        and not output.is_graph_output()
        and all(
            convolution(u.node) is not None and u.idx == 0 and u.node.attributes.get_int("group", 1) == 1 for u in uses
        )
    )


def _rewrite(node: ir.Node, source: ir.Value) -> None:
    for use in list(node.outputs[0].uses()):
        conv = convolution(use.node)
        assert conv is not None
        conv.node.replace_input_with(1, weight(conv.node, conv.weight[:, ::-1], f"{conv.stem}.weight"))
    replace(node.outputs[0], source)


REWRITE = Rewrite(each(_match, "Gather", "Slice"), _rewrite)
