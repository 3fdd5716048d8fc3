"""Q/DQ graphs compute what a plain numpy quantizer says, whatever the weights.

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

pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from quantizing import IMAGE, TWO, TWO_WEIGHTS, network, quantized
from small_graphs import floats, graph, run, signal_to_noise_db, spec, table_for

from edgeseg.backends import get_backend
from edgeseg.backends.cpu.onnxruntime import _open, _session_options, open_unoptimized
from edgeseg.backends.cpu.options import cpu_options
from edgeseg.errors import ArtifactError, BuildError, QuantizationError
from edgeseg.machine.cpu import this_cpu
from edgeseg.quantize.lint import lint
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph


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
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    if scheme.endswith("avx2"):
        largest = np.maximum(largest, pairs(weight).reshape(largest.shape))
    scale = (largest / 127).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127) * scale.astype(np.float64)


def pairs(weight: NDArray[Any]) -> NDArray[Any]:
    """Largest sum of two neighbours in the order (row, column, channel), which start anew at each row, each place, or never."""
    largest = []
    for output in weight.transpose(0, 2, 3, 1):
        runs = [output.ravel(), *output.reshape(len(output), -1), *output.reshape(-1, output.shape[-1])]
        largest.append(max(abs(run[k : k + 2].sum()) for run in runs for k in range(0, len(run), 2)))
    return np.array(largest)


def convolve(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any], pad: int) -> NDArray[np.float64]:
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight) + bias.reshape(1, -1, 1, 1)


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
    shifts = np.zeros(2)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        model = network(
            TWO, **{name: rng.standard_normal(w.shape).astype(np.float32) for name, w in TWO_WEIGHTS.items()}
        )
        table = table_for(model, image=IMAGE)
        ranges = {name: replace(r, channel_mean=None, channel_axis=None) for name, r in table.ranges.items()}
        (expected,) = run(model, image=IMAGE)
        for index, of in enumerate((table, replace(table, ranges=ranges))):
            (actual,) = run(quantized(model, "onnxruntime-avx2", of), image=IMAGE)
            shifts[index] += np.abs((actual - expected).mean(axis=(0, 2, 3))).mean()
    corrected, plain = shifts
    assert corrected < 0.4 * plain


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


@pytest.mark.parametrize("tokens", [16, 32, 24])
@pytest.mark.parametrize("between", ["", "m = Relu(k)", "m = Mul(k, third)"])
def test_openvino_projects_the_tokens_of_a_batch_right(tokens: int, between: str) -> None:
    """Queries without a bias: one product over the tokens of all images, its result cut into heads."""
    openvino = pytest.importorskip("openvino")
    model = graph(
        "(float[n, t, 16] image) => (float[n, 2, t, 8] y)",
        f"""x = Relu(image) f = Reshape(x, flat) {"k" if between else "m"} = MatMul(f, w) {between}
        h = Reshape(m, heads) q = Transpose <perm = [0, 2, 1, 3]> (h) y = Softmax(q)""",
        flat=np.array([-1, 16]),
        heads=np.array([-1, tokens, 2, 8]),
        w=floats(16, 16) * np.exp2(np.linspace(-3, 3, 16)).astype(np.float32),
        **({"third": np.array(1 / 3, np.float32)} if "third" in between else {}),
    )
    image = floats(3, tokens, 16)
    written = quantized(model, get_backend("openvino").scheme, table_for(model, image=image), passes=True)
    read = openvino.Core().read_model(written.SerializeToString())
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.abs(compiled([image])[0] - run(written, image=image)[0]).max() < 0.02


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
