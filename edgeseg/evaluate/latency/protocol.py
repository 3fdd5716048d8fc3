"""How long a call takes: trtexec's protocol, raw samples kept, several contenders measured in turns.

What is timed is what the caller passes in; edgeseg times from a decoded image in host memory to the mask in
host memory. A machine drifts (clocks, neighbours, caches), so contenders that are to be compared are measured in turns
and compared in pairs: see :func:`measure_interleaved` and :func:`compare`.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import Session
from edgeseg.evaluate.latency.batches import BATCHES, MIN_PER_BATCH, Estimate, ratio_interval
from edgeseg.images.dtypes import usual_pixels
from edgeseg.spec import PipelineSpec
from edgeseg.store.manifest import LatencyFigures

Call = Callable[[], object]


@dataclass(frozen=True)
class LatencyProtocol:
    """When to start counting and when to stop. The defaults are trtexec's.

    Attributes:
        warmup_ms: calls are made but not counted for this long, at least ``warmup_iterations`` of them.
        min_iterations: counted calls, at least.
        min_duration_ms: counted time, at least. With several contenders the mean over them, so that a slow one does not
            have to run as often as a fast one needs to fill its time.
        max_iterations: stop here even before ``min_duration_ms``; ``None`` for no limit.
        warmup_iterations: see ``warmup_ms``. One call is no warm-up for a runtime that allocates on its first.
        block: with several contenders, how many counted calls one makes before it is the next one's turn.
        settle: uncounted calls at the start of each block: they pay for caches and worker threads the contender before
            left in its own state, which no deployed engine has to pay.
        stable_within: go on warming up until the median of the last five calls is within this share of the median of the
            five before; ``None`` warms up for ``warmup_ms`` only.
        max_warmup_ms: with ``stable_within``: stop warming up here, stable or not.
        precise_within: with several contenders, stop even before ``min_duration_ms`` once the 95 % interval of each one's
            ratio to the first reaches no further than this share to either side. Asked again after every round, an
            interval is somewhat too narrow: for what decides by more than that share. ``None`` for the whole time.
    """

    warmup_ms: float = 200.0
    min_iterations: int = 10
    min_duration_ms: float = 3000.0
    max_iterations: int | None = None
    warmup_iterations: int = 2
    block: int = 4
    settle: int = 1
    stable_within: float | None = None
    max_warmup_ms: float = 5000.0
    precise_within: float | None = None

    def is_done(self, iterations: int, counted_ms: float) -> bool:
        """Whether ``iterations`` counted calls that took ``counted_ms`` together are enough."""
        if self.max_iterations is not None and iterations >= self.max_iterations:
            return True
        return iterations >= self.min_iterations and counted_ms >= self.min_duration_ms

    def is_precise(self, samples: Sequence[Sequence[float]]) -> bool:
        """Whether the contenders' samples tell their ratios to the first as exactly as asked."""
        first, *others = samples
        if self.precise_within is None or not others or len(first) < max(self.min_iterations, PRECISE_SAMPLES):
            return False
        reach = math.log1p(self.precise_within)
        intervals = (ratio_interval(np.divide(first, other)) for other in others)
        return all(math.log(high / low) <= 2 * reach for low, high in intervals)


PRECISE_SAMPLES = BATCHES * MIN_PER_BATCH
"""Fewest samples that may end a run early: an interval of all its stretches, which few samples do not have."""

STABLE_CALLS = 5
"""Calls whose median is compared with that of as many before, see ``LatencyProtocol.stable_within``."""

TRTEXEC = LatencyProtocol()
BENCH = LatencyProtocol(stable_within=0.03)
"""The protocol of ``edgeseg bench``: trtexec's, warmed up until times settle."""
SHORT = replace(
    BENCH, min_duration_ms=1000.0, min_iterations=12, max_iterations=400, max_warmup_ms=2000.0, precise_within=0.05
)
"""The protocol at the end of a build: bench's, a second for each contender, less where the ratios are known to 5 % before."""


@dataclass(frozen=True)
class LatencySamples:
    """Raw samples of one contender, milliseconds, in the order they were taken.

    ``warmup_stable``: whether the warm-up ended because times had settled; ``None`` where the protocol did not ask.
    """

    samples_ms: tuple[float, ...]
    warmup_iterations: int = 0
    warmup_stable: bool | None = None

    @property
    def median_ms(self) -> float:
        return median(self.samples_ms)

    def percentile_ms(self, percent: float) -> float:
        return percentile(self.samples_ms, percent)

    def figures(self) -> LatencyFigures:
        """Median, p90 and p99 for the manifest."""
        return LatencyFigures(
            median_ms=self.median_ms,
            p90_ms=self.percentile_ms(90),
            p99_ms=self.percentile_ms(99),
            iterations=len(self.samples_ms),
        )


def percentile(samples: tuple[float, ...] | list[float], percent: float) -> float:
    """trtexec's percentile: ``sorted[max(n - 1 - int((1 - percent / 100) * n), 0)]``; an observed sample.

    The definition of ``findPercentile`` in TensorRT's samples/common/sampleReporting.cpp, without the rounding that
    makes ``(1 - 0.9) * 10`` less than 1: p90 of ten samples leaves out exactly one, p99 of a hundred too.

    Raises:
        ValueError: no samples, or ``percent`` outside 0..100.
    """
    if not samples or not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent} of {len(samples)} samples: need at least one sample and 0..100")
    excluded = int((100 - percent) * len(samples) / 100)
    return sorted(samples)[max(len(samples) - 1 - excluded, 0)]


