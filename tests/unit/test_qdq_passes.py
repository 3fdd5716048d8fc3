"""Each graph pass keeps the graph's float results, on the smallest graph that has its pattern, any batch included.

Oracle: ONNX Runtime without optimizations, on the graph before and after.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import RNG, floats, graph, run  # noqa: E402

from edgeseg.quantize.observed import Observed  # noqa: E402
from edgeseg.quantize.passes import PASSES  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402

LINEAR = 'mode = "linear", coordinate_transformation_mode = "align_corners"'


def passed(
    model: onnx.ModelProto, names: str, times: int, feeds: dict[str, NDArray[Any]], tolerance: float = 1e-4
) -> Counter[str]:
    """Run passes, check that the last applied ``times`` and that no output changed; return the operators left."""
    after, observed = ir.serde.deserialize_model(model), Observed()
    for name in names.split():
        count = PASSES[name](after, observed)
    assert count == times
    proto = ir.serde.serialize_model(after)
    onnx.checker.check_model(proto, full_check=True)
    for expected, actual in zip(run(model, **feeds), run(proto, **feeds), strict=True):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    return Counter(node.op_type for node in proto.graph.node)


def image(batch: int, height: int, width: int) -> dict[str, NDArray[np.uint8]]:
    return {"image": RNG.integers(0, 256, (batch, height, width, 3), dtype=np.uint8)}


def stem(
    size: tuple[int | str, int, int], kernel: int, stride: int, pads: list[int], *, swap: bool = False, body: str = ""
) -> onnx.ModelProto:
    """uint8 image -> normalization -> convolution, as the exporter writes it. The mean is a whole pixel value."""
    mean, std = np.array([120, 110, 100], np.float32), np.array([50, 60, 70], np.float32)
    order = "flipped = Gather <axis = 1> (normal, order)" if swap else "flipped = Identity(normal)"
    if not swap:
        order = ""
    source = "flipped" if swap else "normal"
    return graph(
        f"(uint8[{size[0]}, {size[1]}, {size[2]}, 3] image) => (float[n, 8, h, w] y)",
        f"""real = Cast <to = 1> (image)
        planes = Transpose <perm = [0, 3, 1, 2]> (real)
        scaled = Mul(planes, gain)
        normal = Add(scaled, shift)
        {order}
        {body or "y"} = Conv <pads = {pads}, strides = [{stride}, {stride}]> ({source}, weight, bias)
        {"y = Relu(" + body + ")" if body else ""}""",
        gain=(1 / std).reshape(1, 3, 1, 1),
        shift=(-mean / std).reshape(1, 3, 1, 1),
        weight=floats(8, 3, kernel, kernel),
        bias=floats(8),
        **({"order": np.array([2, 1, 0])} if swap else {}),
    )


@pytest.mark.parametrize("batch", [1, 2, "n"])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", ["fold_preprocessing", "fold_preprocessing_in_float"])
def test_fold_preprocessing(batch: int | str, swap: bool, name: str) -> None:
    model = stem((batch, 10, 12), 3, 2, [1, 1, 1, 1], swap=swap)
    count = batch if isinstance(batch, int) else 3
    left = passed(model, name, 1, image(count, 10, 12), 2e-3)
    assert left["Add"] == left["Gather"] == 0
    assert left["Cast"] == (1 if name.endswith("float") else 0)
    assert left["Concat"] >= 2


def test_fold_preprocessing_knows_the_mean_of_the_image() -> None:
    """Bias correction needs it: the mean of the normalized value, brought back through the normalization."""
    model, given = stem((1, 10, 12), 3, 2, [1, 1, 1, 1], swap=True), image(1, 10, 12)["image"]
    normal = (given.reshape(-1, 3).mean(axis=0) - [120, 110, 100]) / [50, 60, 70]
    for name in ("fold_preprocessing", "fold_preprocessing_in_float"):
        after, observed = ir.serde.deserialize_model(model), Observed(channel_means={"flipped": normal[::-1].copy()})
        assert PASSES[name](after, observed) == 1
        (convolution,) = [node for node in after.graph if node.op_type == "Conv"]
        low, high = observed.ranges[convolution.inputs[0].name]
        assert high - low == pytest.approx(1.0)
        expected = given.reshape(-1, 3).mean(axis=0) / 255 + low
        np.testing.assert_allclose(observed.channel_means[convolution.inputs[0].name], expected, rtol=1e-5)


def test_fold_preprocessing_pads_nothing_that_is_not_read() -> None:
    left = passed(stem((1, 16, 16), 4, 4, [0, 0, 0, 0]), "fold_preprocessing", 1, image(1, 16, 16), 2e-3)
    assert left["Concat"] == 0


def test_fold_preprocessing_leaves_alone_a_mean_that_is_no_colour() -> None:
    model = stem((1, 8, 8), 3, 1, [1, 1, 1, 1])
    for tensor in model.graph.initializer:
        if tensor.name == "shift":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((1, 3, 1, 1), 4, np.float32), "shift"))
    assert passed(model, "fold_preprocessing", 0, image(1, 8, 8))["Cast"] == 1


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        ((16, 16), 3, 2, [1, 1, 1, 1]),
        ((16, 24), 3, 2, [0, 0, 1, 1]),
        ((16, 16), 7, 2, [3, 3, 3, 3]),
        ((16, 16), 7, 4, [3, 3, 3, 3]),
        ((16, 32), 16, 16, [0, 0, 0, 0]),
        ((16, 16), 2, 2, [0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("batch", [1, "n"])
@pytest.mark.parametrize("body", ["", "before"])
def test_pixel_groups(
    size: tuple[int, int], kernel: int, stride: int, pads: list[int], batch: int | str, body: str
) -> None:
    model = stem((batch, *size), kernel, stride, pads, body=body)
    count = batch if isinstance(batch, int) else 2
    left = passed(model, "fold_preprocessing pixel_groups", 1, image(count, *size), 2e-3)
    assert left["Reshape"] == 2


def test_pixel_groups_leaves_alone_stride_1_and_odd_rows() -> None:
    assert passed(stem((1, 8, 8), 3, 1, [1] * 4), "fold_preprocessing pixel_groups", 0, image(1, 8, 8), 2e-3)
    assert passed(stem((1, 8, 10), 3, 2, [1] * 4), "fold_preprocessing pixel_groups", 0, image(1, 8, 10), 2e-3)


@pytest.mark.parametrize("batch", ["2", "n"])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "more"), [(4, 2, 1, 0), (2, 2, 0, 0), (3, 2, 1, 1), (4, 4, 0, 0), (6, 2, 2, 0)]
)
@pytest.mark.parametrize("relu", [False, True])
def test_transposed_convolution(batch: str, kernel: int, stride: int, pad: int, more: int, relu: bool) -> None:
    attributes = f"strides = [{stride}, {stride}], pads = {[pad] * 4}, output_padding = [{more}, {more}]"
    model = graph(
        f"(float[{batch}, 3, 4, 5] x) => (float[{batch}, 2, h, w] y)",
        f"{'up' if relu else 'y'} = ConvTranspose <{attributes}> (x, weight, bias) {'y = Relu(up)' if relu else ''}",
        weight=floats(3, 2, kernel, kernel),
        bias=floats(2),
    )
    left = passed(model, "transposed_convolution", 1, {"x": floats(2, 3, 4, 5)})
    assert left["Conv"] == stride**2
    assert left["Relu"] == (stride**2 if relu else 0)
    assert left["ConvTranspose"] == 0


@pytest.mark.parametrize("attributes", ["strides = [2, 2]", "strides = [2, 2], pads = [1, 1, 1, 1], group = 3"])
def test_transposed_convolution_of_another_size_or_of_groups_is_left_alone(attributes: str) -> None:
    outputs = 3 if "group" in attributes else 2
    model = graph(
        f"(float[1, 3, 4, 5] x) => (float[1, {outputs}, h, w] y)",
        f"y = ConvTranspose <{attributes}> (x, weight)",
        weight=floats(3, 1 if "group" in attributes else 2, 4, 4),
    )
    assert passed(model, "transposed_convolution", 0, {"x": floats(1, 3, 4, 5)})["ConvTranspose"] == 1


def test_own_transposed_input() -> None:
    weights = {"w": floats(3, 2, 2, 2), "v": floats(4, 3, 1, 1)}
    body = "r = Relu(x) y = ConvTranspose <strides = [2, 2]> (r, w)"
    shared = graph(
        "(float[n, 3, 4, 5] x) => (float[n, 2, h, w] y, float[n, 4, 4, 5] z)", body + " z = Conv(r, v)", **weights
    )
    assert passed(shared, "own_transposed_input", 1, {"x": floats(2, 3, 4, 5)})["Identity"] == 1
    alone = graph("(float[n, 3, 4, 5] x) => (float[n, 2, h, w] y)", body, w=weights["w"])
    assert passed(alone, "own_transposed_input", 0, {"x": floats(2, 3, 4, 5)})["Identity"] == 0


@pytest.mark.parametrize("batch", ["2", "n"])
@pytest.mark.parametrize("rule", ['"asymmetric", nearest_mode = "floor"', '"half_pixel"'])
@pytest.mark.parametrize("factors", [(2, 2), (1, 3), (4, 1)])
def test_nearest_resize(batch: str, rule: str, factors: tuple[int, int]) -> None:
    model = graph(
        f"(float[{batch}, 3, 4, 5] x) => (float[{batch}, 3, h, w] y)",
        f'y = Resize <mode = "nearest", coordinate_transformation_mode = {rule}> (x, , scales)',
        scales=np.array([1, 1, *factors], np.float32),
    )
    assert passed(model, "nearest_resize", 1, {"x": floats(2, 3, 4, 5)})["Resize"] == 0


def test_nearest_resize_by_a_fraction_or_another_rule_is_left_alone() -> None:
    signature = "(float[1, 3, 4, 4] x) => (float[1, 3, h, w] y)"
    for rule, factor in (("asymmetric", 1.5), ("align_corners", 2.0)):
        model = graph(
            signature,
            f'y = Resize <mode = "nearest", coordinate_transformation_mode = "{rule}", nearest_mode = "floor">'
            " (x, , scales)",
            scales=np.array([1, 1, factor, factor], np.float32),
        )
        assert passed(model, "nearest_resize", 0, {"x": floats(1, 3, 4, 4)})["Resize"] == 1


@pytest.mark.parametrize("batch", ["2", "n"])
def test_depth_to_space_of_one_value_and_of_phases(batch: str) -> None:
    one = graph(
        f"(float[{batch}, 12, 3, 5] x) => (float[{batch}, 3, 6, 10] y)",
        'y = DepthToSpace <blocksize = 2, mode = "DCR"> (x)',
    )
    assert passed(one, "depth_to_space", 1, {"x": floats(2, 12, 3, 5)})["Split"] == 1
    names = [f"p{i}" for i in range(4)]
    phases = graph(
        f"({', '.join(f'float[{batch}, 3, 3, 5] {n}' for n in names)}) => (float[{batch}, 3, 6, 10] y)",
        f"all = Concat <axis = 1> ({', '.join(names)}) y = DepthToSpace <blocksize = 2> (all)",
    )
    left = passed(phases, "depth_to_space", 1, {n: floats(2, 3, 3, 5) for n in names})
    assert left["Split"] == left["DepthToSpace"] == 0
    crd = graph(
        "(float[1, 12, 3, 5] x) => (float[1, 3, 6, 10] y)", 'y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)'
    )
    assert passed(crd, "depth_to_space", 0, {"x": floats(1, 12, 3, 5)})["DepthToSpace"] == 1


def normalization(batch: str, gain: NDArray[np.float32], tail: str = "y = Add(scaled, shift)") -> onnx.ModelProto:
    return graph(
        f"(float[{batch}, 6, 4, 5] x) => (float[{batch}, 6, h, w] y)",
        f"""groups = Reshape(x, grouped)
        normal = InstanceNormalization <epsilon = 0.001> (groups, ones, zeros)
        image = Reshape(normal, full)
        scaled = Mul(image, gain)
        {tail}""",
        grouped=np.array([0, 3, -1]),
        ones=np.ones(3, np.float32),
        zeros=np.zeros(3, np.float32),
        full=np.array([2 if batch == "2" else -1, 6, 4, 5]),
        gain=gain,
        shift=floats(6, 1, 1),
    )


@pytest.mark.parametrize("batch", ["2", "n"])
def test_group_norm(batch: str) -> None:
    left = passed(normalization(batch, floats(1, 6, 1, 1)), "group_norm", 1, {"x": floats(2, 6, 4, 5)})
    assert left == {"Reshape": 2, "InstanceNormalization": 1, "BatchNormalization": 1}


def test_group_norm_with_another_operand_keeps_it() -> None:
    per_pixel = normalization("2", floats(1, 1, 4, 5))
    left = passed(per_pixel, "group_norm", 1, {"x": floats(2, 6, 4, 5)})
    assert left["Mul"] == left["Add"] == 1


@pytest.mark.parametrize("batch", ["2", "n"])
def test_linear_resize(batch: str) -> None:
    model = graph(
        f"(float[{batch}, 3, 4, 5] x) => (float[{batch}, 3, h, w] y)",
        f"y = Resize <{LINEAR}> (x, , scales)",
        scales=np.array([1, 1, 2, 3], np.float32),
    )
    assert passed(model, "linear_resize", 1, {"x": floats(2, 3, 4, 5)}) == {"Transpose": 2, "Resize": 1}
    sizes = graph(
        "(float[2, 3, 4, 5] x) => (float[2, 3, h, w] y)", f"y = Resize <{LINEAR}> (x, , , sizes)", sizes=[2, 3, 7, 9]
    )
    assert passed(sizes, "linear_resize", 1, {"x": floats(2, 3, 4, 5)}) == {"Transpose": 2, "Resize": 1}


@pytest.mark.parametrize("batch", ["2", "n"])
def test_linear_resize_behind_a_normalization(batch: str) -> None:
    tail = f"shifted = Add(scaled, shift) live = Relu(shifted) y = Resize <{LINEAR}> (live, , scales)"
    model = normalization(batch, floats(1, 6, 1, 1), tail)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    model = onnx.shape_inference.infer_shapes(model)
    left = passed(model, "group_norm linear_resize", 1, {"x": floats(2, 6, 4, 5)})
    assert (left["Reshape"], left["Einsum"]) == (2, 1)


def test_pointwise_head() -> None:
    model = graph(
        "(float[n, 6, 4, 5] x) => (float[n, 3, h, w] y)",
        f"a = Conv(x, inner) b = Conv(a, outer, bias) y = Resize <{LINEAR}> (b, , scales)",
        inner=floats(6, 6, 1, 1),
        outer=floats(3, 6, 1, 1),
        bias=floats(3),
        scales=np.array([1, 1, 2, 2], np.float32),
    )
    left = passed(model, "pointwise_head", 1, {"x": floats(2, 6, 4, 5)})
    assert left["Conv"] == left["MatMul"] == left["Sub"] == 1


@pytest.mark.parametrize(("classes", "width"), [(9, 16), (11, 16), (19, 20), (21, 24), (150, 152)])
@pytest.mark.parametrize("bias", ["", ", bias"])
def test_wide_head(classes: int, width: int, bias: str) -> None:
    model = head(classes, bias)
    passed(model, "wide_head", 1, {"x": floats(2, 6, 4, 5)})
    after = ir.serde.deserialize_model(model)
    PASSES["wide_head"](after, Observed())
    (conv,) = (node for node in after.graph if node.op_type == "Conv")
    assert conv.inputs[1] is not None and conv.inputs[1].shape == ir.Shape([width, 6, 3, 3])
    # Where all are rounded to the same integer, or the first class wins, an added one never does.
    same = run(ir.serde.serialize_model(after), x=np.zeros((1, 6, 4, 5), np.float32))[0]
    assert same.max() < classes


@pytest.mark.parametrize("end", [f"z = Resize <{LINEAR}> (y, , scales)", "z = Softmax <axis = 1> (y)", "last"])
def test_wide_head_whose_scores_are_read_is_cut(end: str) -> None:
    left = passed(head(11, ", bias", end, 64), "wide_head", 1, {"x": floats(2, 64, 4, 5)})
    assert left["Slice"] == 1


@pytest.mark.parametrize(
    ("classes", "end"), [(8, ""), (16, ""), (24, ""), (11, "z = Relu(y)"), (11, "last"), (11, "z = Conv(y, more)")]
)
def test_wide_head_that_is_wide_or_read_by_others_or_small_is_left_alone(classes: int, end: str) -> None:
    passed(head(classes, "", end), "wide_head", 0, {"x": floats(2, 6, 4, 5)})


def head(classes: int, bias: str, end: str = "", channels: int = 6) -> onnx.ModelProto:
    last = ", select_last_index = 1" if end == "last" else ""
    other = ", float[n, c, h, w] z" if end.startswith("z") else ""
    return graph(
        f"(float[n, {channels}, 4, 5] x) => (int64[n, h, w] m{other})",
        f"""y = Conv <pads = [1, 1, 1, 1]> (x, weight{bias}) m = ArgMax <axis = 1, keepdims = 0{last}> (y)
        {end if other else ""}""",
        weight=floats(classes, channels, 3, 3),
        **({"bias": floats(classes)} if bias else {}),
        **({"scales": np.array([1, 1, 2, 2], np.float32)} if "Resize" in end else {}),
        **({"more": floats(2, classes, 1, 1)} if "Conv" in end else {}),
    )


def test_every_scheme_names_passes_that_exist() -> None:
    assert {name for scheme in SCHEMES.values() for name in scheme.passes} == set(PASSES)
