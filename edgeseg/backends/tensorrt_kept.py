"""What TensorRT builds leave in edgeseg's cache folder: kernel times per device, and the logs of builds that failed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from edgeseg.artifacts import OnnxGraph, sha256_json
from edgeseg.backends.tensorrt_device import Gpu
from edgeseg.backends.tensorrt_log import LogCapture
from edgeseg.cache import cache_folder


def timing_cache_path(gpu: Gpu, version: str) -> Path:
    """Where kernel times measured on this kind of GPU by this TensorRT are kept."""
    key = sha256_json([gpu.name, gpu.capability_text, version])[:16]
    return cache_folder() / "tensorrt-timing" / f"{key}.cache"


def store_file(path: Path, content: bytes) -> None:
    """Write a file that other builds may read meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    os.replace(temporary, path)


def keep_log(log: LogCapture, graph: OnnxGraph) -> None:
    """The folder of a failed build vanishes; its log does not."""
    folder = cache_folder() / "tensorrt-log"
    folder.mkdir(parents=True, exist_ok=True)
    log.write(folder / f"{graph.sha256[:16]}.log")
