"""What keeps INT8's accuracy before a layer gives it up: chosen by what the output loses, and measured as it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from small_graphs import graph as graph_of
from small_graphs import run, two_layers

from edgeseg.quantize.calibration import AUTO, Observation, calibrate, table_key
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.ranges import METHODS, RangeMethod, range_method
from edgeseg.quantize.repair.fidelity import JUDGES, Fidelity, Judge, hold_out, judge_of
from edgeseg.quantize.repair.range_choice import BY_CAUTION, choose_methods, is_gain
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable, load_table
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

CLASSES = 4
SPEC = PipelineSpec(ModelSpec("custom", classes=CLASSES), InputSpec(16, 24, stride=8))


def images(count: int = 24) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 255, (16, 24, 3), dtype=np.uint8) for _ in range(count)]


def network(path: Path, *, outlier: float, between: str = "d = Relu(c)") -> OnnxGraph:
    """Two modules; the first one's activations have a channel that one pixel in a thousand drives ``outlier`` times as far."""
    rng = np.random.default_rng(8)
    w1, w2 = rng.standard_normal((8, 3, 3, 3)) / 40, rng.standard_normal((8, 8, 3, 3)) / 6
    w3 = rng.standard_normal((CLASSES, 8, 1, 1))
    # Only what lies far above 0.99 of the largest input gets through, and nobody downstream listens to it much.
    w1[0], w2[:, 0] = 0.0, 0.0
    w1[0, :, 1, 1] = outlier
    bias = np.zeros(8)
    bias[0] = -outlier * 3 * 0.86
    text = f"""
        planes = Transpose <perm = [0, 3, 1, 2]> (image)
        float = Cast <to = 1> (planes)
        x = Mul(float, scale)
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        b = Relu(a)
        c = Conv <pads = [1, 1, 1, 1]> (b, w2)
        {between}
        logits = Conv(d, w3)
        classes = ArgMax <axis = 1, keepdims = 0> (logits)
        mask = Cast <to = 2> (classes)
    """
    model = graph_of(
        "(uint8[1, 16, 24, 3] image) => (uint8[1, h, w] mask)",
        text,
        scale=np.float32(1 / 255),
        million=np.float32(1e6),
        w1=w1.astype(np.float32),
        b1=bias.astype(np.float32),
        w2=w2.astype(np.float32),
        w3=w3.astype(np.float32),
    )
    for node in model.graph.node:
        module = {"a": "encoder.layer1", "b": "encoder.layer1", "c": "decoder.block", "d": "decoder.block"}
        node.name = f"{module.get(node.output[0], 'segmentation_head')}/{node.output[0]}"
    onnx.save(model, path)
    return OnnxGraph(path, sha256_file(path), "fp32", SPEC, "weights")


@pytest.fixture
def graph(tmp_path: Path) -> OnnxGraph:
    return network(tmp_path / "small.onnx", outlier=40.0)


def tables(graph: OnnxGraph, samples: CalibrationSet) -> dict[str, CalibrationTable]:
    return {method: calibrate(graph, samples, method=method) for method in METHODS}


def sources(graph: OnnxGraph) -> dict[str, str]:
    return Observation(graph, histograms=False).sources


def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = scores.astype(np.float64)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=0)))


