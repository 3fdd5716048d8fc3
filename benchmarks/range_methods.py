"""Each calibration method for all tensors, and the one ``auto`` chooses, by what INT8 loses on held-out images.

    python -m benchmarks.range_methods [--workloads fpn,camvid] [--limit 48] ...

The graph is the build's: channels equalized, biases corrected. ``auto`` chooses in the scheme of its row, as a build for one
target does, with part of the calibration images; all are judged on validation images. Q/DQ graphs run in ONNX Runtime as they
are written, optimizations off, TensorRT's too: nothing is said about a GPU. ``auto`` minus a method: 95 % intervals by resampling
images, the same for both. ``processor_seconds``: of ``auto``'s whole calibration, equalization and measuring included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.record import RESULTS, Record, this_machine, versions
from benchmarks.workload import Workload, camvid, demo
from edgeseg.convert.export import export_onnx
from edgeseg.demo import demo_models
from edgeseg.evaluate.intervals import interval
from edgeseg.quantize.calibration import AUTO, Observation
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.ranges import METHODS, range_method
from edgeseg.quantize.repair.fidelity import JUDGES
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.manifest import OnnxGraph

Masks = list[NDArray[np.integer[Any]]]


def main() -> None:
    options = arguments()
    console = Console(stderr=True)
    machine = this_machine()
    rows: list[dict[str, Any]] = []
    for name in options.workloads:
        make = camvid if name == "camvid" else partial(demo, name)
        work = make(options.limit, options.calibration_limit)
        with tempfile.TemporaryDirectory() as scratch:
            for row in measure(work, options.schemes, Path(scratch)):
                rows.append({"workload": name, **row})
                console.print(rows[-1])
    Record(
        benchmark="range_methods",
        workload="calibration methods alone and auto; Q/DQ graphs executed in ONNX Runtime, optimizations off",
        machine=machine,
        versions=versions(),
        settings={key: value for key, value in vars(options).items() if key != "output"},
        rows=rows,
    ).write(options.output)
    console.print(f"written: {options.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=lambda text: text.split(","), default=[*demo_models(), "camvid"])
    parser.add_argument("--limit", type=int, default=32, help="validation images of each")
    parser.add_argument("--calibration-limit", type=int, help="calibration images of each; all without it")
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=list(JUDGES))
    parser.add_argument("--output", type=Path, default=RESULTS / "range_methods.json")
    return parser.parse_args()


def measure(work: Workload, schemes: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    graph, _ = export_onnx(work.loaded, work.spec, folder / "fp32.onnx")
    samples = CalibrationSet.open(work.calibration)
    reference = masks_of(graph, work.images)
    truth = confusion(reference, work)
    yield {"method": None, "scheme": "fp32", "miou": float(miou(truth.sum(axis=0)))}
    observation: Observation | None = None
    for scheme in schemes:
        seen: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
        started = time.process_time()
        calibrated, chosen = calibrate_repaired(
            graph, samples, folder / "equalized.onnx", judges=(scheme,), method=AUTO
        )
        seconds = time.process_time() - started
        if observation is None:
            observation = Observation(calibrated, histograms=True)
            observation.add(samples)
        for method in (AUTO, *METHODS):
            ranges = chosen.ranges if method == AUTO else observation.ranges(range_method(method))
            table = replace(chosen, ranges=ranges)
            masks = masks_of(write_qdq(calibrated, table, SCHEMES[scheme], folder / "int8.onnx"), work.images)
            agreement = np.array([(a == b).mean() for a, b in zip(masks, reference, strict=True)])
            seen[method] = agreement, confusion(masks, work)
            row = {
                "method": method,
                "scheme": scheme,
                "agreement": float(agreement.mean()),
                "miou": float(miou(seen[method][1].sum(axis=0))),
            }
            if method == AUTO:
                counts = Counter(limits.method or table.method for limits in table.ranges.values())
                yield row | {"processor_seconds": seconds, "chosen": dict(counts)}
            else:
                yield row | differences(seen[AUTO], seen[method])


def differences(
    auto: tuple[NDArray[np.float64], NDArray[np.int64]], other: tuple[NDArray[np.float64], NDArray[np.int64]]
) -> dict[str, Any]:
    """``auto`` minus another method: positive where ``auto`` is better."""
    count = len(auto[0])

    def agreement(weights: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(weights @ (auto[0] - other[0]) / count)

    def accuracy(weights: NDArray[Any]) -> NDArray[Any]:
        return miou(np.tensordot(weights, auto[1], 1)) - miou(np.tensordot(weights, other[1], 1))

    return {"auto_minus_agreement": interval(count, agreement), "auto_minus_miou": interval(count, accuracy)}


def masks_of(graph: OnnxGraph, images: tuple[NDArray[np.uint8], ...]) -> Masks:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if graph.precision != "fp32":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])
    return [session.run(["mask"], {"image": image[None]})[0][0] for image in images]


def confusion(masks: Masks, work: Workload) -> NDArray[np.int64]:
    """By image ``(N, K, K)``: true class, predicted class; unlabelled pixels left out."""
    classes = work.spec.model.classes
    matrices = []
    for mask, truth in zip(masks, work.masks, strict=True):
        known = (truth >= 0) & (truth < classes)
        cells = truth[known].astype(np.int64) * classes + mask[known]
        matrices.append(np.bincount(cells, minlength=classes**2).reshape(classes, classes))
    return np.array(matrices)


def miou(matrices: NDArray[Any]) -> NDArray[np.float64]:
    """Of confusion matrices ``(..., K, K)``: mean over the classes that occur."""
    right = np.diagonal(matrices, axis1=-2, axis2=-1).astype(np.float64)
    union = matrices.sum(axis=-1) + matrices.sum(axis=-2) - right
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(right / union, axis=-1))


if __name__ == "__main__":
    main()
