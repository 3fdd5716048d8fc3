"""Q/DQ graphs: numerically what a plain numpy quantizer says, and placed where each scheme wants them.

Oracle: numpy, written out below; and ONNX Runtime executing the float graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import RNG, floats, graph, run, spec, table_for  # noqa: E402

from edgeseg.backends import get_backend  # noqa: E402
from edgeseg.backends.cpu.onnxruntime import _open, _session_options, open_unoptimized  # noqa: E402
from edgeseg.backends.cpu.options import cpu_options  # noqa: E402
from edgeseg.errors import ArtifactError, BuildError, QuantizationError  # noqa: E402
from edgeseg.machine.cpu import this_cpu  # noqa: E402
from edgeseg.quantize.lint import lint  # noqa: E402
from edgeseg.quantize.qdq import quantize_model, write_qdq  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402
from edgeseg.quantize.table import CalibrationTable  # noqa: E402
from edgeseg.store.artifacts import OnnxGraph, sha256_file  # noqa: E402

IMAGE = RNG.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
SOURCE = "real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)"
GAIN = np.array(1 / 128, np.float32)


def network(body: str, outputs: str = "float[1, c, h, w] y", **weights: Any) -> onnx.ModelProto:
    return graph(f"(uint8[1, 8, 8, 3] image) => ({outputs})", f"{SOURCE} {body}", gain=GAIN, **weights)


def quantized(
    model: onnx.ModelProto, scheme: str, table: CalibrationTable | None = None, *, passes: bool = False
) -> onnx.ModelProto:
    """The Q/DQ graph, linted; without the scheme's passes unless asked, so that the pattern under test stays."""
    rules = SCHEMES[scheme] if passes else replace(SCHEMES[scheme], passes=())
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


def fake(x: NDArray[Any], low: float, high: float, scheme: str) -> NDArray[np.float64]:
    """Round to the integers of a range and back."""
    if SCHEMES[scheme].symmetric:
        scale, zero, limits = max(-low, high) / 127, 0, (-127, 127)
    else:
        limits = (0, 255) if SCHEMES[scheme].activations == "u8" else (-128, 127)
        scale = (high - low) / 255
        zero = int(np.clip(np.rint(limits[0] - low / np.float32(scale)), *limits))
    scale = float(np.float32(scale))
    return (np.clip(np.rint(x / scale) + zero, *limits) - zero) * scale


def fake_weight(weight: NDArray[Any], scheme: str) -> NDArray[np.float64]:
    limit = 63 if SCHEMES[scheme].weight_bits == 7 else 127
    scale = (np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / limit).astype(np.float32)
    return np.clip(np.rint(weight / scale), -limit, limit) * scale.astype(np.float64)


def convolve(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], pad: int) -> NDArray[np.float64]:
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias.reshape(1, -1, 1, 1)


TWO = "a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) y = Conv(r, w2, b2)"
TWO_WEIGHTS = {"w1": floats(5, 3, 3, 3), "b1": floats(5), "w2": floats(4, 5, 1, 1), "b2": floats(4)}


@pytest.mark.parametrize(
    "scheme", ["onnxruntime-vnni", "onnxruntime-avx2", "onnxruntime-arm", "tensorrt", "openvino", "openvino-avx2"]
)
def test_the_graph_computes_what_a_plain_quantizer_computes(scheme: str) -> None:
    model = network(TWO, **TWO_WEIGHTS)
    table = table_for(model, image=IMAGE)
    without = {name: replace(r, channel_mean=None, channel_axis=None) for name, r in table.ranges.items()}
    (actual,) = run(quantized(model, scheme, replace(table, ranges=without)), image=IMAGE)

    def limits(name: str) -> tuple[float, float]:
        return table.ranges[name].low, table.ranges[name].high

    w = {name: array.astype(np.float64) for name, array in TWO_WEIGHTS.items()}
    x = fake(IMAGE.astype(np.float64).transpose(0, 3, 1, 2) / 128, *limits("x"), scheme)
    hidden = np.maximum(convolve(x, fake_weight(w["w1"], scheme), w["b1"], 1), 0)
    expected = convolve(fake(hidden, *limits("r"), scheme), fake_weight(w["w2"], scheme), w["b2"], 0)
    if SCHEMES[scheme].placement == "operators":
        expected = fake(expected, *limits("y"), scheme)
    step = (table.ranges["y"].high - table.ranges["y"].low) / 255
    # float32 against float64 may fall on either side of a rounding boundary, one step of the last Q apart at most.
    wrong = np.abs(actual - expected) > 1e-4
    assert wrong.mean() < 0.02
    assert np.abs(actual - expected).max() < 1.5 * step


