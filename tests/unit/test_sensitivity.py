"""What INT8 of one module loses: the same as the whole graph with all others in float; and where its milliseconds come from.

Oracle: the partly quantized graph as it is written to a file, run whole; and sums in plain numpy.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from bench_rows import report, row  # noqa: E402
from small_graphs import run, spec, table_for  # noqa: E402
from test_float_modules import IMAGE, network  # noqa: E402

from edgeseg.closing import Closing  # noqa: E402
from edgeseg.errors import SpecError  # noqa: E402
from edgeseg.evaluate.accuracy.dataset import Pair  # noqa: E402
from edgeseg.evaluate.results import ModuleTime, Profile, write_report  # noqa: E402
from edgeseg.mixed.costs import times_from_file  # noqa: E402
from edgeseg.mixed.judge import ImageTally, Judged, Remembered, spread  # noqa: E402
from edgeseg.mixed.sensitivity import NetworkModules, judge_modules, sensitivities  # noqa: E402
from edgeseg.pipeline.plan import plan_build  # noqa: E402
from edgeseg.pipeline.request import BuildRequest  # noqa: E402
from edgeseg.pipeline.sensitivity import run_sensitivity  # noqa: E402
from edgeseg.progress import SilentReporter  # noqa: E402
from edgeseg.quantize.modules import Modules  # noqa: E402
from edgeseg.quantize.qdq import write_qdq  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402
from edgeseg.quantize.suffix import SharedPrefix, SuffixSession, cut, float_values, value_bytes  # noqa: E402
from edgeseg.quantize.table import CalibrationTable  # noqa: E402
from edgeseg.spec import ModelSpec  # noqa: E402
from edgeseg.store.hashing import sha256_file  # noqa: E402
from edgeseg.store.manifest import OnnxGraph  # noqa: E402

RNG = np.random.default_rng(8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))


def masked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with a uint8 mask of the image's size, twice its own, as its output."""
    graph = model.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2, 2], np.float32), "postprocess/scales"))
    graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["index"], "postprocess/ArgMax", axis=1, keepdims=0))
    graph.node.append(onnx.helper.make_node("Cast", ["index"], ["half"], "postprocess/Cast", to=onnx.TensorProto.UINT8))
    graph.node.append(
        onnx.helper.make_node(
            "Resize", ["half", "", "postprocess/scales"], ["mask"], "postprocess/Resize", mode="nearest"
        )
    )
    graph.value_info.append(graph.output[0])
    del graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.UINT8, [1, None, None]))
    return onnx.shape_inference.infer_shapes(model)


def written(folder: Path, seed: int = 0) -> tuple[onnx.ModelProto, OnnxGraph, CalibrationTable]:
    model = network(seed)
    table = table_for(model, image=IMAGE)
    model = masked(model)
    onnx.save(model, str(folder / "f.onnx"))
    return model, OnnxGraph(folder / "f.onnx", sha256_file(folder / "f.onnx"), "fp32", spec(16, 16), "0"), table


@pytest.mark.parametrize("scheme", ["onnxruntime-vnni", "openvino", "tensorrt"])
def test_the_rest_of_a_graph_gives_what_the_whole_gives(scheme: str, tmp_path: Path) -> None:
    model, whole, table = written(tmp_path)
    modules, known = Modules.of(ir.serde.deserialize_model(model).graph), float_values(model)
    images = [RNG.integers(0, 256, IMAGE.shape, dtype=np.uint8) for _ in range(3)]
    sizes = []
    for name in modules.names:
        others = [other for other in modules.names if other != name]
        # FP16 is not what is looked at: the scheme's own fp32 graph.
        graph = write_qdq(whole, table, replace(SCHEMES[scheme], half=False), tmp_path / "q.onnx", others)
        quantized = onnx.load(str(graph.path))
        part = cut(quantized, known)
        onnx.checker.check_model(part)
        sizes.append(len(part.graph.node) / len(quantized.graph.node))
        prefix = SharedPrefix(model, [v.name for v in part.graph.input if v.name in known])
        session = SuffixSession(part, prefix.values)
        for image in images:
            np.testing.assert_array_equal(session.run(image)["mask"], run(quantized, image=image)[0])
            np.testing.assert_array_equal(prefix.run(image)["mask"], run(model, image=image)[0])
        assert prefix.runs == len(images)
    assert min(sizes) < 0.5 < max(sizes), "something has to be left out, and of the first module nothing can be"


