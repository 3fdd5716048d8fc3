"""Folders, images and engines for the tests of a device."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from engine_folders import write_manifest
from onnx import numpy_helper
from recorded_tensorrt.graphs import small_model

from edgeseg.backends import get_backend
from edgeseg.backends.portable import open_graph
from edgeseg.backends.tensorrt.session import TensorRTSession
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.engine import Engine, read_manifest
from edgeseg.store.hashing import FileRef, sha256_file
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

SIDE = 256
PRECISIONS = ("fp32", "fp16", "int8")
# Share of pixels whose class may differ from ONNX Runtime's: ties of random weights, and the GPU's order of sums.
AGREEMENT = {"fp32": 0.999, "fp16": 0.99, "int8": 0.98}
ONE = BatchRange()


def graph(precision: str, batch: int | str = 1, size: tuple[int | str, int | str] = (SIDE, SIDE)) -> onnx.ModelProto:
    """The small graph of the tests with random weights, so that its mask depends on the image."""
    made = small_model(precision, batch, size)
    rng = np.random.default_rng(4)
    for tensor in made.graph.initializer:
        if len(tensor.dims) == 4:
            weights = rng.standard_normal(tuple(tensor.dims))
            weights -= weights.mean((1, 2, 3), keepdims=True)
            dtype = numpy_helper.to_array(tensor).dtype
            values = (weights * 40).clip(-127, 127) if dtype == np.int8 else weights
            tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    return made


def portable(
    folder: Path,
    precision: str,
    batch: BatchRange = ONE,
    *,
    dynamic_size: bool = False,
    model: onnx.ModelProto | None = None,
    table: CalibrationTable | None = None,
) -> Path:
    """A folder as ``edgeseg build --target tensorrt`` leaves it without a GPU.

    Args:
        folder: to make.
        precision: of the graph; with a ``table`` the graph is fp32, and int8 what is asked for.
        batch: batch range.
        dynamic_size: the graph takes any size.
        model: instead of the one of :func:`graph`.
        table: for implicit calibration.
    """
    folder.mkdir(parents=True)
    size: tuple[int | str, int | str] = ("height", "width") if dynamic_size else (SIDE, SIDE)
    made = model or graph(precision, "batch" if batch.is_dynamic else batch.minimum, size)
    onnx.save(made, folder / "model.onnx")
    if table is not None:
        table.save(folder / "calibration.json")
    write_manifest(
        folder,
        portable_spec(batch, dynamic_size),
        PrecisionReport("int8" if table is not None else precision, {}, {}, 0, "typed"),  # type: ignore[arg-type]
        scheme="tensorrt" if precision == "int8" else None,
        calibration=None if table is None else FileRef.of(folder / "calibration.json"),
    )
    return folder


def portable_spec(batch: BatchRange = ONE, dynamic_size: bool = False) -> PipelineSpec:
    """The contract of :func:`portable`'s folders."""
    return PipelineSpec(ModelSpec("fpn", classes=4), InputSpec(SIDE, SIDE, batch=batch, dynamic_size=dynamic_size))


def calibration_table(folder: Path) -> CalibrationTable:
    """Of the fp32 graph on a few of :func:`images`. Needs onnxruntime."""
    from edgeseg.quantize.calibration import calibrate
    from edgeseg.quantize.samples import CalibrationSet

    folder.mkdir(parents=True)
    onnx.save(graph("fp32"), folder / "fp32.onnx")
    return calibrate(
        OnnxGraph(folder / "fp32.onnx", sha256_file(folder / "fp32.onnx"), "fp32", portable_spec(), "0" * 64),
        CalibrationSet.open(calibration_images(folder)),
        method="minmax",
    )


def calibration_images(folder: Path) -> Path:
    """A file of sixteen images."""
    np.save(folder / "images.npy", np.concatenate(images(16, seed=9)))
    return folder / "images.npy"


def agreement(session: TensorRTSession, folder: Path, n: int = 8, least_classes: int = 2) -> float:
    """Share of pixels of the same class as in ONNX Runtime on the folder's graph."""
    manifest = read_manifest(folder)
    with open_graph(Engine(folder, manifest)) as oracle:
        pairs = [(session.run(image)["mask"], oracle.run(image)["mask"]) for image in images(n)]
    assert all(len(np.unique(theirs)) >= least_classes for _, theirs in pairs)
    return float(np.mean([(ours == theirs).mean() for ours, theirs in pairs]))


def with_options(engine: Engine, **options: Any) -> TensorRTSession:
    """Load an engine with other session options than it was compiled with."""
    session = get_backend("tensorrt").load(engine.with_options(**options))
    assert isinstance(session, TensorRTSession)
    return session


def images(n: int, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Smooth random images: noise alone has a tie at every other pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, batch, SIDE // 8, SIDE // 8, 3)).astype(np.uint8)
    return list(np.ascontiguousarray(coarse.repeat(8, 2).repeat(8, 3)))


ITERATIONS = 200
"""Counted calls of a measurement."""


def measured(session: TensorRTSession, image: np.ndarray) -> dict[str, float | None]:
    """Medians in milliseconds, after 200 ms of warm-up; ``None``: there is no such stage."""
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        session.run(image)
    whole, stages = [], []
    for _ in range(ITERATIONS):
        begun = time.perf_counter()
        session.run(image)
        whole.append((time.perf_counter() - begun) * 1e3)
        stages.append(session.run_timed(image)[1])

    def median(name: str) -> float | None:
        values = [getattr(times, name) for times in stages]
        return None if None in values else statistics.median(values)

    names = ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")
    return {"end_to_end_median_ms": statistics.median(whole), **{f"median_{name}": median(name) for name in names}}
