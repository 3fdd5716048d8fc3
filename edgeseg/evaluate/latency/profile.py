"""Where the time goes, in the user's own terms: per-node times grouped by SMP module.

Nodes are called after the module they came from (``encoder.layer3.0.conv1/Conv``), and backends keep those names in what
they execute, fused or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from edgeseg.backends import get_backend
from edgeseg.backends.base import NodeTime
from edgeseg.evaluate.results import ModuleTime, Profile
from edgeseg.graph.modules import module_group
from edgeseg.store.engine import Engine

RUNS = 20
OTHER = "other"


def group_by_module(executed: Iterable[NodeTime], source: str, runs: int) -> Profile:
    """Sum what a profiler told of ``runs`` runs by module, in order of first appearance; milliseconds of one run.

    A node whose name does not tell (a transpose the backend put in) counts to the module before it.
    """
    nodes: dict[str, tuple[float, str | None]] = {}
    for name, ms, dtype in executed:
        nodes[name] = (nodes[name][0] if name in nodes else 0.0) + ms / runs, dtype
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    current = next((module for name in nodes if (module := module_group(name)) is not None), OTHER)
    for name, (ms, dtype) in nodes.items():
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


def profile_engine(engine: Engine, runs: int = RUNS) -> Profile:
    """Profile an engine on a grey image of its size.

    Raises:
        BuildError, MissingDependencyError: the backend cannot run the engine with its profiler on.
    """
    backend = get_backend(engine.manifest.target)
    return group_by_module(backend.profile(engine, runs), backend.profiler, runs)