def logits(path: Path, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    model = onnx.load(path)
    maker = next(node for node in model.graph.node if node.op_type == "ArgMax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(maker.input[0], onnx.TensorProto.FLOAT, None))
    return np.asarray(run(model, image=image[None])[-1][0])


@pytest.mark.parametrize("scheme", JUDGES)
def test_a_judge_says_what_the_written_graph_loses(graph: OnnxGraph, tmp_path: Path, scheme: str) -> None:
    shown = images(8)
    samples = CalibrationSet.open(shown)
    table = calibrate(graph, samples)
    fidelity = Judge(graph, samples).fidelity(graph, table, scheme)
    written = write_qdq(graph, table, SCHEMES[scheme], tmp_path / "qdq.onnx")
    divergences, agreements = [], []
    for image in shown:
        exact, rounded = (log_softmax(logits(g.path, image)) for g in (graph, written))
        divergences.append((np.exp(exact) * (exact - rounded)).sum(axis=0).mean())
        agreements.append((exact.argmax(axis=0) == rounded.argmax(axis=0)).mean())
    np.testing.assert_allclose(fidelity.divergence, divergences, rtol=1e-2, atol=1e-7)
    assert fidelity.agreement == pytest.approx(np.mean(agreements))
    assert 0 < fidelity.agreement < 1


def test_a_judge_does_not_see_the_classes_that_fill_a_kernels_blocks(tmp_path: Path) -> None:
    model = two_layers(16, 24, classes=11)
    onnx.save(model, tmp_path / "eleven.onnx")
    spec = dataclasses.replace(SPEC, model=ModelSpec("custom", classes=11))
    graph = OnnxGraph(tmp_path / "eleven.onnx", "", "fp32", spec, "weights")
    shown = images(8)
    table = calibrate(graph, CalibrationSet.open(shown))
    written = write_qdq(graph, table, SCHEMES["onnxruntime-vnni"], tmp_path / "qdq.onnx")
    assert any(tensor.dims[:1] == [16] for tensor in onnx.load(written.path).graph.initializer)
    alike = [run(model, image=i[None])[0] == run(onnx.load(written.path), image=i[None])[0] for i in shown]
    fidelity = Judge(graph, CalibrationSet.open(shown)).fidelity(graph, table, "onnxruntime-vnni")
    assert fidelity.agreement == pytest.approx(np.mean(alike), abs=2e-3)
    assert 0.9 < fidelity.agreement < 1


@pytest.mark.parametrize("output", ["mask", "probabilities"])
def test_of_a_binary_network_each_side_of_the_threshold_counts(tmp_path: Path, output: str) -> None:
    rng = np.random.default_rng(2)
    ends = {"mask": "g = Greater(z, zero)\n mask = Cast <to = 2> (g)", "probabilities": "probabilities = Sigmoid(z)"}
    kind = "uint8" if output == "mask" else "float"
    model = graph_of(
        f"(uint8[1, 16, 24, 3] image) => ({kind}[1, 1, h, w] {output})",
        "p = Transpose <perm = [0, 3, 1, 2]> (image)\n f = Cast <to = 1> (p)\n x = Sub(f, mean)\n"
        f"c = Conv(x, w)\n r = Relu(c)\n z = Conv(r, v)\n {ends[output]}",
        mean=np.float32(127),
        zero=np.float32(0),
        w=(rng.standard_normal((6, 3, 3, 3)) / 300).astype(np.float32),
        v=rng.standard_normal((1, 6, 3, 3)).astype(np.float32),
    )
    onnx.save(model, tmp_path / "binary.onnx")
    spec = dataclasses.replace(SPEC, model=ModelSpec("custom", classes=1, task="binary"))
    graph = OnnxGraph(tmp_path / "binary.onnx", "", "fp32", spec, "weights")
    shown = images(8)
    samples = CalibrationSet.open(shown)
    table = calibrate(graph, samples)
    written = write_qdq(graph, table, SCHEMES["tensorrt"], tmp_path / "qdq.onnx")

    def chances(path: Path, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        exposed = onnx.load(path)
        exposed.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
        scores = run(exposed, image=image[None])[-1]
        return np.asarray(1 / (1 + np.exp(-scores.astype(np.float64))))

    pairs = [(chances(graph.path, image), chances(written.path, image)) for image in shown]
    fidelity = Judge(graph, samples).fidelity(graph, table, "tensorrt")
    expected = [(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean() for p, q in pairs]
    np.testing.assert_allclose(fidelity.divergence, expected, rtol=1e-2, atol=1e-7)
    assert fidelity.agreement == pytest.approx(np.mean([((p > 0.5) == (q > 0.5)).mean() for p, q in pairs]))


def divergence(fidelity: dict[str, Fidelity]) -> float:
    return float(np.mean([one.divergence.mean() for one in fidelity.values()]))


def test_the_method_is_the_one_the_output_loses_least_by(graph: OnnxGraph) -> None:
    kept, held = hold_out(CalibrationSet.open(images()))
    assert held is not None
    assert not set(kept.pixels) & set(held.pixels)
    judge, by_method = Judge(graph, held), tables(graph, kept)
    methods, fidelity = choose_methods(graph, by_method, sources(graph), judge, JUDGES)
    mean = {method: divergence(judge.fidelities(graph, table, JUDGES)) for method, table in by_method.items()}
    assert mean["minmax"] > 2 * min(mean.values()), "the outlier does not hurt min-max: the network shows nothing"
    assert divergence(fidelity) < 0.5 * mean["minmax"]
    assert methods["b"] != "minmax"


def test_a_bolder_method_must_beat_a_cautious_one_by_more_than_its_noise() -> None:
    """What was seen of a network: moving averages look best on these images, and ruin one of sixteen others."""
    percentile = np.array([3.46, 10.61, 4.96, 8.33, 2.04, 2.80, 2.40, 4.82])
    moving_average = np.array([3.37, 5.61, 6.26, 6.60, 3.23, 2.66, 2.61, 5.25])
    minmax = np.array([6.14, 26.0, 17.19, 16.09, 5.43, 6.04, 3.62, 10.97])
    assert is_gain(minmax, percentile)
    assert moving_average.mean() < percentile.mean()
    assert not is_gain(percentile, moving_average)
    assert set(BY_CAUTION) == set(METHODS)


def test_where_no_method_is_better_the_default_stays(tmp_path: Path) -> None:
    graph = network(tmp_path / "even.onnx", outlier=1.0)
    kept, held = hold_out(CalibrationSet.open(images()))
    assert held is not None
    same = dict.fromkeys(METHODS, calibrate(graph, kept))
    methods, _ = choose_methods(graph, same, sources(graph), Judge(graph, held), JUDGES)
    assert set(methods.values()) == {"minmax"}


def test_modules_get_methods_of_their_own_where_that_pays(graph: OnnxGraph) -> None:
    """Ranges of one method ruin the encoder, those of another the decoder: only both together are any good."""
    kept, held = hold_out(CalibrationSet.open(images()))
    assert held is not None
    exact = calibrate(graph, kept, method="percentile")

    def ruined(*names: str) -> CalibrationTable:
        ranges = {
            name: dataclasses.replace(limits, low=limits.low * 9, high=limits.high * 9) if name in names else limits
            for name, limits in exact.ranges.items()
        }
        return dataclasses.replace(exact, ranges=ranges)

    offered = dict.fromkeys(METHODS, ruined("b", "d", "x"))
    offered |= {"mse": ruined("b"), "entropy": ruined("d")}
    judge = Judge(graph, held)
    methods, fidelity = choose_methods(graph, offered, sources(graph), judge, JUDGES)
    assert (methods["b"], methods["d"]) == ("entropy", "mse")
    assert divergence(fidelity) < min(divergence(judge.fidelities(graph, table, JUDGES)) for table in offered.values())


@pytest.mark.parametrize("method", [*METHODS, AUTO])
def test_the_ranges_are_those_of_all_images(graph: OnnxGraph, tmp_path: Path, method: str) -> None:
    samples = CalibrationSet.open(images())
    calibrated, table = calibrate_repaired(graph, samples, tmp_path / "equalized.onnx", method=method)
    assert table.method == method
    assert table.key == table_key(calibrated, samples, RangeMethod(AUTO) if method == AUTO else range_method(method))
    alone = tables(calibrated, samples)
    for name, limits in table.ranges.items():
        by = limits.method if method == AUTO else method
        assert by is not None
        assert dataclasses.replace(limits, method=None) == alone[by].ranges[name]
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table


@pytest.mark.parametrize("equalize", [True, False])
def test_each_repair_says_what_it_changed_and_what_it_gained(graph: OnnxGraph, tmp_path: Path, equalize: bool) -> None:
    samples = CalibrationSet.open(images())
    equalized = tmp_path / "equalized.onnx" if equalize else None
    calibrated, table = calibrate_repaired(graph, samples, equalized, method=AUTO)
    names = ["bias-correction", *(["equalization"] if equalize else []), "calibration-method"]
    for scheme in JUDGES:
        repairs = [repair for repair in table.repairs if repair.scheme == scheme]
        assert [repair.name for repair in repairs] == names
        for one, following in pairwise(repairs):
            assert one.agreement_after == following.agreement_before
        kept, held = hold_out(samples)
        assert held is not None
        assert repairs[0].images == len(held)
        seen = Observation(calibrated, histograms=True)
        seen.add(kept)
        chosen = {name: limits.method or "" for name, limits in table.ranges.items()}
        rules = {name: range_method(method) for name, method in chosen.items()}
        before = dataclasses.replace(table, ranges=seen.ranges(rules))
        assert repairs[-1].agreement_after == Judge(graph, held).fidelity(calibrated, before, scheme).agreement
        # Each of the three convolutions reads values whose means are known; one is written as a matrix product in between.
        assert repairs[0].changed["biases"] == (3 if scheme == "tensorrt" else 2)
        assert repairs[-1].changed == dict(Counter(chosen.values()))
    assert (calibrated.path == graph.path) is not equalize


def test_equalization_that_loses_is_not_kept(graph: OnnxGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, seen = CalibrationSet.open(images()), Observation.magnitudes

    def wrong(observation: Observation) -> dict[str, tuple[float, ...]]:
        """A channel of each tensor taken for a thousandth of what it is, and so made far too large."""
        return {name: (values[0] / 1e6, *values[1:]) for name, values in seen(observation).items()}

    monkeypatch.setattr(Observation, "magnitudes", wrong)
    calibrated, table = calibrate_repaired(graph, samples, tmp_path / "equalized.onnx")
    assert calibrated == graph
    assert not (tmp_path / "equalized.onnx").exists()
    assert (table.equalization, {repair.name for repair in table.repairs}) == ({}, {"bias-correction"})
    assert table.ranges == calibrate(graph, samples).ranges


def test_equalization_is_not_kept_where_any_rounding_changes_the_scores(tmp_path: Path) -> None:
    graph = network(tmp_path / "amplifies.onnx", outlier=40.0, between="e = Mul(c, million) d = Sin(e)")
    samples = CalibrationSet.open(images())
    calibrated, table = calibrate_repaired(graph, samples, tmp_path / "equalized.onnx")
    assert calibrated == graph
    assert table.equalization == {}


def test_a_correction_of_biases_that_loses_is_not_kept(graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(weight: NDArray[np.float32], *_: object, groups: int) -> NDArray[np.float32]:
        return np.linspace(-3, 3, weight.shape[0], dtype=np.float32)

    monkeypatch.setattr("edgeseg.quantize.insertion.bias_correction", wrong)
    samples = CalibrationSet.open(images())
    _, table = calibrate_repaired(graph, samples, None, method=AUTO)
    assert {repair.name for repair in table.repairs} == {"calibration-method"}
    assert {limits.channel_mean for limits in table.ranges.values()} == {None}


def test_too_few_images_to_judge_on_leave_the_default(graph: OnnxGraph) -> None:
    samples = CalibrationSet.open(images(9))
    assert hold_out(samples) == (samples, None)
    _, table = calibrate_repaired(graph, samples, None, method=AUTO)
    assert table.method == "minmax"
    assert table.ranges == calibrate(graph, samples).ranges
    assert [repair.images for repair in table.repairs] == [9, 9]


def test_every_scheme_has_a_judge_that_rounds_alike() -> None:
    for scheme in SCHEMES.values():
        judge = SCHEMES[judge_of(scheme)]
        assert judge.name in JUDGES
        assert judge.symmetric == scheme.symmetric
