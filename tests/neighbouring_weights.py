"""Layers whose integers reach the largest sum in each pair of weights a kernel adds in 16 bits, and twice that between pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from small_graphs import graph, run, table_for

from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.schemes import SCHEMES


def _runs(outputs: int, length: int) -> NDArray[np.float32]:
    """``(outputs, length)`` weights: of each two neighbours from an even place on one is large, in either order.

    In the last output all are large.
    """
    rng = np.random.default_rng(length)
    large, small = rng.uniform(0.8, 1.0, (outputs, length)), rng.uniform(0.0, 0.05, (outputs, length))
    is_first = (rng.random((outputs, -(-length // 2))) < 0.5).repeat(2, axis=1)[:, :length]
    weights = np.where(is_first == (np.arange(length) % 2 == 0), large, small)
    weights[-1] = large[-1]
    signs = np.where(rng.random((outputs, 1)) < 0.5, -1.0, 1.0)
    return (weights * signs).astype(np.float32)


def _conv(outputs: int, inputs: int, kernel: int, attributes: str = "", groups: int = 1) -> onnx.ModelProto:
    weights = _runs(outputs, kernel * kernel * (inputs // groups)).reshape(outputs, kernel, kernel, inputs // groups)
    return graph(
        f"(float[1, {inputs}, 12, 12] x) => (float[1, c, h, w] y)",
        f"n = Relu(x) y = Conv <group = {groups} {attributes}> (n, weight)",
        weight=weights.transpose(0, 3, 1, 2),
    )


def _transposed() -> onnx.ModelProto:
    return graph(
        "(float[1, 16, 12, 12] x) => (float[1, c, h, w] y)",
        "n = Relu(x) y = ConvTranspose <strides = [2, 2]> (n, weight)",
        weight=_runs(8, 64).reshape(8, 2, 2, 16).transpose(3, 0, 1, 2),
    )


LAYERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "convolution": lambda: _conv(32, 16, 3),
    "strided": lambda: _conv(16, 24, 3, ", strides = [2, 2]"),
    "dilated": lambda: _conv(16, 16, 3, ", dilations = [2, 2]"),
    "of an image": lambda: _conv(16, 3, 7, ", strides = [2, 2]"),
    "of an odd number of channels": lambda: _conv(16, 5, 3),
    "of a grey image": lambda: _conv(16, 1, 5),
    "pointwise": lambda: _conv(32, 64, 1),
    "pointwise, odd": lambda: _conv(16, 9, 1),
    "in groups": lambda: _conv(32, 32, 3, groups=4),
    "in odd groups": lambda: _conv(12, 12, 3, groups=4),
    "depthwise": lambda: _conv(17, 17, 5, groups=17),
    "depthwise, dilated": lambda: _conv(16, 16, 3, ", dilations = [2, 2]", groups=16),
    "one channel a group, two of each": lambda: _conv(24, 12, 3, groups=12),
    "transposed": _transposed,
    "matrix product": lambda: graph(
        "(float[7, 33] x) => (float[7, 20] y)", "n = Relu(x) y = MatMul(n, weight)", weight=_runs(20, 33).T.copy()
    ),
    "Gemm": lambda: graph(
        "(float[7, 64] x) => (float[7, 20] y)",
        "n = Relu(x) y = Gemm <transB = 1> (n, weight, bias)",
        weight=_runs(20, 64),
        bias=np.zeros(20, np.float32),
    ),
}


def errors(scheme: str, execute: Callable[[onnx.ModelProto, NDArray[np.float32]], NDArray[Any]]) -> dict[str, float]:
    """By layer, the largest difference between a target's kernels and the graph as it is written, as a share of its result.

    ``execute``: runs a Q/DQ graph on ``x`` with the target's kernels. Inputs are as large as they can be at four places in five.
    """
    rng = np.random.default_rng(1)
    largest = {}
    for name, make in LAYERS.items():
        model = make()
        shape = [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
        x = np.where(rng.random(shape) < 0.8, 1.0, rng.random(shape)).astype(np.float32)
        written = ir.serde.deserialize_model(model)
        quantize_model(written, table_for(model, x=x), SCHEMES[scheme])
        proto = ir.serde.serialize_model(written)
        expected = run(proto, x=x)[0]
        largest[name] = float(np.abs(execute(proto, x) - expected).max() / np.abs(expected).max())
    return largest
