"""The latency protocol, on a clock that the tests turn."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from edgeseg.evaluate.latency.protocol import (
    TRTEXEC,
    LatencyProtocol,
    LatencySamples,
    compare,
    measure_interleaved,
    median,
    percentile,
)
from edgeseg.evaluate.latency.statistics import fastest_or_first


def measure(call: Callable[[], object], protocol: LatencyProtocol = TRTEXEC, **how: Any) -> LatencySamples:
    """One contender by itself."""
    return measure_interleaved({"": call}, protocol, **how)[""]


class Clock:
    """A clock that stands still unless a call takes time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now_ns

    def call(self, name: str, durations_ms: Iterable[float]) -> Callable[[], None]:
        """A contender: each call lasts the next of ``durations_ms``, the last one for ever."""
        left: Iterator[float] = iter(durations_ms)
        last = 0.0

        def run() -> None:
            nonlocal last
            last = next(left, last)
            self.now_ns += round(last * 1e6)
            self.log.append(name)

        return run


def test_the_defaults_are_trtexecs() -> None:
    assert (TRTEXEC.warmup_ms, TRTEXEC.min_iterations, TRTEXEC.min_duration_ms) == (200.0, 10, 3000.0)


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [
        # sorted[max(n - 1 - int((1 - p / 100) * n), 0)] by hand, samples 1..n
        (10, 100, 10),
        (10, 99, 10),
        (10, 90, 9),
        (10, 50, 5),
        (10, 0, 1),
        (100, 99, 99),
        (100, 95, 95),
        (1000, 99, 990),
        (1, 99, 1),
        (3, 0, 1),
    ],
)
def test_percentile_is_trtexecs(count: int, percent: float, expected: float) -> None:
    samples = [float(v) for v in range(count, 0, -1)]
    assert percentile(samples, percent) == expected


@pytest.mark.parametrize("percent", [-1, 101])
def test_percentile_outside_its_range_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile([1.0], percent)


def test_no_samples_have_no_figures() -> None:
    with pytest.raises(ValueError, match="percentile"):
        percentile([], 50)
    with pytest.raises(ValueError, match="median"):
        median([])


def test_median_of_even_and_odd_counts() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5


def test_warm_up_is_not_counted_and_lasts_as_told() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=50, min_iterations=3, min_duration_ms=0, block=1)
    samples = measure(clock.call("a", [30.0, 10.0, 10.0, 10.0]), protocol, clock_ns=clock)
    # 30 + 10 + 10 fills 50 ms; the slow first call is no sample.
    assert samples.warmup_iterations == 3
    assert samples.samples_ms == (10.0, 10.0, 10.0)


def test_warm_up_makes_at_least_its_iterations() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=1, min_iterations=1, min_duration_ms=0, warmup_iterations=5, block=1)
    assert measure(clock.call("a", [100.0]), protocol, clock_ns=clock).warmup_iterations == 5


def test_measuring_goes_on_until_both_limits_are_met() -> None:
    clock = Clock()
    by_time = LatencyProtocol(warmup_ms=0, min_iterations=2, min_duration_ms=100, block=1)
    assert len(measure(clock.call("a", [7.0]), by_time, clock_ns=clock).samples_ms) == 15  # 14 x 7 = 98 < 100
    by_count = LatencyProtocol(warmup_ms=0, min_iterations=20, min_duration_ms=100, block=1)
    assert len(measure(clock.call("a", [50.0]), by_count, clock_ns=clock).samples_ms) == 20


def test_a_limit_on_iterations_ends_it_early() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=0, min_iterations=2, min_duration_ms=1e9, max_iterations=6, block=2)
    assert len(measure(clock.call("a", [1.0]), protocol, clock_ns=clock).samples_ms) == 6


def test_ratios_that_are_known_end_it_early() -> None:
    precise = LatencyProtocol(warmup_ms=0, min_duration_ms=1e9, max_iterations=200, precise_within=0.05)

    def count(protocol: LatencyProtocol, *spreads: float) -> int:
        """Samples of contenders whose times go up and down by a share of them, each in a rhythm of its own."""
        clock = Clock()
        calls = {
            str(k): clock.call(str(k), [10.0 * (1 + spread * np.sin(n * (k + 1))) for n in range(2000)])
            for k, spread in enumerate(spreads)
        }
        return len(measure_interleaved(calls, protocol, clock_ns=clock)["0"].samples_ms)

    assert count(precise, 0.0, 0.01) == 40
    assert count(precise, 0.0, 0.01, 0.6) > 40  # all of them have to be known
    assert count(precise, 0.0) == 200  # nothing to compare with
    assert count(dataclasses.replace(precise, precise_within=None), 0.0, 0.01) == 200
    assert count(dataclasses.replace(precise, min_iterations=80), 0.0, 0.01) == 80


