"""The rewrites for sizes known at run time only, on the smallest graphs that have their patterns and the nearest that do not.

Oracle: ONNX Runtime without optimizations, on the graph before and after, at two sizes.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import rewriting  # noqa: E402
from rewriting import ints, operators  # noqa: E402
from small_graphs import floats, graph  # noqa: E402

from edgeseg.convert.rewrites import (  # noqa: E402
    attention_scale,
    class_token,
    linear_conv,
    reshape_twice,
    shape_spans,
    token_slices,
    tokens,
)


def rewritten(model: onnx.ModelProto, module: ModuleType, times: int, *shapes: tuple[int, ...]) -> Counter[str]:
    """Apply one rewrite, check it for inputs ``x`` of these shapes; returns the operators left."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)  # as the exporter's are
    return operators(rewriting.rewritten(model, module, times, *({"x": floats(*s)} for s in shapes), within=1e-5))


def sliced(shape: str, start: int, end: int, axis: int = 1, step: int = 1) -> onnx.ModelProto:
    return graph(
        f"(float[{shape}] x) => (float[a, b, c] y)",
        "y = Slice(x, start, end, axis, step)",
        start=ints(start),
        end=ints(end),
        axis=ints(axis),
        step=ints(step),
    )


@pytest.mark.parametrize("shape", ["1, n, 4", "n, 5, 4"])
def test_token_slices(shape: str) -> None:
    sizes = (1, 5, 4), ((1, 7, 4) if shape.startswith("1") else (3, 5, 4))
    assert rewritten(sliced(shape, 0, 1), token_slices, 1, *sizes) == {"Gather": 1}
    for end in (2**31 - 1, 2**63 - 1):
        assert rewritten(sliced(shape, 1, end), token_slices, 1, *sizes) == {"Pad": 1}


def test_other_slices_are_left_alone() -> None:
    whole = 2**63 - 1
    assert rewritten(sliced("2, 5, 4", 0, 1), token_slices, 0) == {"Slice": 1}  # all sizes are known
    for start, end, step in ((0, 2, 1), (2, whole, 1), (1, 4, 1), (1, whole, 2), (-1, whole, 1), (0, -1, 1)):
        assert rewritten(sliced("1, n, 4", start, end, step=step), token_slices, 0) == {"Slice": 1}


TOKEN = """batch = Shape <start = 0, end = 1> (x)
    shape = Concat <axis = 0> (batch, rest)
    token = Expand(class, shape)
    all = Concat <axis = 1> (token, x)
    y = Add(all, positions)"""


def test_class_token() -> None:
    weights = {"class": floats(1, 1, 4), "positions": floats(1, 6, 4), "rest": ints(1, 4)}
    model = graph("(float[n, 5, 4] x) => (float[a, b, c] y)", TOKEN, **weights)
    assert rewritten(model, class_token, 1, (1, 5, 4), (3, 5, 4)) == {"Pad": 1, "Add": 1}


def test_a_class_token_that_varies_or_stands_last_is_left_alone() -> None:
    weights: dict[str, Any] = {"class": floats(1, 1, 4), "positions": floats(1, 6, 4), "rest": ints(1, 4)}
    last = TOKEN.replace("(token, x)", "(x, token)")
    assert rewritten(graph("(float[n, 5, 4] x) => (float[a, b, c] y)", last, **weights), class_token, 0)["Expand"] == 1
    one = {**weights, "positions": floats(1, 1, 4)}  # the same for every token: no first row to add the token to
    assert rewritten(graph("(float[n, 5, 4] x) => (float[a, b, c] y)", TOKEN, **one), class_token, 0)["Expand"] == 1


def test_reshape_twice() -> None:
    body = "a = Reshape(x, first)\n y = Reshape(a, second)"
    signature = "(float[1, n, 12] x) => (float[a, b, c, d] y)"
    model = graph(signature, body, first=ints(-1, 12), second=ints(1, -1, 3, 4))
    assert rewritten(model, reshape_twice, 1, (1, 5, 12), (1, 2, 12)) == {"Reshape": 1}
    copying = graph(signature, body, first=ints(-1, 12), second=ints(0, 3, 2, 2))
    assert rewritten(copying, reshape_twice, 0, (1, 5, 12)) == {"Reshape": 2}
    read = graph(
        "(float[1, n, 12] x) => (float[a, b, c, d] y, float[e, f] a)",
        body,
        first=ints(-1, 12),
        second=ints(1, -1, 3, 4),
    )
    assert rewritten(read, reshape_twice, 0, (1, 5, 12)) == {"Reshape": 2}


def resized(first: str = "<start = 2, end = 3> (z)", second: str = "<start = 3, end = 4> (z)") -> onnx.ModelProto:
    body = f"""z = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
        height = Shape {first}
        width = Shape {second}
        size = Concat <axis = 0> (lead, height, width)
        y = Resize <mode = "nearest"> (x, , , size)"""
    return graph("(float[1, 3, h, w] x) => (float[a, b, c, d] y)", body, lead=ints(1, 3))


