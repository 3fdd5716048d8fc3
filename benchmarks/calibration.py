"""Calibration: time against a bare forward pass, memory against the number of images, accuracy by method.

    python -m benchmarks.calibration [--methods minmax,mse] [--skip-accuracy] ...

Time: ``calibrate`` (loading, decoding, statistics, range choice) and a plain loop of ``session.run`` with every float
activation of the graph fetched and dropped, in turns on the same images; wall-clock and CPU seconds of each round,
and the median of their ratios. Memory: peak resident size of a process that calibrates on 10, 100 and 500 image
files. Accuracy: mIoU and agreement with fp32 of the Q/DQ graph that each method's table leads to, in ONNX Runtime,
on all validation images; with the default method also without bias correction.
The network is the CamVid one where that data is present, else the demo fpn.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference
from PIL import Image
from rich.console import Console

from benchmarks.record import RESULTS, Record, this_machine, versions
from edgeseg.quantize.calibration import DEFAULT_METHOD, calibrate
from edgeseg.quantize.ranges import METHODS
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.manifest import OnnxGraph

MEMORY_COUNTS = (10, 100, 500)
MEMORY_METHOD = "entropy"
CHILD = "--measure-memory-of"


def main() -> None:
    if CHILD in sys.argv:
        _calibrate_and_report_memory(Path(sys.argv[-1]))
        return
    options = arguments()
    console = Console(stderr=True)
    from benchmarks.workload import camvid, camvid_folder, demo
    from edgeseg.convert.export import export_onnx

    machine = this_machine()
    work = camvid(options.limit) if camvid_folder() is not None else demo("fpn", options.limit)
    console.print(f"measured on: {work.name}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph, _ = export_onnx(work.loaded, work.spec, folder / "fp32.onnx")
        rows: list[dict[str, Any]] = []
        for method in options.methods:
            rows.append(time_of(method, graph, work.calibration[: options.images], options.rounds))
            console.print(rows[-1])
        for count in () if options.skip_memory else MEMORY_COUNTS:
            rows.append(memory_of(count, graph, work.calibration, folder))
            console.print(rows[-1])
        if not options.skip_accuracy:
            for row in accuracy(options.methods, options.schemes, graph, work, folder):
                rows.append(row)
                console.print(row)
    Record(
        benchmark="calibration",
        workload=work.name,
        machine=machine,
        versions=versions(),
        settings={key: str(value) for key, value in vars(options).items() if key != "output"},
        rows=rows,
    ).write(options.output)
    console.print(f"written: {options.output}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=sorted(METHODS))
    parser.add_argument("--schemes", type=lambda text: text.split(","), default=["onnxruntime-vnni", "tensorrt"])
    parser.add_argument("--images", type=int, default=64, help="images of a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="validation images; all without it")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-accuracy", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration.json")
    return parser.parse_args()


def time_of(method: str, graph: OnnxGraph, images: tuple[NDArray[np.uint8], ...], rounds: int) -> dict[str, Any]:
    samples, session = CalibrationSet.open(images), all_activations(graph)

    def bare() -> None:
        for image in images:
            session.run(None, {"image": image[None]})

    def ours() -> None:
        calibrate(graph, samples, method=method)

    bare()
    pairs = [(_timed(ours), _timed(bare)) for _ in range(rounds)]
    return {
        "measured": "time",
        "method": method,
        "images": len(images),
        "calibrate_seconds": [a["wall"] for a, _ in pairs],
        "bare_seconds": [b["wall"] for _, b in pairs],
        "ratio": statistics.median(a["wall"] / b["wall"] for a, b in pairs),
        "cpu_ratio": statistics.median(a["cpu"] / b["cpu"] for a, b in pairs),
    }


def _timed(work: Callable[[], None]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def all_activations(graph: OnnxGraph) -> ort.InferenceSession:
    """The graph with every float32 tensor a node makes as output."""
    model = shape_inference.infer_shapes(onnx.load(graph.path), data_prop=True)
    values = [*model.graph.value_info, *model.graph.output]
    names = [v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def memory_of(count: int, graph: OnnxGraph, images: tuple[NDArray[np.uint8], ...], folder: Path) -> dict[str, Any]:
    pictures = folder / f"pictures{count}"
    pictures.mkdir()
    for number, image in zip(range(count), variants(images), strict=False):
        Image.fromarray(image).save(pictures / f"{number}.png", compress_level=1)
    order = folder / "memory.json"
    order.write_bytes(msgspec.json.encode({"graph": graph, "images": str(pictures)}, enc_hook=str))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.calibration", CHILD, str(order)], check=True, capture_output=True, text=True
    )
    return {"measured": "memory", "method": MEMORY_METHOD, "images": count, **json.loads(done.stdout)}


def variants(images: tuple[NDArray[np.uint8], ...]) -> Iterator[NDArray[np.uint8]]:
    """Endlessly: the images, then the same mirrored, shifted sideways by ever more pixels."""
    shift = 0
    while True:
        for image in images:
            moved = np.roll(image, shift, axis=1)
            yield moved if shift % 2 == 0 else np.ascontiguousarray(moved[:, ::-1])
        shift += 1


def _calibrate_and_report_memory(order: Path) -> None:
    task = json.loads(order.read_bytes())
    graph = msgspec.convert(task["graph"], OnnxGraph, dec_hook=lambda kind, value: kind(value))
    before = peak_bytes()
    started = time.perf_counter()
    calibrate(graph, CalibrationSet.open(task["images"]), method=MEMORY_METHOD)
    figures = {"peak_bytes": peak_bytes(), "before_bytes": before}
    print(json.dumps({**figures, "seconds": time.perf_counter() - started}))


def peak_bytes() -> int:
    """Largest resident size of this process so far. getrusage would give the parent's, which a child inherits."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def accuracy(
    methods: list[str], schemes: list[str], graph: OnnxGraph, work: Any, folder: Path
) -> Iterator[dict[str, Any]]:
    from edgeseg.quantize.qdq import write_qdq
    from edgeseg.quantize.schemes import SCHEMES

    reference = masks_of(graph, work.images)
    yield {"measured": "accuracy", "method": None, "scheme": "fp32", "miou": miou(reference, work)}
    samples = CalibrationSet.open(work.calibration)
    for method in methods:
        table = calibrate(graph, samples, method=method)
        for scheme, corrected in itertools.product(schemes, (True, False) if method == DEFAULT_METHOD else (True,)):
            used = table if corrected else without_channel_means(table)
            masks = masks_of(write_qdq(graph, used, SCHEMES[scheme], folder / "int8.onnx"), work.images)
            yield {
                "measured": "accuracy",
                "method": method,
                "scheme": scheme,
                "bias_correction": corrected,
                "miou": miou(masks, work),
                "agreement": statistics.mean(float((a == b).mean()) for a, b in zip(masks, reference, strict=True)),
            }


def without_channel_means(table: CalibrationTable) -> CalibrationTable:
    """The same ranges without what bias correction works from."""
    ranges = {
        name: dataclasses.replace(limits, channel_mean=None, channel_axis=None) for name, limits in table.ranges.items()
    }
    return dataclasses.replace(table, ranges=ranges)


def masks_of(graph: OnnxGraph, images: tuple[NDArray[np.uint8], ...]) -> list[NDArray[np.integer[Any]]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.path, options, providers=["CPUExecutionProvider"])
    return [session.run(["mask"], {"image": image[None]})[0][0] for image in images]


def miou(masks: list[NDArray[np.integer[Any]]], work: Any) -> float:
    from edgeseg.evaluate.accuracy.counts import AccuracyMeter

    meter = AccuracyMeter(work.spec.model.classes)
    for mask, truth in zip(masks, work.masks, strict=True):
        meter.update(mask, truth)
    value = meter.figures().miou
    assert value is not None
    return value


if __name__ == "__main__":
    main()
