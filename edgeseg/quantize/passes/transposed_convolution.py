"""Transposed convolution -> one small convolution per output phase, interleaved.

Output pixels at the same place between input pixels (the same phase) meet the same kernel taps: each phase is an
ordinary convolution of the input with every s-th tap. Nothing is added and no multiply-accumulate is spent that the
transposed form does not spend, and runtimes without an integer ConvTranspose (ONNX Runtime) have an integer Conv.

Precondition: ConvTranspose of two dimensions, group and dilation 1, constant weight, equal strides s > 1, kernel, padding and
output padding such that the output is exactly s times the input.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array, given, given_array, image_shape, replace_value, sole_reader
from edgeseg.quantize.observed import Observed, each


def _stride(node: ir.Node) -> int | None:
    weight = constant_array(node.inputs[1]) if node.op_type == "ConvTranspose" else None
    if weight is None or weight.ndim != 4 or node.attributes.get_int("group", 1) != 1:
        return None
    strides = node.attributes.get_ints("strides", (1, 1))
    source, target = image_shape(node.inputs[0]), image_shape(node.outputs[0])
    plain = (
        strides[0] == strides[1] > 1
        and node.attributes.get_ints("dilations", (1, 1)) == (1, 1)
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        and (len(node.inputs) < 3 or constant_array(node.inputs[2]) is not None)
    )
    if not plain or source is None or target is None:
        return None
    stride, pads = strides[0], node.attributes.get_ints("pads", (0, 0, 0, 0))
    exact = all(t == stride * s for s, t in zip(source[1:], target[1:], strict=True))
    taps = zip(weight.shape[2:], pads[:2], strict=True)
    reached = all(_phase(size, stride, pad, phase) is not None for size, pad in taps for phase in range(stride))
    return stride if exact and reached else None


def _replace(graph: ir.Graph, node: ir.Node, stride: int, observed: Observed) -> None:
    weight, source = given_array(node), given(node)
    batch, (_, *sides) = source.shape and source.shape[0], image_shape(source) or (0, 0, 0)
    # A Relu or Clip behind it has to follow each phase, where it costs nothing: integer convolutions saturate.
    clamp = sole_reader(node.outputs[0], "Relu", "Clip")
    output = (node if clamp is None else clamp).outputs[0]
    top, left = node.attributes.get_ints("pads", (0, 0, 0, 0))[:2]
    editor = Editor(graph, node, node.name)
    plane = (batch, weight.shape[1], *sides)
    phases = []
    for row in range(stride):
        kernel_rows, pads_rows = _phase(weight.shape[2], stride, top, row) or ([], (0, 0))
        for column in range(stride):
            kernel_columns, pads_columns = _phase(weight.shape[3], stride, left, column) or ([], (0, 0))
            taps = weight[:, :, kernel_rows][..., kernel_columns].transpose(1, 0, 2, 3)
            name = f"phase{row}{column}"
            inputs = [source, editor.constant(f"{name}/weight", np.ascontiguousarray(taps))]
            inputs += [bias for bias in node.inputs[2:] if bias is not None]
            pads = [pads_rows[0], pads_columns[0], pads_rows[1], pads_columns[1]]
            phase = editor.op(name, "Conv", inputs, shape=plane, pads=pads, kernel_shape=list(taps.shape[2:]))
            if clamp is not None:
                phase = editor.op(f"{name}_{clamp.op_type}", clamp.op_type, [phase, *clamp.inputs[1:]], shape=plane)
            observed.copy_range(output.name, phase)
            phases.append(phase)
    depth = (batch, weight.shape[1] * stride**2, *sides)
    stacked = editor.op("phases", "Concat", phases, shape=depth, axis=1)
    replace_value(graph, output, editor.op("interleave", "DepthToSpace", [stacked], blocksize=stride, mode="DCR"))


def _phase(taps: int, stride: int, pad: int, phase: int) -> tuple[list[int], tuple[int, int]] | None:
    """Kernel taps of one axis that make the outputs ``stride * i + phase``, in the order a convolution reads its input,
    and that convolution's padding (before, after). ``None`` if there is no such tap or the padding would be negative.

    Input pixel i reaches output ``stride * i + k - pad`` through tap k, so output ``stride * i + phase`` is reached from
    pixel ``i - offset`` through tap ``phase + pad + stride * offset``.
    """
    offsets = [o for o in range(-taps, taps + 1) if 0 <= phase + pad + stride * o < taps]
    if not offsets or max(offsets) < 0 or min(offsets) > 0:
        return None
    order = sorted(offsets, reverse=True)
    return [phase + pad + stride * o for o in order], (order[0], -order[-1])


transposed_convolution = each(_stride, _replace)
