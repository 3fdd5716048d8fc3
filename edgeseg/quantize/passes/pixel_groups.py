"""Strided first convolution over groups of neighbouring pixels: four pixels of three channels are twelve channels.

Integer convolution kernels work on blocks of input channels; three channels fill none, and each pixel costs as much as
one of sixteen. In NHWC, g neighbouring pixels of a row are g times as many channels without a byte moved. A
convolution with horizontal stride s then makes g/s neighbouring output pixels at once, as so many times its channels,
its kernel placed at each pixel's offset and zero elsewhere. Twice the speed for a 3x3 or 7x7 stem of stride 2; for a
patch embedding (stride 16) no zero is added at all.

Precondition: Conv without padding, horizontal stride 2 or a multiple of 4, group and dilation 1, constant weight, over a
uint8 NHWC image as :mod:`fold_preprocessing` leaves it; static size; output width a multiple of the pixels made at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeseg.graph.convolution import Convolution, convolution
from edgeseg.graph.editing import (
    Editor,
    constant_input,
    given,
    given_array,
    image_shape,
    maker,
    put_behind,
    sole_maker,
    sole_reader,
)
from edgeseg.quantize.observed import Observed, each
from edgeseg.quantize.passes.fold_preprocessing import for_each_image


@dataclass(frozen=True)
class _Grouping:
    """How a convolution of one row is grouped.

    Attributes:
        group: input pixels in a group.
        made: output pixels per group.
        blocks: groups a kernel spans.
        groups_out: groups of output pixels in a row.
    """

    group: int
    made: int
    blocks: int
    groups_out: int

    @property
    def width(self) -> int:
        """Input pixels in a row."""
        return self.group * (self.groups_out - 1 + self.blocks)


def _match(node: ir.Node) -> tuple[ir.Node, Convolution, _Grouping] | None:
    conv, planes = convolution(node), _image_planes(node)
    grouping = None if conv is None or planes is None else _grouping(conv, planes)
    return None if conv is None or planes is None or grouping is None else (planes, conv, grouping)


def _image_planes(node: ir.Node) -> ir.Node | None:
    """The Transpose that makes planes of a uint8 NHWC image in front of ``node``'s DequantizeLinear."""
    dequantize = sole_maker(node.inputs[0], "DequantizeLinear") if node.op_type == "Conv" else None
    return None if dequantize is None else maker(dequantize.inputs[0], "Transpose")


def _grouping(conv: Convolution, planes: ir.Node) -> _Grouping | None:
    image, output, attributes = image_shape(planes.inputs[0]), image_shape(conv.node.outputs[0]), conv.node.attributes
    stride = attributes.get_ints("strides", (1, 1))[1]
    if output is None or image is None or any(attributes.get_ints("pads", ())) or (stride != 2 and stride % 4):
        return None
    if attributes.get_int("group", 1) != 1 or attributes.get_ints("dilations", (1, 1)) != (1, 1):
        return None
    group = max(stride, 4)
    made = group // stride
    blocks = ((made - 1) * stride + conv.weight.shape[3] - 1) // group + 1
    grouping = _Grouping(group, made, blocks, output[2] // made)
    return grouping if output[2] % made == 0 and image[1] <= grouping.width else None


def _replace(graph: ir.Graph, node: ir.Node, match: tuple[ir.Node, Convolution, _Grouping], observed: Observed) -> None:
    planes, conv, grouping = match
    weight, bias = conv.weight, constant_input(node, 2)
    image, output = given(planes), image_shape(node.outputs[0]) or (0, 0, 0)
    outputs, channels, kernel_height, kernel_width = weight.shape
    stride_down, stride = node.attributes.get_ints("strides", (1, 1))
    height, width, _ = image_shape(image) or (0, 0, 0)
    full_width = grouping.width
    editor = Editor(graph, planes, f"{node.name}/pixel_groups")
    if full_width > width:  # only zeros of the kernel meet these pixels
        unread = editor.constant("unread", np.zeros((1, height, full_width - width, channels), np.uint8))
        unread = for_each_image(editor, unread, image)
        image = editor.op("padded", "Concat", [image, unread], dtype=ir.DataType.UINT8, axis=2)
    shape = np.array([-1, height, full_width // grouping.group, grouping.group * channels], np.int64)
    grouped = editor.op("groups", "Reshape", [image, editor.constant("groups_shape", shape)], dtype=ir.DataType.UINT8)
    planes.replace_input_with(0, grouped)

    window = np.zeros((grouping.made, outputs, channels, kernel_height, grouping.blocks * grouping.group), np.float32)
    for pixel in range(grouping.made):
        window[pixel, ..., pixel * stride : pixel * stride + kernel_width] = weight
    blocked = window.reshape(grouping.made * outputs, channels, kernel_height, grouping.blocks, grouping.group)
    kernel = blocked.transpose(0, 4, 1, 2, 3).reshape(-1, grouping.group * channels, kernel_height, grouping.blocks)
    editor = Editor(graph, node, f"{node.name}/pixel_groups")
    node.replace_input_with(1, editor.constant("weight", np.ascontiguousarray(kernel)))
    if bias is not None:
        node.replace_input_with(2, editor.constant("bias", np.tile(bias, grouping.made)))
    node.attributes["strides"] = ir.AttrInt64s("strides", [stride_down, 1])
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [kernel_height, grouping.blocks])
    _ungroup(graph, node, (outputs, *output[1:]), observed)
    source = str(node.inputs[0].name) if node.inputs[0] is not None else ""
    if source in observed.channel_means:
        observed.channel_means[source] = np.tile(observed.channel_means[source], grouping.group)


def _ungroup(graph: ir.Graph, node: ir.Node, shape: tuple[int, ...], observed: Observed) -> None:
    """Make single pixels of the output groups, behind a Relu or Clip so that it still follows its convolution."""
    last = sole_reader(node.outputs[0], "Relu", "Clip") or node
    output = last.outputs[0]
    before, full_shape = str(output.name), output.shape
    outputs = given_array(node).shape[0]
    made = outputs // shape[0]

    def single_pixels(grouped: ir.Value) -> ir.Value:
        for value in {node.outputs[0], grouped}:
            batch = None if full_shape is None else full_shape[0]
            value.shape = ir.Shape([batch, outputs, shape[1], shape[2] // made])
        observed.copy_range(before, grouped)
        editor = Editor(graph, last, f"{node.name}/pixel_groups", after=True)
        pixels = editor.op("output_nhwc", "Transpose", [grouped], perm=[0, 2, 3, 1])
        size = editor.constant("output_shape", np.array([-1, shape[1], shape[2], shape[0]], np.int64))
        pixels = editor.op("pixels", "Reshape", [pixels, size])
        return editor.op("output_nchw", "Transpose", [pixels], perm=[0, 3, 1, 2])

    put_behind(graph, output, f"{node.name}/pixel_groups/output", single_pixels)


pixel_groups = each(_match, _replace)
