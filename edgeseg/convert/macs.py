"""Multiply-accumulates per node, from shapes: float, quantized and ONNX Runtime's fused forms alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx import helper

from edgeseg.errors import ArtifactError
from edgeseg.onnx_file import first_line

Shape = tuple[int, ...]

CONV_WEIGHT: Mapping[str, int] = {
    "Conv": 1,
    "FusedConv": 1,
    "NhwcConv": 1,
    "NhwcFusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
}
"""Operators counted as convolutions and the input that holds their weight. ONNX Runtime's blocked ``Conv`` (domain
``com.microsoft.nchwc``) is counted with the channels it computes, padding to its block size included."""

MATMUL_OPERANDS: Mapping[str, tuple[int, int]] = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
"""Operators counted as matrix products and the inputs that hold their operands."""


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
        ArtifactError: a shape that neither the file nor shape inference knows, or a symbolic dimension without a size.
    """
    if shapes is None:
        shapes = _known_shapes(model, {"batch": 1, **(sizes or {})})
    else:
        shapes = {**{t.name: tuple(t.dims) for t in model.graph.initializer}, **shapes}
    macs: dict[str, int] = {}
    for index, node in enumerate(model.graph.node):
        count = _node_macs(node, shapes)
        if count is not None:
            name = node.name or f"{node.op_type}#{index}"
            macs[name if name not in macs else f"{name}#{index}"] = count
    return macs


def _known_shapes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> dict[str, Shape]:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    if _fix_inputs(fixed.graph, sizes):
        # shapes noted in the file are in terms of the symbols: infer them anew from the sizes
        del fixed.graph.value_info[:]
        for output in fixed.graph.output:
            output.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    except Exception as exc:
        raise ArtifactError(f"shapes of the graph cannot be inferred: {first_line(exc)}") from exc
    shapes: dict[str, Shape] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return shapes


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

    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in CONV_WEIGHT:
        return _convolution(node, shape)
    if node.op_type == "ConvTranspose":
        weight = shape(node.input[1])
        return math.prod(shape(node.input[0])) * math.prod(weight[1:])
    if node.op_type in MATMUL_OPERANDS:
        left, right = (shape(node.input[i]) for i in MATMUL_OPERANDS[node.op_type])
        return _product(left, right, bool(attributes.get("transA")), bool(attributes.get("transB")))
    return None


def _convolution(node: onnx.NodeProto, shape: Callable[[str], Shape]) -> int:
    weight = shape(node.input[CONV_WEIGHT[node.op_type]])
    return math.prod(shape(node.output[0])) * math.prod(weight[1:])


def _product(left: Sequence[int], right: Sequence[int], transpose_left: bool, transpose_right: bool) -> int:
    left = (1, *left) if len(left) == 1 else left
    right = (*right, 1) if len(right) == 1 else right
    rows, inner = (left[-1], left[-2]) if transpose_left else (left[-2], left[-1])
    columns = right[-2] if transpose_right else right[-1]
    batches = [1] * (max(len(left), len(right)) - 2)
    for dims in (left[:-2], right[:-2]):
        for i, d in enumerate(reversed(dims), start=1):
            batches[-i] = max(batches[-i], d)
    return math.prod(batches) * rows * inner * columns
