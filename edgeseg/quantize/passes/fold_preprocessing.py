"""Feed the uint8 image to the first convolution as it is: normalization goes into that convolution's weights.

The image is an integer tensor already; normalizing it in float and quantizing it again costs time and half a step of
precision. ``(x * scale - mean) / std`` is affine per channel, so it folds into weight and bias. At the border the
convolution pads normalized zeros, which are pixels of the mean colour: these are put around the image explicitly, as
uint8, rounded to the nearest pixel value.

Precondition: from the graph's uint8 NHWC input a chain of elementwise and channel operators leads to convolutions with
constant weights; static size; the mean colour is a colour; none of them is to stay float, where they read integers; the
normalized image has no scale of training. Otherwise nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgeseg.graph.convolution import convolution
from edgeseg.graph.editing import (
    Editor,
    constant_array,
    constant_input,
    given_array,
    image_shape,
    remove_unread,
    sole_reader,
)
from edgeseg.quantize.observed import Observed

_CHAIN = frozenset({"Cast", "Transpose", "Mul", "Add", "Sub", "Div", "Slice", "Gather"})
PIXEL_SCALE = 1.0 / 255.0


@dataclass(frozen=True)
class _Normalization:
    """Network channels = ``factor`` @ image channels + ``offset``, in pixel values 0..255.

    ``factor`` is diagonal, or a permuted diagonal where the network swaps channels.
    """

    factor: NDArray[np.float64]
    offset: NDArray[np.float64]

    @property
    def colour(self) -> NDArray[np.float64]:
        """The pixel that becomes zero."""
        return np.asarray(np.linalg.solve(self.factor, -self.offset), np.float64)

    @property
    def is_foldable(self) -> bool:
        """Each network channel comes from one image channel, and the pixel that becomes zero is one."""
        single = np.all(np.count_nonzero(self.factor, axis=1) == 1) and np.all(self.factor.sum(axis=1) > 0)
        return bool(single and np.all((np.rint(self.colour) >= 0) & (np.rint(self.colour) <= 255)))


def fold_preprocessing(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns the number of convolutions that read the image's integers afterwards."""
    return _fold(model, observed, in_float=False)


def fold_preprocessing_in_float(model: ir.Model, observed: Observed) -> int:
    """Apply the pass, but hand the convolution the image as float 0..1, to be quantized like any other value.

    For compilers that recognize a quantized value by its Q/DQ pair alone; one with range 0..1 has no zero point and
    loses nothing of a uint8 image.
    """
    return _fold(model, observed, in_float=True)


def _fold(model: ir.Model, observed: Observed, *, in_float: bool) -> int:
    graph = model.graph
    image, chain = graph.inputs[0], _chain(graph.inputs[0])
    shape = image_shape(image)
    if shape is None or image.dtype != ir.DataType.UINT8 or not chain:
        return 0
    normalized = chain[-1].outputs[0]
    convolutions = list(normalized.consumers())
    normalization = _normalization(chain, shape[2])
    if not convolutions or not all(_is_foldable(node) for node in convolutions) or not normalization.is_foldable:
        return 0
    if not in_float and any(map(observed.stays_float, convolutions)):
        return 0
    if str(normalized.name) in observed.grids:
        return 0  # trained on the normalized image in these steps, with weights that belong to them
    mean = observed.channel_means.get(str(normalized.name))
    # Any zero point is exact here. The mean colour keeps the input around zero, where rounding errors of the weights
    # average out; at 0 they add up to a shift of the whole image, unless bias correction knows the image's mean.
    zero_point = 0 if in_float else int(np.rint(normalization.colour.mean()))
    for node in convolutions:
        pixels = _bordered(graph, node, image, np.rint(normalization.colour).astype(np.uint8))
        real = _real(graph, node, pixels, zero_point, in_float=in_float)
        _fold_into(graph, node, real, normalization, zero_point)
        observed.ranges[str(real.name)] = ((0 - zero_point) * PIXEL_SCALE, (255 - zero_point) * PIXEL_SCALE)
        if mean is not None:
            seen = np.linalg.solve(normalization.factor, mean - normalization.offset)
            observed.channel_means[str(real.name)] = np.asarray((seen - zero_point) * PIXEL_SCALE, np.float64)
    remove_unread(graph, [chain[-1]])
    return len(convolutions)


def _chain(image: ir.Value) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    value = image
    while (node := sole_reader(value)) is not None and node.op_type in _CHAIN:
        if any(v is not None and v is not value and v.const_value is None for v in node.inputs):
            break
        nodes.append(node)
        value = node.outputs[0]
    return nodes


def _is_foldable(node: ir.Node) -> bool:
    return convolution(node) is not None and node.attributes.get_int("group", 1) == 1


