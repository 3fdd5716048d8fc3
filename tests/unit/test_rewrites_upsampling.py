"""The rewrites around upsampling and sums, on the smallest graphs that have their patterns and the nearest that do not.

Oracle: ONNX Runtime without optimizations, on the graph before and after.
"""

from __future__ import annotations

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from rewriting import operators, rewritten  # noqa: E402
from small_graphs import floats, graph  # noqa: E402

from edgeseg.convert.rewrites import conv_sum, resize_sum, subpixel  # noqa: E402
from edgeseg.graph.macs import count_macs  # noqa: E402

LINEAR = 'mode = "linear", coordinate_transformation_mode = "align_corners"'
NEAREST = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
PAD = "pads = [1, 1, 1, 1]"
TWICE = np.array([1, 1, 2, 2], np.float32)


@pytest.mark.parametrize("batch", ["1", "n"])
@pytest.mark.parametrize("rule", [NEAREST, 'mode = "nearest"'])
@pytest.mark.parametrize("biased", [False, True])
def test_subpixel_of_an_upsampled_value(batch: str, rule: str, biased: bool) -> None:
    model = graph(
        f"(float[{batch}, 4, 5, 6] x) => (float[{batch}, 3, h, w] y)",
        f"u = Resize <{rule}> (x, , twice) y = Conv <{PAD}> (u, w{', b' if biased else ''})",
        twice=TWICE,
        w=floats(3, 4, 3, 3),
        **({"b": floats(3)} if biased else {}),
    )
    after = rewritten(model, subpixel, 1, {"x": floats(1 if batch == "1" else 2, 4, 5, 6)})
    assert operators(after) == {"ConvTranspose": 1}
    old, new = (sum(count_macs(m, {"n": 1}).values()) for m in (model, after))
    assert new * 9 == old * 4


def test_subpixel_looks_through_a_concat() -> None:
    model = graph(
        "(float[n, 4, 5, 6] x, float[n, 2, 10, 12] s) => (float[n, 3, h, w] y)",
        f"u = Resize <{NEAREST}> (x, , twice) c = Concat <axis = 1> (s, u) y = Conv <{PAD}> (c, w, b)",
        twice=TWICE,
        w=floats(3, 6, 3, 3),
        b=floats(3),
    )
    after = rewritten(model, subpixel, 1, {"x": floats(2, 4, 5, 6), "s": floats(2, 2, 10, 12)})
    assert operators(after) == {"ConvTranspose": 1, "Conv": 1, "Add": 1}


@pytest.mark.parametrize("bias", ["", ", lb"])
def test_subpixel_looks_through_a_sum_and_composes_the_lateral_convolution(bias: str) -> None:
    """FPN. The border is where a wrong treatment of the lateral bias shows: it is added inside the padding only."""
    model = graph(
        "(float[n, 16, 5, 6] x, float[n, 2, 10, 12] s) => (float[n, 3, h, w] y)",
        f"u = Resize <{NEAREST}> (x, , twice) l = Conv(s, lw{bias}) t = Add(u, l) y = Conv <{PAD}> (t, w, b)",
        twice=TWICE,
        lw=floats(16, 2, 1, 1),
        w=floats(3, 16, 3, 3),
        b=floats(3),
        **({"lb": floats(16)} if bias else {}),
    )
    after = rewritten(model, subpixel, 1, {"x": floats(2, 16, 5, 6), "s": floats(2, 2, 10, 12)})
    assert operators(after) == {"ConvTranspose": 1, "Conv": 1, "Add": 2 if bias else 1}


def test_subpixel_keeps_what_others_read() -> None:
    model = graph(
        "(float[1, 4, 5, 6] x) => (float[1, 3, h, w] y, float[1, 4, h, w] u)",
        f"u = Resize <{NEAREST}> (x, , twice) y = Conv <{PAD}> (u, w)",
        twice=TWICE,
        w=floats(3, 4, 3, 3),
    )
    assert operators(rewritten(model, subpixel, 1, {"x": floats(1, 4, 5, 6)})) == {"Resize": 1, "ConvTranspose": 1}


@pytest.mark.parametrize(
    ("resize", "conv", "factor"),
    [
        (LINEAR, PAD, 2),
        (NEAREST, PAD, 3),
        (NEAREST.replace("floor", "ceil"), PAD, 2),
        (NEAREST, "pads = [0, 0, 0, 0]", 2),
        (NEAREST, PAD + ", strides = [2, 2]", 2),
        (NEAREST, "pads = [2, 2, 2, 2], dilations = [2, 2]", 2),
        (NEAREST, PAD + ", group = 2", 2),
    ],
)
def test_subpixel_leaves_alone_what_is_no_plain_3x3_over_nearest_2x(resize: str, conv: str, factor: int) -> None:
    model = graph(
        "(float[1, 4, 5, 6] x) => (float[1, 2, h, w] y)",
        f"u = Resize <{resize}> (x, , scales) y = Conv <{conv}> (u, w)",
        scales=np.array([1, 1, factor, factor], np.float32),
        w=floats(2, 2 if "group" in conv else 4, 3, 3),
    )
    assert operators(rewritten(model, subpixel, 0, {"x": floats(1, 4, 5, 6)})) == {"Resize": 1, "Conv": 1}


