"""Scales of training in a quantized graph: the same integers, wherever a scheme has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from small_graphs import floats, graph, run, spec

from edgeseg.graph.grid import Grid, Marks
from edgeseg.quantize.lint import lint
from edgeseg.quantize.parameters import quantize_weight, trained_parameters, trained_weight
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable, Trained, load_table
from edgeseg.quantize.trained import Held, held, spread, trained_table
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

VNNI, AVX2, ARM = (SCHEMES[f"onnxruntime-{name}"] for name in ("vnni", "avx2", "arm"))
TENSORRT, OPENVINO = SCHEMES["tensorrt"], SCHEMES["openvino"]
RNG = np.random.default_rng(3)


def rounded(channels: int, rest: tuple[int, ...], largest: int = 128) -> tuple[NDArray[Any], NDArray[Any]]:
    """Integers as training makes them, and a scale for each channel."""
    integers = RNG.integers(-largest, min(largest, 127) + 1, (channels, *rest))
    scale = RNG.uniform(1e-4, 3e-2, channels).astype(np.float32)
    return integers, scale


@pytest.mark.parametrize("rest", [(16, 3, 3), (1, 3, 3), (64, 1, 1)])
def test_a_rounded_weight_gets_its_integers_back(rest: tuple[int, ...]) -> None:
    integers, scale = rounded(24, rest)
    integers[:, 0, 0, 0] = -128  # the end that only training uses
    weight = integers.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    quantized = trained_weight(weight, 0, VNNI)
    assert np.array_equal(quantized.values, integers)
    assert np.allclose(quantized.scale, scale, rtol=1e-6, atol=0)


def test_a_folded_normalization_changes_nothing_and_a_weight_may_end_anywhere() -> None:
    integers, scale = rounded(8, (32, 3, 3), largest=90)
    gain = RNG.uniform(-2.0, 2.0, 8).astype(np.float32)
    weight = (integers.astype(np.float32) * scale.reshape(-1, 1, 1, 1)) * gain.reshape(-1, 1, 1, 1)
    quantized = trained_weight(np.moveaxis(weight, 0, 1).copy(), 1, VNNI)
    assert np.abs(np.moveaxis(quantized.dequantized(), 1, 0) - weight).max() < 1e-5 * np.abs(weight).max()
    assert quantized.axis == 1


def test_what_training_did_not_round_is_quantized_as_ever_channel_by_channel() -> None:
    integers, scale = rounded(4, (16, 3, 3))
    weight = integers.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    weight[1] = floats(16, 3, 3)
    weight[2] = 0.0
    quantized, plain = trained_weight(weight, 0, VNNI), quantize_weight(weight, 0, VNNI)
    assert np.array_equal(quantized.values[[0, 3]], integers[[0, 3]])
    assert np.array_equal(quantized.values[[1, 2]], plain.values[[1, 2]])
    assert np.array_equal(quantized.scale[[1, 2]], plain.scale[[1, 2]])


def test_where_pairs_are_added_in_16_bits_what_does_not_overflow_is_held() -> None:
    small, scale = rounded(4, (16, 3, 3), largest=63)
    weight = small.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    assert np.array_equal(trained_weight(weight, 0, AVX2).values, small)
    apart = np.where(np.arange(16).reshape(-1, 1, 1) % 2 == 0, 2 * small + 1, 0).astype(np.int8)  # beside it is nothing
    weight = apart.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    assert np.abs(apart).max() > 100
    assert np.array_equal(trained_weight(weight, 0, AVX2).values, apart)
    both = np.where(apart == 0, 127, small).astype(np.int8)
    weight = both.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    assert np.array_equal(trained_weight(weight, 0, VNNI).values, both)
    assert np.array_equal(trained_weight(weight, 0, AVX2).values, quantize_weight(weight, 0, AVX2).values)


@pytest.mark.parametrize(("groups", "shape"), [(1, (2, 4, 3, 3)), (2, (2, 1, 3, 3))])
def test_two_neighbours_of_minus_128_overflow_on_arm_without_dot_products(groups: int, shape: tuple[int, ...]) -> None:
    """Beside an activation of -128, which a zero behind a Relu is. One of them alone fits."""
    trained = np.full(shape, 3, np.int8)
    trained[0, 0, 0, 0] = -128
    trained[1, :, :2] = -128
    weight = trained.astype(np.float32) * 0.01
    quantized = trained_weight(weight, 0, ARM, groups=groups)
    alone = trained[0] if groups == 1 else np.maximum(trained[0], -127)  # of one channel any two may be neighbours
    assert np.array_equal(quantized.values[0], alone)
    assert np.array_equal(quantized.values[1], np.maximum(trained[1], -127))
    assert quantized.scale == pytest.approx(0.01)
    assert np.array_equal(trained_weight(weight, 0, VNNI, groups=groups).values, trained)


U8 = Grid(0.125, 100, 0, 255)
S8 = Grid(0.125, 0, -128, 127)
NOT_NEGATIVE = S8.without_negative()


@pytest.mark.parametrize(
    ("grid", "scheme", "zero_point"),
    [
        (U8, VNNI, 100),
        (U8, ARM, -28),
        (U8, OPENVINO, 100),
        (U8, TENSORRT, None),  # symmetric: 0 stands in the middle
        (Grid(0.125, 128, 0, 255), TENSORRT, 0),
        (S8, VNNI, 128),
        (S8, ARM, 0),
        (S8, TENSORRT, 0),
        (NOT_NEGATIVE, VNNI, 0),
        (NOT_NEGATIVE, ARM, -128),
        (NOT_NEGATIVE, TENSORRT, 0),
        (Grid(0.125, 0, 0, 255), TENSORRT, None),  # 255 steps above 0, int8 has 127
        (Grid(0.125, 0, 0, 127), TENSORRT, 0),
        (Grid(0.125, 60, 0, 127), VNNI, 60),
    ],
)
def test_integers_of_training_in_those_of_a_scheme(grid: Grid, scheme: Any, zero_point: int | None) -> None:
    parameters = trained_parameters(grid, scheme)
    if zero_point is None:
        assert parameters is None
        return
    assert parameters is not None
    assert (parameters.scale, parameters.zero_point) == (grid.scale, zero_point)
    # The oracle: every value of training is a value of the scheme, and is rounded to itself.
    low, high = grid.limits
    values = np.arange(low, high + grid.scale / 2, grid.scale)
    assert np.array_equal((parameters.quantize(values).astype(np.float64) - zero_point) * parameters.scale, values)


def test_integers_that_stand_for_a_clip_have_to_clip_where_it_does() -> None:
    six = Grid(6 / 255, 0, 0, 255)
    assert trained_parameters(six, VNNI, clamp=(0.0, 6.0)) is not None
    # The same steps as far as 12: a value of 9 would pass.
    assert trained_parameters(Grid(6 / 127, 0, 0, 127), VNNI, clamp=(0.0, 6.0)) is None
    assert trained_parameters(S8, VNNI, clamp=(0.0, np.inf)) is None


def test_a_grid_that_cannot_be_is_refused() -> None:
    for scale, zero_point, low, high in ((0.0, 0, 0, 255), (np.nan, 0, 0, 255), (1.0, -1, 0, 255), (1.0, 0, 0, 0)):
        with pytest.raises(ValueError, match=r"scale|zero point"):
            Grid(scale, zero_point, low, high)


# --- whole graphs ----------------------------------------------------------------------------------------------

BODY = """
    p = Cast<to = 1>(image)
    t = Transpose<perm = [0, 3, 1, 2]>(p)
    x = Mul(t, k)
    a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r = Relu(a)
    m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
    c = Conv<pads = [1, 1, 1, 1]>(m, w2, b2)
    s = Add(c, m)
    q = Relu(s)
    d = Conv(q, w3, b3)
    logits = Identity(d)
