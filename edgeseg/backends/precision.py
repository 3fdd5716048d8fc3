"""Which precision a graph really executes in: shares of multiply-accumulates and of nodes per dtype."""

from __future__ import annotations

from pathlib import Path

import onnx

from edgeseg.artifacts import PrecisionReport
from edgeseg.spec import Precision

_DTYPE_NAMES = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "int8",
}


def executed_precision(path: Path, requested: Precision) -> PrecisionReport:
    """Report on the optimized ONNX file that ONNX Runtime executes."""
    from edgeseg.convert.macs import count_macs

    model = onnx.load(str(path))
    macs = count_macs(model)
    nodes = {node.name: node for node in model.graph.node}
    mac_totals: dict[str, int] = {}
    float_layers: dict[str, str] = {}
    for name, count in macs.items():
        dtype = _node_dtype(nodes[name])
        mac_totals[dtype] = mac_totals.get(dtype, 0) + count
        if requested == "int8" and dtype != "int8":
            float_layers[name] = f"{nodes[name].op_type} runs in {dtype}"
    total = sum(mac_totals.values())
    node_totals: dict[str, int] = {}
    for node in model.graph.node:
        dtype = _node_dtype(node)
        node_totals[dtype] = node_totals.get(dtype, 0) + 1
    return PrecisionReport(
        requested=requested,
        mac_share={k: v / total for k, v in sorted(mac_totals.items())},
        node_share={k: v / len(model.graph.node) for k, v in sorted(node_totals.items())},
        macs=total,
        float_layers=float_layers,
    )


def _node_dtype(node: onnx.NodeProto) -> str:
    integer = node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention"))
    return "int8" if integer else "fp32"
