"""The harness itself, on clocks and engines whose times are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from memory_backend import MemorySession
from numpy.typing import NDArray
from test_latency import Clock, measure

from edgeseg.backends.base import StageTimes
from edgeseg.evaluate.latency.batches import batch_count, bootstrap_interval, median_of, ratio_interval
from edgeseg.evaluate.latency.measure import StageClock
from edgeseg.evaluate.latency.profile import group_by_module
from edgeseg.evaluate.latency.protocol import LatencyProtocol, LatencySamples, compare, measure_interleaved
from edgeseg.evaluate.latency.statistics import distribution, noise_flags, speed_comparison
from edgeseg.evaluate.latency.streams import measure_streams, measure_throughput
from edgeseg.graph.modules import module_group as module_of
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec

SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(32, 32))
QUIET = LatencyProtocol(warmup_ms=0, warmup_iterations=0, min_iterations=200, min_duration_ms=0)


class SlowSession(MemorySession):
    """An engine that takes a known time on a clock the test turns."""

    def __init__(self, clock: Clock, durations_ms: Iterable[float]) -> None:
        super().__init__(SPEC)
        self.spend = clock.call("engine", durations_ms)

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        self.spend()
        return super().run(images)


def segment(session: Any) -> Any:
    segmenter, image = Segmenter(session, SPEC), np.zeros((32, 32, 3), np.uint8)
    return lambda: segmenter(image)


def test_figures_of_a_hand_made_sample() -> None:
    figures = distribution([float(37 * k % 101) for k in range(1, 101)])  # 1 to 100 in no order
    assert (figures.count, figures.min_ms, figures.max_ms, figures.mean_ms, figures.median_ms) == (
        100,
        1,
        100,
        50.5,
        50.5,
    )
    # trtexec: sorted[n - 1 - int((1 - p) * n)], one of the samples
    assert (figures.p90_ms, figures.p95_ms, figures.p99_ms) == (90, 95, 99)
    assert figures.std_ms == pytest.approx(29.0115)  # sqrt(sum((k - 50.5)^2) / 99)
    assert 39 < figures.median_low_ms < 50.5 < figures.median_high_ms < 62
    drifting = distribution([float(v) for v in range(100, 0, -1)])  # the same figures, but another run may well say 30
    assert (drifting.median_ms, drifting.p99_ms) == (50.5, 99)
    assert drifting.median_low_ms < 30 < 70 < drifting.median_high_ms
    assert distribution([3.0]).std_ms is None


def test_the_interval_of_the_median_covers_it() -> None:
    """Of 200 samples from a known distribution, about 95 % of the intervals hold the true median."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.exponential(10.0, 60), median_of, seed=seed)
        hits += low <= 10.0 * np.log(2) <= high
    assert 0.88 <= hits / 200 <= 0.99


def engine_samples(durations_ms: Iterable[float]) -> tuple[float, ...]:
    clock = Clock()
    return measure(segment(SlowSession(clock, durations_ms)), QUIET, clock_ns=clock).samples_ms


def test_a_quiet_run_has_no_flag() -> None:
    assert noise_flags(engine_samples([5.0])) == ()


def test_an_injected_outlier_is_seen() -> None:
    samples = engine_samples([5.0] * 50 + [40.0] * 3 + [5.0])
    (flag,) = noise_flags(samples)
    assert flag.kind == "outliers"
    assert "3 of 200" in flag.detail
    assert "40.0 ms" in flag.detail
    assert distribution(samples).p99_ms == 40.0


def test_a_run_that_gets_slower_drifts() -> None:
    assert [f.kind for f in noise_flags(engine_samples([5.0] * 100 + [5.5]))] == ["drift"]


def test_a_scattered_run_and_a_short_one_are_seen() -> None:
    assert "variation" in [f.kind for f in noise_flags([5.0, 6.0, 7.0, 4.0] * 10)]
    assert [f.kind for f in noise_flags([5.0] * 4)] == ["few-samples"]


def jitter(seed: int, mean_ms: float) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean_ms, 0.05 * mean_ms, 400))


def compared(first_ms: list[float], second_ms: list[float]) -> Any:
    clock = Clock()
    calls = {n: segment(SlowSession(clock, d)) for n, d in (("a", first_ms), ("b", second_ms))}
    samples = measure_interleaved(calls, QUIET, clock_ns=clock)
    return speed_comparison("a b1", "b b1", samples["a"], samples["b"])