def test_bias_correction_brings_the_mean_back() -> None:
    model = network(TWO, **TWO_WEIGHTS)
    table = table_for(model, image=IMAGE)
    without = replace(
        table, ranges={n: replace(r, channel_mean=None, channel_axis=None) for n, r in table.ranges.items()}
    )
    (expected,) = run(model, image=IMAGE)

    def shift(of: CalibrationTable) -> float:
        (actual,) = run(quantized(model, "onnxruntime-avx2", of), image=IMAGE)
        return float(np.abs((actual - expected).mean(axis=(0, 2, 3))).mean())

    assert shift(table) < 0.6 * shift(without)


def test_onnxruntime_takes_the_saturation_of_q_for_the_relu() -> None:
    model = quantized(network(TWO, **TWO_WEIGHTS), "onnxruntime-vnni")
    assert "Relu" not in operators(model)
    zero = [v for name, v in constants(model).items() if name.startswith("r/") and "zero_point" in name]
    assert [z.item() for z in zero] == [0]


def test_tensorrt_keeps_the_relu_and_float_biases_and_zero_zero_points() -> None:
    model = quantized(network(TWO, **TWO_WEIGHTS), "tensorrt")
    assert operators(model).count("Relu") == 1
    assert not any(np.any(v) for name, v in constants(model).items() if "zero_point" in name)
    assert not any(v.dtype == np.int32 for v in constants(model).values())
    assert "QuantizeLinear" not in readers(model, "a"), "no pair between a convolution and its Relu"
    assert "QuantizeLinear" not in readers(model, "y"), "no pair on an output"


RESIDUAL = """a = Conv <pads = [1, 1, 1, 1]> (x, w1) r = Relu(a)
    b = Conv <pads = [1, 1, 1, 1]> (r, w2) s = Add(b, r) t = Relu(s) y = Conv(t, w3)"""
RESIDUAL_WEIGHTS = {"w1": floats(5, 3, 3, 3), "w2": floats(5, 5, 3, 3), "w3": floats(4, 5, 1, 1)}


def test_a_residual_addition_stays_integer() -> None:
    model = quantized(network(RESIDUAL, **RESIDUAL_WEIGHTS), "onnxruntime-vnni")
    assert operators(model) == ["Cast", "Transpose", "Mul", "Conv", "Conv", "Add", "Conv"]
    add = next(n for n in model.graph.node if n.op_type == "Add")
    makers = {name: n.op_type for n in model.graph.node for name in n.output}
    assert [makers[name] for name in add.input] == ["DequantizeLinear"] * 2
    assert readers(model, add.output[0]) == ["QuantizeLinear"]


def test_tensorrt_quantizes_one_side_of_a_residual_addition() -> None:
    model = quantized(network(RESIDUAL, **RESIDUAL_WEIGHTS), "tensorrt")
    add = next(n for n in model.graph.node if n.op_type == "Add")
    makers = {name: n.op_type for n in model.graph.node for name in n.output}
    assert sorted(makers[name] for name in add.input) == ["Conv", "DequantizeLinear"]


CONCAT = "a = Conv(x, w1) b = Conv(x, w2) c = Concat <axis = 1> (a, b) y = Conv(c, w3)"


@pytest.mark.parametrize(("factor", "shared"), [(1.0, True), (50.0, False)])
def test_concat_inputs_share_a_scale_unless_it_costs_too_much(factor: float, shared: bool) -> None:
    weights = {"w1": floats(4, 3, 1, 1), "w2": floats(4, 3, 1, 1) * np.float32(factor), "w3": floats(4, 8, 1, 1)}
    model = quantized(network(CONCAT, **weights), "onnxruntime-vnni")
    concat = next(n for n in model.graph.node if n.op_type == "Concat")
    makers = {name: n for n in model.graph.node for name in n.output}
    inputs = [makers[name] for name in concat.input]
    if shared:
        assert [n.op_type for n in inputs] == ["QuantizeLinear"] * 2, "joined as integers"
        assert inputs[0].input[1:] == inputs[1].input[1:]
    else:
        assert [n.op_type for n in inputs] == ["DequantizeLinear"] * 2
        assert inputs[0].input[1] != inputs[1].input[1]


