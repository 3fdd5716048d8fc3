"""Convolutions as the linear maps they are: shared by the rewrites that move, split and compose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.graph.editing import constant_array, dims, emit, weight


@dataclass(frozen=True)
class Convolution:
    """A Conv node with constant weight ``(O, I/group, kH, kW)`` and bias ``(O,)`` (zeros when it has none)."""

    node: ir.Node
    weight: NDArray[Any]
    bias: NDArray[Any]

    @property
    def has_bias(self) -> bool:
        return bool(self.bias.any())

    @property
    def stem(self) -> str:
        """Name of its weight without ``.weight``, for the weights made from it."""
        value = self.node.inputs[1]
        return ((value.name if value is not None else None) or "conv").removesuffix(".weight")


def convolution(node: ir.Node | None) -> Convolution | None:
    """Read a 2-d Conv with constant weights."""
    if node is None or node.op_type != "Conv" or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    kernel = constant_array(node.inputs[1])
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(bias_value)
    if kernel is None or kernel.ndim != 4 or kernel.dtype != np.float32 or (bias_value is not None and bias is None):
        return None
    return Convolution(node, kernel, np.zeros(kernel.shape[0], kernel.dtype) if bias is None else bias)


def pointwise(node: ir.Node | None) -> Convolution | None:
    """Read a Conv that mixes channels pixel by pixel: 1x1, stride 1, no padding, one group."""
    conv = convolution(node)
    if conv is None or conv.weight.shape[2:] != (1, 1) or conv.node.attributes.get_int("group", 1) != 1:
        return None
    plain = not any(conv.node.attributes.get_ints("pads", ())) and set(
        conv.node.attributes.get_ints("strides", (1, 1))
    ) == {1}
    return conv if plain else None


def concat_channels(concat: ir.Node) -> list[int] | None:
    """Channels of each input of a Concat of images along them; ``None`` for any other, or where one is not known."""
    shapes = [dims(value) for value in concat.inputs]
    channels = [s[1] for s in shapes if s is not None and len(s) == 4 and s[1] is not None]
    return channels if len(channels) == len(shapes) and concat.attributes.get_int("axis", 0) in {1, -3} else None


def emit_concat(before: ir.Node, values: Sequence[ir.Value], channels: int) -> ir.Value:
    """Insert a Concat of images along their channels, so many in all; a single one is returned as it is."""
    first = values[0].shape
    shape = None if first is None else [first[0], channels, *first[2:]]
    return values[0] if len(values) == 1 else emit(before, "Concat", values, {"axis": 1}, shape=shape)


def emit_pointwise(
    before: ir.Node, x: ir.Value, matrix: NDArray[Any], bias: NDArray[Any] | None, stem: str
) -> ir.Value:
    """Insert a 1x1 Conv of ``matrix`` ``(O, I)``; a bias of zeros is left out."""
    inputs = [x, weight(before, matrix[:, :, None, None], f"{stem}.weight")]
    if bias is not None and bias.any():
        inputs.append(weight(before, bias, f"{stem}.bias"))
    shape = None if x.shape is None else [x.shape[0], matrix.shape[0], *x.shape[2:]]
    return emit(before, "Conv", inputs, {"kernel_shape": [1, 1]}, shape=shape)
