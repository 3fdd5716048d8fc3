"""Who is measured beside edgeseg. A peer is one module with a ``prepare(work, folder)`` that returns a Contender.

Each peer has the settings its own documentation recommends for latency on a CPU, all cores, and the preprocessing and
argmax done the fastest way that was found for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from benchmarks.workload import Workload

PEERS: dict[str, str] = {
    "pytorch-eager": "benchmarks.peers.pytorch_eager",
    "pytorch-channels-last": "benchmarks.peers.pytorch_channels_last",
    "pytorch-compile": "benchmarks.peers.pytorch_compile",
    "onnxruntime-quantize-static": "benchmarks.peers.onnxruntime_static",
    "nncf-onnxruntime": "benchmarks.peers.nncf_onnxruntime",
    "modelopt-onnxruntime": "benchmarks.peers.modelopt_onnxruntime",
    "nncf-openvino": "benchmarks.peers.nncf_openvino",
    "edgeseg-onnxruntime": "benchmarks.peers.edgeseg_onnxruntime",
    "edgeseg-openvino": "benchmarks.peers.edgeseg_openvino",
}


class NotInstalledError(Exception):
    """A peer's own environment is not on this machine: it is left out, and the reason is shown."""


@dataclass(frozen=True)
class Contender:
    """A prepared engine.

    Attributes:
        call: decoded uint8 image ``(H, W, 3)`` in memory -> uint8 mask ``(H, W)`` in memory.
        size_bytes: of the file that holds the weights; ``None`` where they live in the process.
        settings: everything that was chosen.
        versions: of packages that are not in this environment.
    """

    call: Callable[[NDArray[np.uint8]], NDArray[Any]]
    size_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def prepare(name: str, work: Workload, folder: Path) -> Contender:
    """Convert, quantize and load one peer; ``folder`` is its own."""
    folder.mkdir(parents=True, exist_ok=True)
    contender: Contender = importlib.import_module(PEERS[name]).prepare(work, folder)
    return contender