def test_modules_are_judged_alone_and_not_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, table = written(tmp_path)
    whole = replace(whole, spec=spec(16, 16))
    network_ = NetworkModules.of(whole)
    assert sum(network_.mac_share.values()) == pytest.approx(1.0)
    scheme = SCHEMES["onnxruntime-vnni"]
    pairs = [Pair(f"{k}", RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8), None) for k in range(6)]
    seen: list[tuple[int, int]] = []
    judged = judge_modules(
        network_, table, scheme, pairs, budget_bytes=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (6 * len(judged), 6 * len(judged))
    for name, one in judged.items():
        graph = write_qdq(
            whole, table, scheme, tmp_path / "q.onnx", [other for other in network_.modules.names if other != name]
        )
        quantized = onnx.load(str(graph.path))
        for pair, image in zip(pairs, one.images, strict=True):
            a, b = run(quantized, image=pair.image[None])[0], run(model, image=pair.image[None])[0]
            assert image.agreement == pytest.approx(float((a == b).mean()))

    def fails(*_: object) -> None:
        raise AssertionError("judged again")

    monkeypatch.setattr("edgeseg.mixed.sensitivity.judge", fails)
    assert judge_modules(network_, table, scheme, pairs, budget_bytes=1) == judged
    with pytest.raises(AssertionError, match="judged again"):
        judge_modules(
            network_, table, scheme, pairs[:5] + [replace(pairs[0], name="7", image=pairs[0].image + 1)], budget_bytes=1
        )


def test_an_end_leaves_all_modules_on_the_same_images(tmp_path: Path) -> None:
    _, whole, table = written(tmp_path)
    network_ = NetworkModules.of(whole)
    pairs = [Pair(f"{k}", RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8), None) for k in range(3)]
    asked = iter(range(1000))
    several = len(network_.modules.names) + 2
    judged = judge_modules(
        network_, table, SCHEMES["openvino"], pairs, budget_bytes=1, is_over=lambda: next(asked) >= several
    )
    assert len(judged) == len(network_.modules.names)
    assert {len(one.images) for one in judged.values()} == {1}
    none = judge_modules(network_, table, SCHEMES["openvino"], pairs, is_over=lambda: True)
    assert none == {}
    assert all(module.agreement is None for module in sensitivities(network_, none, {}))


def test_figures_of_a_judgement() -> None:
    """mIoU of sums over images, and an interval that holds it; classes that never occur are in no mean."""
    rng = np.random.default_rng(1)
    images, counts = [], np.zeros((2, 4, 3))
    for _ in range(12):
        both: list[Any] = []
        for which in range(2):
            columns = rng.integers(1, 100, (3, 3))
            counts[which, :3] += columns
            both.append(tuple((k, *map(int, columns[k])) for k in range(3)))
        images.append(ImageTally(float(rng.random()), *both))
    judged = Judged(4, tuple(images))
    iou = counts[:, :3, 0] / counts[:, :3].sum(-1)
    drop = judged.miou_drop()
    assert drop is not None and drop.low is not None and drop.high is not None
    assert drop.value == pytest.approx(iou[0].mean() - iou[1].mean())
    assert drop.low < drop.value < drop.high
    assert judged.class_drops()[:3] == pytest.approx(tuple(iou[0] - iou[1]))
    assert judged.class_drops()[3] is None
    assert judged.agreement().value == pytest.approx(np.mean([image.agreement for image in images]))
    few = Judged(4, tuple(images[:3]))
    assert few.agreement().low is None
    assert Judged(4, (ImageTally(0.5),)).miou_drop() is None