def test_a_shared_scale_never_undoes_a_relu() -> None:
    body = "a = Conv(x, w1) r = Relu(a) b = Conv(x, w2) c = Concat <axis = 1> (r, b) y = Conv(c, w3)"
    weights = {"w1": floats(4, 3, 1, 1), "w2": -np.abs(floats(4, 3, 1, 1)), "w3": floats(4, 8, 1, 1)}
    model = network(body, **weights)
    (expected,) = run(model, image=IMAGE)
    (actual,) = run(quantized(model, "onnxruntime-vnni"), image=IMAGE)
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_moves_run_on_integers_and_keep_the_scale() -> None:
    body = "a = Conv(x, w1) m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a) y = Conv(m, w2)"
    model = quantized(network(body, w1=floats(4, 3, 1, 1), w2=floats(4, 4, 1, 1)), "onnxruntime-vnni")
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    assert readers(model, pool.input[0]) == ["MaxPool"]
    assert readers(model, pool.output[0]) == ["DequantizeLinear"]


def test_what_follows_the_last_layer_stays_float() -> None:
    body = "l = Conv(x, w1) p = Sigmoid(l) y = Mul(p, two)"
    model = quantized(network(body, w1=floats(4, 3, 1, 1), two=np.array(2, np.float32)), "onnxruntime-vnni")
    assert "QuantizeLinear" not in readers(model, next(n for n in model.graph.node if n.op_type == "Sigmoid").output[0])


def test_a_matrix_product_hands_float_to_float_readers() -> None:
    body = """r = Reshape(x, tokens) n = LayerNormalization <axis = -1> (r, gain2)
        m = MatMul(n, w1) g = Gelu(m) k = MatMul(g, w2) y = Add(k, r)"""
    model = quantized(
        network(
            body,
            outputs="float[1, 24, 8] y",
            tokens=np.array([1, 24, 8]),
            gain2=np.ones(8, np.float32),
            w1=floats(8, 16),
            w2=floats(16, 8),
        ),
        "onnxruntime-vnni",
    )
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    assert [readers(model, n.output[0]) for n in products] == [["Gelu"], ["Add"]]


def test_a_graph_output_keeps_its_name_and_type() -> None:
    model = quantized(network(TWO, **TWO_WEIGHTS), "onnxruntime-vnni")
    (output,) = model.graph.output
    assert output.name == "y"
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


DEAD = (0.0, 1e-9, 1e-20, 1e-38, 1e-42)


def with_dead_filters(weight: float, bias: float, *, all_dead: bool = False) -> onnx.ModelProto:
    """Two convolutions and a residual addition, half of the filters (or all) of the size of ``weight``."""
    first, second = 0.2 * floats(8, 3, 3, 3), 0.2 * floats(8, 8, 3, 3)
    biases = 0.3 * floats(2, 8)
    dead = slice(0, 8 if all_dead else 4)
    first[dead] *= np.float32(weight)
    second[dead] *= np.float32(weight)
    biases[:, dead] = bias
    return network(
        "a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) "
        "b = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, w2, b2) s = Add(b, r) t = Relu(s) y = Conv(t, w3)",
        w1=first,
        b1=biases[0],
        w2=second,
        b2=biases[1],
        w3=0.2 * floats(3, 8, 1, 1),
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [0.0, 0.3, 30.0])
@pytest.mark.parametrize("weight", DEAD)
def test_filters_that_weight_decay_drove_to_zero_keep_their_bias(weight: float, bias: float, scheme: str) -> None:
    model = with_dead_filters(weight, bias)
    written = quantized(model, scheme)
    (expected,) = run(model, image=IMAGE)
    assert signal_to_noise_db(expected, run(written, image=IMAGE)[0]) > 25
    if this_cpu().computes(scheme):
        assert signal_to_noise_db(expected, engine_of(written)(IMAGE)) > 25


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weight", DEAD)
def test_a_dead_layer_behind_a_dead_layer(weight: float, scheme: str) -> None:
    """The smallest activation scale times the smallest weight scale is still a scale."""
    model = with_dead_filters(weight, 0.0, all_dead=True)
    written = quantized(model, scheme)
    for result in (run(written, image=IMAGE)[0], engine_of(written)(IMAGE)):
        assert np.isfinite(result).all()
        assert np.abs(result).max() < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weight", DEAD)