def _normalization(chain: list[ir.Node], channels: int) -> _Normalization:
    """Run the chain on single pixels."""
    pixels = np.zeros((channels + 1, 1, 1, channels), np.uint8)
    pixels[1:, 0, 0][np.diag_indices(channels)] = 255
    nodes = [ir.serde.serialize_node(n) for n in chain]
    feeds = {str(v.name): array for n in chain for v in n.inputs if v and (array := constant_array(v)) is not None}
    feeds[nodes[0].input[0]] = pixels
    opset = onnx.helper.make_opsetid("", 20)
    function = onnx.helper.make_function("", "normalize", list(feeds), [nodes[-1].output[0]], nodes, [opset])
    (values,) = ReferenceEvaluator(function).run(None, feeds, attributes={})
    responses = np.asarray(values, np.float64).reshape(channels + 1, channels)
    return _Normalization((responses[1:] - responses[0]).T / 255.0, responses[0])


def _bordered(graph: ir.Graph, node: ir.Node, image: ir.Value, colour: NDArray[np.uint8]) -> ir.Value:
    """The image with the mean colour around it, in place of the convolution's zero padding."""
    height, width, channels = image_shape(image) or (0, 0, 0)
    batch = image.shape[0] if image.shape is not None else None
    top, left, bottom, right = _read_padding(node, height, width)
    editor, source = Editor(graph, node, f"{node.name}/border"), image

    def strip(name: str, size: tuple[int, int]) -> ir.Value:
        pixels = editor.constant(name, np.broadcast_to(colour, (1, *size, channels)).copy())
        return for_each_image(editor, pixels, source)

    rows = [strip("top", (top, width))] * (top > 0) + [image] + [strip("bottom", (bottom, width))] * (bottom > 0)
    if len(rows) > 1:
        shape = (batch, height + top + bottom, width, channels)
        image = editor.op("rows", "Concat", rows, dtype=ir.DataType.UINT8, shape=shape, axis=1)
    height += top + bottom
    columns = [strip("left", (height, left))] * (left > 0) + [image] + [strip("right", (height, right))] * (right > 0)
    if len(columns) > 1:
        shape = (batch, height, width + left + right, channels)
        image = editor.op("columns", "Concat", columns, dtype=ir.DataType.UINT8, shape=shape, axis=2)
    return image


def for_each_image(editor: Editor, pixels: ir.Value, image: ir.Value) -> ir.Value:
    """Constant ``pixels`` ``(1, H, W, C)``, once for each image of the batch."""
    batch = image.shape[0] if image.shape is not None else None
    if batch == 1:
        return pixels
    count = editor.op("batch", "Shape", [image], dtype=ir.DataType.INT64, start=0, end=1)
    rest = editor.constant("ones", np.ones(3, np.int64))
    shape = editor.op("strip_shape", "Concat", [count, rest], dtype=ir.DataType.INT64, axis=0)
    return editor.op("strip", "Expand", [pixels, shape], dtype=ir.DataType.UINT8)


def _read_padding(node: ir.Node, height: int, width: int) -> tuple[int, int, int, int]:
    """The convolution's padding without the last rows and columns that its stride never reaches."""
    top, left, bottom, right = node.attributes.get_ints("pads", (0, 0, 0, 0))
    weight, used = given_array(node), []
    for axis, (size, before, after) in enumerate(((height, top, bottom), (width, left, right))):
        stride = node.attributes.get_ints("strides", (1, 1))[axis]
        reach = node.attributes.get_ints("dilations", (1, 1))[axis] * (weight.shape[2 + axis] - 1)
        used.append(min(after, (before + size + after - reach - 1) // stride * stride + reach + 1 - before - size))
    return top, left, max(used[0], 0), max(used[1], 0)


def _real(graph: ir.Graph, node: ir.Node, pixels: ir.Value, zero_point: int, *, in_float: bool) -> ir.Value:
    """The NHWC pixels as float planes, a span of 1 for 0..255, so that folded weights keep their usual size."""
    editor = Editor(graph, node, f"{node.name}/image")
    scale = editor.constant("scale", np.array(PIXEL_SCALE, np.float32))
    if in_float:
        values = editor.op("Cast", "Cast", [pixels], to=ir.DataType.FLOAT.value)
        planes = editor.op("planes", "Transpose", [values], perm=[0, 3, 1, 2])
        return editor.op("Mul", "Mul", [planes, scale])
    planes = editor.op("planes", "Transpose", [pixels], dtype=ir.DataType.UINT8, perm=[0, 3, 1, 2])
    zero = editor.constant("zero_point", np.array(zero_point, np.uint8))
    return editor.op("DQ", "DequantizeLinear", [planes, scale, zero])


def _fold_into(graph: ir.Graph, node: ir.Node, real: ir.Value, normalization: _Normalization, zero_point: int) -> None:
    wide, bias = given_array(node).astype(np.float64), constant_input(node, 2)
    offset = normalization.offset + normalization.factor.sum(axis=1) * zero_point
    shifted = np.einsum("oihw,i->o", wide, offset) + (0.0 if bias is None else bias.astype(np.float64))
    folded = np.einsum("oihw,ic->ochw", wide, normalization.factor) / PIXEL_SCALE
    editor = Editor(graph, node, f"{node.name}/image")
    node.replace_input_with(0, real)
    node.replace_input_with(1, editor.constant("weight", folded.astype(np.float32)))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, editor.constant("bias", shifted.astype(np.float32)))
    node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
