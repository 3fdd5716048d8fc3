"""The float ONNX graph the other tools start from: exported by PyTorch, simplified by onnxsim, nothing of edgeseg's."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnxsim
import torch

from benchmarks.workload import Workload

INPUT, OUTPUT = "x", "logits"


def export(work: Workload, folder: Path) -> Path:
    """Write float32 ``(1, 3, H, W)`` normalized -> float32 logits ``(1, C, H, W)`` and return the path."""
    path = folder / "plain.onnx"
    size = work.spec.input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            work.loaded.module,
            (torch.zeros(1, 3, size.height, size.width),),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    simplified, matches = onnxsim.simplify(program.model_proto)
    if not matches:
        raise SystemExit("onnxsim changed the result of the plain graph")
    onnx.save(simplified, str(path))
    return path
