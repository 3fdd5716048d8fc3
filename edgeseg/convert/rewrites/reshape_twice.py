"""Reshape after Reshape -> the second alone.

Reshapes keep the order of elements, so what the first one made is of no account. The ``layout`` rewrite does this and more
where sizes are known; here none need be.

Precondition: a Reshape whose constant shape copies no size (no 0), of a value another Reshape made; nothing else reads the
value between. Postcondition: no such pair is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_array, sole_maker


def _match(node: ir.Node) -> ir.Node | None:
    shape = constant_array(node.inputs[1])
    if shape is None or (0 in shape and not node.attributes.get_int("allowzero", 0)):
        return None
    return sole_maker(node.inputs[0], "Reshape")


def _rewrite(node: ir.Node, first: ir.Node) -> None:
    node.replace_input_with(0, first.inputs[0])


REWRITE = Rewrite(each(_match, "Reshape"), _rewrite)
