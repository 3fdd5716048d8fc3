"""Zeros around what a MaxPool reads -> the smallest float32 above zero around it.

ONNX Runtime moves a Pad of zeros into the MaxPool behind it, whose own padding never wins: at the border of what is negative
(in front of a normalization, as in BiT's stem) the result is another. A constant that is not zero stays where it is.

Precondition: a Pad with the constant 0, read by a MaxPool. Postcondition: no such Pad is left; values differ by 1.2e-38 at most.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_input, weight

SMALLEST = np.finfo(np.float32).tiny
_VALUE = 2  # among the inputs of Pad


def _match(node: ir.Node) -> bool | None:
    value = constant_input(node, _VALUE)
    is_zero = value is None or (value.dtype == np.float32 and not value.any())
    is_pooled = any(reader.op_type == "MaxPool" for reader in node.outputs[0].consumers())
    return True if is_pooled and is_zero and node.attributes.get_string("mode", "constant") == "constant" else None


def _rewrite(node: ir.Node, _: bool) -> None:
    if len(node.inputs) <= _VALUE:
        node.resize_inputs(_VALUE + 1)
    node.replace_input_with(_VALUE, weight(node, np.array(SMALLEST, np.float32), "smallest"))


REWRITE = Rewrite(each(_match, "Pad"), _rewrite)
