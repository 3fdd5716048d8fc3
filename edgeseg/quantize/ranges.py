"""How a range is chosen from what a tensor did: the calibration methods, all on streaming statistics.

Every method works on the exact extremes and on a :class:`Histogram` that widens as images come, so one pass over the
images is enough and nothing grows with their number.

- ``minmax``: the extremes.
- ``moving-average``: the mean over images of each image's extremes (the cumulative moving average; unlike an
  exponential one it does not depend on the order of the images). Jacob et al., "Quantization and Training of Neural
  Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.1.
- ``percentile``: the central share of the values, half of the rest cut at either end. McKinstry et al., "Discovering
  Low-Precision Networks Close to Full-Precision Networks", 2018; ONNX Runtime's percentile calibrator.
- ``entropy``: the threshold on ``|x|`` whose 128-level quantization loses least information (Kullback-Leibler
  divergence). Migacz, "8-bit Inference with TensorRT", GTC 2017; as in NVIDIA's pytorch-quantization, the bin next
  to zero is evened out because the zeros of a ReLU would drown the rest.
- ``mse``: the range of least expected squared error under 8 bits, each end searched by itself. Sung et al.,
  "Resiliency of Deep Neural Networks under Quantization", 2015; Banner et al., "Post Training 4-bit Quantization",
  NeurIPS 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import one_of

BINS = 8192
"""Bins of a histogram. Widths are powers of two, so between 4097 and 8192 of them span the range seen."""

MINIMUM_WIDTH = 1e-5
"""Narrowest range a method returns: what a constant zero becomes."""

PERCENTILE = 99.99
"""Percent of the values that method ``percentile`` leaves inside."""

_KL_BINS = 2048
_KL_LEVELS = 128
_KL_STEP = 4
_MSE_CANDIDATES = 128
_MSE_LEVELS = 255
_MIN_EXPONENT = -100
_FLOAT_BITS = 23


class Histogram:
    """Counts of float32 values in equal bins that start at multiples of their width, a power of two.

    When a value falls outside, the width doubles as often as needed and neighbours merge. Bins of width ``2w`` are
    exactly pairs of bins of width ``w``, and the width depends on the extremes alone: the result is the histogram
    of all values at once, bit for bit, in whatever order they came. A fixed range would need a first pass, and
    clipping to the first image's range loses tails.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.zeros = 0
        self._exponent = _MIN_EXPONENT
        self._first = 0
        self._low = math.inf
        self._high = -math.inf

    @property
    def width(self) -> float:
        """Width of a bin, in the values' units."""
        return math.ldexp(1.0, self._exponent)

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def add(self, values: NDArray[np.float32], low: float, high: float) -> None:
        """Count ``values``, any shape, all finite and within ``[low, high]``; the range grows to hold both."""
        self._grow(min(low, self._low), max(high, self._high))
        # Scaling a float32 by a power of two is exact in float64, so the floor is the true bin.
        position = np.floor(np.multiply(values.reshape(-1), 1.0 / self.width, dtype=np.float64))
        position -= self._first
        self.counts += np.bincount(position.astype(np.intp), minlength=BINS)
        self.zeros += values.size - int(np.count_nonzero(values))

    def edges(self) -> NDArray[np.float64]:
        """Lower edges of all bins, and the upper edge of the last: ``BINS + 1`` values."""
        return (self._first + np.arange(BINS + 1, dtype=np.float64)) * self.width

    def folded(self, bins: int) -> tuple[NDArray[np.int64], float]:
        """Counts of ``|x|`` in at most ``bins`` (a power of two) bins from 0 up, and the width of those bins."""
        used = np.flatnonzero(self.counts)
        index = used.astype(np.int64) + self._first
        magnitude = np.where(index >= 0, index, -index - 1)
        shift = max(0, int(magnitude.max(initial=0)).bit_length() - (bins.bit_length() - 1))
        counts = np.bincount(magnitude >> shift, weights=self.counts[used])
        return counts.astype(np.int64), math.ldexp(self.width, shift)

    def _grow(self, low: float, high: float) -> None:
        if (low, high) == (self._low, self._high):
            return
        self._low, self._high = low, high
        exponent = max(self._exponent, _least_exponent(low, high))
        first = math.floor(math.ldexp(low, -exponent))
        if (exponent, first) == (self._exponent, self._first):
            return
        used = np.flatnonzero(self.counts)
        if used.size:
            # Arithmetic shift is division rounded down, for negative positions too.
            moved = ((used + self._first) >> (exponent - self._exponent)) - first
            self.counts = np.bincount(moved, weights=self.counts[used], minlength=BINS).astype(np.int64)
        self._exponent, self._first = exponent, first


