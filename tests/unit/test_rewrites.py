"""Each rewrite on the smallest graph that has its pattern, and on the nearest ones that it must leave alone.

Oracle: ONNX Runtime without optimizations, on the graph before and after.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import rewriting  # noqa: E402
from rewriting import ints, noise, operators  # noqa: E402
from small_graphs import floats, graph, run  # noqa: E402

from edgeseg.convert import naming, rewrites  # noqa: E402
from edgeseg.convert.rewrites import (  # noqa: E402
    REWRITES,
    attention_scale,
    ceil_pool,
    channel_swap,
    compose_concat,
    compose_conv,
    conv_concat,
    conv_resize,
    global_pool,
    layout,
    linear_conv,
    padded_pool,
    qkv,
    readout,
    reshape_channels,
    resize_scales,
    slices,
    stacked_sum,
    tokens,
)
from edgeseg.convert.rewrites.driver import Rewrite, each  # noqa: E402
from edgeseg.errors import ExportError  # noqa: E402
from edgeseg.graph.editing import tidy  # noqa: E402

LINEAR = 'mode = "linear", coordinate_transformation_mode = "align_corners"'


def test_names_given_to_what_has_none_are_no_other_weights() -> None:
    """The biases of an ensemble kept in a plain list belong to no module; one has a name as these get it."""
    biases = {name: floats(2) for name in ("p", "q", "r")}
    model = graph(
        "(float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)",
        "a = Conv(x, w, p) b = Conv(a, w, q) c = Conv(b, w, r) y = Conv(c, w, s)",
        w=floats(2, 2, 1, 1),
        **biases,
        s=floats(2),
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"Conv_{index}"
    model.graph.node[3].input[2] = model.graph.initializer[4].name = ".bias_1"
    named = naming.normalize(model)
    names = [tensor.name for tensor in named.graph.initializer]
    assert len(names) == len(set(names)) == 5
    image = floats(1, 2, 4, 4)
    np.testing.assert_array_equal(run(named, x=image)[0], run(model, x=image)[0])


def rewritten(model: onnx.ModelProto, module: ModuleType, times: int) -> Counter[str]:
    """Apply one rewrite to a graph, check it; returns the operators left."""
    return operators(rewriting.rewritten(model, module, times))


def test_global_pool() -> None:
    body = "y = ReduceMean <keepdims = 1> (x, axes)"
    signature = "(float[n, 3, 4, 6] x) => (float[n, 3, 1, 1] y)"
    assert rewritten(graph(signature, body, axes=ints(-1, -2)), global_pool, 1) == {"GlobalAveragePool": 1}
    assert rewritten(graph(signature, body, axes=ints(2, 3)), global_pool, 1) == {"GlobalAveragePool": 1}
    channels = graph("(float[n, 3, 4, 6] x) => (float[n, 1, 4, 6] y)", body, axes=ints(1))
    assert rewritten(channels, global_pool, 0) == {"ReduceMean": 1}
    dropped = graph("(float[n, 3, 4, 6] x) => (float[n, 3] y)", body.replace("= 1", "= 0"), axes=ints(2, 3))
    assert rewritten(dropped, global_pool, 0) == {"ReduceMean": 1}


@pytest.mark.parametrize(
    ("height", "kernel", "pads", "times"), [(6, 3, 0, 1), (7, 2, 0, 1), (6, 3, 1, 1), (7, 4, 1, 1), (5, 2, 1, 0)]
)
def test_ceil_pool(height: int, kernel: int, pads: int, times: int) -> None:
    """As torch averages, on ONNX Runtime's integers, too."""
    torch = pytest.importorskip("torch")
    pool = f"""AveragePool <kernel_shape = [{kernel}, {kernel}], strides = [2, 2], pads = {[pads] * 4}, ceil_mode = 1,
        count_include_pad = 1>"""
    x = floats(1, 3, height, 10)
    expected = torch.nn.AvgPool2d(kernel, 2, pads, ceil_mode=True)(torch.from_numpy(x)).numpy()
    shape = f"(float[1, 3, {height}, 10] x) => (float[1, 3, h, w] y)"
    assert rewritten(graph(shape, f"y = {pool} (x)"), ceil_pool, times)["Pad"] == times * pads
    pairs = f"""q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) a = {pool} (d)
        b = QuantizeLinear(a, s, z) y = DequantizeLinear(b, s, z)"""
    changed = ir.serde.deserialize_model(graph(shape, pairs, s=np.float32(0.03), z=np.uint8(128)))
    ceil_pool.REWRITE.apply(changed)
    session = ort.InferenceSession(
        ir.serde.serialize_model(changed).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=0.04)


