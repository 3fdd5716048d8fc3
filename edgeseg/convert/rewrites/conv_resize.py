"""1x1 convolution and Resize change places, so that the convolution works on the smaller plane.

A 1x1 convolution mixes channels pixel by pixel; a Resize mixes pixels channel by channel with weights that sum to
1. They commute, bias included: conv(resize(x)) = resize(conv(x)).

Precondition: nothing else reads the value between the two, and the new order is cheaper (fewer
multiply-accumulates, not outweighed by more channels to resize). Postcondition: no such pair is left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.convolution import Convolution, emit_pointwise, pointwise
from edgeseg.convert.rewrites.driver import RESIZED_ELEMENT, Rewrite, pays
from edgeseg.convert.rewrites.resize import Resizing, emit_resize, resizing
from edgeseg.graph.editing import nodes, replace, sole_maker


def _matches(model: ir.Model) -> list[tuple[Convolution, Resizing]]:
    pairs: list[tuple[Convolution, Resizing]] = []
    taken: set[ir.Node] = set()
    for node in nodes(model):
        pair = _conv_after(node) if node.op_type == "Conv" else _conv_before(node) if node.op_type == "Resize" else None
        # a Resize between two convolutions belongs to one pair at a time
        if pair is not None and not {pair[0].node, pair[1].node} & taken:
            taken |= {pair[0].node, pair[1].node}
            pairs.append(pair)
    return pairs


def _conv_after(node: ir.Node) -> tuple[Convolution, Resizing] | None:
    """conv(resize(x)) whose Resize grows the plane."""
    conv, resize = pointwise(node), resizing(sole_maker(node.inputs[0], "Resize"))
    if conv is None or resize is None or not resize.can_move:
        return None
    outputs, channels = conv.weight.shape[:2]
    growth = resize.growth
    if growth is None or growth <= 1:
        return None
    old = growth * (channels * RESIZED_ELEMENT + outputs * channels)
    new = growth * outputs * RESIZED_ELEMENT + outputs * channels
    return (conv, resize) if pays(new, old) else None


def _conv_before(node: ir.Node) -> tuple[Convolution, Resizing] | None:
    """resize(conv(x)) whose Resize shrinks the plane."""
    resize = resizing(node)
    conv = pointwise(sole_maker(node.inputs[0], "Conv")) if resize is not None else None
    if conv is None or resize is None or not resize.can_move:
        return None
    outputs, channels = conv.weight.shape[:2]
    growth = resize.growth
    if growth is None or growth >= 1:
        return None
    old = outputs * channels + growth * outputs * RESIZED_ELEMENT
    new = growth * (channels * RESIZED_ELEMENT + outputs * channels)
    return (conv, resize) if pays(new, old) else None


def _swap(conv: Convolution, resize: Resizing) -> None:
    matrix = conv.weight[:, :, 0, 0]
    if conv.node.inputs[0] is resize.output:
        small = emit_pointwise(conv.node, resize.source, matrix, conv.bias, conv.stem)
        replace(conv.node.outputs[0], emit_resize(conv.node, small, resize))
    else:
        source = conv.node.inputs[0]
        assert source is not None
        small = emit_resize(resize.node, source, resize)
        replace(resize.output, emit_pointwise(resize.node, small, matrix, conv.bias, conv.stem))


REWRITE = Rewrite(_matches, _swap)
