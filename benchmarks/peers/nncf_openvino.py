"""NNCF post-training quantization of the OpenVINO model, run in OpenVINO with the LATENCY hint.

Normalization and argmax are part of the model, through OpenVINO's own preprocessing and operators.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.preprocess import PrePostProcessor

from benchmarks.peers import Contender
from benchmarks.peers.plain_onnx import export
from benchmarks.workload import Workload


def prepare(work: Workload, folder: Path) -> Contender:
    model = ov.convert_model(export(work, folder))
    model.reshape([1, 3, work.spec.input.height, work.spec.input.width])
    data = nncf.Dataset(work.calibration, work.normalized)
    quantized = nncf.quantize(model, data, subset_size=len(work.calibration))
    path = folder / "nncf.xml"
    ov.save_model(with_processing(quantized, work), path, compress_to_fp16=False)
    threads = len(os.sched_getaffinity(0))
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(path, "CPU", config)
    request = compiled.create_infer_request()

    def call(image: NDArray[np.uint8]) -> NDArray[Any]:
        request.infer({0: image[None]}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data[0])

    settings = {
        "preset": "performance (the default)",
        "subset_size": len(work.calibration),
        "pre- and post-processing": "in the model",
    }
    return Contender(call, path.with_suffix(".bin").stat().st_size, {**settings, **config})


def with_processing(model: ov.Model, work: Workload) -> ov.Model:
    """uint8 NHWC in, uint8 mask out."""
    weight, bias = work.scale_and_shift()
    processing = PrePostProcessor(model)
    processing.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    processing.input().model().set_layout(ov.Layout("NCHW"))
    steps = processing.input().preprocess().convert_element_type(ov.Type.f32)
    # (x - mean) / scale of OpenVINO, from x * weight + bias.
    steps.mean([float(-b / w) for w, b in zip(weight, bias, strict=True)]).scale([float(1 / w) for w in weight])
    built = processing.build()
    logits = built.output(0).get_node().input_value(0)
    best = ops.topk(logits, ops.constant(1, dtype=np.int32), 1, "max", "none", index_element_type="i32").output(1)
    mask = ops.squeeze(ops.convert(best, "u8"), ops.constant([1], dtype=np.int32))
    return ov.Model([mask.output(0)], built.get_parameters(), "segmentation")
