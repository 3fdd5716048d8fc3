"""NNCF post-training quantization of the ONNX graph, run in ONNX Runtime; numpy before and after."""

from __future__ import annotations

from pathlib import Path

import nncf
import onnx

from benchmarks.peers import Contender
from benchmarks.peers.onnxruntime_static import session_contender
from benchmarks.peers.plain_onnx import INPUT, export
from benchmarks.workload import Workload


def prepare(work: Workload, folder: Path) -> Contender:
    model = onnx.load(str(export(work, folder)))
    data = nncf.Dataset(work.calibration, lambda image: {INPUT: work.normalized(image)})
    quantized = nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=len(work.calibration))
    path = folder / "nncf.onnx"
    onnx.save(quantized, str(path))
    return session_contender(work, path, {"preset": "mixed", "subset_size": len(work.calibration)})