def test_padded_pool() -> None:
    """What is negative up to the border, where a zero around it is the largest: optimized, too."""
    signature, pads = "(float[1, 3, 6, 6] x) => (float[1, 3, 3, 3] y)", ints(0, 0, 1, 1, 0, 0, 1, 1)
    pool = "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (p)"
    x = -1 - np.abs(floats(1, 3, 6, 6))
    for value in ({}, {"value": np.float32(0)}):
        model = graph(signature, f"p = Pad(x, pads{', value' if value else ''})\n {pool}", pads=pads, **value)
        assert rewritten(model, padded_pool, 1) == {"Pad": 1, "MaxPool": 1}
        changed = ir.serde.deserialize_model(model)
        padded_pool.REWRITE.apply(changed)
        session = ort.InferenceSession(
            ir.serde.serialize_model(changed).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (pooled,) = session.run(None, {"x": x})
        assert np.all(np.abs(pooled[:, :, 0]) < 1e-30), "zeros win at the border"
        np.testing.assert_allclose(pooled, run(model, x=x)[0], atol=1e-30)
    reflected = 'p = Pad <mode = "reflect"> (x, pads)'
    for body in (f"p = Pad(x, pads, least)\n {pool}", f"{reflected}\n {pool}", "p = Pad(x, pads)\n y = Relu(p)"):
        shape = signature if "MaxPool" in body else signature.replace("3, 3, 3", "3, 8, 8")
        rewritten(graph(shape, body, pads=pads, least=np.float32(-np.inf)), padded_pool, 0)


def test_stacked_sum() -> None:
    body = """u = Unsqueeze(a, zero)
        v = Unsqueeze(b, zero)
        w = Unsqueeze(c, zero)
        s = Concat <axis = 0> (u, v, w)
        y = ReduceSum <keepdims = 0> (s, zero)"""
    inputs = "(float[n, 3, 4] a, float[n, 3, 4] b, float[n, 3, 4] c)"
    stacked = graph(f"{inputs} => (float[n, 3, 4] y)", body, zero=ints(0))
    assert rewritten(stacked, stacked_sum, 1) == {"Add": 2}
    kept = graph(f"{inputs} => (float[1, n, 3, 4] y)", body.replace("keepdims = 0", "keepdims = 1"), zero=ints(0))
    assert "Add" not in rewritten(kept, stacked_sum, 0)
    shared = graph(f"{inputs} => (float[n, 3, 4] y, float[3, n, 3, 4] s)", body, zero=ints(0))
    assert "Add" not in rewritten(shared, stacked_sum, 0)


def test_stacked_sum_along_another_axis_is_left_alone() -> None:
    body = """u = Unsqueeze(a, one)
        v = Unsqueeze(b, one)
        s = Concat <axis = 1> (u, v)
        y = ReduceSum <keepdims = 0> (s, two)"""
    other = graph("(float[2, 3, 4] a, float[2, 3, 4] b) => (float[2, 2, 4] y)", body, one=ints(1), two=ints(2))
    assert rewritten(other, stacked_sum, 0)["ReduceSum"] == 1


def sliced(*bounds: tuple[int, int]) -> Any:
    body = "\n".join(f"y{i} = Slice(x, s{i}, e{i}, axis, step)" for i in range(len(bounds)))
    outputs = ", ".join(f"float[2, {min(e, 5) - s}, 4] y{i}" for i, (s, e) in enumerate(bounds))
    numbers = {f"{k}{i}": ints(v) for i, b in enumerate(bounds) for k, v in zip("se", b, strict=True)}
    return graph(f"(float[2, 5, 4] x) => ({outputs})", body, axis=ints(1), step=ints(1), **numbers)


def test_slices() -> None:
    assert rewritten(sliced((0, 1), (1, 2**63 - 1)), slices, 2) == {"Split": 1}
    assert rewritten(sliced((3, 5), (0, 2), (2, 3)), slices, 3) == {"Split": 1}
    assert rewritten(sliced((0, 1), (2, 5)), slices, 0) == {"Slice": 2}  # a gap
    assert rewritten(sliced((0, 3), (2, 5)), slices, 0) == {"Slice": 2}  # an overlap
    assert rewritten(sliced((1, 5)), slices, 0) == {"Slice": 1}  # half of it


QKV = """h = MatMul(x, w)
    r = Reshape(h, heads)
    t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    a, b, c = Split <axis = 0, num_outputs = 3> (t)
    q = Squeeze(a, zero)
    k = Squeeze(b, zero)
    v = Squeeze(c, zero)"""


def test_qkv() -> None:
    part = "float[n, 2, 5, 4]"
    weights: dict[str, Any] = {"w": floats(8, 24), "heads": ints(-1, 5, 3, 2, 4), "zero": ints(0)}
    signature = f"(float[n, 5, 8] x) => ({part} q, {part} k, {part} v)"
    assert rewritten(graph(signature, QKV, **weights), qkv, 1) == {
        "MatMul": 1,
        "Split": 1,
        "Reshape": 3,
        "Transpose": 3,
    }
    # heads outside the parts: the split axis is not the first factor of the last axis
    other = QKV.replace("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]")
    weights["heads"] = ints(-1, 5, 2, 3, 4)
    assert rewritten(graph(signature, other, **weights), qkv, 0)["Squeeze"] == 3


def test_attention_scale() -> None:
    body = """h = MatMul(x, w)
        g = Add(h, b)
        a, c, d = Split <axis = 2> (g, sizes)
        r = Reshape(c, heads)
        t = Transpose <perm = [0, 2, 1, 3]> (r)
        y = Mul(t, scale)"""
    weights: dict[str, Any] = {
        "w": floats(8, 12),
        "b": floats(12),
        "sizes": ints(2, 6, 4),
        "heads": ints(0, 0, 3, 2),
        "scale": np.float32(0.37),
    }
    signature = "(float[n, 5, 8] x) => (float[n, 3, 5, 2] y, float[n, 5, 2] a, float[n, 5, 4] d)"
    assert "Mul" not in rewritten(graph(signature, body, **weights), attention_scale, 1)
    weights["scale"] = floats(2)  # no scalar
    assert rewritten(graph(signature, body, **weights), attention_scale, 0)["Mul"] == 1


def test_attention_scale_of_a_shared_value_is_left_alone() -> None:
    body = """h = MatMul(x, w)
        a, c = Split <axis = 2> (h, sizes)
        y = Mul(c, scale)"""
    signature = "(float[n, 5, 8] x) => (float[n, 5, 4] y, float[n, 5, 8] h)"
    model = graph(signature, body, w=floats(8, 8), sizes=ints(4, 4), scale=np.float32(2))
    assert rewritten(model, attention_scale, 0)["Mul"] == 1


def test_readout() -> None:
    body = """e = Expand(token, shape)
        c = Concat <axis = 2> (x, e)
        y = MatMul(c, w)"""
    signature = "(float[2, 5, 8] x, float[2, 1, 6] token) => (float[2, 5, 3] y)"
    model = graph(signature, body, w=floats(14, 3), shape=ints(2, 5, 6))
    assert rewritten(model, readout, 1) == {"MatMul": 2, "Add": 1}


def test_readout_that_expands_channels_is_left_alone() -> None:
    body = """e = Expand(token, shape)
        c = Concat <axis = 2> (x, e)
        y = MatMul(c, w)"""
    signature = "(float[2, 5, 8] x, float[2, 5, 1] token) => (float[2, 5, 3] y)"
    assert rewritten(graph(signature, body, w=floats(14, 3), shape=ints(2, 5, 6)), readout, 0)["Expand"] == 1


FLATTENED = """r = Reshape(x, flat)
    t = Transpose <perm = [0, 2, 1]> (r)
    m = MatMul(t, w)
    a = Add(m, b)
    u = Transpose <perm = [0, 2, 1]> (a)
    y = Reshape(u, plane)"""


def test_linear_conv() -> None:
    weights: dict[str, Any] = {"flat": ints(0, 4, 15), "w": floats(4, 6), "b": floats(6), "plane": ints(-1, 6, 3, 5)}
    signature = "(float[2, 4, 3, 5] x) => (float[2, 6, 3, 5] y)"
    assert rewritten(graph(signature, FLATTENED, **weights), linear_conv, 1) == {"Conv": 1}
    weights["plane"] = ints(-1, 6, 5, 3)  # another plane than x's
    other = graph("(float[2, 4, 3, 5] x) => (float[2, 6, 5, 3] y)", FLATTENED, **weights)
    assert rewritten(other, linear_conv, 0)["MatMul"] == 1


def test_tokens() -> None:
    body = """n = LayerNormalization <axis = -1> (x, s, h)
        m = MatMul(n, w)
        a = Add(m, b)
        g = Gelu(a)
        k = MatMul(g, v)
        r = Add(x, k)
        t = Reshape(r, heads)
        y = Transpose <perm = [0, 2, 1, 3]> (t)"""
    weights: dict[str, Any] = {"s": floats(8), "h": floats(8), "w": floats(8, 6), "b": floats(6), "v": floats(6, 8)}
    signature = "(float[n, 5, 8] x) => (float[n, 2, 5, 4] y, float[n, 5, 8] r)"
    model = graph(signature, body, heads=ints(0, 0, 2, 4), **weights)
    left = rewritten(model, tokens, 2)
    assert left["MatMul"] == 2
    after = ir.serde.deserialize_model(model)
    tokens.REWRITE.apply(after)
    tidy(after)
    assert all(len(node.inputs[0].shape) == 2 for node in after.graph if node.op_type == "MatMul")


def test_tokens_with_a_value_per_position_are_left_alone() -> None:
    body = """m = MatMul(x, w)
        a = Add(m, position)
        y = MatMul(a, v)"""
    model = graph(
        "(float[n, 5, 8] x) => (float[n, 5, 8] y)", body, w=floats(8, 6), position=floats(1, 5, 6), v=floats(6, 8)
    )
    assert "Reshape" not in rewritten(model, tokens, 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = Transpose <perm = [0, 2, 3, 1]> (x)\n y = Transpose <perm = [0, 3, 1, 2]> (a)", {"Identity": 1}),
        ("a = Transpose <perm = [0, 2, 1, 3]> (x)\n y = Transpose <perm = [0, 3, 1, 2]> (a)", {"Transpose": 1}),
        ("a = Reshape(x, s0)\n y = Reshape(a, s1)", {"Reshape": 1}),
        (
            "a = Reshape(x, s0)\n b = Transpose <perm = [0, 2, 1]> (a)\n y = Reshape(b, s2)",
            {"Reshape": 2, "Transpose": 1},
        ),
        ("a = Reshape(x, s3)\n y = Transpose <perm = [0, 2, 1, 3]> (a)", {"Reshape": 1}),
        ("y = Transpose <perm = [0, 2, 1, 3]> (x)", {"Transpose": 1}),
    ],
)
def test_layout(body: str, expected: dict[str, int]) -> None:
    shapes = {"s0": ints(0, 12, 5), "s1": ints(-1, 4, 15), "s2": ints(-1, 6, 10), "s3": ints(0, 60, 1, 1)}
    used = {name: shape for name, shape in shapes.items() if f", {name})" in body}
    for signature in ("(float[n, 3, 4, 5] x) => (float[a] y)", "(float[2, 3, 4, 5] x) => (float[a] y)"):
        model = graph(signature, body, **used)
        after = ir.serde.deserialize_model(model)
        layout.REWRITE.apply(after)
        tidy(after)
        assert not list(layout.REWRITE.matches(after))
        proto = ir.serde.serialize_model(after)
        assert Counter(n.op_type for n in proto.graph.node) == expected
        np.testing.assert_array_equal(run(proto, **noise(proto))[0], run(model, **noise(model))[0])


