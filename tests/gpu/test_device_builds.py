"""Builds on a real GPU: calibration, DLA, timing cache, options, dynamic sizes, both CUDA packages, and the verbs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from described import Described
from device_engines import (
    AGREEMENT,
    SIDE,
    agreement,
    calibration_images,
    calibration_table,
    graph,
    images,
    measured,
    portable,
    with_options,
)
from PIL import Image

import edgeseg
from edgeseg.backends.compile import compile_folder, recompile
from edgeseg.backends.cuda import device as cuda_module
from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.backends.tensorrt.backend import has_weak_typing
from edgeseg.backends.tensorrt.module import TENSORRT
from edgeseg.cli.app import cli
from edgeseg.errors import BuildError, MissingDependencyError
from edgeseg.progress import SilentReporter
from edgeseg.spec import BatchRange
from edgeseg.store.engine import Engine, open_engine

pytestmark = pytest.mark.gpu

needs_oracle = pytest.mark.usefixtures("onnxruntime")


@pytest.fixture
def onnxruntime() -> Any:
    return pytest.importorskip("onnxruntime", reason="the oracle: pip install onnxruntime")


class Told(SilentReporter):
    """Keeps what a build says."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.percent: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: int, total: int) -> None:
        self.percent.append(100 * done // total)


def test_kernel_times_are_used_again(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    told = Told()
    for name in ("first", "second"):
        begun = time.perf_counter()
        compile_folder(portable(tmp_path / name, "fp16"), reporter=told)
        figures[f"{name}_compile_s"] = time.perf_counter() - begun
        (cache,) = (tmp_path / ".timing").glob("*.cache")
        figures[f"{name}_cache_bytes"] = cache.stat().st_size
    figures["cache"] = cache.name
    assert told.notes == [], "TensorRT takes its own cache back"
    assert str(device["tensorrt"]) in cache.name and f"{device['multiprocessors']}sm" in cache.name


def test_progress_of_a_build(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    told = Told()
    compile_folder(portable(tmp_path / "engine", "fp32"), options={"timing_cache": False}, reporter=told)
    figures.update(percent=told.percent)
    if not hasattr(TENSORRT.load(), "IProgressMonitor"):
        pytest.skip("this TensorRT tells no progress")
    assert told.percent and told.percent == sorted(told.percent) and told.percent[-1] <= 100


def test_an_error_of_tensorrt_names_the_node(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    made = graph("fp32")
    relu = next(node for node in made.graph.node if node.name == "decoder.block/Relu")
    relu.op_type, relu.domain = "NoSuchOperator", "nowhere"
    made.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    with pytest.raises(BuildError) as raised:
        compile_folder(portable(tmp_path / "engine", "fp32", model=made))
    figures.update(error=str(raised.value))
    assert "node decoder.block/Relu (module decoder.block of the SMP model)" in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_oracle
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"version_compatible": True}, id="version_compatible"),
        pytest.param({"hardware_compatibility": "ampere_plus"}, id="ampere_plus"),
        pytest.param({"strip_weights": True}, id="strip_weights"),
        pytest.param({"refit": True}, id="refit"),
        pytest.param({"optimization_level": 1, "aux_streams": 0, "workspace_mb": 256}, id="limits"),
        pytest.param({"tactic_sources": "JIT_CONVOLUTIONS,EDGE_MASK_CONVOLUTIONS"}, id="tactic_sources"),
        pytest.param({"typing": "weak"}, id="weak"),
    ],
)
def test_options_give_the_same_masks(
    device: dict[str, Any], figures: dict[str, Any], tmp_path: Path, options: dict[str, Any]
) -> None:
    trt = TENSORRT.load()
    if "hardware_compatibility" in options and device["integrated"]:
        pytest.skip("TensorRT has no hardware compatibility on a Jetson")
    for option, holder, name in (
        ("version_compatible", trt.BuilderFlag, "VERSION_COMPATIBLE"),
        ("hardware_compatibility", trt, "HardwareCompatibilityLevel"),
        ("optimization_level", trt.IBuilderConfig, "builder_optimization_level"),
    ):
        if option in options and not hasattr(holder, name):
            pytest.skip(f"this TensorRT has no {option}")
    if "strip_weights" in options and not hasattr(trt.BuilderFlag, "STRIP_PLAN"):
        pytest.skip("this TensorRT strips no weights")
    if options.get("typing") == "weak" and not has_weak_typing(trt):
        pytest.skip("this TensorRT types strongly only")
    engine = compile_folder(portable(tmp_path / "engine", "fp16"), options=options)
    assert engine.manifest.engine is not None
    figures.update(size_bytes=engine.manifest.engine.size_bytes, typing=engine.manifest.options["typing"])
    with with_options(engine) as session:
        figures.update(agreement=agreement(session, engine.folder))
    assert figures["agreement"] >= AGREEMENT["fp16"]
    again = recompile(open_engine(engine.folder))
    assert again.manifest.options == engine.manifest.options