def percentile_of_rows(samples: NDArray[np.float64], percent: float) -> NDArray[np.float64]:
    """:func:`percentile` of each row of ``(R, N)``."""
    excluded = int((100 - percent) * samples.shape[1] / 100)
    place = max(samples.shape[1] - 1 - excluded, 0)
    return np.asarray(np.partition(samples, place, axis=1)[:, place])


def measure_interleaved(
    calls: Mapping[str, Call],
    protocol: LatencyProtocol = TRTEXEC,
    *,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LatencySamples]:
    """Time several contenders in turns: a block of A, a block of B, ..., again, until each has enough.

    All get the same number of samples, and the contender that begins moves on by one each round, so that no one always
    follows the same neighbour. Garbage collection is off while samples are taken, as in :mod:`timeit`.

    Args:
        calls: by name, at least one; each call returns only when its result is in host memory.
        protocol: how long.
        clock_ns: monotonic clock, nanoseconds (tests bring their own).
        progress: called after each round with the milliseconds counted (mean of the contenders) and those needed.
    """
    warmups = {name: _warm_up(call, protocol, clock_ns) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    settle = protocol.settle if len(calls) > 1 else 0
    with _no_garbage_collection():
        for first in itertools.count():
            for offset in range(len(names)):
                name = names[(first + offset) % len(names)]
                _take_block(calls[name], samples[name], protocol, settle, clock_ns)
            counted_ms = sum(map(sum, samples.values())) / len(samples)
            if progress is not None:
                progress(int(min(counted_ms, protocol.min_duration_ms)), int(protocol.min_duration_ms))
            if protocol.is_done(len(samples[names[0]]), counted_ms) or protocol.is_precise(list(samples.values())):
                break
    return {name: LatencySamples(tuple(samples[name]), *warmups[name]) for name in names}


def compare(a: LatencySamples, b: LatencySamples) -> Estimate:
    """How many times faster ``b`` is than ``a``, from samples taken in turns: the median of the paired ratios.

    Sample ``i`` of ``a`` is paired with sample ``i`` of ``b``: they were taken in the same round, under the same load.

    Raises:
        ValueError: a different number of samples, so not taken in turns, or fewer than two.
    """
    if len(a.samples_ms) != len(b.samples_ms):
        raise ValueError(f"{len(a.samples_ms)} and {len(b.samples_ms)} samples were not measured in turns")
    ratios = np.asarray(a.samples_ms, np.float64) / np.asarray(b.samples_ms, np.float64)
    return Estimate(float(np.median(ratios)), *ratio_interval(ratios))


def _warm_up(call: Call, protocol: LatencyProtocol, clock_ns: Callable[[], int]) -> tuple[int, bool | None]:
    """Call until warm: (calls made, whether times were stable in the end)."""
    start, took_ms = clock_ns(), list[float]()
    while True:
        passed_ms = (clock_ns() - start) / 1e6
        if len(took_ms) >= protocol.warmup_iterations and passed_ms >= protocol.warmup_ms:
            if protocol.stable_within is None:
                return len(took_ms), None
            if _is_stable(took_ms, protocol.stable_within):
                return len(took_ms), True
            if passed_ms >= protocol.max_warmup_ms:
                return len(took_ms), False
        begin = clock_ns()
        call()
        took_ms.append((clock_ns() - begin) / 1e6)


def _is_stable(took_ms: list[float], within: float) -> bool:
    if len(took_ms) < 2 * STABLE_CALLS:
        return False
    before, last = median(took_ms[-2 * STABLE_CALLS : -STABLE_CALLS]), median(took_ms[-STABLE_CALLS:])
    return abs(last - before) <= within * before


def _take_block(
    call: Call, samples: list[float], protocol: LatencyProtocol, settle: int, clock_ns: Callable[[], int]
) -> None:
    for _ in range(settle):
        call()
    for _ in range(protocol.block):
        start = clock_ns()
        call()
        samples.append((clock_ns() - start) / 1e6)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def measure_sessions(
    sessions: Mapping[str, Session], spec: PipelineSpec, protocol: LatencyProtocol = SHORT
) -> dict[str, LatencySamples]:
    """Time each session on one image (or the smallest batch) of the engine's size, in turns."""
    images = noise_image(spec)
    return measure_interleaved({name: partial(session.run, images) for name, session in sessions.items()}, protocol)


def noise_image(spec: PipelineSpec) -> NDArray[Any]:
    """One image (or the smallest batch) to time with; see :func:`noise_images`."""
    size = spec.input
    return noise_images(spec, (size.batch.minimum, size.height, size.width))


def noise_images(spec: PipelineSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Images to time with, ``(*shape, C)`` of the engine's dtype, always the same: what they show does not change what
    kernels do."""
    levels = np.random.default_rng(0).integers(0, 256, (*shape, spec.input.channels), dtype=np.uint8)
    return usual_pixels(levels, spec.preprocess, spec.input.dtype)
