"""Intervals for samples that resemble their neighbours: a machine is slow for a while, not for one call.

Resampling single calls takes them for independent, and its intervals are far too narrow: between two loads of one and the
same engine it found a "difference" in one run of five. So a run is cut into up to ten stretches, each long enough to have
forgotten most of the one before, and the stretches are what is compared or resampled (Law, "Simulation Modeling and
Analysis", chapter 9: batch means; Lahiri, "Resampling Methods for Dependent Data", chapter 2: block bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

BATCHES = 10
RESAMPLES = 1000
MIN_PER_BATCH = 4
"""Samples of one stretch, at least; with fewer samples in all there are fewer stretches."""

# 97.5 % quantile of Student's t by degrees of freedom, 1 to 9.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Resamples at a time: memory stays at a few dozen MB for any number of samples.
_CHUNK_CELLS = 2_000_000


SAME_WITHIN = 1.10
"""Two speeds are called the same when the whole interval of their ratio lies within this factor; an interval that holds 1
and reaches further shows neither a difference nor its absence."""


@dataclass(frozen=True)
class Estimate:
    """A positive figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_difference(self) -> bool:
        """Of a ratio: whether a difference was shown; not when the interval spans 1."""
        return not self.low <= 1.0 <= self.high

    @property
    def is_same(self) -> bool:
        """Of a ratio: no difference was shown, and none larger than :data:`SAME_WITHIN` is possible."""
        return not self.is_difference and self.low >= 1 / SAME_WITHIN and self.high <= SAME_WITHIN

    def over(self, other: Estimate) -> Estimate:
        """The ratio of two figures from different runs, with the interval that follows from both intervals (Zou and
        Donner, "Construction of confidence limits about effect measures", 2008), on a logarithmic scale."""
        down = math.hypot(math.log(self.value / self.low), math.log(other.high / other.value))
        up = math.hypot(math.log(self.high / self.value), math.log(other.value / other.low))
        ratio = self.value / other.value
        return Estimate(ratio, ratio * math.exp(-down), ratio * math.exp(up))


def batch_count(samples: int) -> int:
    """How many stretches ``samples`` are cut into, 2 to :data:`BATCHES`; ``ValueError`` for fewer than 2 samples."""
    if samples < 2:
        raise ValueError(f"interval of {samples} samples; at least 2 are needed")
    return max(2, min(BATCHES, samples // MIN_PER_BATCH))


def ratio_interval(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the median of paired ratios, in the order they were taken: Student's t over the medians of the
    stretches, on a logarithmic scale so that ``a / b`` and ``b / a`` say the same.
    """
    logs = np.log(ratios)
    count = batch_count(len(logs))
    medians = [float(np.median(part)) for part in np.array_split(logs, count)]
    reach = _T_975[count - 2] * float(np.std(medians, ddof=1)) / math.sqrt(count)
    middle = float(np.median(logs))
    return math.exp(middle - reach), math.exp(middle + reach)


def median_of(samples: NDArray[Any]) -> NDArray[Any]:
    """Median of each row of ``(R, N)``."""
    return np.asarray(np.median(samples, axis=1))


def bootstrap_interval(
    values: NDArray[Any], statistic: Callable[[NDArray[Any]], NDArray[Any]], *, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of a statistic: a bootstrap that resamples whole stretches, with percentiles widened for their small
    number (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015: expanded percentile interval).

    A single sample is its own interval: nothing is known about its spread.
    """
    if not len(values):
        raise ValueError("interval of no samples")
    if len(values) == 1:
        (only,) = statistic(values[None])
        return float(only), float(only)
    count = batch_count(len(values))
    length = -(-len(values) // count)
    starts = np.linspace(0, len(values) - length, count).round().astype(np.int64)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_CELLS // len(values))
    figures: list[NDArray[Any]] = []
    for done in range(0, RESAMPLES, step):
        picks = starts[rng.integers(0, count, (min(step, RESAMPLES - done), count))]
        places = (picks[:, :, None] + np.arange(length)).reshape(len(picks), -1)
        figures.append(statistic(values[places]))
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _T_975[count - 2])
    low, high = np.quantile(np.concatenate(figures), [tail, 1 - tail])
    return float(low), float(high)