"""
GRIDS = {
    "x": Grid(1 / 100, 128, 0, 255),
    "r": Grid(0.02, 0, 0, 255),
    "c": Grid(0.03, 120, 0, 255),
    "q": Grid(0.025, 0, 0, 255),
    "d": Grid(0.05, 128, 0, 255),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    weights = {}
    for name, shape in (("w1", (16, 3, 3, 3)), ("w2", (16, 16, 3, 3)), ("w3", (4, 16, 1, 1))):
        integers, _ = rounded(shape[0], shape[1:])
        fan = float(np.prod(shape[1:]))
        weights[name] = (integers * (RNG.uniform(0.5, 1.5, shape[0]) / 64 / fan**0.5).reshape(-1, 1, 1, 1)).astype(
            np.float32
        )
        weights[name.replace("w", "b")] = floats(shape[0]) * 0.1
    model = graph("(uint8[1, 16, 16, 3] image) => (float[1, 4, 8, 8] logits)", BODY, k=np.float32(2.5 / 255), **weights)
    path = tmp_path_factory.mktemp("trained") / "model.onnx"
    onnx.save(model, path)
    return OnnxGraph(path, sha256_file(path), "fp32", spec(16, 3), "0" * 64)


def fake_quantized(model: onnx.ModelProto, names: str) -> onnx.ModelProto:
    """The oracle: the float graph that rounds where training did, by the formula written out in ONNX operators."""
    text = BODY
    for name in names:
        text = (
            text.replace(f"({name},", f"({name}_q,")
            .replace(f", {name})", f", {name}_q)")
            .replace(f"({name})", f"({name}_q)")
        )
        lines = [line for line in text.splitlines() if line.strip()]
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{name} ="))
        lines[at + 1 : at + 1] = [
            f"{name}_n = Div({name}, {name}_scale)", f"{name}_i = Round({name}_n)", f"{name}_r = Mul({name}_i, {name}_scale)",
            f"{name}_q = Clip({name}_r, {name}_low, {name}_high)",
        ]  # fmt: skip
        text = "\n".join(lines)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for name in names:
        grid = GRIDS[name]
        low, high = grid.limits
        numbers = {"scale": grid.scale, "low": low, "high": high}
        constants |= {f"{name}_{what}": np.float32(value) for what, value in numbers.items()}
    return graph("(uint8[1, 16, 16, 3] image) => (float[1, 4, 8, 8] logits)", text, **constants)


def marks(**grids: Grid) -> Marks:
    return Marks(("a tool",), {name: (grid,) for name, grid in grids.items()}, 0)


# What OpenVINO adds and returns it keeps in float: it quantizes what layers read.
@pytest.mark.parametrize(
    ("scheme", "names"), [("onnxruntime-vnni", "xrcqd"), ("onnxruntime-arm", "xrcqd"), ("openvino", "xrq")]
)
def test_a_quantized_graph_computes_what_the_fake_quantized_one_does(
    network: OnnxGraph, scheme: str, names: str, tmp_path: Path
) -> None:
    table = trained_table(network, marks(**GRIDS), None)
    assert table.trained == Trained(("a tool",), activations=5, derived=2, ambiguous=0, lost=0, calibrated=0)
    quantized = write_qdq(network, table, SCHEMES[scheme], tmp_path / "int8.onnx")
    model = onnx.load(quantized.path)
    assert lint(model, SCHEMES[scheme]) == []
    image = RNG.integers(0, 256, (1, 16, 16, 3), np.uint8)
    (expected,), (got,) = run(fake_quantized(onnx.load(network.path), names), image=image), run(model, image=image)
    # Equal but for ties that the order of a float32 sum turns, and what the integer of a bias rounds off.
    off = np.abs(got - expected)
    assert (off > GRIDS["d"].scale / 2).mean() < 0.03
    assert off.max() < 1.1 * GRIDS["d"].scale
    kept = held(network, quantized, table)
    assert (kept.activations, kept.weights, kept.others) == (kept.activations_trained, kept.layers, ())
    assert kept.layers >= 2


def test_symmetric_schemes_say_which_scales_they_cannot_hold(network: OnnxGraph, tmp_path: Path) -> None:
    table = trained_table(network, marks(**GRIDS), None)
    quantized = write_qdq(network, table, TENSORRT, tmp_path / "int8.onnx")
    kept = held(network, quantized, table)
    assert kept.others == ("m", "q")
    assert (kept.activations, kept.activations_trained, kept.weights) == (1, 3, 3)
    assert "1 of 3 trained scales" in kept.words
    assert "m, q" in kept.words
    signed = {name: Grid(grid.scale, 0, -128, 127) for name, grid in GRIDS.items()}
    table = trained_table(network, marks(**signed), None)
    assert held(network, write_qdq(network, table, TENSORRT, tmp_path / "s8.onnx"), table).others == ()


def test_what_training_left_in_float_stays_float_without_images(network: OnnxGraph, tmp_path: Path) -> None:
    table = trained_table(network, marks(x=GRIDS["x"], r=GRIDS["r"]), None)
    assert "c" not in table.ranges
    quantized = write_qdq(network, table, VNNI, tmp_path / "int8.onnx")
    model = onnx.load(quantized.path)
    read = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    assert read["c/Conv"] == "w2"
    assert read["a/Conv"] != "w1"
    assert lint(model, VNNI) == ["c/Conv reads integers but its weight is float: it runs in float"]
    assert held(network, quantized, table).words.startswith("2 of 2 trained scales and the weights of 1 of 1 layers")


def test_a_table_of_trained_scales_is_read_back(network: OnnxGraph, tmp_path: Path) -> None:
    table = trained_table(network, marks(**GRIDS), None)
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    assert table.ranges["r"].grid == GRIDS["r"]
    assert table.ranges["m"].grid == GRIDS["r"]
    assert isinstance(table, CalibrationTable)


def test_grids_spread_over_what_moves_clips_and_repeats() -> None:
    model = graph(
        "(float[1, 2, 4, 4] x) => (float[1, 4, 8, 8] z, float[1, 2, 4, 4] y)",
        """
        r = Relu(x)
        u = Resize<mode = "nearest">(r, , scales)
        v = Relu(y0)
        y0 = Neg(x)
        w = Resize<mode = "nearest">(v, , scales)
        c = Concat<axis = 1>(u, w)
        z = Identity(c)
        y = Sigmoid(x)
        """.replace("v = Relu(y0)\n        y0 = Neg(x)", "y0 = Neg(x)\n        v = Relu(y0)"),
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    signed = Grid(0.5, 0, -128, 127)
    plain = ir.serde.deserialize_model(model).graph
    # Forward from before a Relu, where it leaves the steps; nothing is known of what is negated.
    assert spread(plain, {"x": signed}) == {
        "x": signed, "r": signed.without_negative(), "u": signed.without_negative()
    }  # fmt: skip
    # Back from what a layer reads to what was moved there, and no further than a Relu.
    assert set(spread(plain, {"z": signed})) == {"z", "c", "u", "w", "r", "v"}
    assert set(spread(plain, {"u": signed, "w": Grid(0.25, 0, -128, 127)})) == {"u", "w", "r", "v"}


def test_words_name_two_of_what_is_not_held() -> None:
    assert Held(1, 1, 2, 2, ()).words.endswith("held as they were trained")
    assert Held(1, 4, 2, 2, ("a", "b", "c")).words.endswith(": a, b and others")
