"""FP16 islands and precision reports, on graphs small enough to know every node of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from small_graphs import graph, spec, table_for

from edgeseg.backends import get_backend
from edgeseg.errors import QuantizationError
from edgeseg.quantize.fp16 import FP16_MAX, fp16_model
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

pytestmark = pytest.mark.integration

SIDE = 8
IMAGE = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(1, SIDE, SIDE, 3)


def two_convolutions(first: float = 0.1, second: float = 0.1) -> onnx.ModelProto:
    """uint8 image -> two 1x1 convolutions with Relu -> logits, their weights constant."""
    return graph(
        f"(uint8[1, {SIDE}, {SIDE}, 3] image) => (float[1, 2, {SIDE}, {SIDE}] logits)",
        """nchw = Transpose <perm = [0, 3, 1, 2]> (image) real = Cast <to = 1> (nchw) x = Mul(real, scale)
        a = Conv(x, w1, b1) r = Relu(a) c = Conv(r, w2, b2) logits = Relu(c)""",
        scale=np.float32(1 / 255),
        w1=np.full((4, 3, 1, 1), first, np.float32),
        b1=np.zeros(4, np.float32),
        w2=np.full((2, 4, 1, 1), second, np.float32),
        b2=np.full(2, 0.5, np.float32),
    )


def weight_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of the weight each convolution reads."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {node.name: types[node.input[1]] for node in model.graph.node if node.op_type == "Conv"}


def run(model: onnx.ModelProto) -> np.ndarray:
    """In numpy, every type as written: ONNX Runtime on a CPU would compute the half-precision parts in float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, {"image": IMAGE})[0])


def test_everything_is_half_where_ranges_allow() -> None:
    model = fp16_model(two_convolutions(), {"a": 1.0, "logits": 2.0})
    assert weight_types(model) == {"a/Conv": TensorProto.FLOAT16, "c/Conv": TensorProto.FLOAT16}
    np.testing.assert_allclose(run(model), run(two_convolutions()), rtol=4e-3, atol=4e-3)


def test_a_range_that_leaves_fp16_makes_an_island() -> None:
    model = fp16_model(two_convolutions(), {"a": 60_000.0})
    assert weight_types(model) == {"a/Conv": TensorProto.FLOAT, "c/Conv": TensorProto.FLOAT16}


def test_an_island_saves_what_half_precision_would_lose() -> None:
    large = two_convolutions(first=5e4, second=1e-5)
    island = fp16_model(large, {"a": 1.5e5, "r": 1.5e5})
    np.testing.assert_allclose(run(island), run(large), rtol=4e-3, atol=4e-3)
    without = fp16_model(large, {})
    assert not np.isfinite(run(without)).all(), "the test's range must really leave FP16"


def test_a_weight_that_leaves_fp16_makes_an_island() -> None:
    model = fp16_model(two_convolutions(second=2 * FP16_MAX), {})
    assert weight_types(model) == {"a/Conv": TensorProto.FLOAT16, "c/Conv": TensorProto.FLOAT}


def test_what_onnx_has_in_float32_only_makes_an_island() -> None:
    network = two_convolutions()
    next(node for node in network.graph.node if node.op_type == "Relu").op_type = "Celu"
    typed = fp16_model(network, {})
    onnx.checker.check_model(typed, full_check=True)
    assert weight_types(typed) == {"a/Conv": TensorProto.FLOAT16, "c/Conv": TensorProto.FLOAT16}


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "norm",
    [
        "n = ReduceL2(r, one) d = Clip(n, small) l = Div(r, d)",
        "q = Mul(r, r) v = ReduceMean(q, one) e = Add(v, small) s = Sqrt(e) t = Reciprocal(s) l = Mul(r, t)",
        "q = Pow(r, two) v = ReduceSum(q, one) e = Add(v, small) s = Pow(e, root) d = Expand(s, shape) l = Div(r, d)",
        "n = ReduceSum(r, one) d = Add(n, small) l = Div(r, d)",
    ],
)
def test_a_division_by_a_norm_and_its_epsilon_is_that_of_float32(norm: str, magnitude: float) -> None:
    """FP16 takes 1e-12 for 0, and 0 / 0 is NaN; its squares of 1e-4 are 0, too, and those of 1000 are infinite."""
    network = graph(
        f"(uint8[1, {SIDE}, {SIDE}, 3] image) => (float[1, 2, {SIDE}, {SIDE}] logits)",
        f"""nchw = Transpose <perm = [0, 3, 1, 2]> (image) real = Cast <to = 1> (nchw) x = Mul(real, scale)
        a = Conv(x, w1, b1) r = Relu(a) {norm} logits = Conv(l, w2)""",
        scale=np.float32(magnitude / 255),
        one=np.array([1], np.int64),
        two=np.float32(2.0),
        root=np.float32(0.5),
        small=np.float32(1e-12),
        shape=np.array([1, 4, SIDE, SIDE], np.int64),
        # Two channels of bright pixels, two of dark ones; those between are 0 in all. No pixel is near a bound.
        w1=np.tile(np.array([1, -1, 0.5, -0.5], np.float32).reshape(4, 1, 1, 1), (1, 3, 1, 1)),
        b1=np.array([-259.5, 153, -129.75, 76.5], np.float32) * np.float32(magnitude / 255),
        w2=np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4, 1, 1),
    )
    expected = run(network)
    assert np.ptp(expected) > 0.1, "the images must have vectors that are 0, and others"
    typed = fp16_model(network, {})
    assert weight_types(typed) == dict.fromkeys(("a/Conv", "logits/Conv"), TensorProto.FLOAT16)
    np.testing.assert_allclose(run(typed), expected, atol=4e-3 * np.abs(expected).max())


def test_nothing_left_for_half_precision_is_an_error() -> None:
    with pytest.raises(QuantizationError, match="no layer can run in FP16"):
        fp16_model(two_convolutions(), dict.fromkeys(("x", "a", "r", "logits"), 1e6))


def test_precision_is_counted_on_what_runs(tmp_path: Path) -> None:
    """MACs by hand: 64 pixels x 3 x 4 in the first convolution, 64 x 4 x 2 in the second."""
    model, path = two_convolutions(), tmp_path / "model.onnx"
    onnx.save(model, path)
    stored = OnnxGraph(path, sha256_file(path), "fp32", spec(SIDE, SIDE, 2), "0" * 64)
    assert get_backend("onnxruntime").build(stored, tmp_path, {}).precision.mac_share == {"fp32": 1.0}
    table = table_for(model, image=IMAGE)
    quantized = write_qdq(stored, table, SCHEMES["onnxruntime-vnni"], tmp_path / "q.onnx")
    report = get_backend("onnxruntime").build(quantized, tmp_path, {}).precision
    assert report.mac_share == {"int8": 1.0}
    assert report.macs == 64 * 3 * 4 + 64 * 4 * 2
    assert report.float_layers == {}
