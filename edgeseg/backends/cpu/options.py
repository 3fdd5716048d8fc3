"""What the CPU backends share: their build options, and the checks that an engine was made for this machine and image size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from edgeseg.backends.base import require_known
from edgeseg.errors import InputError, SpecError, StaleEngineError, typed
from edgeseg.machine.cpu import Cpu
from edgeseg.spec import InputSpec
from edgeseg.store.engine import Engine

CPU_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("threads", "spinning", "streams"),
    "openvino": ("threads", "streams"),
}
"""Build options by backend."""

WITHOUT_VNNI = "INT8 without VNNI: neighbouring weights are kept small, so that nothing saturates; less gain"
"""What :class:`~edgeseg.backends.base.BackendStatus` says of such an x86 CPU."""


def cpu_options(backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a backend's build options and add defaults, also for those that are ``None``.

    ``threads``: of the engine, 0 for one per core this process may use. ``streams``: inferences at the same time, among which
    the threads are divided; 0 for as many as threads. ``spinning``: pool threads spin a little before they sleep, for lower
    latency at more power; by default where there is one stream.

    Raises:
        SpecError: an unknown option, or a value out of range.
    """
    allowed = CPU_OPTIONS[backend]
    require_known(backend, options, allowed)
    # ``None`` asks for the default, as in the TensorRT backends.
    defaults = {"threads": 0, "streams": 1, "spinning": options.get("streams") in (None, 1)}
    chosen = {name: defaults[name] if options.get(name) is None else options[name] for name in allowed}
    threads, streams, spinning = chosen["threads"], chosen["streams"], chosen.get("spinning", True)
    most = _most_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or not 0 <= threads <= most:
        raise SpecError(f"threads is {threads!r}; give a number from 0 (one per core) to {most} on this machine")
    if isinstance(streams, bool) or not isinstance(streams, int) or not 0 <= streams <= most:
        raise SpecError(
            f"streams is {streams!r}; give 1 (the lowest latency), more, up to {most} on this machine, or 0 (one per thread)"
        )
    if not isinstance(spinning, bool):
        raise SpecError(f"spinning is {spinning!r}; give true or false")
    return chosen


def _most_threads() -> int:
    # Threads beyond the processors wait for each other: 40 small convolutions on 2 processors took 0.05 s with 2 of them,
    # 0.46 with 16, 6.6 with 256.
    return max(16, 4 * (os.cpu_count() or 1))


def saved_options(engine: Engine, backend: str) -> dict[str, Any]:
    """The options an engine was built with, checked again: a manifest may have been edited. Raises ``SpecError``."""
    saved = engine.manifest.options
    return cpu_options(backend, {name: saved[name] for name in CPU_OPTIONS[backend] if name in saved})


def threads_and_streams(options: Mapping[str, Any], cores: int) -> tuple[int, int]:
    """How many threads an engine of these options has on a machine, and for how many callers; no more than threads."""
    threads: int = options["threads"] or cores
    return threads, min(options["streams"] or threads, threads)


def with_streams(engine: Engine, streams: int | None) -> Engine:
    """``engine`` to be loaded for ``streams`` callers at a time, none of whose threads spin; ``None``: as it was built.

    An inference on one thread waits for no other; and threads that spin take the cores from callers that do something else:
    fpn at 256x256 took 3.0 ms of CPU time with one thread, 4.6 with two that spin, on a machine with other work.
    """
    target = engine.manifest.target
    if streams is None or target not in CPU_OPTIONS:
        return engine
    spinning = {"spinning": False} if streams > 1 and "spinning" in CPU_OPTIONS[target] else {}
    return engine.with_options(**spinning, streams=min(streams, _most_threads()))


def with_threads(engine: Engine, most: int | None) -> Engine:
    """``engine`` to be loaded with no more than so many threads; ``None``: as it was built."""
    target = engine.manifest.target
    if most is None or target not in CPU_OPTIONS:
        return engine
    return engine.with_options(threads=min(saved_options(engine, target)["threads"] or most, most))


def check_built_for(engine: Engine, cpu: Cpu, package: str, version: str) -> None:
    """Raise ``StaleEngineError`` if the engine was built for another instruction set or with another package version."""
    manifest = engine.manifest
    again = f"run: {typed('compile', engine.folder)}"
    built_for, built_with = manifest.device.get("isa"), manifest.versions.get(package)
    if built_for != cpu.isa:
        raise StaleEngineError(
            f"{engine.folder} was built for a CPU with [{built_for}], this one has [{cpu.isa}]; {again}"
        )
    if built_with != version:
        raise StaleEngineError(f"{engine.folder} was built with {package} {built_with}, this is {version}; {again}")


def check_image_size(shape: Sequence[int], spec: InputSpec) -> None:
    """Raise ``InputError`` for images ``(N, H, W, C)`` of a size that the model refuses and its graph would run."""
    if not spec.dynamic_size or len(shape) != 4:
        return
    least = spec.min_size or (spec.stride, spec.stride)
    if any(n % spec.stride or n < low for n, low in zip(shape[1:3], least, strict=True)):
        raise InputError(
            f"images have {shape[1]}x{shape[2]} pixels, this engine takes multiples of {spec.stride} from {least[0]}x{least[1]}"
        )
