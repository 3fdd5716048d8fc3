"""The bench on real engines: ONNX Runtime, OpenVINO, and a PyTorch model as the baseline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_folders import write_manifest
from numpy.typing import NDArray
from PIL import Image

import edgeseg
from edgeseg.backends import get_backend
from edgeseg.errors import BuildError
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest, evaluate
from edgeseg.evaluate.bench import BenchRequest, run_bench
from edgeseg.evaluate.contenders import Contender, Opener, baseline_contenders, engine_contenders
from edgeseg.evaluate.latency.fresh import measure_fresh
from edgeseg.evaluate.latency.profile import profile_engine
from edgeseg.evaluate.results import read_report, write_report
from edgeseg.progress import SilentReporter
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.engine import open_engine
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import MANIFEST_NAME, OnnxGraph

pytestmark = pytest.mark.integration
SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(64, 64))


def brightness_engine(folder: Path, target: str) -> Path:
    """An engine folder whose class at each pixel is the quarter of the range its brightness falls in."""
    pytest.importorskip(target)
    folder.mkdir()
    body = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (uint8[1, 64, 64, 3] image) => (uint8[1, 64, 64] mask)
        <float scale = {0.015625}, int64[1] last = {3}> {
            pixels = Cast <to = 1> (image)
            grey = ReduceMean <keepdims = 0> (pixels, last)
            bands = Mul (grey, scale)
            mask = Cast <to = 2> (bands)
        }"""
    model = onnx.parser.parse_model(body)
    modules = ("preprocess", "encoder.layer1.0", "decoder.p4", "segmentation_head.0")
    for node, module in zip(model.graph.node, modules, strict=True):
        node.name = f"{module}/{node.op_type}"
    onnx.save(model, folder / "model.onnx")
    graph = OnnxGraph(folder / "model.onnx", sha256_file(folder / "model.onnx"), "fp32", SPEC, "w")
    built = get_backend(target).build(graph, folder, {})
    write_manifest(folder, SPEC, target=target, built=built, weights="none", inputs_sha256={"weights": "w"})
    return folder


