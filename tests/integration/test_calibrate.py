"""Calibration of small hand-made graphs in ONNX Runtime, against plain numpy on all activations of all images."""

from __future__ import annotations

import dataclasses
import math
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from small_graphs import graph as graph_of
from small_graphs import plain_session

from edgeseg.errors import ArtifactError, InputError, QuantizationError, SpecError
from edgeseg.graph.running import GraphSession
from edgeseg.quantize import calibration, ranges
from edgeseg.quantize.activations import find_activations, group_by_size
from edgeseg.quantize.calibration import AUTO, calibrate, method_or_default, sample_stride, table_key
from edgeseg.quantize.ranges import METHODS, RangeMethod
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import check_fresh
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec, Preprocess
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

pytestmark = pytest.mark.integration

Images = list[NDArray[np.uint8]]
INPUT = InputSpec(24, 32, stride=8)


def images(count: int = 9, height: int = 24, width: int = 32) -> Images:
    rng = np.random.default_rng(11)
    return [rng.integers(0, 20 * (k + 2), (height, width, 3), dtype=np.uint8) for k in range(count)]


def save(
    path: Path,
    body: str,
    output: str,
    spec: InputSpec = INPUT,
    shape: Sequence[int | str] | None = None,
    **weights: object,
) -> OnnxGraph:
    """A graph from text; of the weights those that it uses."""
    dims = ", ".join(map(str, shape or (spec.batch.minimum, spec.height, spec.width, spec.channels)))
    used = {name: value for name, value in weights.items() if re.search(rf"\b{name}\b", body)}
    onnx.save(graph_of(f"(uint8[{dims}] image) => ({output})", body, **used), path)
    return OnnxGraph(path, sha256_file(path), "fp32", PipelineSpec(ModelSpec("custom", classes=2), spec), "weights")


def network(
    path: Path, spec: InputSpec = INPUT, shape: Sequence[int | str] | None = None, *, tokens: bool = True
) -> OnnxGraph:
    """Preprocessing, a clipped convolution, a residual add, tokens through a MatMul (static sizes), and an ArgMax."""
    rng = np.random.default_rng(5)
    body = """planes = Transpose <perm = [0, 3, 1, 2]> (image) real = Cast <to = 1> (planes) normal = Sub(real, mean)
        conv1 = Conv <pads = [1, 1, 1, 1]> (normal, w1) relu6 = Clip(conv1, zero, six) conv2 = Conv(relu6, w2)
        sum = Add(conv2, relu6) from_constants = Mul(six, six)"""
    ends = """reshaped = Reshape(sum, flat) tokens = Transpose <perm = [0, 2, 1]> (reshaped) logits = MatMul(tokens, w3)
        mask = ArgMax <axis = 2, keepdims = 0> (logits)"""
    return save(
        path,
        f"{body} {ends if tokens else 'mask = ArgMax <axis = 1, keepdims = 0> (sum)'}",
        "int64[a, b] mask" if tokens else "int64[a, b, c] mask",
        spec,
        shape,
        mean=np.array([80, 90, 100], np.float32).reshape(1, 3, 1, 1),
        w1=(rng.standard_normal((4, 3, 3, 3)) / 50).astype(np.float32),
        w2=rng.standard_normal((4, 4, 1, 1)).astype(np.float32),
        w3=rng.standard_normal((4, 2)).astype(np.float32),
        zero=np.float32(0),
        six=np.float32(6),
        flat=np.array([spec.batch.minimum, 4, -1]),
    )


WATCHED = ("real", "normal", "relu6", "conv2", "sum", "reshaped", "tokens", "logits")


def fetched(graph: OnnxGraph, batches: Images, names: Sequence[str] = WATCHED) -> dict[str, list[NDArray[np.float32]]]:
    """The oracle: every tensor of every image, from a session without optimizations."""
    model = onnx.load(graph.path)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = plain_session(model)
    runs = [session.run(list(names), {"image": batch}) for batch in batches]
    return {name: [run[k] for run in runs] for k, name in enumerate(names)}


