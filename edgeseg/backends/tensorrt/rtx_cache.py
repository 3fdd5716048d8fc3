"""TensorRT-RTX's runtime cache: kernels it compiles for the GPU when an engine is loaded, kept for the next load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.store.atomic import write_bytes
from edgeseg.store.cache import stage_folder
from edgeseg.store.hashing import sha256_json

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext


def runtime_cache_path(engine_sha256: str, gpu: CudaDevice, version: str) -> Path:
    """Where the kernels of one engine on one kind of GPU are kept."""
    key = sha256_json([engine_sha256, gpu.name, gpu.capability_text, version])[:16]
    return stage_folder("tensorrt-rtx-runtime") / f"{key}.cache"


class CachingEngine:
    """An ``ICudaEngine`` whose execution contexts take compiled kernels from a file, and can put new ones there.

    Everything else is the engine's own.

    Args:
        engine: a deserialized ``ICudaEngine`` of TensorRT-RTX.
        path: the cache file; need not exist. One that TensorRT-RTX does not take is written anew.
    """

    def __init__(self, engine: ICudaEngine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        self._stored = path.read_bytes() if path.is_file() else b""
        if self._stored and not self._cache.deserialize(self._stored):
            self._cache.reset()
        self._config.set_runtime_cache(self._cache)

    def create_execution_context(self) -> IExecutionContext:
        return self._engine.create_execution_context(self._config)

    def store(self) -> None:
        """Write the kernels compiled so far, if there are new ones; a place that cannot be written is a warning."""
        compiled = bytes(self._cache.serialize())
        if compiled == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._path, compiled)
        except OSError as exc:
            warnings.warn(
                f"edgeseg: compiled kernels are not kept for the next load: cannot write {self._path}: {exc.strerror}; "
                "EDGESEG_CACHE names another folder",
                RuntimeWarning,
                stacklevel=2,
            )
        self._stored = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
