"""An average that counts the padding, and has none, where its windows reach beyond the image -> one that does not count it.

ONNX Runtime's integer AveragePool takes what lies beyond the image for padding, and divides by it.

Precondition: an AveragePool with ceil_mode and count_include_pad, without pads. Postcondition: no such AveragePool is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import integer, ints


def _match(node: ir.Node) -> bool | None:
    counts = integer(node, "ceil_mode", 0) and integer(node, "count_include_pad", 0)
    return True if counts and not any(ints(node, "pads")) else None


def _rewrite(node: ir.Node, _: bool) -> None:
    node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)


REWRITE = Rewrite(each(_match, "AveragePool"), _rewrite)
