"""Two linear convolutions in a row, the first 1x1 -> one.

A convolution (or transposed convolution) after a 1x1 convolution without activation between is one convolution
whose kernel is the product of the two. The first's bias passes through the second: where that pads with zeros or
strides, the contribution differs from pixel to pixel, so it is added as a constant map (planes of static size
only).

Precondition: nothing else reads the value between, and the result is cheaper. Postcondition: no such pair is
left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.rewrites.driver import ADDED_ELEMENT, Rewrite, each, pays
from edgeseg.graph.convolution import Convolution, pointwise
from edgeseg.graph.editing import (
    constant_array,
    constant_input,
    dims,
    emit,
    given,
    given_array,
    replace,
    sole_maker,
    weight,
)


def _first(node: ir.Node) -> Convolution | None:
    """The 1x1 convolution before ``node``, if composing the two is possible and pays."""
    first = pointwise(sole_maker(node.inputs[0], "Conv"))
    kernel = constant_array(node.inputs[1])
    if first is None or kernel is None or kernel.ndim != 4 or node.attributes.get_int("group", 1) != 1:
        return None
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant_input(node, 2) is None:
        return None
    planes = dims(node.inputs[0]), dims(node.outputs[0])
    needs_map = first.has_bias and not _uniform(node, kernel)
    if None in planes or (needs_map and any(p is None or None in p[2:] for p in planes)):
        return None
    middle, inputs = first.weight.shape[:2]
    transposed = node.op_type == "ConvTranspose"
    outputs = kernel.shape[1] if transposed else kernel.shape[0]
    taps, strides = int(np.prod(kernel.shape[2:])), int(np.prod(node.attributes.get_ints("strides", (1, 1))))
    # per pixel of the plane the 1x1 convolution works on
    times = taps if transposed else taps / strides
    added = outputs * (strides if transposed else 1 / strides) * ADDED_ELEMENT if needs_map else 0
    old = middle * inputs + times * outputs * middle
    return first if pays(times * outputs * inputs + added, old) else None


def _uniform(node: ir.Node, kernel: NDArray[Any]) -> bool:
    """Every output pixel sees the same taps: no zero padding; for a transposed one, a single tap."""
    if node.op_type == "ConvTranspose":
        return kernel.shape[2:] == (1, 1) and set(node.attributes.get_ints("strides", (1, 1))) == {1}
    return not any(node.attributes.get_ints("pads", ()))


def _rewrite(node: ir.Node, first: Convolution) -> None:
    channels = 0 if node.op_type == "ConvTranspose" else 1  # the axis of its input's
    outer = np.moveaxis(given_array(node), channels, -1).astype(np.float64)  # (O, kH, kW, M)
    kernel = np.moveaxis(outer @ first.weight[:, :, 0, 0].astype(np.float64), -1, channels)
    taps = outer @ first.bias.astype(np.float64)  # (O, kH, kW): what the first's bias gives at each kernel position
    own = constant_input(node, 2)
    bias = np.zeros(len(outer), np.float32) if own is None else own
    stem = (given(node, 1).name or "conv").removesuffix(".weight")
    uniform = _uniform(node, kernel)
    if uniform:
        bias = (bias + taps.sum(axis=(1, 2))).astype(np.float32)
    inputs = [given(first.node), weight(node, kernel.astype(np.float32), f"{stem}.weight")]
    if bias.any():
        inputs.append(weight(node, bias.astype(np.float32), f"{stem}.bias"))
    shape = node.outputs[0].shape
    result = emit(node, node.op_type, inputs, node.attributes, shape=shape)
    if not uniform and taps.any():
        constant_map = _bias_map(node, taps)[None].astype(np.float32)
        result = emit(node, "Add", [result, weight(node, constant_map, f"{stem}.bias_map")], shape=shape)
    replace(node.outputs[0], result)


def _bias_map(node: ir.Node, taps: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a plane of ones times ``taps`` becomes: float64 ``(O, H, W)`` of ``node``'s output plane."""
    small, large = dims(node.inputs[0]) or (), dims(node.outputs[0]) or ()
    if node.op_type == "Conv":
        small, large = large, small  # a convolution gathers what a transposed one scatters
    planes = [(s or 0, b or 0) for s, b in zip(small[2:], large[2:], strict=True)]
    strides, dilations = node.attributes.get_ints("strides", (1, 1)), node.attributes.get_ints("dilations", (1, 1))
    pads = node.attributes.get_ints("pads", (0, 0, 0, 0))
    target = [b if node.op_type == "ConvTranspose" else s for s, b in planes]
    result = np.zeros((taps.shape[0], *target))
    for row in range(taps.shape[1]):
        for column in range(taps.shape[2]):
            touched = []
            for axis, offset in enumerate((row, column)):
                cells = np.arange(planes[axis][0])
                reached = cells * strides[axis] + offset * dilations[axis] - pads[axis]
                inside = (reached >= 0) & (reached < planes[axis][1])
                touched.append(reached[inside] if node.op_type == "ConvTranspose" else cells[inside])
            result[:, touched[0][:, None], touched[1][None, :]] += taps[:, row, column, None, None]
    return result


REWRITE = Rewrite(each(_first, "Conv", "ConvTranspose"), _rewrite)
