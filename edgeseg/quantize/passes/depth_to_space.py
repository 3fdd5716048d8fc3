"""DepthToSpace as block copies in NHWC: ONNX Runtime has no integer kernel for it, and a slow float one.

With the channels of a pixel side by side, interleaving columns is a Concat along the channels and interleaving rows a
Concat of whole rows. Precondition: DCR mode, static height, width and channels; best when the input is a Concat of the
phases (as the subpixel rewrite makes it), which is taken apart.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.graph.editing import Editor, image_shape, replace_value, sole_maker
from edgeseg.quantize.observed import Observed, each


def _match(node: ir.Node) -> tuple[int, int, int] | None:
    if node.op_type != "DepthToSpace" or node.attributes.get_string("mode", "DCR") != "DCR":
        return None
    return image_shape(node.inputs[0])


def _replace(graph: ir.Graph, node: ir.Node, shape: tuple[int, int, int], _: Observed) -> None:
    block = node.attributes.get_int("blocksize", 1)
    channels, height, width = shape[0] // block**2, *shape[1:]
    editor = Editor(graph, node, node.name)
    phases = _phases(editor, node, block, channels)
    row = editor.constant("row_shape", np.array([-1, height, 1, width * block * channels], np.int64))
    rows = []
    for index in range(block):
        pixels = [
            editor.op(f"nhwc{index}{j}", "Transpose", [p], perm=[0, 2, 3, 1])
            for j, p in enumerate(phases[index * block : (index + 1) * block])
        ]
        columns = editor.op(f"columns{index}", "Concat", pixels, axis=3)
        rows.append(editor.op(f"row{index}", "Reshape", [columns, row]))
    image = editor.op("rows", "Concat", rows, axis=2)
    full = editor.constant("shape", np.array([-1, height * block, width * block, channels], np.int64))
    result = editor.op("pixels", "Reshape", [image, full])
    replace_value(graph, node.outputs[0], editor.op("nchw", "Transpose", [result], perm=[0, 3, 1, 2]))


def _phases(editor: Editor, node: ir.Node, block: int, channels: int) -> list[ir.Value]:
    concat = sole_maker(node.inputs[0], "Concat")
    if concat is not None and len(concat.inputs) == block**2:
        parts = [v for v in concat.inputs if v is not None]
        if all((image_shape(v) or (0,))[0] == channels for v in parts):
            return parts
    sizes = editor.constant("sizes", np.full(block**2, channels, np.int64))
    first = editor.op("phases", "Split", [node.inputs[0], sizes], outputs=block**2, axis=1)
    return list(first.producer().outputs)  # type: ignore[union-attr]


depth_to_space = each(_match, _replace)