def photos(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        mask = rng.integers(0, 4, (16, 16)).repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
        grey = (32 + 64 * mask).astype(np.uint8)
        mask[0, :8] = (mask[0, :8] + 1) % 4  # eight pixels of which the truth says otherwise
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brightness_engine(tmp_path_factory.mktemp("engines") / "grey", "onnxruntime")


def test_an_engine_is_measured_from_cold_start_to_profile(engine: Path, tmp_path: Path) -> None:
    request = BenchRequest((engine,), duration_s=0.2, threads=(2, 1), fresh_processes=1, profile=True)
    report = run_bench(request, SilentReporter())
    write_report(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == report
    first, second = report.rows
    assert (first.id, second.id) == ("grey b1 t2 s1", "grey b1 t1 s1")
    for row in report.rows:
        assert row.latency is not None and row.cold_start is not None and row.memory is not None
        assert row.latency.end_to_end.count >= 10
        assert row.latency.warmup_stable is not None
        assert row.cold_start.load_ms > 0
        assert row.memory.peak_rss_bytes is not None and row.memory.base_rss_bytes is not None
        assert row.memory.peak_rss_bytes > row.memory.base_rss_bytes > 10e6
        assert row.profile is not None
        assert row.profile.source == "onnxruntime profiler"
        assert sum(m.share for m in row.profile.modules) == pytest.approx(1.0)
        assert {m.module for m in row.profile.modules} <= {
            "preprocess",
            "encoder.layer1",
            "decoder.p4",
            "segmentation_head",
        }
    assert report.environment.versions["onnxruntime"]


def test_openvino_tells_its_layers(tmp_path: Path) -> None:
    folder = brightness_engine(tmp_path / "grey", "openvino")
    profile = profile_engine(open_engine(folder), runs=2)
    assert profile.source == "openvino profiling_info"
    assert profile.total_ms > 0
    assert any(m.module != "other" for m in profile.modules)


def test_several_processes_say_the_same(engine: Path, tmp_path: Path) -> None:
    data = photos(tmp_path / "data", 6)
    contenders, _ = engine_contenders([engine])
    results = [
        evaluate(
            AccuracyRequest(data, state_folder=tmp_path / str(jobs), jobs=jobs), contenders, Opener(), SilentReporter()
        )
        for jobs in (1, 2)
    ]
    assert results[0] == results[1]
    truth = results[0]["grey"].truth
    assert truth is not None
    assert truth.pixel_accuracy == pytest.approx(1 - 8 / 64**2)


def test_a_fresh_process_that_fails_says_why(engine: Path) -> None:
    gone = Contender("gone", SPEC, folder=str(engine / "gone"))
    with pytest.raises(BuildError, match=r"gone failed in a fresh process.*not an engine folder"):
        measure_fresh(gone, 1)


def test_an_engine_beside_the_model_it_came_from(tmp_path: Path) -> None:
    """The demo fpn in fp32: PyTorch is loaded from what the manifest says, timed in turns, and agrees."""
    pytest.importorskip("torch")
    built = edgeseg.build(arch="fpn", precision="fp32", target="onnxruntime", size=(64, 64), output=tmp_path / "fpn")
    rng = np.random.default_rng(0)
    images: list[NDArray[Any]] = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    (tmp_path / "data").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "data" / f"{index}.png")
    request = BenchRequest((built.folder,), duration_s=0.3, fresh_processes=0)
    accuracy = AccuracyRequest(tmp_path / "data", state_folder=tmp_path / "state")
    report = run_bench(request, SilentReporter(), accuracy)
    assert [row.engine.name for row in report.rows] == ["pytorch", "fpn"]
    baseline, engine = report.rows
    assert baseline.engine.is_baseline
    assert baseline.engine.weights_sha256 == engine.engine.weights_sha256
    (comparison,) = report.comparisons
    assert (comparison.baseline, comparison.row) == ("pytorch b1 t- s1", "fpn b1 t- s1")
    assert comparison.low <= comparison.ratio <= comparison.high
    assert engine.accuracy is not None and engine.accuracy.agreement is not None
    assert engine.accuracy.agreement.overall.value > 0.999
    assert engine.accuracy.truth is None
    # Another model's weights are not taken for this engine's.
    manifest = replace(built.manifest, inputs_sha256={**built.manifest.inputs_sha256, "weights": "0" * 64})
    write_json(built.folder / MANIFEST_NAME, manifest)
    notes = run_bench(replace(request, duration_s=0.0), SilentReporter()).notes
    assert any("not what the engine was built from" in note for note in notes)


def test_an_engine_with_an_auxiliary_head_has_its_pytorch_baseline(tmp_path: Path) -> None:
    """Built from a bare state dict with arguments that only the request knows."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch = pytest.importorskip("torch")
    args: dict[str, Any] = {
        "aux_params": {"classes": 2},
        "decoder_segmentation_channels": 32,
        "decoder_pyramid_channels": 64,
    }
    torch.manual_seed(0)
    network = smp.FPN("resnet18", encoder_weights=None, classes=3, **args)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    folder = tmp_path / "kept"
    edgeseg.build(
        "fpn", encoder="resnet18", weights=tmp_path / "model.pt", model_args=args, keep_aux=True, size=(64, 64),
        precision="fp32", target="onnxruntime", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), output=folder,
    )  # fmt: skip
    report = run_bench(BenchRequest((folder,), duration_s=0.05, fresh_processes=0), SilentReporter())
    assert not [note for note in report.notes if "baseline" in note]
    assert [(c.baseline, c.row) for c in report.comparisons] == [("pytorch b1 t- s1", "kept b1 t- s1")]
    # The baseline's masks are those of the network itself, normalized as was asked.
    (kept,), _ = engine_contenders([folder])
    image = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    baseline = next(c for c in report.rows if c.engine.is_baseline).engine
    assert baseline.weights_sha256 == kept.weights_sha256
    pixels = (torch.from_numpy(image).float() / 255 - torch.tensor([0.5, 0.4, 0.3])) / 0.2
    with torch.no_grad():
        logits, labels = network.eval()(pixels.permute(0, 3, 1, 2))
    opener = Opener()
    (first,), _ = baseline_contenders([kept], ("pytorch",), None, opener)
    with opener.open(first) as session:
        assert np.array_equal(session.run(image)["mask"], logits.argmax(1).numpy())
    assert labels.shape == (1, 2)