@pytest.fixture
def graph(tmp_path: Path) -> OnnxGraph:
    return network(tmp_path / "small.onnx")


def test_table_lists_every_float_activation_but_those_clipped_in_place(graph: OnnxGraph) -> None:
    table = calibrate(graph, CalibrationSet.open(images()), method="minmax")
    assert tuple(table.ranges) == WATCHED


def test_what_is_read_before_its_relu_is_in_the_table(tmp_path: Path) -> None:
    def conv_and_relu(more: str, output: str) -> tuple[str, ...]:
        body = f"real = Cast <to = 1> (image) conv = Conv(real, w) relu = Relu(conv) {more}"
        graph = save(tmp_path / "a.onnx", body, f"float[a, b, c, d] {output}", w=np.ones((2, 24, 1, 1), np.float32))
        return tuple(calibrate(graph, CalibrationSet.open(images())).ranges)

    assert conv_and_relu("", "relu") == ("real", "relu")
    assert conv_and_relu("", "conv") == ("real", "conv", "relu")
    assert conv_and_relu("both = Add(conv, relu)", "both") == ("real", "conv", "relu", "both")
    pooled = "pooled = MaxPool <kernel_shape = [1, 1]> (conv)"
    assert conv_and_relu(pooled, "pooled") == ("real", "conv", "relu", "pooled")


def test_extremes_are_exact(graph: OnnxGraph) -> None:
    table = calibrate(graph, CalibrationSet.open(images()), method="minmax")
    for name, values in fetched(graph, [image[None] for image in images()]).items():
        limits = table.ranges[name]
        assert limits.minimum == pytest.approx(min(float(v.min()) for v in values), rel=1e-5, abs=1e-5), name
        assert limits.maximum == pytest.approx(max(float(v.max()) for v in values), rel=1e-5, abs=1e-5), name
        assert (limits.low, limits.high) == (min(limits.minimum, 0), max(limits.maximum, 0))


def test_percentile_is_that_of_all_values_of_all_images(graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "PERCENTILE", 99.0)
    table = calibrate(graph, CalibrationSet.open(images()), method="percentile")
    for name, values in fetched(graph, [image[None] for image in images()]).items():
        flat = np.concatenate([v.ravel() for v in values]).astype(np.float64)
        # All values are counted here (tensors below the sample size); a bin is at most 1/4096 of the range.
        assert max(v.size for v in values) <= calibration.SAMPLE
        slack = np.ptp(flat) / 2048
        limits = table.ranges[name]
        for got, side, ordered in ((-limits.low, "low", -flat), (limits.high, "high", flat)):
            below, above = (float(np.percentile(ordered, 99.5, method=m)) for m in ("lower", "higher"))
            assert max(below, 0.0) - slack <= got <= max(above, 0.0) + slack, (name, side)


def test_channel_means_are_those_of_all_images(graph: OnnxGraph) -> None:
    table = calibrate(graph, CalibrationSet.open(images()), method="minmax")
    runs = fetched(graph, [image[None] for image in images()])
    expected = {
        "normal": np.mean([v.mean(axis=(0, 2, 3), dtype=np.float64) for v in runs["normal"]], axis=0),
        "relu6": np.mean([v.mean(axis=(0, 2, 3), dtype=np.float64) for v in runs["relu6"]], axis=0),
        "tokens": np.mean([v.mean(axis=(0, 1), dtype=np.float64) for v in runs["tokens"]], axis=0),
    }
    for name, mean in expected.items():
        assert table.ranges[name].channel_mean == pytest.approx(mean.tolist(), rel=1e-4, abs=1e-5)
        assert table.ranges[name].channel_axis == (2 if name == "tokens" else 1)
    others = [limits for name, limits in table.ranges.items() if name not in expected]
    assert others and all((limits.channel_mean, limits.channel_axis) == (None, None) for limits in others)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_rearranged_tensors_share_a_range(graph: OnnxGraph, method: str) -> None:
    ranges = calibrate(graph, CalibrationSet.open(images()), method=method).ranges
    assert len({(ranges[n].low, ranges[n].high, ranges[n].minimum) for n in ("sum", "reshaped", "tokens")}) == 1


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(images()), method=st.sampled_from(["minmax", "percentile", "entropy", "mse"]))
def test_order_of_the_images_does_not_matter(graph: OnnxGraph, order: Images, method: str) -> None:
    first = calibrate(graph, CalibrationSet.open(images()), method=method)
    second = calibrate(graph, CalibrationSet.open(order), method=method)
    assert first.key == second.key
    for name, expected in first.ranges.items():
        limits = second.ranges[name]
        assert (limits.low, limits.high, limits.minimum, limits.maximum) == (
            expected.low,
            expected.high,
            expected.minimum,
            expected.maximum,
        )
        assert limits.channel_mean == (
            None if expected.channel_mean is None else pytest.approx(expected.channel_mean, rel=1e-9, abs=1e-9)
        )


