"""The channels of a convolution's input, left to a Reshape of computed size to find out, -> the number they are.

At dynamic size, tokens become planes by a Reshape to ``(batch, -1, height, width)`` whose height and width are computed.
The -1 is the one number that is known: the convolution's weight says it. TensorRT takes no transposed convolution
of channels it does not know.

Precondition: a Reshape to four axes whose shape is a Concat of single numbers with a constant -1 for the channels, read by
a Conv or ConvTranspose with a constant weight. Postcondition: no such Reshape is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_array, dims, emit, maker, weight


def _match(node: ir.Node) -> tuple[ir.Node, int] | None:
    concat = maker(node.inputs[1], "Concat")
    if concat is None or len(concat.inputs) != 4 or concat.attributes.get_int("axis", 0) != 0:
        return None
    if any(dims(part) != (1,) for part in concat.inputs):
        return None
    values = [constant_array(part) for part in concat.inputs]
    batch, open_channels, *sides = (None if value is None else int(value.item()) for value in values)
    # A second number left open (-1) or copied (0) would make the channels depend on more than the weight.
    if open_channels != -1 or any(number is not None and number < 1 for number in (batch, *sides)):
        return None
    if None not in (batch, *sides):
        return None  # nothing is computed: the whole shape is a constant, which needs no help
    channels = {_channels(use.node) for use in node.outputs[0].uses() if use.idx == 0} - {None}
    return (concat, channels.pop() or 0) if len(channels) == 1 else None


def _channels(reader: ir.Node) -> int | None:
    """Input channels of a convolution with a constant weight."""
    kernel = constant_array(reader.inputs[1]) if reader.op_type in ("Conv", "ConvTranspose") else None
    if kernel is None:
        return None
    return int(
        kernel.shape[0]
        if reader.op_type == "ConvTranspose"
        else kernel.shape[1] * reader.attributes.get_int("group", 1)
    )


def _rewrite(node: ir.Node, match: tuple[ir.Node, int]) -> None:
    concat, channels = match
    parts = list(concat.inputs)
    parts[1] = weight(node, np.array([channels], np.int64), "channels")
    # A Concat of its own: another Reshape may read the old one for other channels.
    node.replace_input_with(1, emit(node, "Concat", parts, {"axis": 0}, shape=(4,)))


REWRITE = Rewrite(each(_match, "Reshape"), _rewrite)
