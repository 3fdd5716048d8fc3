"""A timing cache that is text: whose times they are, then a kernel a line; and the memory it is serialized into."""

from __future__ import annotations

from typing import Any

TIMING_MARK = b"recorded-tensorrt-timing\n"


def host_memory(recorder: Any, content: bytes) -> Any:
    """An ``IHostMemory`` that holds these bytes."""
    memory = bytes.__new__(recorder.classes["IHostMemory"], content)
    object.__setattr__(memory, "_state", {"nbytes": len(content)})
    return memory


def create_timing_cache(config: Any, serialized_timing_cache: Any) -> Any:
    """A cache is text: whose times they are, then a kernel a line. ``None`` for anything else."""
    recorder, content = config._recorder, bytes(serialized_timing_cache)
    if not content:
        return recorder.new("ITimingCache", origin=recorder.version, kernels=[])
    if not content.startswith(TIMING_MARK):
        return None
    origin, *kernels = content[len(TIMING_MARK) :].decode().splitlines()
    return recorder.new("ITimingCache", origin=origin, kernels=kernels)


def set_timing_cache(config: Any, cache: Any, ignore_mismatch: bool) -> bool:
    if cache._state["origin"] != config._recorder.version and not ignore_mismatch:
        return False
    config._state["timing_cache"] = cache
    return True


def combine_timing_cache(cache: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
    if cache._state["origin"] != input_cache._state["origin"] and not ignore_mismatch:
        return False
    cache._state["kernels"] = sorted({*cache._state["kernels"], *input_cache._state["kernels"]})
    return True


def serialize_timing_cache(cache: Any) -> Any:
    lines = [cache._state["origin"], *cache._state["kernels"]]
    return host_memory(cache._recorder, TIMING_MARK + "\n".join(lines).encode())
