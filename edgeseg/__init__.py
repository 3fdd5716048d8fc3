"""edgeseg: segmentation-models-pytorch models as fast engines whose accuracy loss is known.

Importing this package loads nothing heavy: torch is imported by :func:`build` alone, numpy and a backend by
:func:`load`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from edgeseg.errors import (
    ArtifactError,
    BuildError,
    CheckpointError,
    DeviceError,
    EdgesegError,
    ExportError,
    GateError,
    InputError,
    MissingDependencyError,
    OutputExistsError,
    QuantizationError,
    SpecError,
    StaleEngineError,
)
from edgeseg.version import __version__

if TYPE_CHECKING:
    from edgeseg.pipeline.api import build
    from edgeseg.runtime.segmenter import Segmenter, load
    from edgeseg.runtime.stream import stream

# ONNX Runtime sends usage data and keeps a device id in the user's cache folder, from its import on, unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "ArtifactError",
    "BuildError",
    "CheckpointError",
    "DeviceError",
    "EdgesegError",
    "ExportError",
    "GateError",
    "InputError",
    "MissingDependencyError",
    "OutputExistsError",
    "QuantizationError",
    "Segmenter",
    "SpecError",
    "StaleEngineError",
    "__version__",
    "build",
    "load",
    "stream",
]

_LAZY = {
    "Segmenter": "edgeseg.runtime.segmenter",
    "build": "edgeseg.pipeline.api",
    "load": "edgeseg.runtime.segmenter",
    "stream": "edgeseg.runtime.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'edgeseg' has no attribute {name!r}")
    # Set last and always: importing edgeseg.runtime.stream binds nothing here, but a submodule of the same name would.
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
