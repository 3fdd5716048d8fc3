"""Figures of a sample of durations, and reasons not to trust it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from edgeseg.evaluate.latency.batches import Estimate, bootstrap_interval, median_of
from edgeseg.evaluate.latency.protocol import LatencySamples, compare, percentile
from edgeseg.evaluate.results import Distribution, Latency, SpeedComparison, SpeedVerdict
from edgeseg.machine.record import NoiseFlag

MAX_VARIATION = 0.10
"""Robust coefficient of variation (1.4826 * median absolute deviation / median) of a quiet run."""
OUTLIER_FACTOR = 1.5
MAX_OUTLIER_SHARE = 0.01
"""From this share of outliers on, p99 is one of them."""
MAX_DRIFT = 0.05
MIN_SAMPLES = 10


def distribution(samples_ms: Sequence[float]) -> Distribution:
    """Describe a sample; ``ValueError`` if it is empty."""
    values = np.asarray(samples_ms, dtype=np.float64)
    ordered = sorted(samples_ms)
    low, high = bootstrap_interval(values, median_of)
    return Distribution(
        count=len(ordered),
        min_ms=ordered[0],
        mean_ms=float(values.mean()),
        median_ms=median(ordered),
        p90_ms=percentile(ordered, 90),
        p95_ms=percentile(ordered, 95),
        p99_ms=percentile(ordered, 99),
        max_ms=ordered[-1],
        median_low_ms=low,
        median_high_ms=high,
        std_ms=float(values.std(ddof=1)) if len(ordered) > 1 else None,
    )


def noise_flags(samples_ms: Sequence[float]) -> tuple[NoiseFlag, ...]:
    """What the samples themselves say against the run; see :mod:`edgeseg.machine.state` for what the machine says."""
    values = np.asarray(samples_ms, dtype=np.float64)
    middle = float(np.median(values))
    flags = []
    if len(values) < MIN_SAMPLES:
        flags.append(NoiseFlag("few-samples", f"{len(values)} samples; at least {MIN_SAMPLES} are needed for p90"))
    variation = 1.4826 * float(np.median(np.abs(values - middle))) / middle if middle > 0 else 0.0
    if variation > MAX_VARIATION:
        flags.append(NoiseFlag("variation", f"samples vary by {variation:.0%} around the median"))
    slow = int(np.count_nonzero(values > OUTLIER_FACTOR * middle))
    if slow > MAX_OUTLIER_SHARE * len(values):
        worst = float(values.max())
        flags.append(
            NoiseFlag(
                "outliers",
                f"{slow} of {len(values)} samples above {OUTLIER_FACTOR:g} times the median, slowest {worst:.1f} ms",
            )
        )
    half = len(values) // 2
    if half >= MIN_SAMPLES // 2:
        first, second = float(np.median(values[:half])), float(np.median(values[-half:]))
        if first > 0 and not math.isclose(second / first, 1.0, abs_tol=MAX_DRIFT):
            flags.append(
                NoiseFlag("drift", f"the second half ran at {second / first:.2f} times the first half's median")
            )
    return tuple(flags)


def paired_ratio(slow: Latency | None, fast: Latency | None) -> Estimate | None:
    """How many times faster one row of a report is than another; ``None`` unless their samples were taken in turns."""
    if slow is None or fast is None or not slow.round_group or slow.round_group != fast.round_group:
        return None
    if len(slow.samples_ms) < 2 or len(slow.samples_ms) != len(fast.samples_ms):
        return None
    return compare(LatencySamples(slow.samples_ms), LatencySamples(fast.samples_ms))


def speed_comparison(
    baseline_id: str, row_id: str, baseline: LatencySamples, contender: LatencySamples
) -> SpeedComparison:
    """How many times faster the contender is, from samples taken in turns; see :func:`.protocol.compare`."""
    ratio = compare(baseline, contender)
    verdict: SpeedVerdict = "no difference" if ratio.is_same else "cannot tell"
    if ratio.is_difference:
        verdict = "faster" if ratio.value > 1 else "slower"
    return SpeedComparison(baseline_id, row_id, ratio.value, ratio.low, ratio.high, len(baseline.samples_ms), verdict)


def fastest_or_first(measured: Mapping[str, LatencySamples]) -> tuple[str, str]:
    """Which contender to take, and why in words: the fastest; the first unless another is faster by more than noise.

    Args:
        measured: at least two, by name, taken in turns.
    """
    first, *others = measured
    comparisons = [speed_comparison(first, name, measured[first], measured[name]) for name in others]
    faster = [c for c in comparisons if c.verdict == "faster"]
    if faster:
        best = max(faster, key=lambda c: c.ratio)
        return best.row, f"{_in_words(best)} as {first} here"
    doubtful = [c for c in comparisons if c.verdict != "slower"]
    if not doubtful:
        return first, f"{', '.join(map(_in_words, comparisons))} here"
    why = "noise could turn it" if any(c.verdict == "cannot tell" for c in doubtful) else "no difference"
    return first, f"the first of them; {', '.join(map(_in_words, doubtful))} here: {why}"


def _in_words(comparison: SpeedComparison) -> str:
    return f"{comparison.row} is {comparison.ratio:.2f}x as fast ({comparison.low:.2f} to {comparison.high:.2f})"
