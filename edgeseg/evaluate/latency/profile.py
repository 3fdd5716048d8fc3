"""Where the time goes, in the user's own terms: per-node times grouped by SMP module.

Nodes are called after the module they came from (``encoder.layer3.0.conv1/Conv``), and backends keep those names in what
they execute, fused or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from edgeseg.evaluate.results import ModuleTime, Profile
from edgeseg.graph.modules import module_group
from edgeseg.store.engine import Engine

RUNS = 20
OTHER = "other"


NodeTime: TypeAlias = "tuple[str, float, str | None]"
"""One executed node or layer: its name, milliseconds in one run of the engine, and dtype where known."""


def group_by_module(nodes: Sequence[NodeTime], source: str, runs: int) -> Profile:
    """Sum node times by module, in order of first appearance.

    A node whose name does not tell (a transpose the backend put in) counts to the module before it.
    """
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    current = next((module for name, _, _ in nodes if (module := module_group(name)) is not None), OTHER)
    for name, ms, dtype in nodes:
        current = module_group(name) or current
        times[current] += ms  # type: ignore[assignment]  # Counter is typed for int, adds floats alike
        counts[current] += 1
        if dtype is not None:
            dtypes.setdefault(current, Counter())[dtype] += ms  # type: ignore[assignment]
    total = float(sum(times.values()))
    modules = tuple(
        ModuleTime(
            module=name,
            nodes=counts[name],
            time_ms=float(ms),
            share=float(ms) / total if total > 0 else 0.0,
            dtypes={dtype: part / float(ms) for dtype, part in sorted(dtypes.get(name, {}).items())} if ms > 0 else {},
        )
        for name, ms in times.items()
    )
    return Profile(source, runs, total, modules)


def profile_of_layers(layers: Iterable[tuple[str, float]], runs: int = 1) -> Profile:
    """The hook for TensorRT: ``(layer name, milliseconds)`` as ``IProfiler.report_layer_time`` gets them."""
    total: dict[str, float] = {}
    for name, ms in layers:
        total[name] = total.get(name, 0.0) + ms
    return group_by_module([(name, ms / runs, None) for name, ms in total.items()], "tensorrt IProfiler", runs)


def profile_engine(engine: Engine, runs: int = RUNS) -> Profile | None:
    """Profile an engine on a grey image of its size; ``None`` for a backend without a per-node profile.

    Raises:
        BuildError, MissingDependencyError: the backend cannot run the engine with its profiler on.
    """
    target = engine.manifest.target
    if target == "onnxruntime":
        from edgeseg.backends.cpu.onnxruntime import profile_nodes

        return group_by_module(profile_nodes(engine, runs), "onnxruntime profiler", runs)
    if target == "openvino":
        from edgeseg.backends.cpu.openvino import profile_nodes as openvino_nodes

        return group_by_module(openvino_nodes(engine, runs), "openvino profiling_info", runs)
    if target in ("tensorrt", "tensorrt-rtx"):
        return _profile_tensorrt(engine, runs)
    return None


def _profile_tensorrt(engine: Engine, runs: int) -> Profile:
    from edgeseg.backends import get_backend
    from edgeseg.backends.tensorrt.session import TensorRTSession

    size = engine.manifest.spec.input
    grey = np.full((size.batch.minimum, size.height, size.width, size.channels), 128, size.dtype)
    with get_backend(engine.manifest.target).load(engine) as session:
        assert isinstance(session, TensorRTSession)
        return profile_of_layers(session.layer_times(grey, runs), runs)