def test_shape_spans() -> None:
    assert rewritten(resized(), shape_spans, 1, (1, 3, 8, 6), (1, 3, 4, 4))["Shape"] == 1
    assert rewritten(resized(second="<start = 3, end = 4> (x)"), shape_spans, 0, (1, 3, 8, 6))["Shape"] == 2
    alone = resized()
    alone.graph.node.append(onnx.helper.make_node("Identity", ["height"], ["rows"], "rows/Identity"))
    alone.graph.output.append(onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, [1]))
    assert rewritten(alone, shape_spans, 0, (1, 3, 8, 6))["Shape"] == 2
    swapped = resized("<start = 3, end = 4> (z)", "<start = 2, end = 3> (z)")
    assert rewritten(swapped, shape_spans, 0, (1, 3, 8, 6))["Shape"] == 2


def flattened(plane: str, height: str = "Shape <start = 2, end = 3> (p)") -> onnx.ModelProto:
    """A linear layer on the pixels of r, brought to the height and width of ``plane``, which may call itself p."""
    body = f"""c = Conv <pads = [1, 1, 1, 1]> (x, k)
        s = Add(c, x)
        r = Relu(s)
        p = {plane}
        f = Reshape(r, flat)
        t = Transpose <perm = [0, 2, 1]> (f)
        m = MatMul(t, w)
        u = Transpose <perm = [0, 2, 1]> (m)
        height = {height}
        width = Shape <start = 3, end = 4> (p)
        shape = Concat <axis = 0> (one, outputs, height, width)
        y = Reshape(u, shape)"""
    for name in ("c", "r"):
        if plane == name:
            body = body.replace("p = " + name, "").replace("(p)", f"({name})")
    weights = {"k": floats(4, 4, 3, 3), "w": floats(4, 6), "flat": ints(1, 4, -1), "one": ints(1), "outputs": ints(6)}
    return graph("(float[1, 4, h, v] x) => (float[a, b, d, e] y)", body, **weights)


@pytest.mark.parametrize("plane", ["r", "c", "Sigmoid(r)"], ids=["the source", "before it", "after it"])
def test_linear_conv_of_a_dynamic_plane(plane: str) -> None:
    assert rewritten(flattened(plane), linear_conv, 1, (1, 4, 3, 5), (1, 4, 6, 2))["Conv"] == 2


def test_linear_conv_of_another_plane_is_left_alone() -> None:
    turned = flattened("Transpose <perm = [0, 1, 3, 2]> (r)")
    assert rewritten(turned, linear_conv, 0, (1, 4, 3, 5))["MatMul"] == 1
    square = flattened("r", "Shape <start = 3, end = 4> (p)")
    assert rewritten(square, linear_conv, 0, (1, 4, 4, 4))["MatMul"] == 1


def test_tokens_of_one_image_and_unknown_number() -> None:
    body = """m = MatMul(x, w)
        g = Gelu(m)
        k = MatMul(g, v)
        y = Add(x, k)"""
    weights = {"w": floats(8, 6), "v": floats(6, 8)}
    one = graph("(float[1, n, 8] x) => (float[a, b, c] y)", body, **weights)
    assert rewritten(one, tokens, 2, (1, 5, 8), (1, 3, 8))["Reshape"] == 2
    several = graph("(float[2, n, 8] x) => (float[a, b, c] y)", body, **weights)
    assert rewritten(several, tokens, 0, (2, 5, 8))["Reshape"] == 0


GATHERED = """h = MatMul(x, w)
    b = Add(h, bias)
    r = Reshape(b, heads)
    t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
    q = Gather <axis = 0> (t, zero)
    k = Gather <axis = 0> (t, one)
    y = Mul(q, scale)"""


def attention(body: str = GATHERED, outputs: str = "") -> onnx.ModelProto:
    weights: dict[str, Any] = {"w": floats(8, 24), "bias": floats(24), "heads": ints(1, -1, 2, 3, 4)}
    weights |= {"scale": np.float32(0.37), "zero": np.int32(0), "one": np.int32(1)}
    return graph(f"(float[1, n, 8] x) => (float[a, b, c, d] y, float[e, f, g, i] k{outputs})", body, **weights)


def test_attention_scale_of_a_gathered_part() -> None:
    assert rewritten(attention(), attention_scale, 1, (1, 5, 8), (1, 2, 8))["Mul"] == 0


def test_attention_scale_of_a_part_read_otherwise_is_left_alone() -> None:
    twice = GATHERED.replace("(t, one)", "(t, zero)")
    assert rewritten(attention(twice), attention_scale, 0, (1, 5, 8))["Mul"] == 1
    whole = attention(outputs=", float[j, l, m, o, p] t")
    assert rewritten(whole, attention_scale, 0, (1, 5, 8))["Mul"] == 1
    # the gathered axis are the heads, which no columns next to each other belong to
    heads = GATHERED.replace("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]")
    assert rewritten(attention(heads), attention_scale, 0, (1, 5, 8))["Mul"] == 1
