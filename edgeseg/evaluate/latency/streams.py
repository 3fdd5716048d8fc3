"""Several callers at the same time: latency under load and throughput."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from edgeseg.backends import Session
from edgeseg.evaluate.latency.protocol import Call, LatencySamples, noise_image
from edgeseg.spec import PipelineSpec

ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class StreamSamples(LatencySamples):
    """Calls of one contender made by several threads; its samples by round and thread.

    Attributes:
        calls_per_s: completed calls over wall-clock time.
        calls_per_s_by_round: the same of each round.
    """

    calls_per_s: float
    calls_per_s_by_round: tuple[float, ...]


def measure_streams(
    calls: Mapping[str, Call],
    streams: int,
    duration_ms: float,
    *,
    warmup_ms: float = 200.0,
    rounds: int = ROUNDS,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StreamSamples]:
    """Let ``streams`` threads call each contender as fast as they can, the contenders in turns of a few rounds.

    Args:
        calls: by name; each call is safe to make from several threads.
        streams: threads.
        duration_ms: counted wall-clock time of each contender, all rounds together.
        warmup_ms: uncounted, at the start of each contender's first round.
        rounds: turns of each contender.
        clock_ns: monotonic clock, nanoseconds.
        progress: called when all are warm and after each round, with the milliseconds counted of each contender and
            those needed.

    Raises:
        Exception: whatever a call raised, in whichever thread.
    """
    warmups = {name: len(_burst(call, streams, warmup_ms, clock_ns)[0]) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    seconds: dict[str, float] = dict.fromkeys(calls, 0.0)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    tell = progress or (lambda done, total: None)
    tell(0, int(duration_ms))
    for number in range(1, rounds + 1):
        for name, call in calls.items():
            took_ms, wall_s = _burst(call, streams, duration_ms / rounds, clock_ns)
            samples[name] += took_ms
            seconds[name] += wall_s
            rates[name].append(len(took_ms) / wall_s)
        tell(int(duration_ms * number / rounds), int(duration_ms))
    return {
        name: StreamSamples(
            tuple(samples[name]),
            warmups[name],
            calls_per_s=len(samples[name]) / seconds[name],
            calls_per_s_by_round=tuple(rates[name]),
        )
        for name in calls
    }


def measure_throughput(
    sessions: Mapping[str, Session],
    spec: PipelineSpec,
    callers: int,
    *,
    duration_ms: float = 2000.0,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, LatencySamples]:
    """Milliseconds per image with ``callers`` calling at the same time, a sample each round, the sessions in turns.

    One image (or the smallest batch) of the engine's size is given, noise, always the same.
    """
    images = noise_image(spec)
    calls = {name: partial(session.run, images) for name, session in sessions.items()}
    # As many pairs as an interval of the median needs to be narrow.
    measured = measure_streams(calls, callers, duration_ms, rounds=16, clock_ns=clock_ns)
    return {
        name: LatencySamples(
            tuple(1000 / (rate * spec.input.batch.minimum) for rate in samples.calls_per_s_by_round),
            samples.warmup_iterations,
        )
        for name, samples in measured.items()
    }


def _burst(call: Call, streams: int, duration_ms: float, clock_ns: Callable[[], int]) -> tuple[list[float], float]:
    """(milliseconds of every call, wall-clock seconds from the first call's start to the last one's end)."""
    taken: list[list[float]] = [[] for _ in range(streams)]
    spans: list[tuple[int, int]] = []
    failures: list[BaseException] = []
    gate, lock = threading.Barrier(streams), threading.Lock()

    def work(mine: list[float]) -> None:
        gate.wait()
        first = end = clock_ns()
        deadline = first + int(duration_ms * 1e6)
        try:
            while not mine or (end < deadline and not failures):
                begin = clock_ns()
                call()
                end = clock_ns()
                mine.append((end - begin) / 1e6)
        except BaseException as exc:
            failures.append(exc)
        with lock:
            spans.append((first, end))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    wall_s = (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e9
    return [ms for mine in taken for ms in mine], wall_s
