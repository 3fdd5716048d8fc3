"""Where the pairs stand: what runs on integers, what shares a scale and what stays float, as each scheme wants it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx_ir as ir
from quantizing import IMAGE, TWO, TWO_WEIGHTS, constants, network, operators, quantized, readers
from small_graphs import floats, graph, run, table_for

from edgeseg.graph.types import node_dtypes
from edgeseg.quantize.lint import lint
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.schemes import SCHEMES


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
READ_BY = {"nobody else": "", "a": " e = Conv(a, w4) z = Add(y, e)", "b": " e = Conv(b, w4) z = Add(y, e)"}


@pytest.mark.parametrize(
    ("factor", "read", "shared"),
    [
        (1.0, "a", True),
        (50.0, "nobody else", True),  # the result has the coarser steps whether they share them or not
        (50.0, "b", True),
        (50.0, "a", False),
    ],
)
def test_concat_inputs_share_a_scale_unless_it_costs_others_too_much(factor: float, read: str, shared: bool) -> None:
    weights = {"w1": floats(4, 3, 1, 1), "w2": floats(4, 3, 1, 1) * np.float32(factor), "w3": floats(4, 8, 1, 1)}
    body, output = CONCAT + READ_BY[read], "z" if READ_BY[read] else "y"
    if READ_BY[read]:
        weights["w4"] = floats(4, 4, 1, 1)
    model = quantized(network(body, outputs=f"float[1, 4, h, w] {output}", **weights), "onnxruntime-vnni")
    concat = next(n for n in model.graph.node if n.op_type == "Concat")
    makers = {name: n for n in model.graph.node for name in n.output}
    inputs = [makers[name] for name in concat.input]
    if shared:
        assert [n.op_type for n in inputs] == ["QuantizeLinear"] * 2, "joined as integers"
        assert inputs[0].input[1:] == inputs[1].input[1:]
    else:
        assert [n.op_type for n in inputs] == ["DequantizeLinear"] * 2
        (result,) = (n for n in model.graph.node if n.input[0] == concat.output[0])
        assert result.op_type == "QuantizeLinear"
        # What only the Concat reads is copied into its result; what others read keeps its own steps.
        assert inputs[1].input[1:] == result.input[1:]
        assert inputs[0].input[1] != result.input[1]


@pytest.mark.parametrize("scheme", ["tensorrt", "openvino", "openvino-avx2"])
@pytest.mark.parametrize("factor", [1.0, 50.0])
def test_a_concat_of_one_scale_leaves_other_readers_of_its_inputs_their_own(scheme: str, factor: float) -> None:
    """A skip connection, much smaller than what it is joined with: the layer that reads it too needs its own steps."""
    weights = {"w1": floats(4, 3, 1, 1), "w2": floats(4, 3, 1, 1) * np.float32(factor), "w4": floats(4, 4, 1, 1)}
    model = network(
        CONCAT + " e = Conv(a, w4)", "float[1, 4, h, w] y, float[1, 4, h, w] e", w3=floats(4, 8, 1, 1), **weights
    )
    typed = quantized(model, scheme)
    for expected, actual in zip(run(model, image=IMAGE), run(typed, image=IMAGE), strict=True):
        assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()
    concat = next(n for n in typed.graph.node if n.op_type == "Concat")
    makers = {name: n for n in typed.graph.node for name in n.output}
    # They share one pair where that costs the other little.
    assert (makers["e"].input[0] == concat.input[0]) == (factor == 1)
    assert len({tuple(makers[name].input[1:]) for name in concat.input}) == 1, "one scale, which fuses"


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


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_a_pool_whose_places_are_read_stays_float(scheme: str) -> None:
    weights = {**TWO_WEIGHTS, "small": np.float32(0.01)}
    float_model = network(
        """a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a)
        p, n = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) f = Cast <to = 1> (n) s = Mul(f, small) z = Add(p, s)
        y = Conv(z, w2, b2)""",
        **weights,
    )
    model = quantized(float_model, scheme)
    (pool,) = (node for node in model.graph.node if node.op_type == "MaxPool")
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node if pool.input[0] in node.output}
    expected, actual = run(float_model, image=IMAGE)[0], run(model, image=IMAGE)[0]
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("read", ["", " e = Conv(r, w3) p = MaxPool <kernel_shape = [1, 1]> (e)"])
def test_a_transposed_convolution_of_groups_stays_float_where_it_has_no_integers(scheme: str, read: str) -> None:
    body = f"""a = Conv(x, w1) r = Relu(a){read} u = ConvTranspose <strides = [2, 2], group = 4> (r, w2)
        y = Conv(u, w3)"""
    outputs = "float[1, c, h, w] y" + (", float[1, c, i, j] p" if read else "")
    model = network(body, outputs, w1=floats(4, 3, 1, 1), w2=floats(4, 1, 2, 2), w3=floats(5, 4, 1, 1))
    typed = quantized(model, scheme, passes=True)
    for expected, actual in zip(run(model, image=IMAGE), run(typed, image=IMAGE), strict=True):
        assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_float_image_that_is_only_moved_is_quantized(scheme: str, channels: int) -> None:
    """Of float32 images with mean 0 the normalization is one factor, which goes into the first convolution's weights."""
    moved = "Transpose <perm = [0, 3, 1, 2]> (image)" if channels == 3 else "Reshape(image, planes)"
    weights = {"w1": floats(4, channels, 3, 3), "w2": floats(4, 4, 1, 1), "planes": np.array([1, 1, 8, 8])}
    body = f"x = {moved} a = Conv(x, w1) r = Relu(a) y = Conv(r, w2)"
    model = graph(f"(float[1, 8, 8, {channels}] image) => (float[1, c, h, w] y)", body, **weights)
    image = floats(1, 8, 8, channels)
    typed = quantized(model, scheme, table_for(model, image=image))
    (expected,), (actual,) = run(model, image=image), run(typed, image=image)
    assert np.abs(actual - expected).max() < 0.03 * np.abs(expected).max()
    makers = {name: n for n in typed.graph.node for name in n.output}
    source = makers[next(n for n in typed.graph.node if n.op_type == "Conv").input[0]]
    while source.op_type in {"Transpose", "Reshape"}:
        source = makers[source.input[0]]
    assert source.op_type == "DequantizeLinear"


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


