"""3x3 convolution of a nearest-2x upsampled tensor -> one 4x4 transposed convolution of stride 2 at the low resolution.

After nearest 2x upsampling every pixel stands four times, so the nine taps of a 3x3 kernel meet at most four different
values. Nearest upsampling is a transposed convolution with a 2x2 kernel of ones; composed with the 3x3 kernel it is one
with a 4x4 kernel. 9 multiply-accumulates per input channel and output pixel become 4, and the upsampled tensor is never
written (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016, in reverse).

Decoders upsample right before they merge, so the rewrite looks through the merge: convolution is linear, and
conv(concat(up(a), b)) = conv_a(up(a)) + conv_b(b), conv(up(a) + b) = conv(up(a)) + conv(b). A 1x1 convolution that made b
is then composed into the 3x3 (FPN's lateral convolutions: 24 input channels instead of 256).

Precondition: 3x3 Conv of stride, dilation and group 1, padding 1, constant weight, whose input is made by nearest 2x Resize,
directly or below Add and channel Concat nodes; and it saves a quarter of the convolution. Postcondition: none is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import Rewrite
from edgeseg.graph.convolution import Convolution, concat_channels, convolution, emit_concat, pointwise
from edgeseg.graph.editing import dims, emit, maker, nodes, replace, weight
from edgeseg.graph.resize import resizing

FloatArray = NDArray[np.float32]

MINIMUM_SAVING = 0.25
"""Share of the multiply-accumulates that has to go; below it a transposed convolution's scatter costs more than is saved."""


@dataclass
class _Terms:
    """A 3x3 convolution as a sum: over low-resolution values, and over values at full resolution."""

    low: list[tuple[ir.Value, FloatArray]] = field(default_factory=list)
    full: list[tuple[ir.Value, FloatArray]] = field(default_factory=list)
    lateral: tuple[ir.Value, FloatArray, FloatArray] | None = None
    """One more value at full resolution: what a composed 1x1 convolution reads, its weights ``(M, I)``, and the 3x3 kernel
    ``(O, M, 3, 3)`` behind it."""
    shift: FloatArray | None = None
    """Bias of a composed 1x1 convolution, per channel of the first low-resolution value. Zero padding keeps it away from
    the border, so it is no bias of the result: it is added to that value, which is padded alike."""

    def macs_per_pixel(self) -> int:
        macs = sum(4 * int(w.shape[0] * w.shape[1]) for _, w in self.low) + sum(int(w.size) for _, w in self.full)
        if self.lateral is not None:
            _, inner, kernel = self.lateral
            macs += int(kernel.size) // inner.shape[0] * inner.shape[1]
        return macs

    def at_full_resolution(self) -> list[tuple[ir.Value, FloatArray]]:
        """All values at full resolution, the composed one with its kernel."""
        if self.lateral is None:
            return self.full
        value, inner, kernel = self.lateral
        composed = np.tensordot(kernel.astype(np.float64), inner.astype(np.float64), ((1,), (0,)))
        return [*self.full, (value, np.moveaxis(composed, -1, 1).astype(np.float32))]


def _matches(model: ir.Model) -> list[tuple[Convolution, _Terms]]:
    pairs = []
    for node in nodes(model, "Conv"):
        conv = convolution(node)
        if conv is None or not _is_plain_3x3(conv):
            continue
        terms = _Terms()
        _decompose(node.inputs[0], conv.weight, terms)
        if terms.low and terms.macs_per_pixel() <= (1.0 - MINIMUM_SAVING) * conv.weight.size:
            pairs.append((conv, terms))
    return pairs


def _is_plain_3x3(conv: Convolution) -> bool:
    node = conv.node
    return (
        conv.weight.shape[2:] == (3, 3)
        and node.attributes.get_ints("pads", (0, 0, 0, 0)) == (1, 1, 1, 1)
        and set(node.attributes.get_ints("strides", (1, 1))) == {1}
        and set(node.attributes.get_ints("dilations", (1, 1))) == {1}
        and node.attributes.get_int("group", 1) == 1
    )