def test_contenders_take_turns_in_blocks_and_the_beginner_changes() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=0, warmup_iterations=0, min_iterations=6, min_duration_ms=0, block=2, settle=1)
    calls = {name: clock.call(name, [1.0]) for name in "abc"}
    samples = measure_interleaved(calls, protocol, clock_ns=clock)
    # one settling call and two counted ones a block
    assert "".join(clock.log) == "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert {len(s.samples_ms) for s in samples.values()} == {6}


def test_the_settling_call_is_not_counted() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=0, warmup_iterations=0, min_iterations=4, min_duration_ms=0, block=2, settle=1)
    cold = [9.0, 1.0, 1.0] * 10
    samples = measure_interleaved({"a": clock.call("a", cold), "b": clock.call("b", cold)}, protocol, clock_ns=clock)
    assert set(samples["a"].samples_ms) == set(samples["b"].samples_ms) == {1.0}


def test_one_contender_needs_no_settling() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=0, warmup_iterations=0, min_iterations=3, min_duration_ms=0, block=3)
    assert measure(clock.call("a", [1.0, 2.0, 3.0]), protocol, clock_ns=clock).samples_ms == (1.0, 2.0, 3.0)


def test_progress_ends_at_its_total() -> None:
    clock = Clock()
    seen: list[tuple[int, int]] = []
    protocol = LatencyProtocol(warmup_ms=0, min_iterations=1, min_duration_ms=40, block=1)
    measure_interleaved({"a": clock.call("a", [9.0])}, protocol, clock_ns=clock, progress=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == [9, 18, 27, 36, 40]
    assert {total for _, total in seen} == {40}


def test_garbage_collection_is_off_while_measuring_and_on_again_after_an_error() -> None:
    states: list[bool] = []

    def call() -> None:
        states.append(gc.isenabled())
        if len(states) == 3:
            raise RuntimeError("engine died")

    protocol = LatencyProtocol(warmup_ms=0, warmup_iterations=1, min_iterations=9, min_duration_ms=0, block=1)
    with pytest.raises(RuntimeError, match="engine died"):
        measure(call, protocol)
    assert states == [True, False, False]
    assert gc.isenabled()


def test_drift_that_hits_both_cancels_in_the_pairs() -> None:
    drift = [1.0 + 0.05 * k for k in range(40)]
    ratio = compare(LatencySamples(tuple(12.0 * d for d in drift)), LatencySamples(tuple(10.0 * d for d in drift)))
    assert ratio.value == pytest.approx(1.2)
    assert ratio.high - ratio.low < 1e-9


def test_the_first_is_taken_unless_another_is_faster_by_more_than_noise() -> None:
    steady = LatencySamples((10.0, 10.1) * 40)

    def taken(**others: list[float]) -> tuple[str, str]:
        return fastest_or_first(
            {"a": steady} | {name: LatencySamples(tuple(values)) for name, values in others.items()}
        )

    assert taken(b=[5.0, 5.05] * 40) == ("b", "b is 2.00x as fast (2.00 to 2.00) as a here")
    assert taken(b=[20.0, 20.2] * 40) == ("a", "b is 0.50x as fast (0.50 to 0.50) here")
    assert taken(b=[5.0, 5.05] * 40, c=[4.0, 4.04] * 40)[0] == "c"
    name, why = taken(b=[10.2] * 40 + [9.9] * 40)
    assert name == "a" and why.startswith("the first of them; b is 1.0") and why.endswith("here: no difference")
    # The median is lower, but three stretches of the run say the opposite.
    name, why = taken(b=[ms for ms in (12, 6, 9, 16, 9.5, 7, 8, 14, 9.5, 9) for _ in range(8)])
    assert name == "a" and why.endswith("here: noise could turn it")


def test_samples_not_taken_in_turns_are_not_compared() -> None:
    with pytest.raises(ValueError, match="in turns"):
        compare(LatencySamples((1.0,)), LatencySamples((1.0, 2.0)))
