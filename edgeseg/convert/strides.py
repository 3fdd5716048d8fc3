"""The image of a model of dynamic size, as torch.export sees it: sides as so many strides, each of so many pixels.

torch.export does not use that a side is a multiple of something: of a ``side`` a reduction by 4 makes ``(side - 1) // 4 + 1``,
window padding and the shapes of windows make fractions of such fractions, and sympy takes minutes to hours to compare
them. Of ``32 * strides`` a reduction makes ``8 * strides``. So the image is given as ``(N, strides, 32, strides, 32, C)`` and
joined by the module; in the graph it is an image again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgeseg.graph.editing import constant_array, emit, remove_unread, replace, weight

AXES = (1, 3)
"""Where the numbers of strides stand that make height and width."""


def in_strides(shape: Sequence[int], stride: int) -> tuple[int, ...]:
    """The shape of an image ``(N, H, W, C)`` by strides; two a side at least, torch.export takes a size of 1 for a constant."""
    batch, height, width, channels = shape
    return batch, max(height // stride, 2), stride, max(width // stride, 2), stride, channels


@contextlib.contextmanager
def given_in_strides(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile ``module`` takes its image by strides."""

    def join(_: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        batch, rows, row, columns, column, channels = inputs[0].shape
        return inputs[0].reshape(batch, rows * row, columns * column, channels)

    hook = module.register_forward_pre_hook(join)
    try:
        yield
    finally:
        hook.remove()


def as_image(model: ir.Model) -> None:
    """Let the graph of a module that was :func:`given_in_strides` take the image itself, in place."""
    image = model.graph.inputs[0]
    assert image.shape is not None
    batch, rows, stride, columns, _, channels = image.shape
    assert isinstance(stride, int)
    # As torch names what it computes of them, so that outputs have them too.
    sides = [n * stride if isinstance(n, int) else f"{stride}*{n}" if stride > 1 else n for n in (rows, columns)]
    image.shape = ir.Shape([batch, *sides, channels])
    for node, _ in image.uses():
        if node.op_type == "Reshape":
            replace(node.outputs[0], image)
            remove_unread(model.graph, [node])
    for node, _ in image.uses():
        if node.op_type == "Shape" and (axis := node.attributes.get_int("start", 0)) in AXES:
            _count_strides(node, AXES.index(axis) + 1, stride)


def _count_strides(node: ir.Node, axis: int, stride: int) -> None:
    """Let a Shape, of one axis, give how many strides an image has along ``axis``; whole multiples come from the size."""
    node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)
    if stride == 1:
        return
    size = node.outputs[0]
    for reader, index in size.uses():
        if reader.op_type == "Squeeze":
            for scaled, _ in reader.outputs[0].uses():
                factor = constant_array(scaled.inputs[1]) if scaled.op_type == "Mul" else None
                if factor is not None and factor.size == 1 and factor % stride == 0:
                    pixels = emit(scaled, "Squeeze", [size, *reader.inputs[1:]], reader.attributes, shape=[])
                    if factor != stride:
                        pixels = emit(scaled, "Mul", [pixels, weight(scaled, factor // stride, "strides")], shape=[])
                    replace(scaled.outputs[0], pixels)
        strides = emit(reader, "Div", [size, weight(reader, np.array([stride]), "stride")], shape=[1])
        reader.replace_input_with(index, strides)