def test_layout_of_tokens_with_a_dynamic_batch() -> None:
    body = """a = Reshape(x, three)
        b = Reshape(a, two)
        c = Reshape(b, three)
        y = Transpose <perm = [0, 2, 1]> (c)"""
    model = graph("(float[n, 8] x) => (float[a] y)", body, two=ints(-1, 8), three=ints(-1, 5, 8))
    after = ir.serde.deserialize_model(model)
    assert layout.REWRITE.apply(after) > 0
    tidy(after)
    proto = ir.serde.serialize_model(after)
    assert Counter(n.op_type for n in proto.graph.node) == {"Reshape": 1, "Transpose": 1}
    np.testing.assert_array_equal(run(proto, **noise(proto, 10))[0], run(model, **noise(model, 10))[0])


def planes(op_type: str, weight_shape: tuple[int, ...], channels: int = -1, height: str = "height") -> Any:
    """Tokens ``(1, 6, n)`` -> planes ``(1, 6, h, w)`` at a computed size -> a convolution."""
    body = f"""size = Shape <start = 2, end = 3> (x)
        height = Div(size, three)
        shape = Concat <axis = 0> (one, channels, {height}, three)
        p = Reshape(x, shape)
        y = {op_type}(p, w)"""
    numbers = {"one": ints(1), "three": ints(3), "channels": ints(channels), "two": ints(2)}
    return graph("(float[1, 6, 6] x) => (float[a, b, c, d] y)", body, w=floats(*weight_shape), **numbers)