def _least_exponent(low: float, high: float) -> int:
    """Smallest power of two whose bins hold ``[low, high]`` in ``BINS`` bins, with positions exact in float32."""
    # frexp gives the power of two above a number; zero has none, and must not hold back a first, all-zero image.
    bounds = ((max(abs(low), abs(high)), _FLOAT_BITS), (high - low, BINS.bit_length()))
    exponent = max([_MIN_EXPONENT, *(math.frexp(value)[1] - bits for value, bits in bounds if value)])
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


@dataclass
class RangeStatistics:
    """What is kept of one tensor while images stream by.

    Attributes:
        minimum, maximum: exact extremes over all images.
        histogram: of a sample of the values, for methods that need it.
    """

    minimum: float = math.inf
    maximum: float = -math.inf
    images: int = 0
    sum_of_minima: float = 0.0
    sum_of_maxima: float = 0.0
    histogram: Histogram | None = None

    def add(self, low: float, high: float, sample: NDArray[np.float32] | None) -> None:
        """Take in one image: its exact extremes and, for a histogram, a sample of its values."""
        self.minimum = min(self.minimum, low)
        self.maximum = max(self.maximum, high)
        self.sum_of_minima += low
        self.sum_of_maxima += high
        self.images += 1
        if self.histogram is not None and sample is not None:
            self.histogram.add(sample, low, high)


@dataclass(frozen=True)
class RangeMethod:
    """A calibration method with its options.

    Attributes:
        name: a key of :data:`METHODS`.
        options: its numbers, as recorded in the table.
    """

    name: str
    options: dict[str, float] = field(default_factory=dict)

    @property
    def needs_histogram(self) -> bool:
        return self.name not in {"minmax", "moving-average"}

    def choose(self, statistics: RangeStatistics) -> tuple[float, float]:
        """Return the range to quantize: within the extremes, but always with 0 in it and never empty."""
        low, high = METHODS[self.name](statistics, self.options)
        return _usable(max(low, statistics.minimum), min(high, statistics.maximum))


def range_method(name: str) -> RangeMethod:
    """The method of a name, a key of :data:`METHODS`. Raises :class:`SpecError` for another."""
    one_of("calibration method", name, tuple(METHODS))
    return RangeMethod(name, {"percentile": PERCENTILE} if name == "percentile" else {})


def _usable(low: float, high: float) -> tuple[float, float]:
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low >= MINIMUM_WIDTH:
        return low, high
    return (low, low + MINIMUM_WIDTH) if high > 0 or low == 0 else (high - MINIMUM_WIDTH, high)


def _minmax(statistics: RangeStatistics, options: dict[str, float]) -> tuple[float, float]:
    return statistics.minimum, statistics.maximum


def _moving_average(statistics: RangeStatistics, options: dict[str, float]) -> tuple[float, float]:
    return statistics.sum_of_minima / statistics.images, statistics.sum_of_maxima / statistics.images


def _percentile(statistics: RangeStatistics, options: dict[str, float]) -> tuple[float, float]:
    histogram = _histogram(statistics)
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    cut = (100.0 - options["percentile"]) / 200.0 * cumulative[-1]
    # Empty bins repeat a cumulative count; the last of equals is the low end, the first the high end.
    edges, total = histogram.edges(), cumulative[-1]
    low_bin = int(np.searchsorted(cumulative, cut, side="right")) - 1
    high_bin = int(np.searchsorted(cumulative, total - cut, side="left"))
    low = _interpolate(edges, cumulative, low_bin, cut)
    return low, _interpolate(edges, cumulative, high_bin - 1, total - cut)


def _interpolate(edges: NDArray[np.float64], cumulative: NDArray[np.float64], index: int, rank: float) -> float:
    count = cumulative[index + 1] - cumulative[index]
    share = (rank - cumulative[index]) / count if count else 0.0
    return float(edges[index] + share * (edges[index + 1] - edges[index]))


