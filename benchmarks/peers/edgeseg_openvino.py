"""edgeseg INT8 for OpenVINO, through the public interface."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers import Contender
from benchmarks.peers.edgeseg_onnxruntime import contender
from benchmarks.workload import Workload


def prepare(work: Workload, folder: Path) -> Contender:
    return contender(work, folder, "openvino")
