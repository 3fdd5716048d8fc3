"""1x1 convolution of a sum with a Resize in it -> sum of convolutions, the resized one on the smaller plane.

conv(resize(a) + b) = resize(conv(a)) + conv(b): the Resize then moves the convolution's output channels (a head's few
classes) instead of its inputs'.

Precondition: nothing else reads the sum and the resized value, and the new order is cheaper. Postcondition: no such
convolution is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import ADDED_ELEMENT, RESIZED_ELEMENT, Rewrite, each, pays
from edgeseg.graph.convolution import Convolution, emit_pointwise, pointwise
from edgeseg.graph.editing import dims, emit, replace, sole_maker
from edgeseg.graph.resize import Resizing, emit_resize, resizing

Match = tuple[Convolution, Resizing, ir.Value]


def _match(node: ir.Node) -> Match | None:
    conv, total = pointwise(node), sole_maker(node.inputs[0], "Add")
    if conv is None or total is None:
        return None
    for value, other in (total.inputs, reversed(total.inputs)):
        resize = resizing(sole_maker(value, "Resize"))
        if resize is None or other is None or not resize.can_move or (resize.growth or 0) <= 1:
            continue
        outputs, channels = conv.weight.shape[:2]
        growth = resize.growth or 1.0
        old = growth * (channels * (RESIZED_ELEMENT + ADDED_ELEMENT) + outputs * channels)
        new = growth * (outputs * (RESIZED_ELEMENT + ADDED_ELEMENT) + outputs * channels) + outputs * channels
        if dims(value) == dims(other) == dims(total.outputs[0]) and pays(new, old):
            return conv, resize, other
    return None


def _rewrite(node: ir.Node, match: Match) -> None:
    conv, resize, other = match
    matrix = conv.weight[:, :, 0, 0]
    small = emit_pointwise(node, resize.source, matrix, None, f"{conv.stem}.resized")
    large = emit_pointwise(node, other, matrix, conv.bias, conv.stem)
    grown = emit_resize(node, small, resize)
    replace(node.outputs[0], emit(node, "Add", [grown, large], shape=node.outputs[0].shape))


REWRITE = Rewrite(each(_match, "Conv"), _rewrite)
