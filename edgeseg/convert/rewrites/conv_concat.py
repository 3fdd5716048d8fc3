"""1x1 convolution of a Concat with upsampled parts -> upsampled convolutions of the parts, added.

conv(concat(resize(a), b)) = resize(conv_a(a)) + conv_b(b): a 1x1 convolution is linear in its input channels and
commutes with a Resize (see conv_resize). Where ``a`` is one pixel (image pooling in ASPP) the Resize is a
broadcast and the Add does it.

Precondition: the Concat is along channels and read by this convolution only; at least one part is an upsampling
Resize for which the new form is cheaper, counting the elements resized, copied and added. Postcondition: no such
part is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import ADDED_ELEMENT, COPIED_ELEMENT, RESIZED_ELEMENT, Rewrite, each, pays
from edgeseg.graph.convolution import Convolution, concat_channels, emit_concat, emit_pointwise, pointwise
from edgeseg.graph.editing import dims, emit_sum, given, replace, sole_maker
from edgeseg.graph.resize import Resizing, emit_resize, resizing


@dataclass(frozen=True)
class _Part:
    value: ir.Value
    start: int
    end: int
    resize: Resizing | None

    @property
    def channels(self) -> int:
        return self.end - self.start


def _match(node: ir.Node) -> tuple[Convolution, list[_Part], list[_Part]] | None:
    conv, concat = pointwise(node), sole_maker(node.inputs[0], "Concat")
    channels = None if concat is None else concat_channels(concat)
    if conv is None or concat is None or channels is None:
        return None
    moved: list[_Part] = []
    kept: list[_Part] = []
    start = 0
    for index, count in enumerate(channels):
        value = given(concat, index)
        part = _Part(value, start, start + count, resizing(sole_maker(value, "Resize")))
        start = part.end
        (moved if _gains(part, conv.weight.shape[0]) else kept).append(part)
    return (conv, moved, kept) if moved else None


def _gains(part: _Part, outputs: int) -> bool:
    resize = part.resize
    if resize is None or not resize.can_move or resize.growth is None or resize.growth <= 1:
        return False
    pixels = resize.growth  # prices per pixel of the small plane
    old = pixels * part.channels * (RESIZED_ELEMENT + COPIED_ELEMENT + outputs)
    resized = 0 if _is_one_pixel(resize) else pixels * outputs * RESIZED_ELEMENT
    return pays(resized + pixels * outputs * ADDED_ELEMENT + part.channels * outputs, old)


def _is_one_pixel(resize: Resizing) -> bool:
    shape = dims(resize.source)
    return shape is not None and shape[2:] == (1, 1)


def _rewrite(node: ir.Node, match: tuple[Convolution, list[_Part], list[_Part]]) -> None:
    conv, moved, kept = match
    matrix = conv.weight[:, :, 0, 0]
    bias = conv.bias
    terms = []
    if kept:
        whole = emit_concat(node, [p.value for p in kept], sum(p.channels for p in kept))
        columns = [c for p in kept for c in range(p.start, p.end)]
        terms.append(emit_pointwise(node, whole, matrix[:, columns], bias, conv.stem))
    for index, part in enumerate(moved):
        resize = part.resize
        assert resize is not None  # or it would be kept
        own_bias = bias if not kept and index == 0 else None
        small = emit_pointwise(node, resize.source, matrix[:, part.start : part.end], own_bias, conv.stem)
        # a one-pixel plane is broadcast by the Add, unless nothing of full size would remain
        broadcast = _is_one_pixel(resize) and (kept or any(not _is_one_pixel(p.resize) for p in moved if p.resize))
        terms.append(small if broadcast else emit_resize(node, small, resize))
    replace(node.outputs[0], emit_sum(node, terms))


REWRITE = Rewrite(each(_match, "Conv"), _rewrite)
