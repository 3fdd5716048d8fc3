"""Small ONNX models from text, and running them as they are written: shared by the quantization tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from edgeseg.quantize.table import TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec

RNG = np.random.default_rng(5)


def floats(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def graph(signature: str, body: str, **weights: Any) -> onnx.ModelProto:
    """A model from ONNX text; keyword arguments are its initializers; nodes are named after their first output."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {signature} {{ {body} }}')
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in model.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def two_layers(height: int, width: int, classes: int, kernels: tuple[int, int] = (3, 3)) -> onnx.ModelProto:
    """uint8 image -> convolution, Relu, convolution -> mask: always the same network."""
    rng = np.random.default_rng(9)
    pads = [f"pads = {[kernel // 2] * 4}" for kernel in kernels]
    return graph(
        f"(uint8[1, {height}, {width}, 3] image) => (uint8[1, {height}, {width}] mask)",
        f"""real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        a = Conv <{pads[0]}> (x, w1) r = Relu(a) l = Conv <{pads[1]}> (r, w2)
        index = ArgMax <axis = 1, keepdims = 0> (l) mask = Cast <to = 2> (index)""",
        gain=np.array(1 / 128, np.float32),
        w1=rng.standard_normal((8, 3, kernels[0], kernels[0])).astype(np.float32),
        w2=rng.standard_normal((classes, 8, kernels[1], kernels[1])).astype(np.float32),
    )


def plain_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """ONNX Runtime without optimization: every operator as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, **feeds: NDArray[Any]) -> list[NDArray[Any]]:
    return list(plain_session(model).run(None, feeds))


def plain_logits(model: onnx.ModelProto, images: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Logits of each image, from ONNX Runtime without its own rewrites."""
    session = plain_session(model)
    return np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in images])


def every_value(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every float value as an output."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    known = {value.name for value in exposed.graph.output}
    for value in model.graph.value_info:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and value.name not in known:
            exposed.graph.output.append(value)
    return exposed


def table_for(model: onnx.ModelProto, **feeds: NDArray[Any]) -> CalibrationTable:
    """The exact min-max table of ``model`` for one batch of inputs, with channel means of images and tokens."""
    exposed = every_value(model)
    values = dict(zip([v.name for v in exposed.graph.output], run(exposed, **feeds), strict=True))
    values |= {name: array for name, array in feeds.items() if array.dtype == np.float32}
    ranges = {}
    for name, array in values.items():
        if array.dtype != np.float32:
            continue
        low, high = float(array.min()), float(array.max())
        axis = 1 if array.ndim == 4 else array.ndim - 1
        means = array.mean(axis=tuple(i for i in range(array.ndim) if i != axis)) if array.ndim > 1 else None
        ranges[name] = TensorRange(
            min(low, 0.0),
            max(high, 0.0, 1e-6),
            low,
            high,
            None if means is None else tuple(float(m) for m in means),
            None if means is None else axis,
        )
    key = dict.fromkeys(("weights", "graph", "images", "preprocess", "method"), "0")
    return CalibrationTable(TABLE_SCHEMA_VERSION, "minmax", {}, key, 8, ranges)


def signal_to_noise_db(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    noise = np.square(expected - actual, dtype=np.float64).mean()
    return float(10 * np.log10(np.var(expected, dtype=np.float64) / max(noise, 1e-30)))


def spec(height: int, width: int, classes: int = 4) -> PipelineSpec:
    return PipelineSpec(ModelSpec("custom", classes=classes), InputSpec(height, width, stride=1))