def test_openvino_computes_dead_filters_right(weight: float) -> None:
    openvino = pytest.importorskip("openvino")
    model = with_dead_filters(weight, 0.3)
    read = openvino.Core().read_model(quantized(model, get_backend("openvino").scheme).SerializeToString())
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert signal_to_noise_db(run(model, image=IMAGE)[0], compiled([IMAGE])[0]) > 25


def test_a_portable_graph_runs_by_its_own_semantics(tmp_path: Path) -> None:
    """ONNX Runtime, left to itself, writes the float biases of TensorRT's graph as int32 that overflow."""
    model = with_dead_filters(1e-9, 0.3)
    written = quantized(model, "tensorrt")
    onnx.save(written, tmp_path / "model.onnx")
    with open_unoptimized(tmp_path / "model.onnx") as session:
        np.testing.assert_array_equal(session.run(IMAGE)["y"], run(written, image=IMAGE)[0])


def engine_of(model: onnx.ModelProto) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """The graph as ONNX Runtime optimizes it with the settings engines are built with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        settings = _session_options(ort, cpu_options("onnxruntime", {"threads": 1, "spinning": False}), this_cpu())
        session = _open(ort, path, settings, BuildError)
    return lambda image: np.asarray(session.run(None, {"image": image})[0])


def signal_to_noise_db(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    noise = np.square(expected - actual, dtype=np.float64).mean()
    return float(10 * np.log10(np.var(expected, dtype=np.float64) / max(noise, 1e-30)))


def test_seven_bit_weights_for_avx2() -> None:
    weights = [v for v in constants(quantized(network(TWO, **TWO_WEIGHTS), "onnxruntime-avx2")).values() if v.ndim == 4]
    assert max(np.abs(v).max() for v in weights if v.dtype == np.int8) == 63


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_passes_together_keep_the_result(scheme: str) -> None:
    body = """s = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1, b1) r = Relu(s)
        up = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (r, w2) t = Relu(up)
        n = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (r, , scales)
        c = Concat <axis = 1> (t, n) h = Conv(c, w3, b3)
        y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (h, , scales)"""
    weights = {
        "w1": floats(8, 3, 3, 3),
        "b1": floats(8),
        "w2": floats(8, 6, 4, 4),
        "w3": floats(4, 14, 1, 1),
        "b3": floats(4),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    model = network(body, **weights)
    table = table_for(model, image=IMAGE)
    (expected,) = run(model, image=IMAGE)
    (actual,) = run(quantized(model, scheme, table, passes=True), image=IMAGE)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 0.05 * np.abs(expected).max()


def test_a_table_of_another_graph_is_refused() -> None:
    model = network(TWO, **TWO_WEIGHTS)
    table = table_for(model, image=IMAGE)
    renamed = replace(table, ranges={f"other/{name}": r for name, r in table.ranges.items()})
    with pytest.raises(QuantizationError, match="calibrate this graph again"):
        quantized(model, "onnxruntime-vnni", renamed)
    holed = replace(table, ranges={name: r for name, r in table.ranges.items() if name != "y"})
    with pytest.raises(QuantizationError, match="no range for y"):
        quantized(model, "onnxruntime-vnni", holed)


def test_write_qdq_writes_a_file_and_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "float.onnx"
    model = network(TWO, **TWO_WEIGHTS)
    onnx.save(model, str(path))
    source = OnnxGraph(path, sha256_file(path), "fp32", spec(8, 8), "0" * 64)
    written = write_qdq(source, table_for(model, image=IMAGE), SCHEMES["tensorrt"], tmp_path / "int8.onnx")
    assert (written.precision, written.scheme) == ("int8", "tensorrt")
    assert written.sha256 == sha256_file(tmp_path / "int8.onnx")
    assert lint(onnx.load(str(written.path)), SCHEMES["tensorrt"]) == []
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactError):
        write_qdq(source, table_for(model, image=IMAGE), SCHEMES["tensorrt"], tmp_path / "int8.onnx")
