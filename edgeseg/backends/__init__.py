"""The backends, by the name ``--target`` takes. A backend is one module with a ``backend()`` function."""

from __future__ import annotations

import importlib
from typing import cast

from edgeseg.arguments import one_of
from edgeseg.backends.base import Backend, BackendStatus, BuiltEngine, Session
from edgeseg.errors import BuildError

BACKENDS: dict[str, str] = {
    "onnxruntime": "edgeseg.backends.cpu.onnxruntime",
    "openvino": "edgeseg.backends.cpu.openvino",
    "tensorrt": "edgeseg.backends.tensorrt.backend",
    "tensorrt-rtx": "edgeseg.backends.tensorrt.rtx",
}

AUTO_TARGETS: tuple[str, ...] = ("onnxruntime", "openvino")
"""Backends ``--target auto`` builds for and measures against each other, where they are installed; the first is taken where
noise could turn which is faster."""

GPU_TARGETS: tuple[str, ...] = ("tensorrt", "tensorrt-rtx")
"""Backends whose engines run on a GPU."""

__all__ = [
    "AUTO_TARGETS",
    "BACKENDS",
    "GPU_TARGETS",
    "Backend",
    "BackendStatus",
    "BuiltEngine",
    "Session",
    "get_backend",
    "require_builder",
]


def get_backend(name: str) -> Backend:
    """Import and return a backend. Raises ``SpecError`` for an unknown name."""
    one_of("target", name, tuple(BACKENDS))
    return cast("Backend", importlib.import_module(BACKENDS[name]).backend())


def require_builder(name: str) -> Backend:
    """Like :func:`get_backend`, and engines can be built on this machine. Raises ``BuildError`` saying what to do."""
    backend = get_backend(name)
    status = backend.status()
    if not (status.available or status.can_build):
        raise BuildError(f"target {name} cannot be used here: {status.detail}")
    return backend