def test_milliseconds_come_from_a_bench_of_the_device(tmp_path: Path) -> None:
    def profiled(name: str, precision: str, times: dict[str, float]) -> Any:
        modules = tuple(ModuleTime(module, 1, ms, 0.1) for module, ms in times.items())
        one = row(name, precision=precision)
        return replace(one, profile=Profile("tensorrt IProfiler", 20, sum(times.values()), modules))

    modules = Modules(
        ("encoder.conv1", "decoder.p5"),
        {"encoder.conv1": "encoder.conv1", "encoder.act1": "encoder.conv1", "decoder.p5": "decoder.p5"},
    )
    int8 = profiled("a", "int8", {"encoder.conv1": 1.0, "encoder.act1": 0.5, "decoder.p5": 2.0, "other": 9.0})
    half = profiled("b", "fp16", {"encoder.conv1": 4.0, "decoder.p5": 1.5})
    path = tmp_path / "nano.json"
    floats = profiled("c", "fp32", {"decoder.p5": 99.0})
    write_report(path, report(row("pytorch", is_baseline=True), int8, floats, half))
    model = ModelSpec("fpn", "resnet18", classes=2)
    times = times_from_file(path, model, modules)
    assert times.saved_ms == {"encoder.conv1": 2.5, "decoder.p5": -0.5}
    assert times.estimate_ms(()) == 3.5
    assert times.estimate_ms(["encoder.conv1"]) == 6.0
    assert "nano.json" in times.source
    with pytest.raises(SpecError, match="no profile of an int8 and an fp16 or fp32 engine of this unet"):
        times_from_file(path, ModelSpec("unet", "resnet18", classes=2), modules)
    os.remove(path)
    write_report(path, report(int8))
    with pytest.raises(SpecError, match="an fp16 or fp32 engine"):
        times_from_file(path, model, modules)


@pytest.mark.parametrize("verb", ["build", "sensitivity"])
def test_a_bench_of_another_model_is_refused_before_the_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path / "other.json", report(row("other")))
    request = BuildRequest(
        arch="fpn", encoder="resnet18", weights="random", precision="fp32", latency_from=tmp_path / "other.json"
    )
    for module in ("plan", "sensitivity"):
        monkeypatch.setattr(f"edgeseg.pipeline.{module}.calibration_and_held_out", lambda *_: pytest.fail("it began"))
    with pytest.raises(SpecError, match="holds no profile of an int8 and an fp16 or fp32 engine of this fpn"):
        if verb == "build":
            plan_build(request, None, SilentReporter())
        else:
            run_sensitivity(request, SilentReporter(), 4)


def test_a_session_that_remembers_runs_each_batch_once(tmp_path: Path) -> None:
    class Counted(Closing):
        runs = 0

        def run(self, images: Any) -> dict[str, Any]:
            self.runs += 1
            return {"mask": images[..., 0], "confidence": images[..., 1].astype(np.float32)}

        def close(self) -> None:
            raise AssertionError("it is the caller's")

    session = Counted()
    batches = [RNG.integers(0, 256, (1, 4, 5, 3), dtype=np.uint8) for _ in range(2)]
    with Remembered(session, tmp_path / "kept") as first:
        for batch in (*batches, *batches):
            outputs = first.run(batch)
            np.testing.assert_array_equal(outputs["mask"], batch[..., 0])
            assert outputs["confidence"].dtype == np.float32
        one = first.digest()
    second = Remembered(session, tmp_path / "kept")
    second.run(batches[1])
    assert session.runs == 2 and second.digest() == one
    # The same bytes in another shape are another batch, and change what the results are known by.
    second.run(batches[0].reshape(1, 5, 4, 3))
    assert session.runs == 3 and second.digest() != one


def test_memory_of_values_is_counted_for_one_image() -> None:
    def value(*dims: int | str | None) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, list(dims))

    assert value_bytes(value(1, 8, 16, 16)) == value_bytes(value("batch", 8, 16, 16)) == 8 * 16 * 16 * 4
    assert value_bytes(value(1, 8, "height", None)) is None
    assert value_bytes(onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, None)) is None


def test_images_are_taken_evenly() -> None:
    pairs = [Pair(str(k), np.zeros((1, 1, 3), np.uint8), None) for k in range(10)]
    assert [pair.name for pair in spread(pairs, 4)] == ["0", "2", "5", "7"]
    assert spread(pairs, 10) == spread(pairs, 99) == pairs
