"""NNCF post-training quantization of the ONNX graph, run in ONNX Runtime; numpy before and after."""

from __future__ import annotations

from pathlib import Path

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

from benchmarks.peers import Contender
from benchmarks.peers.onnxruntime_static import session_contender
from benchmarks.peers.plain_onnx import INPUT, export
from benchmarks.workload import Workload


def prepare(work: Workload, folder: Path) -> Contender:
    model = onnx.load(str(export(work, folder)))
    data = nncf.Dataset(work.calibration, lambda image: {INPUT: work.normalized(image)})
    # The default quantizes the inputs of depthwise convolutions per channel, which ONNX Runtime's QLinearConv refuses.
    per_tensor = AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(per_channel=False)
    )
    count = len(work.calibration)
    quantized = nncf.quantize(
        model,
        data,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=count,
        advanced_parameters=per_tensor,
    )
    path = folder / "nncf.onnx"
    onnx.save(quantized, str(path))
    return session_contender(work, path, {"preset": "mixed", "activations": "per tensor", "subset_size": count})