@pytest.mark.parametrize(("op_type", "weight_shape"), [("Conv", (4, 6, 1, 1)), ("ConvTranspose", (6, 4, 2, 2))])
def test_reshape_channels(op_type: str, weight_shape: tuple[int, ...]) -> None:
    left = rewritten(planes(op_type, weight_shape), reshape_channels, 1)
    assert left["Concat"] == 1 and left["Reshape"] == 1
    assert rewritten(planes(op_type, weight_shape, channels=6), reshape_channels, 0)["Concat"] == 1
    assert rewritten(planes(op_type, weight_shape, height="two"), reshape_channels, 0)["Concat"] == 1


def test_resize_scales() -> None:
    body = f"y = Resize <{LINEAR}> (x, , , sizes)"

    def model(height: int, width: int) -> Any:
        signature = f"(float[2, 3, 4, 6] x) => (float[2, 3, {height}, {width}] y)"
        return graph(signature, body, sizes=ints(2, 3, height, width))

    doubled = ir.serde.deserialize_model(model(8, 12))
    assert resize_scales.REWRITE.apply(doubled) == 1
    assert doubled.graph[-1].inputs[2].const_value.numpy().tolist() == [1, 1, 2, 2]
    assert rewritten(model(8, 12), resize_scales, 1) == {"Resize": 1}
    assert rewritten(model(2, 12), resize_scales, 1) == {"Resize": 1}
    assert rewritten(model(4, 6), resize_scales, 1) == {}  # to its own size
    assert rewritten(model(9, 12), resize_scales, 0) == {"Resize": 1}  # no whole ratio