def test_a_contender_twice_as_fast_is_found_with_its_interval() -> None:
    comparison = compared(jitter(1, 20.0), jitter(2, 10.0))
    assert comparison.verdict == "faster"
    assert comparison.low < 2.0 < comparison.high
    assert comparison.high - comparison.low < 0.1
    assert compared(jitter(1, 10.0), jitter(2, 20.0)).verdict == "slower"


def test_a_tie_is_called_a_tie() -> None:
    comparison = compared(jitter(1, 10.0), jitter(2, 10.0))
    assert comparison.verdict == "no difference"
    assert comparison.low <= 1.0 <= comparison.high


def slow_and_fast_spells(rng: np.random.Generator, count: int) -> NDArray[Any]:
    """Durations around 10 ms of a machine that is slow for a while and fast for a while (AR(1), 3 %), with jitter (2 %)."""
    steps, level, levels = rng.normal(0, 1, count), 0.0, []
    for step in steps:
        level = 0.9 * level + step * np.sqrt(1 - 0.9**2)
        levels.append(10 * np.exp(0.03 * level + 0.02 * rng.normal()))
    return np.array(levels)


def test_a_tie_is_called_a_tie_on_a_machine_that_is_slow_for_a_while() -> None:
    """Of 200 comparisons of equals a tenth may be wrong; resampling single calls gets about half wrong."""
    rng = np.random.default_rng(5)
    wrong = wrong_by_single_calls = 0
    for _ in range(200):
        first, second = slow_and_fast_spells(rng, 200), slow_and_fast_spells(rng, 200)
        samples = [LatencySamples(tuple(ms)) for ms in (first, second)]
        wrong += compare(*samples).is_difference
        ratios = first / second
        medians = np.median(ratios[rng.integers(0, 200, (300, 200))], axis=1)
        low, high = np.percentile(medians, [2.5, 97.5])
        wrong_by_single_calls += not low <= 1 <= high
    assert wrong <= 30
    assert wrong_by_single_calls >= 80


def test_the_interval_of_a_ratio_by_hand() -> None:
    """Two stretches with medians 2 and 8: middle 4, standard error ln(2), and t is 12.706 with one degree of freedom."""
    low, high = ratio_interval(np.array([2.0] * 4 + [8.0] * 4))
    assert (low, high) == pytest.approx((4 * 2.0**-12.706, 4 * 2.0**12.706))
    back = ratio_interval(1 / np.array([2.0] * 4 + [8.0] * 4))
    assert back == pytest.approx((1 / high, 1 / low))
    assert [batch_count(n) for n in (2, 7, 12, 39, 40, 4000)] == [2, 2, 3, 9, 10, 10]
    with pytest.raises(ValueError, match="at least 2"):
        ratio_interval(np.array([1.0]))


def test_warm_up_goes_on_until_times_settle() -> None:
    clock = Clock()
    protocol = LatencyProtocol(
        warmup_ms=1, min_iterations=1, min_duration_ms=0, stable_within=0.03, max_warmup_ms=1e6, block=1
    )
    # 12 slow calls, then 10 ms: stable when the last five and the five before are all fast, or both all slow.
    falling = [100.0 - 5 * k for k in range(12)]
    samples = measure(clock.call("a", [*falling, 10.0]), protocol, clock_ns=clock)
    assert samples.warmup_stable is True
    assert samples.warmup_iterations == 20  # medians: 8 of the fast calls make both windows' middle fast
    assert samples.samples_ms == (10.0,)


def test_warm_up_that_never_settles_ends_and_says_so() -> None:
    clock = Clock()
    protocol = LatencyProtocol(warmup_ms=1, min_iterations=1, min_duration_ms=0, stable_within=0.0, max_warmup_ms=50)
    samples = measure(clock.call("a", [1.0 + k for k in range(30)]), protocol, clock_ns=clock)
    assert samples.warmup_stable is False
    assert sum(1.0 + k for k in range(samples.warmup_iterations)) >= 50


def test_a_call_is_split_into_before_in_and_after_the_engine() -> None:
    clock = Clock()
    stage_clock = StageClock(SlowSession(clock, [7.0]), clock)
    before, after = clock.call("pre", [2.0]), clock.call("post", [1.5])
    inner = segment(stage_clock)

    def call() -> None:
        before()
        inner()
        after()

    stage_clock.timed(call)
    split = stage_clock.split()
    assert (split.pre_ms, split.compute_ms, split.post_ms) == (2.0, 7.0, 1.5)
    assert (split.h2d_ms, split.d2h_ms) == (None, None)