def test_large_tensors_are_sampled_evenly_and_extremes_stay_exact(
    graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PERCENTILE", 98.0)
    whole = calibrate(graph, CalibrationSet.open(images()), method="percentile")
    monkeypatch.setattr(calibration, "SAMPLE", 300)
    calibration.sample_stride.cache_clear()
    sampled = calibrate(graph, CalibrationSet.open(images()), method="percentile")
    calibration.sample_stride.cache_clear()
    assert sampled.key["method"] != whole.key["method"]
    for name, full in whole.ranges.items():
        part = sampled.ranges[name]
        assert (part.minimum, part.maximum) == (full.minimum, full.maximum)
        assert part.channel_mean == full.channel_mean
        width = full.maximum - full.minimum
        assert part.low == pytest.approx(full.low, abs=0.1 * width)
        assert part.high == pytest.approx(full.high, abs=0.1 * width)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=4).map(tuple))
def test_sample_stride_visits_every_row_column_and_channel(shape: tuple[int, ...]) -> None:
    stride = sample_stride(shape)
    size = math.prod(shape)
    assert -(-size // stride) <= calibration.SAMPLE
    assert stride == 1 or all(math.gcd(stride, length) == 1 for length in shape)
    if stride > 1 and size < 5_000_000:
        taken = np.unravel_index(np.arange(0, size, stride), shape)
        for axis, length in enumerate(shape):
            # An axis longer than the sample's steps along it cannot be seen whole.
            if -(-size // stride) >= 4 * length:
                assert np.unique(taken[axis]).size >= 0.9 * length


def test_several_passes_give_the_table_of_one(graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    samples = CalibrationSet.open(images())
    one = calibrate(graph, samples, method="percentile")
    monkeypatch.setattr("edgeseg.quantize.calibration.ACTIVATION_BUDGET_BYTES", 4 * 24 * 32 * 4)
    several = calibrate(graph, samples, method="percentile", progress=lambda a, b: seen.append((a, b)))
    assert several.key == one.key
    assert list(several.ranges) == list(one.ranges)
    for name, limits in several.ranges.items():
        # Each pass runs another graph, which ONNX Runtime may fuse otherwise.
        assert dataclasses.astuple(limits)[:4] == pytest.approx(dataclasses.astuple(one.ranges[name])[:4], rel=1e-4)
    total = seen[-1][1]
    assert total > 2 * len(samples)
    assert seen == [(k + 1, total) for k in range(total)]


def test_groups_keep_within_the_budget(graph: OnnxGraph) -> None:
    activations = find_activations(onnx.load(graph.path), INPUT)
    budget = 4 * 24 * 32 * 8
    groups = group_by_size(activations, budget)
    assert [a.name for group in groups for a in group] == [
        "real",
        "normal",
        "relu6",
        "conv2",
        "sum",
        "tokens",
        "logits",
    ]
    assert all(sum(4 * a.elements for a in group) <= budget for group in groups)
    assert len(groups) > 1


def test_the_activations_of_one_image_are_gone_before_the_next(
    graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[NDArray[np.float32]]] = []
    alive: list[int] = []

    class Watched(GraphSession):
        def run(self, *arguments: Any) -> dict[str, NDArray[Any]]:
            alive.append(sum(array() is not None for array in held))
            outputs = super().run(*arguments)
            held.extend(map(weakref.ref, outputs.values()))
            return outputs

    monkeypatch.setattr(calibration, "GraphSession", Watched)
    calibrate(graph, CalibrationSet.open(images(8)))
    assert alive == [0] * 8 and len(held) > 8


def test_progress_counts_images(graph: OnnxGraph) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(graph, CalibrationSet.open(images()), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, 9) for k in range(9)]


@pytest.mark.parametrize("batch", [BatchRange(4, 4, 4), BatchRange(1, 2, 4), BatchRange(2, 2, 4)])
def test_batches_see_every_image(tmp_path: Path, batch: BatchRange) -> None:
    single = calibrate(network(tmp_path / "one.onnx", tokens=False), CalibrationSet.open(images()), method="minmax")
    spec = dataclasses.replace(INPUT, batch=batch)
    shape = ("N", 24, 32, 3) if batch.is_dynamic else None
    seen: list[int] = []
    batched = calibrate(
        network(tmp_path / "n.onnx", spec, shape, tokens=False),
        CalibrationSet.open(images()),
        method="minmax",
        progress=lambda done, total: seen.append(done),
    )
    assert seen[-1] == 9
    for name, limits in batched.ranges.items():
        assert limits.minimum == pytest.approx(single.ranges[name].minimum, rel=1e-5)
        assert limits.maximum == pytest.approx(single.ranges[name].maximum, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_dynamic_size_takes_images_of_any_size(tmp_path: Path, batch: int) -> None:
    spec = InputSpec(24, 32, batch=BatchRange(batch, batch, batch), stride=8, dynamic_size=True, max_size=(48, 64))
    graph = network(tmp_path / "any.onnx", spec, (batch, "H", "W", 3), tokens=False)
    mixed = images(5) + images(4, 40, 64)
    table = calibrate(graph, CalibrationSet.open(mixed), method="minmax")
    runs = fetched(graph, [np.stack([image] * batch) for image in mixed], ("real", "sum"))
    for name, values in runs.items():
        assert table.ranges[name].maximum == pytest.approx(max(float(v.max()) for v in values), rel=1e-5)


def test_tiles_are_all_seen(tmp_path: Path) -> None:
    graph = network(tmp_path / "tile.onnx", dataclasses.replace(INPUT, fit="tile"), tokens=False)
    large = images(8, 48, 32)
    for image in large:
        image[:24] //= 2
        image[47, 31] = 255
    seen: list[int] = []
    table = calibrate(
        graph, CalibrationSet.open(large), method="minmax", progress=lambda done, total: seen.append(done)
    )
    assert table.ranges["real"].maximum == 255.0
    assert seen[-1] == 8
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("op", "pixel", "word"), [("Log", 7, "NaN"), ("Sqrt", 7, "NaN"), ("Exp", 255, "infinite"), ("Log", 30, "infinite")]
)
def test_first_bad_activation_and_its_image_are_named(tmp_path: Path, op: str, pixel: int, word: str) -> None:
    good = [np.full((24, 32, 3), 40 + k, np.uint8) for k in range(8)]
    worse = good[0].copy()
    worse[3, 5, 1] = pixel
    body = f"real = Cast <to = 1> (image) x = Sub(real, thirty) bad = {op}(x) after = Neg(bad)"
    graph = save(tmp_path / "bad.onnx", body, "float[a, b, c, d] after", thirty=np.float32(30))
    with pytest.raises(QuantizationError, match=rf"'bad' has {word} values on array 6;") as caught:
        calibrate(graph, CalibrationSet.open([*good[:6], worse, *good[6:]]))
    assert "\n" not in str(caught.value)


def test_failure_of_onnxruntime_is_translated(tmp_path: Path) -> None:
    body = """real = Cast <to = 1> (image) whole = Cast <to = 7> (image) number = ReduceMax <keepdims = 0> (whole)
        gathered = Gather <axis = 1> (real, number)"""
    with pytest.raises(QuantizationError, match="ONNX Runtime failed on array 0 of shape") as caught:
        calibrate(save(tmp_path / "gather.onnx", body, "float[a, b, c] gathered"), CalibrationSet.open(images()))
    assert "\n" not in str(caught.value)


def test_graph_without_float_activations_is_refused(tmp_path: Path) -> None:
    graph = save(tmp_path / "copy.onnx", "same = Identity(image)", "uint8[a, b, c, d] same")
    with pytest.raises(QuantizationError, match="no float activation"):
        calibrate(graph, CalibrationSet.open(images()))


def test_unknown_operator_is_named(tmp_path: Path) -> None:
    body = "real = Cast <to = 1> (image) odd = Identity(real) after = Neg(odd)"
    graph = save(tmp_path / "odd.onnx", body, "float[a, b, c, d] after")
    model = onnx.load(graph.path)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Mystery", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, graph.path)
    with pytest.raises(QuantizationError, match=r"com\.example::Mystery"):
        calibrate(graph, CalibrationSet.open(images()))


def test_wrong_requests_are_refused(graph: OnnxGraph, tmp_path: Path) -> None:
    samples = CalibrationSet.open(images())
    with pytest.raises(SpecError, match="calibration method 'kl'"):
        calibrate(graph, samples, method="kl")
    with pytest.raises(QuantizationError, match="is int8; calibration needs the fp32 graph"):
        calibrate(dataclasses.replace(graph, precision="int8"), samples)
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        (tmp_path / "text.onnx").write_text("text")
        calibrate(dataclasses.replace(graph, path=tmp_path / "text.onnx"), samples)
    with pytest.raises(InputError, match="array 0 has 3 channels, the model takes 4"):
        CalibrationSet.open(images(), channels=4)
    with pytest.raises(SpecError, match="calibration method"):
        method_or_default("random")
    assert method_or_default(None) == AUTO


def test_key_names_what_changed(graph: OnnxGraph) -> None:
    samples = CalibrationSet.open(images())
    table = calibrate(graph, samples, method="percentile")
    rule = RangeMethod(table.method, table.options)
    check_fresh(table, table_key(graph, samples, rule))
    check_fresh(table, table_key(graph, None, rule))
    spec = graph.spec
    said_otherwise = dataclasses.replace(spec, preprocess=dataclasses.replace(spec.preprocess, source="other words"))
    check_fresh(table, table_key(dataclasses.replace(graph, spec=said_otherwise), samples, rule))
    other_mean = dataclasses.replace(spec, preprocess=Preprocess(mean=(0.0, 0.0, 0.0)))
    letterbox = dataclasses.replace(spec, input=dataclasses.replace(INPUT, fit="letterbox"))
    stale = {
        "the model weights": table_key(dataclasses.replace(graph, weights_sha256="x"), samples, rule),
        "the fp32 graph": table_key(dataclasses.replace(graph, sha256="x"), samples, rule),
        "the calibration images": table_key(graph, CalibrationSet.open(images(8)), rule),
        "the preprocessing": table_key(dataclasses.replace(graph, spec=other_mean), samples, rule),
        "or input size": table_key(dataclasses.replace(graph, spec=letterbox), samples, rule),
        "the calibration method": table_key(graph, samples, RangeMethod("percentile", {"percentile": 99.0})),
        "method or its options": table_key(graph, samples, RangeMethod("mse")),
    }
    for words, key in stale.items():
        with pytest.raises(ArtifactError, match=f"stale: [^,]*{words}"):
            check_fresh(table, key)
