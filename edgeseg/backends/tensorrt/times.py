"""Where the time of a new engine goes, layer by layer: a few runs with TensorRT's ``IProfiler``, right after the build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgeseg.backends.cuda.device import Cuda
from edgeseg.backends.tensorrt.device import on_gpu
from edgeseg.backends.tensorrt.module import Library
from edgeseg.backends.tensorrt.session import open_session

if TYPE_CHECKING:
    from edgeseg.backends.tensorrt.graph import ParsedGraph
    from edgeseg.backends.tensorrt.session import TensorRTSession

RUNS = 10

LayerTimes: TypeAlias = list[tuple[str, float]]
"""(layer name, milliseconds), every layer once per run."""


def measure_layer_times(library: Library, plan: bytes, options: Mapping[str, Any], parsed: ParsedGraph) -> LayerTimes:
    """Run a plan on a grey image of its size, :data:`RUNS` times after one that is not counted.

    Args:
        library: the plan was built with.
        plan: its content.
        options: it was built with.
        parsed: the graph it was built from; a plan without weights gets them from there.

    Raises:
        MissingDependencyError, DeviceError: no CUDA layer; the GPU has no memory left for it, or cannot run it.
    """

    def opened(cuda: Cuda) -> TensorRTSession:
        with cuda.active():
            engine = library.deserialize(plan, options, Path("the new engine"), parsed.path)
        return open_session(library.trt, engine, parsed.spec, cuda, {**options, "contexts": 1, "cuda_graph": False})

    with on_gpu(opened) as session:
        return session.layer_times(RUNS)