def test_device_times_take_the_place_of_the_host_s() -> None:
    class OnDevice(SlowSession):
        def run_timed(self, images: NDArray[np.uint8]) -> tuple[dict[str, NDArray[Any]], StageTimes]:
            return self.run(images), StageTimes(h2d_ms=0.5, compute_ms=6.0, d2h_ms=None, enqueue_ms=0.1)

    clock = Clock()
    stage_clock = StageClock(OnDevice(clock, [7.0]), clock)
    stage_clock.timed(segment(stage_clock))
    split = stage_clock.split()
    assert (split.h2d_ms, split.compute_ms, split.d2h_ms, split.enqueue_ms) == (0.5, 6.0, None, 0.1)


def test_streams_make_their_calls_at_the_same_time() -> None:
    import threading

    together = threading.Barrier(3)
    measured = measure_streams({"a": lambda: together.wait(5)}, 3, 0.0, warmup_ms=0.0)["a"]
    # Every call waits for two others: only callers at the same time get through.
    assert len(measured.samples_ms) == 12
    assert measured.warmup_iterations == 3
    assert measured.calls_per_s > 0


def test_throughput_is_time_per_image_of_all_callers() -> None:
    clock = Clock()

    class Working:
        def __init__(self, ms: float) -> None:
            self.ms = ms

        def run(self, images: Any) -> dict[str, Any]:
            assert images.shape == (4, 32, 64, 3)
            clock.now_ns += int(self.ms * 1e6)
            return {}

    sessions: Any = {"slow": Working(8.0), "fast": Working(2.0)}
    batches = PipelineSpec(ModelSpec("custom", classes=2), InputSpec(32, 64, batch=BatchRange(4, 4, 8)))
    measured = measure_throughput(sessions, batches, 1, duration_ms=200.0, clock_ns=clock)
    assert {name: samples.median_ms for name, samples in measured.items()} == {"slow": 2.0, "fast": 0.5}
    assert compare(measured["slow"], measured["fast"]).low == 4.0


def test_a_failing_stream_fails_the_measurement() -> None:
    def fail() -> None:
        raise RuntimeError("engine broke")

    with pytest.raises(RuntimeError, match="engine broke"):
        measure_streams({"a": fail}, 2, 1.0)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("encoder.layer3.0.conv1/Conv", "encoder.layer3"),
        ("encoder.conv1/Conv", "encoder.conv1"),
        ("encoder.model.blocks.2.0.dw_mid.conv/Conv_token_66", "encoder.blocks.2"),
        ("encoder.model.conv_stem/Conv/border/rows", "encoder.conv_stem"),
        ("decoder.p4.skip_conv/Conv_token_119", "decoder.p4"),
        ("decoder.seg_blocks.1.block.0.block.2/Relu", "decoder.seg_blocks.1"),
        ("segmentation_head.0/Conv", "segmentation_head"),
        ("postprocess/ArgMax", "postprocess"),
        ("encoder.layer1.0.conv1/Conv + encoder.layer1.0.relu/Relu", "encoder.layer1"),
        ("PWN(decoder.p3/Add)", "decoder.p3"),
        ("{ForeignNode[encoder.model.blocks.0/Add...encoder.model.blocks.1/Add]}", "encoder.blocks.0"),
        ("Transpose_token_193", None),
        ("Reformatting CopyNode for Input Tensor 0", None),
    ],
)
def test_modules_of_nodes(name: str, module: str | None) -> None:
    assert module_of(name) == module


def test_node_times_are_summed_by_module() -> None:
    nodes = [
        ("Transpose_token_1", 1.0, "other"),
        ("encoder.layer1.0/Conv", 3.0, "int8"),
        ("Transpose_token_2", 1.0, "fp32"),
        ("decoder.p4/Conv", 5.0, "int8"),
    ]
    profile = group_by_module(nodes, "test", 1)
    assert [(m.module, m.nodes, m.time_ms, m.share) for m in profile.modules] == [
        ("encoder.layer1", 3, 5.0, 0.5),
        ("decoder.p4", 1, 5.0, 0.5),
    ]
    assert profile.modules[0].dtypes == {"fp32": 0.2, "int8": 0.6, "other": 0.2}
    assert profile.total_ms == 10.0


def test_layers_reported_by_a_profiler_are_means_over_runs() -> None:
    reports = [("encoder.layer1.0/Conv", 2.0, None), ("decoder.p4/Conv", 1.0, None)] * 3
    profile = group_by_module(reports, "test", runs=3)
    assert [(m.module, m.nodes, m.time_ms) for m in profile.modules] == [
        ("encoder.layer1", 1, 2.0),
        ("decoder.p4", 1, 1.0),
    ]
