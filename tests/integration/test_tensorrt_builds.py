"""``--target tensorrt`` and ``tensorrt-rtx`` from the outside, on a machine without a GPU. Engines are built, not run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import typed
from PIL import Image
from recorded_tensorrt.graphs import SIDE, small_model
from small_graphs import plain_session

from edgeseg.backends import get_backend
from edgeseg.backends.base import BuildContext
from edgeseg.demo import sample_folder
from edgeseg.errors import BuildError, SpecError
from edgeseg.evaluate.accuracy.counts import AccuracyMeter
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.engine import open_engine
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        get_backend("tensorrt").status().available, reason="there is a GPU here: engines would be built for it"
    ),
]


@pytest.fixture(scope="module")
def demo_build(small_demo: Path) -> tuple[str | Path, ...]:
    return "build", "--arch", "fpn", "--precision", "int8", "--target", "tensorrt", "--validation", small_demo / "val"


@pytest.fixture(scope="module")
def portable(demo_build: tuple[str | Path, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo model built for TensorRT where there is none, and what the command printed."""
    folder = tmp_path_factory.mktemp("engines") / "fpn"
    done = typed(*demo_build, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_build_for_a_device_stops_at_the_portable_graph(portable: tuple[Path, str]) -> None:
    folder, printed = portable
    manifest = open_engine(folder).manifest
    assert manifest.engine is None and manifest.target == "tensorrt" and manifest.scheme == "tensorrt"
    assert "typed: " in printed and "executed: " not in printed
    assert printed.rstrip().endswith(f"on the device: edgeseg compile {folder} --target tensorrt")
    assert sorted(p.name for p in folder.iterdir()) == ["calibration.json", "manifest.json", "model.onnx"]


def test_its_accuracy_is_that_of_the_graph_in_onnx_runtime(portable: tuple[Path, str], small_demo: Path) -> None:
    folder, printed = portable
    verification = open_engine(folder).manifest.verification
    assert verification is not None
    assert verification.engine_latency is None and verification.pytorch_latency is None
    assert "accuracy of the portable graph in ONNX Runtime; latency not measured" in verification.data
    assert "latency not measured" in " ".join(printed.split())
    session = plain_session(onnx.load(str(folder / "model.onnx")))  # the graph by its own semantics
    meter = AccuracyMeter(8)
    for image, mask in zip(
        *(sorted((small_demo / "val" / kind).iterdir()) for kind in ("images", "masks")), strict=True
    ):
        pixels, truth = np.asarray(Image.open(image).convert("RGB")), np.asarray(Image.open(mask), np.int32)
        truth = np.where(truth == 255, IGNORED, truth)
        meter.update(session.run(["mask"], {"image": pixels[None]})[0][0], truth, image.name)
    assert verification.engine_accuracy.miou == pytest.approx(meter.figures().miou, abs=1e-9)


def test_without_a_device_compile_and_run_say_what_is_missing(portable: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = portable
    compiled = typed("compile", folder)
    assert compiled.returncode == 1 and compiled.stderr.startswith("edgeseg: target tensorrt cannot be used here: ")
    ran = typed("run", folder, sample_folder() / "val" / "images", "--output", tmp_path / "out")
    assert ran.returncode == 1 and f"holds a portable graph only; run: edgeseg compile {folder}" in ran.stderr


def test_compile_builds_one_rtx_engine_for_several_gpus(portable: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = portable
    done = typed(
        "compile", folder, "--target", "tensorrt-rtx", "--sm", "86,89,120", "--output", tmp_path / "rtx", "--json"
    )
    assert done.returncode == 0, done.stderr
    manifest = open_engine(tmp_path / "rtx").manifest
    assert manifest.device == {"sm": "86,89,120"} and manifest.engine is not None
    assert manifest.precision.mac_share["int8"] >= 0.95
    assert manifest.verification is None  # measured elsewhere, on another engine


def test_options_are_refused_before_any_work(tmp_path: Path) -> None:
    done = typed("build", "--arch", "fpn", "--target", "tensorrt-rtx", "--sm", "87", "--output", tmp_path / "e")
    assert done.returncode == 2
    assert done.stderr == (
        "edgeseg: TensorRT-RTX has no SM 87 (allowed: 75, 80, 86, 89, 120, 121); Jetsons take --target tensorrt\n"
    )
    assert not (tmp_path / "e").exists()


def small(folder: Path, precision: str, dynamic: bool) -> OnnxGraph:
    path = folder / "model.onnx"
    shape: tuple[int | str, tuple[int | str, int | str]] = (
        ("batch", ("height", "width")) if dynamic else (1, (SIDE, SIDE))
    )
    path.write_bytes(small_model(precision, *shape).SerializeToString())
    batch = BatchRange(1, 2, 4) if dynamic else BatchRange()
    spec = PipelineSpec(ModelSpec("unet", classes=4), InputSpec(SIDE, SIDE, batch=batch, dynamic_size=dynamic))
    return OnnxGraph(path, sha256_file(path), precision, spec, "0" * 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_rtx_tells_the_precision_of_the_parsed_network(tmp_path: Path, precision: str, dynamic: bool) -> None:
    """The recorded modules' graphs, in the real parser and builder."""
    told: list[tuple[int, int]] = []
    graph = small(tmp_path, precision, dynamic)
    built = get_backend("tensorrt-rtx").build(
        graph, tmp_path, {}, BuildContext(lambda done, total: told.append((done, total)))
    )
    assert built.precision.mac_share == {precision: 1.0}
    assert built.precision.evidence == "typed"  # a network without a GPU was not run
    assert built.precision.macs == SIDE * SIDE * 9 * (3 * 8 + 8 * 4)
    assert told == sorted(told) and all(total == 100 for _, total in told)


def test_an_error_of_the_real_parser_names_the_node(tmp_path: Path) -> None:
    graph = small(tmp_path, "fp32", False)
    model = onnx.load(str(graph.path))
    model.graph.node.append(
        onnx.helper.make_node("Bernoulli", ["encoder.conv1.r"], ["noise"], "encoder.drop/Bernoulli")
    )
    onnx.save(model, str(graph.path))
    with pytest.raises(BuildError) as raised:
        get_backend("tensorrt-rtx").build(graph, tmp_path, {})
    assert "node encoder.drop/Bernoulli (module encoder.drop of the SMP model)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_graph_for_another_target_is_refused(tmp_path: Path) -> None:
    graph = small(tmp_path, "fp32", False)
    with pytest.raises(SpecError, match="has no Q/DQ nodes"):
        get_backend("tensorrt-rtx").build(OnnxGraph(graph.path, graph.sha256, "int8", graph.spec, "0"), tmp_path, {})


def test_implicit_calibration_leaves_the_fp32_graph_and_its_table(
    demo_build: tuple[str | Path, ...], tmp_path: Path
) -> None:
    """What a DLA before TensorRT 11.4 needs; the table becomes TensorRT's calibration cache on the device."""
    folder = tmp_path / "fpn"
    options = ("--backend-option", "implicit_calibration=true", "--backend-option", "dla_core=0")
    done = typed(*demo_build, *options, "--output", folder)
    assert done.returncode == 0, done.stderr
    manifest = open_engine(folder).manifest
    assert manifest.scheme is None and manifest.precision.requested == "int8"
    assert manifest.options == {"implicit_calibration": True, "dla_core": 0}
    operators = {node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node}
    assert "QuantizeLinear" not in operators
    assert (folder / "calibration.json").is_file()
    assert manifest.verification is not None
    assert "of the fp32 graph in ONNX Runtime: TensorRT makes it int8 on the device" in manifest.verification.data


def test_the_committed_table_is_that_of_the_raw_results() -> None:
    benchmark = pytest.importorskip(
        "benchmarks.tensorrt_rtx", reason="benchmarks/ is not part of the installed package"
    )
    from benchmarks.record import read_record

    record = read_record(benchmark.OUTPUT)
    table = benchmark.OUTPUT.with_suffix(".md").read_text()
    assert table == benchmark.markdown(record) + "\n"
    assert [row for row in record.rows if row["reason"] is not None] == []
