"""Matrix products for SM 75, each form on the smallest graph that has it. Oracle: ONNX Runtime on the graph before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import floats, graph, run

from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.backends.tensorrt.turing import for_turing
from edgeseg.errors import SpecError
from edgeseg.graph.macs import count_macs
from edgeseg.graph.types import node_dtypes
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec, Precision

SPEC = PipelineSpec(ModelSpec("unet", classes=4), InputSpec(32, 32))


def parsed(model: onnx.ModelProto, requested: Precision = "fp32") -> ParsedGraph:
    nodes = tuple(node.name for node in model.graph.node)
    return ParsedGraph(Path("model.onnx"), model, SPEC, requested, nodes, {}, node_dtypes(model))


def rewritten(model: onnx.ModelProto, **feeds: NDArray[Any]) -> onnx.ModelProto:
    """The graph for SM 75, valid, and with the same outputs for these inputs."""
    after = for_turing(parsed(model)).model
    onnx.checker.check_model(after, full_check=True)
    for expected, actual in zip(run(model, **feeds), run(after, **feeds), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    return after


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def named(model: onnx.ModelProto, name: str) -> str:
    return next(node.op_type for node in model.graph.node if node.name == name)


CONSTANT_MATRICES = [
    ("x", "w", (5, 6), (6, 4)),
    ("x", "w", (2, 5, 6), (6, 4)),
    ("x", "w", (2, 3, 5, 6), (6, 4)),
    ("x", "w", (2, 3, 5, 6), (1, 6, 4)),
    ("w", "x", (6, 5), (4, 6)),
    ("w", "x", (2, 6, 5), (4, 6)),
    ("w", "x", (2, 3, 6, 5), (4, 6)),
]


@pytest.mark.parametrize(("left", "right", "shape", "matrix"), CONSTANT_MATRICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_product_with_a_constant_is_a_convolution(
    left: str, right: str, shape: tuple[int, ...], matrix: tuple[int, ...], dynamic: bool
) -> None:
    """With any size unknown but the one that is summed over."""
    summed = len(shape) - 1 if left == "x" else len(shape) - 2
    sizes = [f"d{i}" if dynamic and i != summed else str(d) for i, d in enumerate(shape)]
    outputs = ", ".join(f"o{i}" for i in range(len(shape)))
    body = f"y = MatMul({left}, {right})"
    model = graph(f"(float[{', '.join(sizes)}] x) => (float[{outputs}] y)", body, w=floats(*matrix))
    after = rewritten(model, x=floats(*shape))
    assert named(after, "y/MatMul") == "Conv" and "MatMul" not in operators(after)

    known = {f"d{i}": d for i, d in enumerate(shape)}
    assert count_macs(after, known) == count_macs(model, known)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_linear_layer_is_a_convolution_with_its_bias(transposed: int, bias: str) -> None:
    weights = {"w": floats(4, 6) if transposed else floats(6, 4)} | ({"b": floats(4)} if bias else {})
    body = f"y = Gemm <transB = {transposed}> (x, w{bias})"
    after = rewritten(graph("(float[n, 6] x) => (float[n, 4] y)", body, **weights), x=floats(3, 6))
    assert named(after, "y/Gemm") == "Conv" and operators(after) == {"Unsqueeze", "Conv", "Squeeze"}


def attention(batch: str, tokens: str) -> onnx.ModelProto:
    """Two products of computed operands, as attention has them."""
    shape = f"float[{batch}, 3, {tokens}, 4]"
    body = """t = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul(q, t)
        p = Softmax <axis = -1> (s)
        y = MatMul(p, v)"""
    return graph(f"({shape} q, {shape} k, {shape} v) => (float[a, b, c, d] y)", body)


@pytest.mark.parametrize(
    ("batch", "tokens", "operator"), [("2", "5", "Conv"), ("n", "5", "Mul"), ("2", "m", "Mul"), ("n", "m", "Mul")]
)
def test_two_computed_operands(batch: str, tokens: str, operator: str) -> None:
    model = attention(batch, tokens)
    after = rewritten(model, **{name: floats(2, 3, 5, 4) for name in "qkv"})
    assert [named(after, name) for name in ("s/MatMul", "y/MatMul")] == [operator] * 2
    assert "MatMul" not in operators(after)
    assert ("ReduceSum" in operators(after)) == (operator == "Mul")
    if operator == "Conv":
        assert count_macs(after) == count_macs(model)


def test_unknown_columns_stay_a_convolution_and_broadcast_operands_do_not() -> None:
    open_ended = graph("(float[2, 3, 5] x, float[2, 5, n] z) => (float[a, b, c] y)", "y = MatMul(x, z)")
    assert named(rewritten(open_ended, x=floats(2, 3, 5), z=floats(2, 5, 7)), "y/MatMul") == "Conv"
    broadcast = graph("(float[2, 4, 3, 5] x, float[4, 5, 6] z) => (float[a, b, c, d] y)", "y = MatMul(x, z)")
    assert named(rewritten(broadcast, x=floats(2, 4, 3, 5), z=floats(4, 5, 6)), "y/MatMul") == "Mul"


def integers(*shape: int) -> NDArray[np.int8]:
    return np.random.default_rng(2).integers(-127, 128, shape).astype(np.int8)


ZERO, EIGHTH = np.int8(0), np.float32(0.125)


def quantized(left: str, right: str, shape: str, matrix: NDArray[np.int8], scales: Any, axis: int) -> onnx.ModelProto:
    """A product of quantized values with a quantized matrix; scales are powers of two, so that every sum is exact."""
    body = f"""q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        m = DequantizeLinear <axis = {axis}> (w, scales, zeros)
        y = MatMul({left}, {right})"""
    weights = {"w": matrix, "scales": scales, "zeros": np.zeros(np.shape(scales), np.int8)}
    rank = shape.count(",") + 1
    outputs = ", ".join(f"o{i}" for i in range(rank))
    return graph(f"(float[{shape}] x) => (float[{outputs}] y)", body, scale=EIGHTH, zero=ZERO, **weights)


POWERS = np.array([0.5, 0.25, 2.0, 1.0], np.float32)


@pytest.mark.parametrize(
    ("left", "right", "shape", "matrix", "scales", "axis"),
    [
        ("d", "m", (5, 6), (6, 4), POWERS, 1),
        ("d", "m", (2, 5, 6), (6, 4), POWERS, -1),
        ("d", "m", (2, 3, 5, 6), (6, 4), np.float32(0.5), 1),
        ("m", "d", (2, 3, 6, 5), (4, 6), POWERS, 0),
    ],
)
def test_int8_products_stay_int8(
    left: str, right: str, shape: tuple[int, ...], matrix: tuple[int, int], scales: Any, axis: int
) -> None:
    model = quantized(left, right, ", ".join(map(str, shape)), integers(*matrix), scales, axis)
    after = rewritten(model, x=floats(*shape))
    assert node_dtypes(model)["y/MatMul"] == node_dtypes(after)["y/MatMul"] == "int8"
    x = 8 * floats(*shape)
    np.testing.assert_array_equal(run(after, x=x)[0], run(model, x=x)[0])


def test_a_scale_along_the_summed_axis_leaves_a_float_kernel() -> None:
    model = quantized("d", "m", "5, 4", integers(4, 6), POWERS, 0)
    after = rewritten(model, x=floats(5, 4))
    assert named(after, "y/MatMul") == "Conv" and node_dtypes(after)["y/MatMul"] == "fp32"


@pytest.mark.parametrize(("batch", "dtype"), [("2", "int8"), ("n", "fp32")])
def test_int8_attention_is_told_as_what_it_becomes(batch: str, dtype: str) -> None:
    body = """q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        r = QuantizeLinear(z, scale, zero)
        e = DequantizeLinear(r, scale, zero)
        y = MatMul(d, e)"""
    signature = f"(float[{batch}, 3, 5, 4] x, float[{batch}, 3, 4, 6] z) => (float[a, b, c, d] y)"
    model = graph(signature, body, scale=EIGHTH, zero=ZERO)
    after = rewritten(model, x=floats(2, 3, 5, 4), z=floats(2, 3, 4, 6))
    assert node_dtypes(after)["y/MatMul"] == dtype


def test_what_is_not_a_float32_product_is_left_alone() -> None:
    half = parsed(graph("(float16[5, 6] x, float16[6, 4] z) => (float16[5, 4] y)", "y = MatMul(x, z)"), "fp16")
    assert for_turing(half) is half
    for body in ('y = Einsum <equation = "mk,kn->mn"> (x, z)', "y = Gemm <alpha = 2.0> (x, w)", "y = Gemm (x, z)"):
        other = parsed(graph("(float[5, 6] x, float[6, 4] z) => (float[5, 4] y)", body, w=floats(6, 4)))
        assert for_turing(other) is other


def test_nodes_are_those_of_the_rewritten_graph_and_macs_those_of_the_portable_one() -> None:
    model = graph("(float[5, 6] x) => (float[5, 4] y)", "y = MatMul(x, w)", w=floats(6, 4))
    before = parsed(model)
    bytes_before = model.SerializeToString()
    after = for_turing(before)
    assert after.nodes == tuple(node.name for node in after.model.graph.node) != before.nodes
    assert "y/MatMul" in after.nodes and after.macs is before.macs
    assert model.SerializeToString() == bytes_before, "the portable graph is not changed"
    assert after.for_parser(opset_17=False) is after
    made = [name for name in after.nodes if name != "y/MatMul"]
    assert made and all(after.where(name) == after.where("y/MatMul") for name in made), "the user has no such node"


def test_weights_that_are_put_in_later_have_to_stay() -> None:
    model = graph("(float[5, 6] x) => (float[5, 4] y)", "y = MatMul(x, w)", w=floats(6, 4))
    with pytest.raises(SpecError, match=r"1 matrix products .* leave out these options, or 75 of sm"):
        for_turing(parsed(model), keep_weights=True)
    plain = parsed(graph("(float[5, 6] x) => (float[5, 6] y)", "y = Relu(x)"))
    assert for_turing(plain, keep_weights=True) is plain