def test_conv_resize_moves_the_convolution_to_the_smaller_plane() -> None:
    up = f"u = Resize <{LINEAR}> (x, , scales)\n y = Conv(u, w, b)"
    weights: dict[str, Any] = {"w": floats(5, 64, 1, 1), "b": floats(5), "scales": np.array([1, 1, 2, 3], np.float32)}
    model = graph("(float[n, 64, 4, 6] x) => (float[n, 5, 8, 18] y)", up, **weights)
    rewritten(model, conv_resize, 1)
    after = ir.serde.deserialize_model(model)
    conv_resize.REWRITE.apply(after)
    tidy(after)
    assert [n.op_type for n in after.graph] == ["Conv", "Resize"]
    down = f"c = Conv(x, w, b)\n y = Resize <{LINEAR}> (c, , scales)"
    weights = {"w": floats(64, 5, 1, 1), "b": floats(64), "scales": np.array([1, 1, 0.5, 0.5], np.float32)}
    model = graph("(float[n, 5, 8, 8] x) => (float[n, 64, 4, 4] y)", down, **weights)
    assert rewritten(model, conv_resize, 1) == {"Conv": 1, "Resize": 1}


def test_conv_resize_leaves_alone_what_would_cost_more() -> None:
    up = f"u = Resize <{LINEAR}> (x, , scales)\n y = Conv(u, w)"
    scales = np.array([1, 1, 2, 2], np.float32)
    widening = graph("(float[n, 4, 4, 4] x) => (float[n, 256, 8, 8] y)", up, w=floats(256, 4, 1, 1), scales=scales)
    assert rewritten(widening, conv_resize, 0) == {"Resize": 1, "Conv": 1}
    shared = graph(
        "(float[n, 64, 4, 4] x) => (float[n, 4, 8, 8] y, float[n, 64, 8, 8] u)",
        up,
        w=floats(4, 64, 1, 1),
        scales=scales,
    )
    assert rewritten(shared, conv_resize, 0) == {"Resize": 1, "Conv": 1}
    padded = graph(
        "(float[n, 64, 4, 4] x) => (float[n, 4, 8, 8] y)",
        up.replace("Conv(", "Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> ("),
        w=floats(4, 64, 3, 3),
        scales=scales,
    )
    assert rewritten(padded, conv_resize, 0) == {"Resize": 1, "Conv": 1}


