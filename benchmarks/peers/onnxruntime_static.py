"""ONNX Runtime's own ``quantize_static``: u8 activations, s8 per-channel weights, min-max; numpy before and after."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers import Contender
from benchmarks.peers.plain_onnx import INPUT, export
from benchmarks.workload import Workload


class Reader(CalibrationDataReader):  # type: ignore[misc]  # not typed
    """Feeds inputs by name, one image at a time."""

    def __init__(self, feeds: Iterable[dict[str, Any]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def prepare(work: Workload, folder: Path) -> Contender:
    plain, ready, quantized = export(work, folder), folder / "ready.onnx", folder / "quantized.onnx"
    quant_pre_process(str(plain), str(ready))
    quantize(ready, quantized, ({INPUT: work.normalized(image)} for image in work.calibration))
    return session_contender(work, quantized, {"activations": "u8", "weights": "s8 per channel", "method": "minmax"})


def quantize(graph: Path, quantized: Path, feeds: Iterable[dict[str, Any]]) -> None:
    """Write ``graph`` with Q/DQ pairs, calibrated on ``feeds``."""
    quantize_static(
        str(graph),
        str(quantized),
        Reader(feeds),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )


def session_contender(work: Workload, path: Path, settings: dict[str, Any]) -> Contender:
    """Run an ONNX file of float input and logits with numpy pre- and post-processing."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(image: NDArray[np.uint8]) -> NDArray[Any]:
        (logits,) = session.run(None, {name: work.normalized(image)})
        return argmax(logits[0])

    settings = {**settings, "threads": options.intra_op_num_threads, "pre- and post-processing": "numpy"}
    return Contender(call, path.stat().st_size, settings)


def argmax(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``logits.argmax(0)`` of ``(C, H, W)``, the lowest index of equals, C at most 255.

    Found plane by plane from the maximum: numpy's argmax over the first axis takes about ten times as long.
    """
    classes = len(logits)
    best = logits.max(axis=0)
    best_index = np.zeros(best.shape, np.uint8)
    for index, plane in enumerate(logits):
        np.maximum(best_index, (plane == best).view(np.uint8) * np.uint8(classes - index), out=best_index)
    return np.asarray(np.uint8(classes) - best_index)
