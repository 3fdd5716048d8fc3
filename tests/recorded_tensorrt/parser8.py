"""What the ONNX parser of TensorRT 8.5 and 8.6 refuses, as its source says (onnx-tensorrt, branches 8.5-GA and 8.6-GA).

Not the parser: its table of operators, the types it asks for, and what it would read wrongly without saying so. A graph
this finds nothing in may still be refused by TensorRT itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

# grep -oE 'DEFINE_BUILTIN_OP_IMPORTER\((\w+)\)' builtin_op_importers.cpp
_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
    Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity If ImageScaler
    InstanceNormalization IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool
    MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample
    Where Xor
"""
IMPORTERS_85 = frozenset(_NAMES.split())
IMPORTERS_86 = IMPORTERS_85 | {"GroupNormalization", "IsInf", "LayerNormalization"}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def complaints(model: onnx.ModelProto, version: str) -> Iterator[tuple[int, str]]:
    """``(index of the node, what the parser says)``; what it would not say begins with ``silently``."""
    importers = IMPORTERS_85 if version.startswith("8.5") else IMPORTERS_86
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {t.name: t.data_type for t in graph.initializer}
    types.update({v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)})
    shapes = {v.name: v.type.tensor_type.shape for v in graph.value_info}
    constants = {t.name: t for t in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type not in importers:
            yield index, f"No importer registered for op: {node.op_type}"
        kinds = [types.get(name) for name in node.input if name]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast":
            to = attributes["to"]
            if (kinds[0] == TensorProto.UINT8 and to not in _FLOATS) or (
                to == TensorProto.UINT8 and kinds[0] not in _FLOATS
            ):
                yield index, "Assertion failed: UINT8 type casting is only supported from and to FP types"
        elif TensorProto.UINT8 in kinds:
            # NvInfer.h: "Use IdentityLayer to convert uint8 network-level inputs prior to use with other layers".
            yield index, "Found invalid input type of UINT8"
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] not in constants:
            shape = [dim.dim_value for dim in shapes[node.input[1]].dim[2:]]
            if list(attributes.get("kernel_shape", [1] * len(shape))) != shape:  # type: ignore[call-overload]
                yield index, "The input tensor shape misaligns with the input kernel shape."  # seen on an H200
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield from ((index, text) for text in _of_quantization(node, constants))
        yield from ((index, f"silently: {text}") for text in _misread(node, attributes))


def _of_quantization(node: NodeProto, constants: dict[str, TensorProto]) -> Iterator[str]:
    if len(node.input) != 3:
        yield "This version of TensorRT requires 3 inputs for the DequantizeLinear operator."
        return
    scale, zeros = (constants[name] for name in node.input[1:])
    steps, offsets = numpy_helper.to_array(scale), numpy_helper.to_array(zeros)
    if not (steps > 0).all():
        yield "Scale coefficients must all be positive"
    if offsets.any():
        yield "TRT only supports symmetric quantization - zeroPt must be all zeros"
    if steps.size != offsets.size:
        yield "The scale and zero-point must have the same size"
    if node.input[0] in constants and constants[node.input[0]].data_type == TensorProto.INT8:
        yield "invalid weights type of Int8"


def _misread(node: NodeProto, attributes: dict[str, object]) -> Iterator[str]:
    if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(node.input) > 1:
        yield "reduces over all axes"
    if node.op_type == "Shape" and {"start", "end"} & attributes.keys():
        yield "takes the whole shape"
    if node.op_type == "Split" and "num_outputs" in attributes:
        yield "parts are of one size, rounded down"
    if node.op_type == "GridSample" and attributes.get("mode") in (b"linear", b"cubic"):
        yield "samples the nearest"
    if node.op_type == "Resize" and {"antialias", "axes", "keep_aspect_ratio_policy"} & attributes.keys():
        yield "resizes otherwise"
    if node.op_type in ("ScatterElements", "ScatterND") and attributes.get("reduction", b"none") != b"none":
        yield "overwrites"
