"""FP16 islands and precision reports, on graphs small enough to know every node of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgeseg.backends import get_backend
from edgeseg.errors import QuantizationError
from edgeseg.quantize.fp16 import FP16_MAX, fp16_model
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

pytestmark = pytest.mark.integration

SIDE = 8


def two_convolutions(first: float = 0.1, second: float = 0.1) -> onnx.ModelProto:
    """uint8 image -> two 1x1 convolutions with Relu -> logits, their weights constant."""

    def weight(name: str, value: float, shape: tuple[int, ...]) -> onnx.TensorProto:
        return numpy_helper.from_array(np.full(shape, value, np.float32), name)

    nodes = [
        helper.make_node("Transpose", ["image"], ["nchw"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["x"], "normalize"),
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2", "b2"], ["c"], "second"),
        helper.make_node("Relu", ["c"], ["logits"], "last"),
    ]
    weights = [
        numpy_helper.from_array(np.float32(1 / 255), "scale"),
        weight("w1", first, (4, 3, 1, 1)),
        weight("b1", 0.0, (4,)),
        weight("w2", second, (2, 4, 1, 1)),
        weight("b2", 0.5, (2,)),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, SIDE, SIDE, 3))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 2, SIDE, SIDE))],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of the weight each convolution reads."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {node.name: types[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}


def run(model: onnx.ModelProto) -> np.ndarray:
    """In numpy, every type as written: ONNX Runtime on a CPU would compute the half-precision parts in float32."""
    image = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(1, SIDE, SIDE, 3)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, {"image": image})[0])


def test_everything_is_half_where_ranges_allow() -> None:
    model = fp16_model(two_convolutions(), {"a": 1.0, "logits": 2.0})
    assert weight_types(model) == {"first": TensorProto.FLOAT16, "second": TensorProto.FLOAT16}
    np.testing.assert_allclose(run(model), run(two_convolutions()), rtol=4e-3, atol=4e-3)


def test_a_range_that_leaves_fp16_makes_an_island() -> None:
    model = fp16_model(two_convolutions(), {"a": 60_000.0})
    assert weight_types(model) == {"first": TensorProto.FLOAT, "second": TensorProto.FLOAT16}


def test_an_island_saves_what_half_precision_would_lose() -> None:
    large = two_convolutions(first=5e4, second=1e-5)
    island = fp16_model(large, {"a": 1.5e5, "r": 1.5e5})
    np.testing.assert_allclose(run(island), run(large), rtol=4e-3, atol=4e-3)
    without = fp16_model(large, {})
    assert not np.isfinite(run(without)).all(), "the test's range must really leave FP16"


def test_a_weight_that_leaves_fp16_makes_an_island() -> None:
    model = fp16_model(two_convolutions(second=2 * FP16_MAX), {})
    assert weight_types(model) == {"first": TensorProto.FLOAT16, "second": TensorProto.FLOAT}


def test_nothing_left_for_half_precision_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no layer can run in FP16"):
        fp16_model(two_convolutions(), dict.fromkeys(("x", "a", "r", "logits"), 1e6))


def table(*names: str) -> CalibrationTable:
    key = dict.fromkeys(("weights", "graph", "images", "preprocess", "method"), "0")
    ranges = {name: TensorRange(0.0, 1.0, 0.0, 1.0) for name in names}
    return CalibrationTable(TABLE_SCHEMA_VERSION, "minmax", {}, key, 8, ranges)


def as_graph(model: onnx.ModelProto, path: Path) -> OnnxGraph:
    onnx.save(model, str(path))
    spec = PipelineSpec(
        ModelSpec("custom", classes=2), InputSpec(SIDE, SIDE, stride=8), Preprocess(), OutputSpec("logits")
    )
    return OnnxGraph(path, sha256_file(path), "fp32", spec, "0" * 64)


def test_precision_is_counted_on_what_runs(tmp_path: Path) -> None:
    """MACs by hand: 64 pixels x 3 x 4 in the first convolution, 64 x 4 x 2 in the second."""
    graph = as_graph(two_convolutions(), tmp_path / "model.onnx")
    report = get_backend("onnxruntime").build(graph, tmp_path, {}).precision
    assert report.mac_share == {"fp32": 1.0}
    quantized = write_qdq(graph, table("x", "r", "logits"), SCHEMES["onnxruntime-vnni"], tmp_path / "q.onnx")
    report = get_backend("onnxruntime").build(quantized, tmp_path, {}).precision
    assert report.mac_share == {"int8": 1.0}
    assert report.macs == 64 * 3 * 4 + 64 * 4 * 2
    assert report.float_layers == {}


def test_a_layer_without_a_range_is_reported_as_float(tmp_path: Path) -> None:
    graph = as_graph(two_convolutions(), tmp_path / "model.onnx")
    quantized = write_qdq(graph, table("x", "r"), SCHEMES["tensorrt"], tmp_path / "q.onnx")
    assert any(n.op_type == "DequantizeLinear" for n in onnx.load(str(quantized.path)).graph.node)
    report = get_backend("onnxruntime").build(graph, tmp_path, {}).precision
    assert report.requested == "fp32"
    assert report.float_layers == {}
