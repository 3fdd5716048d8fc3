"""Small networks behind an image's preprocessing, quantized, and what stands in their graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from small_graphs import RNG, floats, graph, table_for

from edgeseg.quantize.lint import lint
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.schemes import SCHEMES, QuantScheme
from edgeseg.quantize.table import CalibrationTable

IMAGE = RNG.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
SOURCE = "real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)"
GAIN = np.array(1 / 128, np.float32)


def network(body: str, outputs: str = "float[1, c, h, w] y", **weights: Any) -> onnx.ModelProto:
    return graph(f"(uint8[1, 8, 8, 3] image) => ({outputs})", f"{SOURCE} {body}", gain=GAIN, **weights)


def quantized(
    model: onnx.ModelProto, scheme: str | QuantScheme, table: CalibrationTable | None = None, *, passes: bool = False
) -> onnx.ModelProto:
    """The Q/DQ graph, linted; without the scheme's passes unless asked, so that the pattern under test stays."""
    rules = SCHEMES[scheme] if isinstance(scheme, str) else scheme
    rules = rules if passes else replace(rules, passes=())
    after = ir.serde.deserialize_model(model)
    quantize_model(after, table or table_for(model, image=IMAGE), rules)
    proto = ir.serde.serialize_model(after)
    onnx.checker.check_model(proto, full_check=True)
    assert lint(proto, rules) == []
    return proto


def operators(model: onnx.ModelProto) -> list[str]:
    """Operator types in order, pairs left out."""
    return [n.op_type for n in model.graph.node if n.op_type not in {"QuantizeLinear", "DequantizeLinear"}]


def readers(model: onnx.ModelProto, name: str) -> list[str]:
    return [n.op_type for n in model.graph.node if name in n.input]


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


TWO = "a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) y = Conv(r, w2, b2)"
TWO_WEIGHTS = {"w1": floats(5, 3, 3, 3), "b1": floats(5), "w2": floats(4, 5, 1, 1), "b2": floats(4)}