def _entropy(statistics: RangeStatistics, options: dict[str, float]) -> tuple[float, float]:
    folded, width = _histogram(statistics).folded(_KL_BINS)
    counts = folded.astype(np.float64)
    if counts.size <= _KL_LEVELS:
        return statistics.minimum, statistics.maximum
    counts[0] = counts[1]
    divergence, sizes = kl_divergences(counts)
    if not np.isfinite(divergence).any():
        return statistics.minimum, statistics.maximum
    threshold = float(sizes[int(np.argmin(divergence))]) * width
    return -threshold, threshold


def kl_divergences(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Divergence between a clipped distribution and its 128-level quantization, for every candidate number of bins.

    For a candidate of ``i`` bins the reference is the first ``i`` with all that lies beyond added to the last; the
    quantized one spreads each level's count evenly over the level's non-empty bins. All from prefix sums, so that a
    candidate costs 128 steps and not ``i``.

    Args:
        counts: float64 ``(bins,)``, more than 128.

    Returns:
        divergence in nats, float64 ``(candidates,)`` (infinite where the last bin is empty but has mass beyond it), and
        the candidates, int64 ``(candidates,)``.
    """
    sizes = np.unique(np.append(np.arange(_KL_LEVELS, counts.size, _KL_STEP), counts.size)).astype(np.int64)
    mass, filled = _prefix(counts), _prefix(counts > 0)
    entropy_terms = _prefix(_x_log_x(counts))
    # First bin of each level: bin j of i belongs to level floor(128 * j / i).
    bounds = -(-np.arange(_KL_LEVELS + 1)[None, :] * sizes[:, None] // _KL_LEVELS)
    level_mass = np.diff(mass[bounds], axis=1)
    level_filled = np.diff(filled[bounds], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_level = np.where(level_mass > 0, np.log(level_mass / level_filled), 0.0)
    last, beyond, kept = counts[sizes - 1], mass[-1] - mass[sizes], mass[sizes]
    p_log_p = entropy_terms[sizes - 1] + _x_log_x(last + beyond)
    p_log_q = (level_mass * log_level).sum(axis=1) + beyond * log_level[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = (p_log_p - p_log_q) / mass[-1] - np.log(mass[-1]) + np.log(kept)
    impossible = (kept == 0) | ((last == 0) & (beyond > 0))
    return np.where(impossible, np.inf, divergence), sizes


def _mse(statistics: RangeStatistics, options: dict[str, float]) -> tuple[float, float]:
    histogram = _histogram(statistics)
    edges = histogram.edges()
    centres = (edges[:-1] + edges[1:]) / 2
    shares = np.arange(1, _MSE_CANDIDATES + 1) / _MSE_CANDIDATES
    lows, highs = min(statistics.minimum, 0.0) * shares, max(statistics.maximum, 0.0) * shares
    if lows[-1] == highs[-1]:
        return 0.0, 0.0
    lows, highs = np.unique(lows), np.unique(highs)
    counts = histogram.counts.astype(np.float64)
    above = _clip_error(centres, counts, highs)
    below = _clip_error(-centres[::-1], counts[::-1], -lows)
    # Zero is on the grid of every candidate; all else carries the error of a uniform grid, step^2 / 12.
    step = (highs[None, :] - lows[:, None]) / _MSE_LEVELS
    error = above[None, :] + below[:, None] + (histogram.total - histogram.zeros) * step**2 / 12
    row, column = np.unravel_index(int(np.argmin(error)), error.shape)
    return float(lows[row]), float(highs[column])


def _clip_error(
    centres: NDArray[np.float64], counts: NDArray[np.float64], limits: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum of ``(x - limit)^2`` over the values above each limit, from suffix sums of moments."""
    zeroth, first, second = (_prefix((counts * centres**power)[::-1])[::-1] for power in range(3))
    start = np.searchsorted(centres, limits, side="right")
    return np.asarray(second[start] - 2 * limits * first[start] + limits**2 * zeroth[start])


def _prefix(values: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values * np.log(np.where(values > 0, values, 1.0)))


def _histogram(statistics: RangeStatistics) -> Histogram:
    if statistics.histogram is None:
        raise ValueError("this method needs statistics collected with a histogram")
    return statistics.histogram


METHODS: dict[str, Callable[[RangeStatistics, dict[str, float]], tuple[float, float]]] = {
    "minmax": _minmax,
    "moving-average": _moving_average,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
"""The calibration methods, by the name ``--calibration-method`` takes."""