def _decompose(value: ir.Value | None, kernel: FloatArray, terms: _Terms, *, added: bool = False) -> None:
    """Split ``conv(value, kernel)`` into terms; ``added`` says that ``value`` is a term of a sum."""
    assert value is not None
    low, total, concat = _before_nearest_2x(value), maker(value, "Add"), maker(value, "Concat")
    lateral = pointwise(maker(value, "Conv")) if added and terms.lateral is None else None
    if low is not None:
        terms.low.append((low, kernel))
    elif total is not None and all(dims(v) == dims(value) is not None for v in total.inputs):
        for side in total.inputs:
            _decompose(side, kernel, terms, added=True)
    elif concat is not None and (channels := concat_channels(concat)) is not None:
        starts = np.cumsum([0, *channels])
        for part, start, stop in zip(concat.inputs, starts[:-1], starts[1:], strict=True):
            _decompose(part, kernel[:, start:stop], terms)
    elif lateral is not None and lateral.node.inputs[0] is not None:
        terms.lateral = lateral.node.inputs[0], lateral.weight[:, :, 0, 0], kernel
        terms.shift = lateral.bias
    else:
        terms.full.append((value, kernel))


def _before_nearest_2x(value: ir.Value) -> ir.Value | None:
    """What ``value`` repeats twice in both directions."""
    resized = resizing(maker(value, "Resize"))
    if resized is None or not resized.repeats_pixels:
        return None
    before, after = dims(resized.source), dims(resized.output)
    doubled = before is not None and after is not None and None not in (*before[2:], *after[2:])
    doubled = doubled and [2 * (n or 0) for n in (before or ())[2:]] == list((after or ())[2:])
    return resized.source if doubled or resized.scales == (1.0, 1.0, 2.0, 2.0) else None


def transposed_kernel(kernel: FloatArray) -> FloatArray:
    """The kernel ``(I, O, 4, 4)`` of stride 2 and padding 1 that does on a plane what the 3x3 ``kernel`` ``(O, I, 3, 3)``
    does on it after nearest 2x upsampling."""
    taps = kernel.astype(np.float64).transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    for axis in (2, 3):
        before, after = [(0, 0)] * 4, [(0, 0)] * 4
        before[axis], after[axis] = (1, 0), (0, 1)
        taps = np.pad(taps, before) + np.pad(taps, after)
    return np.asarray(taps, np.float32)


def _rewrite(conv: Convolution, terms: _Terms) -> None:
    node, output = conv.node, conv.node.outputs[0]
    after = output.shape
    full_terms = terms.at_full_resolution()
    low, kernel = _joined(node, _shifted(conv, terms), conv.stem)
    inputs = [low, weight(node, transposed_kernel(kernel), f"{conv.stem}.upsampled.weight")]
    if conv.has_bias and not full_terms:
        inputs.append(weight(node, conv.bias, f"{conv.stem}.upsampled.bias"))
    attributes = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    result = emit(node, "ConvTranspose", inputs, attributes, shape=after)
    if full_terms:
        full, kernel = _joined(node, full_terms, conv.stem)
        inputs = [full, weight(node, kernel, f"{conv.stem}.skip.weight")]
        if conv.has_bias:
            inputs.append(weight(node, conv.bias, f"{conv.stem}.skip.bias"))
        skip = emit(node, "Conv", inputs, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, shape=after)
        result = emit(node, "Add", [result, skip], shape=after)
    replace(output, result)


def _shifted(conv: Convolution, terms: _Terms) -> list[tuple[ir.Value, FloatArray]]:
    """The low-resolution terms, the composed bias added to the first."""
    if terms.shift is None or not terms.shift.any():
        return terms.low
    (value, kernel), *others = terms.low
    shift = weight(conv.node, terms.shift.reshape(1, -1, 1, 1), f"{conv.stem}.shift")
    return [(emit(conv.node, "Add", [value, shift], shape=value.shape), kernel), *others]


def _joined(node: ir.Node, parts: list[tuple[ir.Value, FloatArray]], stem: str) -> tuple[ir.Value, FloatArray]:
    """One value and one kernel for a sum of convolutions: same value, kernels added; different values, a Concat."""
    merged: dict[ir.Value, FloatArray] = {}
    for value, kernel in parts:
        merged[value] = merged[value] + kernel if value in merged else kernel
    kernel = np.concatenate(list(merged.values()), axis=1)
    return emit_concat(node, list(merged), kernel.shape[1]), kernel


REWRITE = Rewrite(_matches, _rewrite)
