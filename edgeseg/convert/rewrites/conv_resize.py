"""1x1 convolution and Resize change places, so that the convolution works on the smaller plane.

A 1x1 convolution mixes channels pixel by pixel; a Resize mixes pixels channel by channel with weights that sum to
1. They commute, bias included: conv(resize(x)) = resize(conv(x)).

Precondition: nothing else reads the value between the two, and the new order is cheaper (fewer
multiply-accumulates, not outweighed by more channels to resize). Postcondition: no such pair is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import RESIZED_ELEMENT, Rewrite, pays
from edgeseg.graph.convolution import Convolution, emit_pointwise, pointwise
from edgeseg.graph.editing import given, nodes, replace, sole_maker
from edgeseg.graph.resize import Resizing, emit_resize, resizing


def _matches(model: ir.Model) -> list[tuple[Convolution, Resizing]]:
    pairs: list[tuple[Convolution, Resizing]] = []
    taken: set[ir.Node] = set()
    for node in nodes(model, "Conv", "Resize"):
        pair = _pair(node)
        # a Resize between two convolutions belongs to one pair at a time
        if pair is not None and not {pair[0].node, pair[1].node} & taken:
            taken |= {pair[0].node, pair[1].node}
            pairs.append(pair)
    return pairs


def _pair(node: ir.Node) -> tuple[Convolution, Resizing] | None:
    """conv(resize(x)) whose Resize grows the plane, or resize(conv(x)) whose Resize shrinks it."""
    before = sole_maker(node.inputs[0], "Conv", "Resize")
    conv, resize = pointwise(node) or pointwise(before), resizing(node) or resizing(before)
    if conv is None or resize is None or not resize.can_move or resize.growth is None:
        return None
    outputs, channels = conv.weight.shape[:2]
    resized_first = resize.growth * (channels * RESIZED_ELEMENT + outputs * channels)
    resized_last = resize.growth * outputs * RESIZED_ELEMENT + outputs * channels
    if conv.node is node:
        fits = resize.growth > 1 and pays(resized_last, resized_first)
    else:
        fits = resize.growth < 1 and pays(resized_first, resized_last)
    return (conv, resize) if fits else None


def _swap(conv: Convolution, resize: Resizing) -> None:
    matrix = conv.weight[:, :, 0, 0]
    if conv.node.inputs[0] is resize.output:
        small = emit_pointwise(conv.node, resize.source, matrix, conv.bias, conv.stem)
        replace(conv.node.outputs[0], emit_resize(conv.node, small, resize))
    else:
        small = emit_resize(resize.node, given(conv.node), resize)
        replace(resize.output, emit_pointwise(resize.node, small, matrix, conv.bias, conv.stem))


REWRITE = Rewrite(_matches, _swap)
