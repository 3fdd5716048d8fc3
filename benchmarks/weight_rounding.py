"""What any rounding of weights could still recover: INT8 beside the same graph with weights of 16 bits.

    python -m benchmarks.weight_rounding [--folder /tmp/hard]

AdaRound (Nagel et al., 2020) and its kin choose for each weight whether it is rounded up or down, by the layer's output.
Weights of 16 bits, one scale a channel as before, are nearer to the float ones than any choice of 8 bits: what they gain
bounds what such a method can. Everything else is the build's: channels equalized, ranges chosen by ``auto``, biases
corrected, activations of 8 bits. The scheme is TensorRT's, whose biases are float: int32 ones overflow in steps so fine.
Graphs run in ONNX Runtime as they are written, optimizations off; nothing is said about a GPU. ``--folder`` adds the networks
of :mod:`benchmarks.hard_networks` that were trained there. Agreement is with the float graph's masks; intervals (95 %)
resample images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks import hard_networks
from benchmarks.range_methods import confusion, masks_of, miou
from benchmarks.record import RESULTS, Record, this_machine, versions
from benchmarks.workload import Workload, camvid, demo
from edgeseg.convert.export import export_onnx
from edgeseg.convert.wrap import wrap_module
from edgeseg.demo import demo_models
from edgeseg.evaluate.intervals import interval
from edgeseg.quantize import insertion, qdq
from edgeseg.quantize.calibration import AUTO
from edgeseg.quantize.parameters import QuantizedWeight
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES, QuantScheme
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import ModelRequest
from edgeseg.store.manifest import OnnxGraph

OPSET_OF_INT16 = 21
LEVELS = 2**15 - 1


def weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Any:
    """Of each row of weights."""
    return weights @ values / len(values)


def main() -> None:
    record_each(
        "weight_rounding",
        "INT8 with weights of 8 and of 16 bits; Q/DQ graphs executed in ONNX Runtime, optimizations off",
        __doc__,
        measure,
    )


def record_each(
    benchmark: str, words: str, description: str | None, measure: Callable[[Workload, Path], dict[str, Any]]
) -> None:
    """A benchmark's command line: measure each workload in a scratch folder, and write the rows.

    Args:
        benchmark: its name, and that of its results.
        words: what it measures.
        description: of the command line.
        measure: gives the row of a workload.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of benchmarks.hard_networks, with its trained networks")
    parser.add_argument("--limit", type=int, default=32, help="validation images of each")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{benchmark}.json")
    options = parser.parse_args()
    rows = []
    for work in workloads(options):
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(measure(work, Path(scratch)))
        print(rows[-1], flush=True)
    Record(
        benchmark=benchmark,
        workload=words,
        machine=this_machine(),
        versions=versions(),
        settings={"limit": options.limit},
        rows=rows,
    ).write(options.output)


def workloads(options: argparse.Namespace) -> Iterator[Workload]:
    for arch in demo_models():
        yield demo(arch, options.limit)
    yield camvid(options.limit)
    if options.folder is None:
        return
    scenes = demo("fpn", options.limit)
    for name in hard_networks.NETWORKS:
        if not (options.folder / f"{name}.safetensors").is_file():
            continue
        settings = ModelRequest(mean=scenes.loaded.preprocess.mean, std=scenes.loaded.preprocess.std)
        loaded = wrap_module(hard_networks.trained(name, options.folder), settings)
        spec = replace(
            scenes.spec,
            model=loaded.model,
            preprocess=loaded.preprocess,
            input=replace(scenes.spec.input, stride=loaded.stride),
        )
        yield replace(scenes, name=f"hard {name}", loaded=loaded, spec=spec)


def measure(work: Workload, folder: Path) -> dict[str, Any]:
    graph, _ = export_onnx(work.loaded, work.spec, folder / "fp32.onnx")
    reference = masks_of(graph, work.images)
    truth = float(miou(confusion(reference, work).sum(axis=0)))
    scheme = "tensorrt"
    samples = CalibrationSet.open(work.calibration)
    calibrated, table = calibrate_repaired(graph, samples, folder / "equalized.onnx", judges=(scheme,), method=AUTO)
    agreement: list[NDArray[np.float64]] = []
    losses = []
    for write in (qdq.write_qdq, write_fine):
        masks = masks_of(write(calibrated, table, SCHEMES[scheme], folder / "int8.onnx"), work.images)
        agreement.append(np.array([(a == b).mean() for a, b in zip(masks, reference, strict=True)]))
        losses.append(truth - float(miou(confusion(masks, work).sum(axis=0))))
    gain = agreement[1] - agreement[0]
    return {
        "name": f"{work.name}, {scheme}",
        "scheme": scheme,
        "miou_float": truth,
        "agreement_8_bits": float(agreement[0].mean()),
        "agreement_16_bits": float(agreement[1].mean()),
        "agreement_gain": interval(len(gain), partial(weighted_mean, gain)),
        "miou_drop_8_bits": losses[0],
        "miou_drop_16_bits": losses[1],
    }


def write_fine(graph: OnnxGraph, table: CalibrationTable, scheme: QuantScheme, path: Path) -> OnnxGraph:
    """:func:`edgeseg.quantize.qdq.write_qdq` with weights of 16 bits, which no kernel takes and no linter passes."""
    with mock.patch.object(insertion, "quantize_weight", fine_weight), mock.patch.object(qdq, "lint", no_problems):
        written = qdq.write_qdq(graph, table, scheme, path)
    model = onnx.load(path)
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, OPSET_OF_INT16)
    onnx.save(model, path)
    return written


def no_problems(*graph_and_rules: object) -> list[str]:
    return []


def fine_weight(weight: NDArray[np.float32], axis: int, scheme: QuantScheme, *, groups: int = 1) -> QuantizedWeight:
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others)
    scale = np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
    values = np.clip(np.rint(weight / scale.reshape(shape)), -LEVELS, LEVELS).astype(np.int16)
    return QuantizedWeight(values, scale, axis)


if __name__ == "__main__":
    main()