def test_subpixel_leaves_alone_what_saves_too_little() -> None:
    model = graph(
        "(float[1, 2, 5, 6] x, float[1, 8, 10, 12] s) => (float[1, 3, h, w] y)",
        f"u = Resize <{NEAREST}> (x, , twice) c = Concat <axis = 1> (s, u) y = Conv <{PAD}> (c, w)",
        twice=TWICE,
        w=floats(3, 10, 3, 3),
    )
    feeds = {"x": floats(1, 2, 5, 6), "s": floats(1, 8, 10, 12)}
    assert operators(rewritten(model, subpixel, 0, feeds)) == {"Resize": 1, "Concat": 1, "Conv": 1}


SUM = f"""u = Resize <{LINEAR}> (a, , twice) v = Resize <{LINEAR}> (b, , twice) w = Resize <{LINEAR}> (c, , twice)
    s = Add(u, v) t = Add(s, w) y = Add(t, d)"""
PYRAMID = "(float[2, 3, 4, 5] a, float[2, 3, 4, 5] b, float[2, 3, 4, 5] c, float[2, 3, 8, 10] d)"
LEVELS = {name: floats(2, 3, 4, 5) for name in "abc"} | {"d": floats(2, 3, 8, 10)}


def test_resize_sum_merges_a_pyramid() -> None:
    model = graph(f"{PYRAMID} => (float[2, 3, h, w] y)", SUM, twice=TWICE)
    assert operators(rewritten(model, resize_sum, 1, LEVELS)) == {"Resize": 1, "Add": 3}


def test_resize_sum_keeps_resizes_by_another_rule_and_those_others_read() -> None:
    other = SUM.replace(f"w = Resize <{LINEAR}>", f"w = Resize <{NEAREST}>")
    model = graph(f"{PYRAMID} => (float[2, 3, h, w] y)", other, twice=TWICE)
    assert operators(rewritten(model, resize_sum, 1, LEVELS)) == {"Resize": 2, "Add": 3}
    model = graph(f"{PYRAMID} => (float[2, 3, h, w] y, float[2, 3, h, w] u, float[2, 3, h, w] v)", SUM, twice=TWICE)
    assert operators(rewritten(model, resize_sum, 0, LEVELS)) == {"Resize": 3, "Add": 3}
    model = graph(f"{PYRAMID} => (float[2, 3, h, w] y, float[2, 3, h, w] s)", SUM, twice=TWICE)
    assert operators(rewritten(model, resize_sum, 1, LEVELS)) == {"Resize": 2, "Add": 3}


@pytest.mark.parametrize("swapped", [False, True])
def test_conv_sum(swapped: bool) -> None:
    model = graph(
        "(float[n, 32, 4, 5] a, float[n, 32, 8, 10] b) => (float[n, 3, h, w] y)",
        f"u = Resize <{LINEAR}> (a, , twice) s = Add({'b, u' if swapped else 'u, b'}) y = Conv(s, k, bias)",
        twice=TWICE,
        k=floats(3, 32, 1, 1),
        bias=floats(3),
    )
    after = rewritten(model, conv_sum, 1, {"a": floats(2, 32, 4, 5), "b": floats(2, 32, 8, 10)})
    assert operators(after) == {"Conv": 2, "Resize": 1, "Add": 1}
    (resize,) = [n for n in after.graph.node if n.op_type == "Resize"]
    assert any(resize.input[0] in n.output for n in after.graph.node if n.op_type == "Conv")


def test_conv_sum_leaves_alone_what_would_cost_more_or_is_read_elsewhere() -> None:
    body = f"u = Resize <{LINEAR}> (a, , twice) s = Add(u, b) y = Conv(s, k)"
    feeds = {"a": floats(1, 4, 4, 5), "b": floats(1, 4, 8, 10)}
    widening = graph(
        "(float[1, 4, 4, 5] a, float[1, 4, 8, 10] b) => (float[1, 64, h, w] y)",
        body,
        twice=TWICE,
        k=floats(64, 4, 1, 1),
    )
    assert operators(rewritten(widening, conv_sum, 0, feeds)) == {"Resize": 1, "Add": 1, "Conv": 1}
    shared = graph(
        "(float[1, 4, 4, 5] a, float[1, 4, 8, 10] b) => (float[1, 1, h, w] y, float[1, 4, h, w] s)",
        body,
        twice=TWICE,
        k=floats(1, 4, 1, 1),
    )
    assert operators(rewritten(shared, conv_sum, 0, feeds)) == {"Resize": 1, "Add": 1, "Conv": 1}
