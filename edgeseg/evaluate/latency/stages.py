"""Where the time of one call goes: before, in and after the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from statistics import median
from typing import Any

from numpy.typing import NDArray

from edgeseg.backends.base import Session, StageTimes, TimedSession
from edgeseg.closing import Closing
from edgeseg.evaluate.results import StageSplit

Clock = Callable[[], int]
_DEVICE = ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")


class StageClock(Closing):
    """A session that notes when the engine was entered and left, for the split of a call.

    Of a session that has the device's own times (:class:`~edgeseg.backends.base.TimedSession`), those are taken; asking for
    them costs it the recording of four events a run.
    """

    def __init__(self, session: Session, clock_ns: Clock = time.perf_counter_ns) -> None:
        self._session = session
        self._clock_ns = clock_ns
        # One engine may be called by several threads; each has its own call to split.
        self._local = threading.local()
        self._split: dict[str, list[float]] = {name: [] for name in (f.name for f in fields(StageSplit))}
        self._lock = threading.Lock()

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`."""
        runs = getattr(self._local, "runs", None)
        if runs is None:
            return self._session.run(images)
        times: StageTimes | None = None
        begin = self._clock_ns()
        if isinstance(self._session, TimedSession):
            outputs, times = self._session.run_timed(images)
        else:
            outputs = self._session.run(images)
        runs.append((begin, self._clock_ns(), times))
        return outputs

    def timed(self, call: Callable[[], object]) -> object:
        """Make ``call``, which runs this session, and keep its split."""
        runs: list[tuple[int, int, StageTimes | None]] = []
        self._local.runs = runs
        begin = self._clock_ns()
        result = call()
        end = self._clock_ns()
        self._local.runs = None
        if runs:
            self._keep(begin, end, runs)
        return result

    def _keep(self, begin: int, end: int, runs: list[tuple[int, int, StageTimes | None]]) -> None:
        inside_ms = sum(stop - start for start, stop, _ in runs) / 1e6
        pre_ms = (runs[0][0] - begin) / 1e6
        stages: dict[str, float | None] = {"pre_ms": pre_ms, "post_ms": (end - begin) / 1e6 - pre_ms - inside_ms}
        device = [times for _, _, times in runs if times is not None]
        if len(device) == len(runs):
            stages |= {name: _sum([getattr(times, name) for times in device]) for name in _DEVICE}
        else:
            stages["compute_ms"] = inside_ms
        with self._lock:
            for name, ms in stages.items():
                if ms is not None:
                    self._split[name].append(ms)

    def split(self) -> StageSplit:
        """Medians over the calls made through :meth:`timed`; ``None`` for what was not seen."""
        return StageSplit(**{name: median(values) if values else None for name, values in self._split.items()})

    def close(self) -> None:
        """Close the engine."""
        self._session.close()


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
