"""How long a build says it takes: the runs that it counts are those that are made."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from small_graphs import two_layers

from edgeseg.pipeline import estimate
from edgeseg.pipeline.estimate import CalibrationRuns, TimeToGo, time_to_go
from edgeseg.pipeline.request import BuildRequest
from edgeseg.pipeline.stages import few_collections
from edgeseg.quantize.calibration import Observation
from edgeseg.quantize.repair.fidelity import Judge
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(16, 24, stride=8))


@pytest.fixture
def graph(tmp_path: Path) -> OnnxGraph:
    model = two_layers(16, 24, classes=4, kernels=(3, 1))
    for node in model.graph.node:
        node.name = f"encoder/{node.output[0]}"
    onnx.save(model, tmp_path / "small.onnx")
    return OnnxGraph(tmp_path / "small.onnx", sha256_file(tmp_path / "small.onnx"), "fp32", SPEC, "weights")


def images(count: int, size: tuple[int, int] = (16, 24)) -> CalibrationSet:
    rng = np.random.default_rng(3)
    return CalibrationSet.open([rng.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(count)])


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize("equalize", [True, False])
@pytest.mark.parametrize("method", ["auto", "minmax"])
def test_the_runs_of_a_calibration_are_those_that_were_counted(
    graph: OnnxGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, equalize: bool, method: str
) -> None:
    judged, seen = [], []

    def counted(owner: type, name: str, note: Any) -> None:
        usual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *a, **k: (note(self, *a), usual(self, *a, **k))[1])

    counted(Judge, "fidelity", lambda judge, *_: judged.append(judge.images))
    counted(Observation, "add", lambda _, samples, *__: seen.append(len(samples)))
    samples = images(count)
    request = BuildRequest("fpn", calibration_method=method, equalize=equalize)
    runs = CalibrationRuns.of(request, samples, SPEC.input)
    _, table = calibrate_repaired(
        graph, samples, tmp_path / "equalized.onnx" if equalize else None, method=method, judges=("onnxruntime-vnni",)
    )
    assert set(judged) == {runs.judging}
    assert runs.evaluations <= len(judged) <= runs.evaluations + runs.trials
    if table.equalization or not equalize:
        # Of a repair that was not kept the activations are counted again.
        assert sum(seen) == runs.observed


def test_windows_and_batches_are_counted() -> None:
    request = BuildRequest("fpn", equalize=False)
    tiled = InputSpec(16, 24, stride=8, fit="tile")
    windows = len(next(images(8, (40, 60)).named_windows(tiled))[1])
    assert windows > 1
    assert CalibrationRuns.of(request, images(8, (40, 60)), tiled).observed == 8 * windows
    pairs = InputSpec(16, 24, stride=8, batch=BatchRange(2, 2, 2))
    assert CalibrationRuns.of(request, images(8), pairs).observed == 4


def plan(samples: Any, held_out: int, *targets: str) -> Any:
    return SimpleNamespace(samples=samples, held_out=SimpleNamespace(pairs=range(held_out)), targets=targets)


def test_more_work_takes_longer_and_is_named(graph: OnnxGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "seconds_of_a_run", lambda graph: 0.05)
    request, samples = BuildRequest("fpn"), images(40)

    def asked(plan: Any, request: BuildRequest = request, *, calibrates: bool = True) -> TimeToGo:
        return time_to_go(request, plan, graph, 100, 1, calibrates=calibrates)

    usual = asked(plan(samples, 10, "onnxruntime"))
    assert usual.work == ("calibration on 40 images", "verification on 10 images")
    assert 0 < usual.low_s < usual.high_s
    # PyTorch and the engine, each once.
    more = asked(plan(samples, 110, "onnxruntime"))
    assert 100 * 2 * 0.05 < more.low_s - usual.low_s < 100 * 5 * 0.05
    kept = asked(plan(samples, 10, "onnxruntime"), calibrates=False)
    assert kept.work == ("verification on 10 images",)
    assert kept.low_s == kept.high_s < usual.low_s
    both = asked(plan(samples, 10, "onnxruntime", "openvino"))
    assert "onnxruntime and openvino timed in turns" in both.work
    assert both.low_s > usual.low_s
    goal = asked(plan(samples, 10, "onnxruntime"), BuildRequest("fpn", max_drop=0.01))
    assert goal.work[-1] == "a search not counted, should INT8 miss the goal"


@pytest.mark.parametrize(
    ("low_s", "high_s", "words"),
    [
        (11.0, 12.0, "about 10 s to go: a, b"),
        (12.6, 29.0, "about 15 to 30 s to go: a, b"),
        (0.4, 12.0, "about 5 to 10 s to go: a, b"),
        (115.0, 178.0, "about 115 to 180 s to go: a, b"),
        (100.0, 200.0, "about 2 to 3 minutes to go: a, b"),
        (3000.0, 3010.0, "about 50 minutes to go: a, b"),
    ],
)
def test_an_estimate_in_words(low_s: float, high_s: float, words: str) -> None:
    assert TimeToGo(low_s, high_s, ("a", "b")).words == words


def test_python_looks_for_garbage_as_before_after_a_build() -> None:
    before = gc.get_threshold()
    with contextlib.suppress(KeyError), few_collections():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before
