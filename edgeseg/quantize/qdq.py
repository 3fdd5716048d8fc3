"""Write the Q/DQ graph of a scheme from the float graph and calibrated ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeseg.artifacts import OnnxGraph, sha256_file
from edgeseg.errors import QuantizationError
from edgeseg.quantize.schemes import QuantScheme

if TYPE_CHECKING:
    from edgeseg.quantize.table import CalibrationTable

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_CARRIERS = {
    "Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Mul", "Relu", "Resize", "Sigmoid",
}  # fmt: skip


def write_qdq(graph: OnnxGraph, table: CalibrationTable, scheme: QuantScheme, path: Path) -> OnnxGraph:
    """Write ``graph`` with Q/DQ pairs placed for ``scheme``.

    Args:
        graph: the float graph the table was made from.
        table: calibrated ranges by tensor name.
        scheme: types and placement rules of the target.
        path: where the quantized ONNX file goes.

    Raises:
        QuantizationError: a needed range is missing or not finite.
    """
    model = onnx.load(str(graph.path))
    _Writer(model, {name: (r.low, r.high) for name, r in table.ranges.items()}, scheme).run()
    onnx.save(model, str(path))
    return replace(graph, path=path, sha256=sha256_file(path), precision="int8", scheme=scheme.name)


class _Writer:
    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]], scheme: QuantScheme) -> None:
        self.graph = model.graph
        self.ranges = ranges
        self.scheme = scheme
        self.weights = {t.name: t for t in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.dequantized: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.qdtype: Any = np.uint8 if scheme.activations == "u8" else np.int8

    def run(self) -> None:
        consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                consumers.setdefault(name, []).append(node)
        wanted = set()
        for node in self.graph.node:
            if node.op_type in _WEIGHTED or (node.op_type in _CARRIERS and self.scheme.quantize_outputs):
                inputs = node.input[:2] if node.op_type in _WEIGHTED else node.input
                wanted.update(n for n in inputs if n in self.ranges)
                if self.scheme.quantize_outputs:
                    wanted.update(n for n in node.output if n in self.ranges)
        for node in self.graph.node:
            if node.op_type == "Conv" and self.scheme.quantize_outputs:
                follow = consumers.get(node.output[0], [])
                if len(follow) == 1 and follow[0].op_type in {"Relu", "Clip"}:
                    wanted.discard(node.output[0])
        old = list(self.graph.node)
        for node in old:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for i, name in enumerate(copy.input):
                copy.input[i] = self.dequantized.get(name, name)
            if node.op_type in _WEIGHTED:
                self._weights(node, copy)
            self.nodes.append(copy)
            for name in node.output:
                if name in wanted:
                    self._activation(name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _initializer(self, name: str, value: NDArray[Any]) -> str:
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _activation(self, name: str) -> None:
        low, high = self.ranges[name]
        low, high = min(low, 0.0), max(high, 0.0)
        if not np.isfinite([low, high]).all():
            raise QuantizationError(f"range of {name} is [{low}, {high}]; calibrate on images that keep it finite")
        if self.scheme.activations == "u8":
            scale = max((high - low) / 255, 1e-8)
            zero = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        else:
            scale, zero = max(max(-low, high) / 127, 1e-8), np.int8(0)
        self.scales[name] = scale
        s = self._initializer(f"{name}_scale", np.array(scale, np.float32))
        z = self._initializer(f"{name}_zero_point", np.array(zero, self.qdtype))
        q, dq = f"{name}_quantized", f"{name}_dequantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [name, s, z], [q], name=f"{name}/Q"))
        self.nodes.append(helper.make_node("DequantizeLinear", [q, s, z], [dq], name=f"{name}/DQ"))
        self.dequantized[name] = dq

    def _weights(self, node: onnx.NodeProto, copy: onnx.NodeProto) -> None:
        if node.input[1] not in self.weights or f"{node.input[0]}" not in self.dequantized:
            return
        w = numpy_helper.to_array(self.weights[node.input[1]])
        axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": w.ndim - 1}[node.op_type]
        if node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute):
            axis = 1
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute):
            return
        limit = 2 ** (self.scheme.weight_bits - 1) - 1
        rest = tuple(i for i in range(w.ndim) if i != axis)
        scale = np.maximum(np.abs(w).max(axis=rest) / limit, 1e-8).astype(np.float32)
        shape = [1] * w.ndim
        shape[axis] = -1
        q = np.clip(np.round(w / scale.reshape(shape)), -limit, limit).astype(np.int8)
        name = f"{node.input[1]}_{node.name}"
        qn, sn = self._initializer(f"{name}_q", q), self._initializer(f"{name}_scale", scale)
        zn = self._initializer(f"{name}_zp", np.zeros(scale.shape, np.int8))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [qn, sn, zn], [f"{name}_dq"], name=f"{name}/DQ", axis=axis)
        )
        copy.input[1] = f"{name}_dq"
        if self.scheme.bias == "int32" and len(node.input) > 2 and node.input[2] in self.weights:
            b = numpy_helper.to_array(self.weights[node.input[2]])
            bs = (scale * self.scales[node.input[0]]).astype(np.float32)
            bq = np.clip(np.round(b / bs), -(2**31), 2**31 - 1).astype(np.int32)
            n1, n2 = self._initializer(f"{name}_bias_q", bq), self._initializer(f"{name}_bias_scale", bs)
            n3 = self._initializer(f"{name}_bias_zp", np.zeros(bs.shape, np.int32))
            self.nodes.append(
                helper.make_node("DequantizeLinear", [n1, n2, n3], [f"{name}_bias_dq"], name=f"{name}/bias_DQ", axis=0)
            )
            copy.input[2] = f"{name}_bias_dq"