def test_conv_concat() -> None:
    body = f"""u = Resize <{LINEAR}> (a, , scales)
        p = Resize <{LINEAR}> (d, , , sizes)
        c = Concat <axis = 1> (u, b, p, e)
        y = Conv(c, w, bias)"""
    inputs = "(float[2, 64, 4, 4] a, float[2, 8, 8, 8] b, float[2, 64, 1, 1] d, float[2, 8, 8, 8] e)"
    weights: dict[str, Any] = {"w": floats(48, 144, 1, 1), "bias": floats(48)}
    weights |= {"scales": np.array([1, 1, 2, 2], np.float32), "sizes": ints(2, 64, 8, 8)}
    model = graph(f"{inputs} => (float[2, 48, 8, 8] y)", body, **weights)
    assert rewritten(model, conv_concat, 1) == {"Conv": 3, "Resize": 1, "Concat": 1, "Add": 2}


def test_conv_concat_keeps_a_plane_when_every_part_is_one_pixel() -> None:
    body = f"""u = Resize <{LINEAR}> (a, , , sizes)
        p = Resize <{LINEAR}> (d, , , sizes)
        c = Concat <axis = 1> (u, p)
        y = Conv(c, w)"""
    inputs = "(float[2, 64, 1, 1] a, float[2, 64, 1, 1] d)"
    model = graph(f"{inputs} => (float[2, 8, 6, 6] y)", body, w=floats(8, 128, 1, 1), sizes=ints(2, 64, 6, 6))
    assert rewritten(model, conv_concat, 1)["Resize"] >= 1


def test_conv_concat_leaves_alone_what_would_cost_more() -> None:
    body = f"""u = Resize <{LINEAR}> (a, , scales)
        c = Concat <axis = 1> (u, b)
        y = Conv(c, w)"""
    signature = "(float[n, 4, 4, 4] a, float[n, 8, 8, 8] b) => (float[n, 256, 8, 8] y)"
    model = graph(signature, body, w=floats(256, 12, 1, 1), scales=np.array([1, 1, 2, 2], np.float32))
    assert rewritten(model, conv_concat, 0)["Concat"] == 1


def test_compose_concat() -> None:
    body = """p = Conv(a, v, vb)
        c = Concat <axis = 1> (p, b)
        y = Conv(c, w, wb)"""
    signature = "(float[n, 4, 3, 5] a, float[n, 6, 3, 5] b) => (float[n, 8, 3, 5] y)"
    weights: dict[str, Any] = {"v": floats(32, 4, 1, 1), "vb": floats(32), "w": floats(8, 38, 1, 1), "wb": floats(8)}
    assert rewritten(graph(signature, body, **weights), compose_concat, 1) == {"Concat": 1, "Conv": 1}
    narrow: dict[str, Any] = {"v": floats(1, 4, 1, 1), "vb": floats(1), "w": floats(8, 7, 1, 1), "wb": floats(8)}
    assert rewritten(graph(signature, body, **narrow), compose_concat, 0)["Conv"] == 2


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("second", "output", "operators"),
    [
        ("Conv <kernel_shape = [1, 1]>", (6, 7, 9), {"Conv": 1}),
        ("Conv <kernel_shape = [3, 3]>", (6, 5, 7), {"Conv": 1}),
        ("Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", (6, 7, 9), {"Conv": 1, "Add": 1}),
        ("Conv <kernel_shape = [3, 3], pads = [0, 1, 2, 1], strides = [2, 2]>", (6, 4, 5), {"Conv": 1, "Add": 1}),
        ("Conv <kernel_shape = [3, 3], pads = [2, 2, 2, 2], dilations = [2, 2]>", (6, 7, 9), {"Conv": 1, "Add": 1}),
        ("ConvTranspose <kernel_shape = [2, 2], strides = [2, 2]>", (6, 14, 18), {"ConvTranspose": 1, "Add": 1}),
        (
            "ConvTranspose <kernel_shape = [4, 4], strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [0, 1]>",
            (6, 14, 19),
            {"ConvTranspose": 1, "Add": 1},
        ),
    ],
)
def test_compose_conv(second: str, output: tuple[int, ...], operators: dict[str, int], biased: bool) -> None:
    kernel = [int(v) for v in second.split("kernel_shape = [")[1].split("]")[0].split(",")]
    shape = (128, 6, *kernel) if "Transpose" in second else (6, 128, *kernel)
    weights: dict[str, Any] = {"v": floats(128, 4, 1, 1), "w": floats(*shape), "wb": floats(6)}
    weights["vb"] = floats(128) if biased else np.zeros(128, np.float32)
    body = f"m = Conv(x, v, vb)\n y = {second} (m, w, wb)"
    model = graph(f"(float[2, 4, 7, 9] x) => (float[2, {output[0]}, {output[1]}, {output[2]}] y)", body, **weights)
    assert rewritten(model, compose_conv, 1) == (
        operators if biased else {k: v for k, v in operators.items() if k != "Add"}
    )


