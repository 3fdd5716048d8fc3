"""Where the time of one call goes: before, in and after the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import Session, TimedSession
from edgeseg.evaluate.latency import median
from edgeseg.evaluate.results import StageSplit

Clock = Callable[[], int]


@runtime_checkable
class DeviceTimed(Protocol):
    """A session that knows the device time of its last run on this thread, from device events.

    Optional: a GPU backend's session may have this method; the harness uses it when it is there.
    """

    def stage_times_ms(self) -> Mapping[str, float]:
        """``{"h2d": ..., "compute": ..., "d2h": ...}`` in milliseconds, as trtexec defines them."""
        ...


class StageClock:
    """A session that notes when the engine was entered and left, for the split of a call.

    Args:
        session: the engine; belongs to the caller of :meth:`close` like any session.
        clock_ns: monotonic clock, nanoseconds.
    """

    def __init__(self, session: Session, clock_ns: Clock = time.perf_counter_ns) -> None:
        self._session = session
        self._clock_ns = clock_ns
        # One engine may be called by several threads; each has its own call to split.
        self._local = threading.local()
        self._split: dict[str, list[float]] = {name: [] for name in ("pre", "h2d", "compute", "d2h", "post")}
        self._lock = threading.Lock()

    def run(self, images: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`."""
        runs = getattr(self._local, "runs", None)
        device: Mapping[str, float] | None = None
        begin = self._clock_ns()
        if runs is not None and isinstance(self._session, TimedSession):
            outputs, times = self._session.run_timed(images)
            end = self._clock_ns()
            stages = {"h2d": times.h2d_ms, "compute": times.compute_ms, "d2h": times.d2h_ms}
            device = {name: ms for name, ms in stages.items() if ms is not None}
        else:
            outputs = self._session.run(images)
            end = self._clock_ns()
            if runs is not None and isinstance(self._session, DeviceTimed):
                device = self._session.stage_times_ms()
        if runs is not None:
            runs.append((begin, end, device))
        return outputs

    def timed(self, call: Callable[[], object]) -> object:
        """Make ``call``, which runs this session, and keep its split."""
        runs: list[tuple[int, int, Mapping[str, float] | None]] = []
        self._local.runs = runs
        begin = self._clock_ns()
        result = call()
        end = self._clock_ns()
        self._local.runs = None
        if runs:
            self._keep(begin, end, runs)
        return result

    def _keep(self, begin: int, end: int, runs: list[tuple[int, int, Mapping[str, float] | None]]) -> None:
        inside_ms = sum(stop - start for start, stop, _ in runs) / 1e6
        pre_ms = (runs[0][0] - begin) / 1e6
        found = {"pre": pre_ms, "post": (end - begin) / 1e6 - pre_ms - inside_ms}
        devices = [device for _, _, device in runs if device is not None]
        if len(devices) == len(runs):
            # A device that shares the CPU's memory copies nothing: it has no h2d and d2h.
            stages = [n for n in ("h2d", "compute", "d2h") if all(n in device for device in devices)]
            found |= {name: sum(device[name] for device in devices) for name in stages}
        else:
            found["compute"] = inside_ms
        with self._lock:
            for name, ms in found.items():
                self._split[name].append(ms)

    def split(self) -> StageSplit:
        """Medians over the calls made through :meth:`timed`; ``None`` for what was not seen."""
        medians = {f"{name}_ms": median(values) if values else None for name, values in self._split.items()}
        return StageSplit(**medians)

    def close(self) -> None:
        """Close the engine."""
        self._session.close()

    def __enter__(self) -> StageClock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