@needs_oracle
@pytest.mark.parametrize("calibrator", ["table", "entropy", "minmax"])
def test_implicit_calibration(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path, calibrator: str) -> None:
    if not has_weak_typing(TENSORRT.load()):
        pytest.skip("this TensorRT has no implicit calibration")
    table = calibration_table(tmp_path / "calibration")
    # So small a network is faster in FP16 on a large GPU, and TensorRT takes what is fastest.
    options: dict[str, Any] = {"implicit_calibration": True, "calibrator": calibrator, "allow_fp16": False}
    if calibrator != "table":
        options["calibration_images"] = str(calibration_images(tmp_path))
    engine = compile_folder(portable(tmp_path / "engine", "fp32", table=table), options=options)
    with with_options(engine) as session:
        figures.update(agreement=agreement(session, engine.folder), mac_share=engine.manifest.precision.mac_share)
    assert (engine.folder / "calibration.cache").read_text().startswith("TRT-")
    assert figures["agreement"] > 0.8


@needs_oracle
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_dla(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path, precision: str) -> None:
    if device["dla_cores"] == 0:
        pytest.skip("this device has no DLA")
    implicit = precision == "int8" and has_weak_typing(TENSORRT.load())
    table = calibration_table(tmp_path / "calibration") if implicit else None
    folder = portable(tmp_path / "engine", "fp32" if implicit else precision, table=table)
    # What a DLA names its layers in the inspector is not known yet: recorded, not judged.
    engine = compile_folder(folder, options={"dla_core": 0, "prove_precision": False, "implicit_calibration": implicit})
    report = engine.manifest.precision
    figures.update(mac_share=report.mac_share, node_share=report.node_share, time_share=report.time_share)
    figures.update(log=(folder / "tensorrt.log").read_text()[-4000:])
    with with_options(engine) as session:
        figures.update(agreement=agreement(session, folder), **measured(session, images(1)[0]))
    assert figures["agreement"] > 0.8


@needs_oracle
def test_dynamic_size(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    """Sizes at both ends and between, against ONNX Runtime; and what the inspector tells of such an engine."""
    from edgeseg.backends.portable import open_graph

    folder = portable(tmp_path / "engine", "fp16", BatchRange(1, 1, 2), dynamic_size=True)
    engine = compile_folder(folder, options={"min_size": "128x128", "max_size": "512x384"})
    figures.update(mac_share=engine.manifest.precision.mac_share, time_share=engine.manifest.precision.time_share)
    rng = np.random.default_rng(5)
    shares = []
    with with_options(engine) as session, open_graph(engine) as oracle:
        for batch, height, width in [(1, 128, 128), (2, 512, 384), (1, SIDE, SIDE), (1, 160, 352), (1, 128, 128)]:
            image = rng.integers(0, 256, (batch, height // 8, width // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
            shares.append(float((session.run(image)["mask"] == oracle.run(image)["mask"]).mean()))
    figures.update(agreement=shares)
    assert min(shares) >= AGREEMENT["fp16"]


@pytest.mark.parametrize("package", get_args(DriverName))
def test_each_cuda_package_gives_the_same_masks(
    engines: dict[str, Engine], figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, package: DriverName
) -> None:
    """Both packages, wherever both are installed: host arrays, mapped and copied, streams, and arrays on the device."""
    try:
        open_cuda(package).close()
    except MissingDependencyError as exc:
        pytest.skip(str(exc))
    given = images(4)
    with with_options(engines["fp16"]) as session:
        wanted = [session.run(image)["mask"] for image in given]
    monkeypatch.setattr(cuda_module, "_DRIVERS", {package: cuda_module._DRIVERS[package]})
    for memory in ("copy", "mapped"):
        with with_options(engines["fp16"], host_memory=memory) as session:
            for mask, image in zip(wanted, given, strict=True):
                np.testing.assert_array_equal(session.run(image)["mask"], mask)
            piped = [outputs["mask"] for outputs in session.run_many(given)]
            np.testing.assert_array_equal(np.stack(piped), np.stack(wanted))
    with with_options(engines["fp16"]) as session, open_cuda() as cuda:
        assert cuda.driver.name == package
        with cuda.device_memory(given[0].nbytes) as memory_there, cuda.stream() as stream, cuda.active():
            stream.copy_to_device(memory_there.address, given[0].reshape(-1))
            stream.synchronize()
            there = Described(memory_there.address, given[0].shape, stream=None)
            with session.run_device(there)["mask"] as mask_there:
                np.testing.assert_array_equal(mask_there.numpy(), wanted[0])
        figures.update(has_graphs=cuda.driver.has_graphs)


def test_the_verbs(device: dict[str, Any], figures: dict[str, Any], tmp_path: Path) -> None:
    """``doctor``, ``compile``, ``inspect``, ``run``, as a person types them."""
    folder = portable(tmp_path / "engine", "int8")
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(images(3)):
        Image.fromarray(image[0]).save(tmp_path / "photos" / f"{number}.png")

    def type_in(*arguments: object) -> str:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    figures.update(doctor=json.loads(type_in("doctor", "--json")))
    assert "of MACs in int8" in type_in("compile", folder)
    figures.update(inspect=type_in("inspect", folder)[-3000:])
    type_in("run", folder, tmp_path / "photos", "--output", tmp_path / "out")
    with edgeseg.load(folder) as segmenter:
        for number, image in enumerate(images(3)):
            (written,) = (tmp_path / "out").rglob(f"{number}*.png")
            np.testing.assert_array_equal(np.asarray(Image.open(written)), segmenter(image[0]))