def test_compose_conv_leaves_alone_a_bottleneck_a_shared_value_and_an_unknown_plane() -> None:
    body = "m = Conv(x, v, vb)\n y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (m, w)"
    bottleneck: dict[str, Any] = {"v": floats(4, 64, 1, 1), "vb": floats(4), "w": floats(64, 4, 3, 3)}
    model = graph("(float[2, 64, 7, 9] x) => (float[2, 64, 7, 9] y)", body, **bottleneck)
    assert rewritten(model, compose_conv, 0) == {"Conv": 2}
    wide: dict[str, Any] = {"v": floats(128, 4, 1, 1), "vb": floats(128), "w": floats(6, 128, 3, 3)}
    model = graph("(float[2, 4, 7, 9] x) => (float[2, 6, 7, 9] y, float[2, 128, 7, 9] m)", body, **wide)
    assert rewritten(model, compose_conv, 0) == {"Conv": 2}
    model = graph("(float[2, 4, n, n] x) => (float[2, 6, n, n] y)", body, **wide)  # its bias map has no size
    assert rewritten(model, compose_conv, 0) == {"Conv": 2}


@pytest.mark.parametrize("swap", ["s = Gather <axis = 1> (x, order)", "s = Slice(x, last, before_first, axis, back)"])
def test_channel_swap(swap: str) -> None:
    body = f"{swap}\n y = Conv(s, w)\n z = Conv <strides = [2, 2]> (s, v)"
    weights: dict[str, Any] = {"w": floats(4, 3, 1, 1), "v": floats(5, 3, 1, 1)}
    if "Gather" in swap:
        weights["order"] = ints(2, 1, 0)
    else:
        weights |= {"last": ints(-1), "before_first": ints(-(2**63)), "axis": ints(1), "back": ints(-1)}
    model = graph("(float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y, float[n, 5, 2, 2] z)", body, **weights)
    assert rewritten(model, channel_swap, 1) == {"Conv": 2}


def test_channel_swap_that_something_else_reads_is_left_alone() -> None:
    body = "s = Gather <axis = 1> (x, order)\n y = Conv(s, w)\n z = Relu(s)"
    signature = "(float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y, float[n, 3, 4, 4] z)"
    model = graph(signature, body, w=floats(4, 3, 1, 1), order=ints(2, 1, 0))
    assert rewritten(model, channel_swap, 0)["Gather"] == 1
    shuffled = graph(signature, body, w=floats(4, 3, 1, 1), order=ints(1, 2, 0))
    assert rewritten(shuffled, channel_swap, 0)["Gather"] == 1


def test_names_of_rewrites_are_those_of_their_files() -> None:
    files = {path.stem for path in Path(rewrites.__file__).parent.glob("*.py")}
    assert {r.name for r in REWRITES} <= files
    assert len({r.name for r in REWRITES}) == len(REWRITES)


def test_a_rewrite_that_leaves_its_pattern_is_an_error() -> None:
    model = ir.serde.deserialize_model(graph("(float[1] x) => (float[1] y)", "y = Relu(x)"))
    lazy = Rewrite(each(lambda node: node, "Relu"), lambda node, match: None)
    with pytest.raises(ExportError, match="test_rewrites comes to no end"):
        lazy.apply(model)
