"""Bilinear Resize in NHWC: ONNX Runtime's float kernel works on whole channel vectors there, four to six times faster.

Precondition: linear Resize of a 4-d value over height and width only, no antialiasing, constant scales or sizes. The
Transposes around it meet those that integer convolutions (NHWC as well) bring, and cancel.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.graph.editing import Editor, constant_array, constant_input, given, replace_value
from edgeseg.quantize.observed import Observed


def linear_resize(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns how many Resize nodes it moved."""
    resizes = [node for node in model.graph if _matches(node)]
    for node in resizes:
        source, output = given(node), node.outputs[0]
        editor = Editor(model.graph, node, node.name)
        inputs: list[ir.Value | None] = [_channels_last(editor, source), None]
        for index, value in enumerate(node.inputs[2:]):
            array = constant_array(value)
            permuted = array is not None and array.size == 4
            inputs.append(editor.constant(f"extent{index}", array[[0, 2, 3, 1]]) if permuted else value)  # type: ignore[index]
        resized = editor.op("Resize", "Resize", inputs)
        resized.producer().attributes.update(node.attributes)  # type: ignore[union-attr]
        observed.copy_range(output.name, resized)
        replace_value(model.graph, output, editor.op("nchw", "Transpose", [resized], perm=[0, 3, 1, 2]))
    return len(resizes)


def _channels_last(editor: Editor, source: ir.Value) -> ir.Value:
    if not _is_channels_first_island(source):
        return editor.op("nhwc", "Transpose", [source], perm=[0, 2, 3, 1])
    # A Transpose would be pushed behind the Resize by ONNX Runtime, to be joined with the next one, and the slow kernel
    # run; it does not look into an Einsum.
    return editor.op("nhwc", "Einsum", [source], equation="nchw->nhwc")


def _is_channels_first_island(value: ir.Value) -> bool:
    """Whether ``value`` is made by normalization over planes, which runs in NCHW, and elementwise operators behind it."""
    node = value.producer()
    while node is not None and node.op_type in {"Relu", "Clip", "Add", "Mul", "BatchNormalization", "Reshape"}:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type == "InstanceNormalization"


def _matches(node: ir.Node) -> bool:
    if node.op_type != "Resize" or node.attributes.get_string("mode", "nearest") != "linear":
        return False
    if node.attributes.get_int("antialias", 0) or "axes" in node.attributes:
        return False
    roi = constant_input(node, 1)
    if roi is not None and roi.size:
        return False
    extents = [constant_array(v) for v in node.inputs[2:] if v is not None]
    return bool(extents) and all(e is not None and e.size in {0, 4} for e in extents)