MOVED = """a = Conv(x, w1) t = Transpose <perm = [0, 2, 3, 1]> (a) b = MatMul(t, w2) r = Relu(b)
    u = Transpose <perm = [0, 3, 1, 2]> (r) y = Conv(u, w3)"""
MOVED_WEIGHTS = {"w1": floats(5, 3, 3, 3), "w2": floats(5, 6), "w3": floats(4, 6, 1, 1)}


@pytest.mark.parametrize(
    ("scheme", "quantized_values"),
    [("openvino", {"x", "a", "r"}), ("tensorrt", {"x", "t", "u"})],
)
def test_openvino_quantizes_before_what_only_rearranges(scheme: str, quantized_values: set[str]) -> None:
    model = network(MOVED, **MOVED_WEIGHTS)
    typed = quantized(model, scheme)
    assert {n.input[0] for n in typed.graph.node if n.op_type == "QuantizeLinear"} == quantized_values
    dtypes = node_dtypes(typed)
    assert [dtypes[n.name] for n in typed.graph.node if n.op_type in {"Conv", "MatMul"}] == ["int8"] * 3


def test_pairs_before_a_rearrangement_round_to_the_same_integers() -> None:
    model = network(MOVED, **MOVED_WEIGHTS)
    before, behind = (
        quantized(model, replace(SCHEMES["openvino"], pairs_before_moves=moved)) for moved in (True, False)
    )
    assert operators(before) == operators(behind)
    for one, other in zip(run(before, image=IMAGE), run(behind, image=IMAGE), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pair_before_a_rearrangement_is_a_mistake_for_any_other_scheme() -> None:
    typed = quantized(network(MOVED, **MOVED_WEIGHTS), "openvino")
    problems = lint(typed, replace(SCHEMES["openvino"], pairs_before_moves=False))
    assert len(problems) == 2 and all("reads a float value" in problem for problem in problems)


def test_a_value_that_is_read_in_float_too_is_quantized_behind_the_move() -> None:
    body = "a = Conv(x, w1) t = Transpose <perm = [0, 2, 3, 1]> (a) b = MatMul(t, w2) s = Sigmoid(a) y = Mul(s, a)"
    typed = quantized(network(body, w1=floats(4, 3, 1, 1), w2=floats(4, 4)), "openvino")
    assert "a" not in {n.input[0] for n in typed.graph.node if n.op_type == "QuantizeLinear"}


def test_a_move_of_a_module_that_stays_float_keeps_the_pair_behind_it() -> None:
    after = ir.serde.deserialize_model(network(MOVED, **MOVED_WEIGHTS))
    table = table_for(ir.serde.serialize_model(after), image=IMAGE)
    quantize_model(
        after, table, replace(SCHEMES["openvino"], passes=()), lambda node: node.outputs[0].name in {"a", "t"}
    )
    typed = ir.serde.serialize_model(after)
    assert {n.input[0] for n in typed.graph.node if n.op_type == "QuantizeLinear"} == {"t", "r"}
    assert lint(typed, SCHEMES["openvino"], {"a/Conv"} | {n.name for n in typed.graph.node if n.output[0] == "a"}) == []
