"""Feed the uint8 image to the first convolution as it is: normalization goes into that convolution's weights.

The image is an integer tensor already; normalizing it in float and quantizing it again costs time and half a step of
precision. ``(x * scale - mean) / std`` is affine per channel, so it folds into weight and bias. At the border the
convolution pads normalized zeros, which are pixels of the mean colour: these are put around the image explicitly, as
uint8, rounded to the nearest pixel value.

Precondition: from the graph's uint8 NHWC input a chain of elementwise and channel operators leads to convolutions with
constant weights; static size; the mean colour is a colour. Otherwise nothing changes.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from edgeseg.quantize.editing import Editor, constant_array, image_shape, remove_unread, sole_reader
from edgeseg.quantize.placement import Range
from edgeseg.spec import PipelineSpec

_CHAIN = frozenset({"Cast", "Transpose", "Mul", "Add", "Sub", "Div", "Slice", "Gather"})
PIXEL_SCALE = 1.0 / 255.0


def fold_preprocessing(model: ir.Model, ranges: dict[str, Range], spec: PipelineSpec) -> int:
    """Apply the pass; returns the number of convolutions that read the image directly afterwards."""
    graph = model.graph
    image = graph.inputs[0]
    shape = image_shape(image)
    chain = _chain(image)
    if shape is None or image.dtype != ir.DataType.UINT8 or not chain:
        return 0
    normalized = chain[-1].outputs[0]
    convolutions = list(normalized.consumers())
    if not convolutions or not all(_is_foldable(node) for node in convolutions):
        return 0
    factor, offset = _channel_affine(chain, shape[2])
    # Column c of `factor` says what image channel c adds to each network channel; swapped channels are off the diagonal.
    gain = factor.sum(axis=1)
    border = np.rint(np.linalg.solve(factor, -offset))
    if not np.all((border >= 0) & (border <= 255) & (np.count_nonzero(factor, axis=1) == 1)) or not np.all(gain > 0):
        return 0
    for node in convolutions:
        pixels = _bordered(graph, node, image, border.astype(np.uint8))
        _fold_into(graph, node, pixels, factor, offset, zero_point=int(np.rint(border.mean())))
        ranges[str(node.inputs[0].name)] = (-1.0, 1.0)  # type: ignore[union-attr]
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
    weight = constant_array(node.inputs[1]) if node.op_type == "Conv" else None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        weight is not None
        and weight.ndim == 4
        and node.attributes.get_int("group", 1) == 1
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and (bias is None or constant_array(bias) is not None)
    )


def _channel_affine(chain: list[ir.Node], channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run the chain on single pixels: network channels = factor @ image channels + offset."""
    pixels = np.zeros((channels + 1, 1, 1, channels), np.uint8)
    pixels[1:, 0, 0][np.diag_indices(channels)] = 255
    nodes = [ir.serde.serialize_node(n) for n in chain]
    constants = {v.name: v for n in chain for v in n.inputs if v is not None and v.const_value is not None}
    image = onnx.helper.make_tensor_value_info(nodes[0].input[0], onnx.TensorProto.UINT8, None)
    result = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    initializers = [onnx.numpy_helper.from_array(v.const_value.numpy(), name) for name, v in constants.items()]  # type: ignore[union-attr]
    graph = onnx.helper.make_graph(nodes, "preprocessing", [image], [result], initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    (values,) = ReferenceEvaluator(model).run(None, {image.name: pixels})
    responses = np.asarray(values, np.float64).reshape(channels + 1, channels)
    return (responses[1:] - responses[0]).T / 255.0, responses[0]


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
    weight = constant_array(node.inputs[1])
    assert weight is not None
    used = []
    for axis, (size, before, after) in enumerate(((height, top, bottom), (width, left, right))):
        stride = node.attributes.get_ints("strides", (1, 1))[axis]
        reach = node.attributes.get_ints("dilations", (1, 1))[axis] * (weight.shape[2 + axis] - 1)
        used.append(min(after, (before + size + after - reach - 1) // stride * stride + reach + 1 - before - size))
    return top, left, max(used[0], 0), max(used[1], 0)


def _fold_into(
    graph: ir.Graph,
    node: ir.Node,
    pixels: ir.Value,
    factor: NDArray[np.float64],
    offset: NDArray[np.float64],
    zero_point: int,
) -> None:
    # Any zero point is exact here. The mean colour keeps the input around zero, where rounding errors of the weights
    # average out; at 0 they would add up to a shift of the whole image (0.25 points of mIoU on a street-scene FPN).
    offset = offset + factor.sum(axis=1) * zero_point
    weight, bias = constant_array(node.inputs[1]), constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    assert weight is not None
    wide = weight.astype(np.float64)
    shifted = np.einsum("oihw,i->o", wide, offset) + (0.0 if bias is None else bias.astype(np.float64))
    # The image's integers are read as a span of 1, so that the weights keep their usual size.
    folded = np.einsum("oihw,ic->ochw", wide, factor) / PIXEL_SCALE
    editor = Editor(graph, node, f"{node.name}/image")
    planes = editor.op("planes", "Transpose", [pixels], dtype=ir.DataType.UINT8, perm=[0, 3, 1, 2])
    scale = editor.constant("scale", np.array(PIXEL_SCALE, np.float32))
    zero = editor.constant("zero_point", np.array(zero_point, np.uint8))
    real = editor.op("DQ", "DequantizeLinear", [planes, scale, zero])
    node.replace_input_with(0, real)
    node.replace_input_with(1, editor.constant("weight", folded.astype(np.float32)))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, editor.constant("bias", shifted.astype(np.float32)))
    node.attributes["pads"] = ir.AttrInt64s("pads", [0, 0, 0, 0])
