"""Segmentation graphs of two convolutions, in edgeseg's contract, for the recorded modules."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 32


def small_model(
    precision: str = "fp32", batch: int | str = 1, size: tuple[int | str, int | str] = (SIDE, SIDE)
) -> onnx.ModelProto:
    """``image`` uint8 ``(batch, H, W, 3)`` -> ``mask`` uint8 ``(batch, H, W)``, typed fp32, fp16 or int8 (Q/DQ).

    Nodes are named as the exporter does: ``encoder.conv1/Conv``, ``decoder.block/Conv``.
    """
    height, width = size
    kind = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.FLOAT
    dtype = np.float16 if precision == "fp16" else np.float32
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "preprocess/Cast", to=kind),
        helper.make_node("Transpose", ["float"], ["nchw"], "preprocess/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "scale"], ["x"], "preprocess/Mul"),
    ]
    weights = [numpy_helper.from_array(np.asarray(1 / 255, dtype), "scale")]
    value = "x"
    for module, channels, outputs in (("encoder.conv1", 3, 8), ("decoder.block", 8, 4)):
        weight = np.full((outputs, channels, 3, 3), 0.05, dtype)
        if precision == "int8":
            scales = {
                f"{module}.act_scale": np.float32(0.01),
                f"{module}.weight_scale": np.full(outputs, 0.001, np.float32),
            }
            weights += [numpy_helper.from_array(np.asarray(s), n) for n, s in scales.items()]
            weights.append(numpy_helper.from_array(np.full(weight.shape, 50, np.int8), f"{module}.weight"))
            nodes += [
                helper.make_node(
                    "QuantizeLinear", [value, f"{module}.act_scale", "zero"], [f"{module}.q"], f"{module}/Q"
                ),
                helper.make_node(
                    "DequantizeLinear", [f"{module}.q", f"{module}.act_scale"], [f"{module}.x"], f"{module}/DQ"
                ),
                helper.make_node(
                    "DequantizeLinear",
                    [f"{module}.weight", f"{module}.weight_scale"],
                    [f"{module}.w"],
                    f"{module}/DQ_weight",
                    axis=0,
                ),
            ]
            inputs = [f"{module}.x", f"{module}.w"]
        else:
            weights.append(numpy_helper.from_array(weight, f"{module}.weight"))
            inputs = [value, f"{module}.weight"]
        nodes.append(helper.make_node("Conv", inputs, [f"{module}.y"], f"{module}/Conv", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"{module}.y"], [f"{module}.r"], f"{module}/Relu"))
        value = f"{module}.r"
    if precision == "int8":
        weights.append(numpy_helper.from_array(np.int8(0), "zero"))
    nodes += [
        helper.make_node("ArgMax", [value], ["index"], "postprocess/ArgMax", axis=1, keepdims=0),
        helper.make_node("Cast", ["index"], ["mask"], "postprocess/Cast", to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, (batch, height, width, 3))],
        [helper.make_tensor_value_info("mask", TensorProto.UINT8, (batch, height, width))],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model
