"""Multiply-accumulates per node, from shapes: float, quantized and ONNX Runtime's fused forms alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeseg.errors import ArtifactError, first_line
from edgeseg.graph.proto import attribute, copied, dims, refill, value_infos

Shape = tuple[int, ...]

CONV_WEIGHT: Mapping[str, int] = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvInteger"), 1),
    "QLinearConv": 3,
}
"""Operators counted as convolutions and the input that holds their weight. ONNX Runtime's blocked ``Conv`` (domain
``com.microsoft.nchwc``) is counted with the channels it computes, padding to its block size included."""

MATMUL_OPERANDS: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"), (0, 1)),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
"""Operators counted as matrix products and the inputs that hold their operands."""


SHAPE_ARITHMETIC = frozenset(
    ("Add", "And", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Greater", "GreaterOrEqual")
    + ("Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Range", "ReduceSum", "Reshape", "Slice", "Squeeze", "Sub")
    + ("Transpose", "Unsqueeze", "Where")
)
"""Operators that graphs of dynamic size compute shapes and pooling matrices with."""

MAX_FOLDED_ELEMENTS = 1_000_000
"""Inputs larger than this are data, not shapes."""


def count_macs(
    model: onnx.ModelProto, sizes: Mapping[str, int] | None = None, shapes: Mapping[str, Shape] | None = None
) -> dict[str, int]:
    """Multiply-accumulates of every node that has any, by node name.

    Args:
        model: any ONNX model, one saved by ONNX Runtime after optimization too.
        sizes: values of symbolic dimensions of the graph inputs (``{"batch": 1, "height": 256, "width": 256}``);
            a ``batch`` not given counts as 1.
        shapes: of the tensors, as they were seen at run time; without them they are inferred.

    Raises:
        ArtifactError: a shape that neither the file nor shape inference knows, a symbolic dimension without a size, or a
            damaged graph.
    """
    try:
        if shapes is None:
            shapes = _known_shapes(model, {"batch": 1, **(sizes or {})})
        else:
            shapes = {**{t.name: tuple(t.dims) for t in model.graph.initializer}, **shapes}
        macs: dict[str, int] = {}
        for index, node in enumerate(model.graph.node):
            if (count := _node_macs(node, shapes)) is not None:
                name = node.name or f"{node.op_type}#{index}"
                macs[name if name not in macs else f"{name}#{index}"] = count
        return macs
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as exc:
        # A damaged graph: nodes without their inputs, tensors without their data. onnx's own operators raise all kinds.
        raise ArtifactError(f"the graph is damaged: {first_line(exc)}; export it again") from exc


def _known_shapes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, Shape]:
    fixed = copied(model)
    if _fix_inputs(fixed.graph, sizes):
        # shapes noted in the file are in terms of the symbols: infer them anew from the sizes
        del fixed.graph.value_info[:]
        for output in fixed.graph.output:
            output.type.tensor_type.ClearField("shape")
    while True:
        shapes = _inferred(fixed)
        # sizes and matrices that a graph of dynamic size computes from its input's shape are constants now
        if not _fold(fixed, shapes):
            return shapes


def _inferred(model: onnx.ModelProto) -> dict[str, Shape]:
    try:
        values = value_infos(model, data_prop=True)
    except Exception as exc:
        raise ArtifactError(f"shapes of the graph cannot be inferred: {first_line(exc)}") from exc
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for name, value in values.items():
        known = dims(value)
        if known is not None and None not in known:
            shapes[name] = tuple(d for d in known if d is not None)
    return shapes


def _fold(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> bool:
    """Replace the nodes that compute with known shapes only by their result, in place; whether there were any."""
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    opsets = list(model.opset_import)
    made: dict[str, NDArray[Any]] = {}
    kept = []
    for node in graph.node:
        results = _shape_arithmetic(node, shapes, made, weights, opsets)
        if results is None:
            kept.append(node)
        else:
            made.update(zip(node.output, results, strict=False))
    if made:
        refill(graph.node, kept)
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in made.items())
    return bool(made)


def _shape_arithmetic(
    node: onnx.NodeProto,
    shapes: Mapping[str, Shape],
    made: Mapping[str, NDArray[Any]],
    weights: Mapping[str, onnx.TensorProto],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> list[NDArray[Any]] | None:
    """Outputs of a node that reads shapes, or computes with what such nodes gave; else ``None``."""
    if node.op_type == "Shape" and node.input[0] in shapes:
        return [np.array(shapes[node.input[0]][attribute(node, "start", 0) : attribute(node, "end")], np.int64)]
    if node.op_type not in SHAPE_ARITHMETIC or not node.input:
        return None
    feeds: dict[str, NDArray[Any]] = {}
    for name in filter(None, node.input):
        if name not in made and name not in weights:
            return None
        feeds[name] = made[name] if name in made else numpy_helper.to_array(weights[name])
    if sum(array.size for array in feeds.values()) > MAX_FOLDED_ELEMENTS:
        return None
    single = helper.make_function("", "shapes", list(feeds), list(node.output), [node], list(opsets))
    return [np.asarray(value) for value in ReferenceEvaluator(single).run(None, feeds, attributes={})]


def _fix_inputs(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> bool:
    changed = False
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                continue
            if dim.dim_param not in sizes:
                raise ArtifactError(
                    f"input {value.name!r} has the dynamic dimension {dim.dim_param or '?'!r}; give its size"
                )
            dim.dim_value = sizes[dim.dim_param]
            changed = True
    return changed


def _node_macs(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    def shape(name: str) -> Shape:
        if name not in shapes:
            raise ArtifactError(f"the shape of {name!r} at node {node.name!r} is unknown; export the graph again")
        return shapes[name]

    if node.op_type in CONV_WEIGHT:
        return math.prod(shape(node.output[0])) * math.prod(shape(node.input[CONV_WEIGHT[node.op_type]])[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shape(node.input[0])) * math.prod(shape(node.input[1])[1:])
    if node.op_type in MATMUL_OPERANDS:
        left, right = (shape(node.input[i]) for i in MATMUL_OPERANDS[node.op_type])
        return _product(left, right, bool(attribute(node, "transA")), bool(attribute(node, "transB")))
    return None


def _product(left: Sequence[int], right: Sequence[int], transpose_left: bool, transpose_right: bool) -> int:
    left = (1, *left) if len(left) == 1 else left
    right = (*right, 1) if len(right) == 1 else right
    rows, inner = (left[-1], left[-2]) if transpose_left else (left[-2], left[-1])
    columns = right[-2] if transpose_right else right[-1]
    batches = [1] * (max(len(left), len(right)) - 2)
    for sides in (left[:-2], right[:-2]):
        for i, d in enumerate(reversed(sides), start=1):
            batches[-i] = max(batches[-i], d)
    return math.prod(batches) * rows * inner * columns
