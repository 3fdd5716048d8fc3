"""Streaming range choice against plain numpy over all data at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgeseg.errors import SpecError
from edgeseg.quantize.ranges import (
    BINS,
    METHODS,
    MINIMUM_WIDTH,
    Histogram,
    RangeMethod,
    RangeStatistics,
    kl_divergences,
    range_method,
)

Array = NDArray[np.float32]

FINITE = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)
IMAGES = st.lists(hnp.arrays(np.float32, st.integers(1, 40), elements=FINITE), min_size=1, max_size=6)


def collect(images: list[Array], *, histogram: bool = True) -> RangeStatistics:
    statistics = RangeStatistics(histogram=Histogram() if histogram else None)
    for image in images:
        statistics.add(float(image.min()), float(image.max()), image)
    return statistics


def distributions() -> dict[str, Array]:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(60_000)
    tail = np.concatenate([normal, [40.0, -25.0, 60.0]])
    relu = np.maximum(rng.laplace(-0.5, 1.0, 60_000), 0)
    named = {
        "normal": normal,
        "laplace": rng.laplace(0.3, 2.0, 60_000),
        "outliers": tail,
        "relu": relu,
        "relu6": np.clip(6 * rng.standard_normal(60_000), 0, 6),
        "large": 1e6 * normal + 2e5,
        "small": 1e-3 * normal,
    }
    return {name: values.astype(np.float32) for name, values in named.items()}


DISTRIBUTIONS = distributions()


def by_distribution() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("values", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


@settings(deadline=None)
@given(IMAGES)
def test_histogram_is_that_of_all_values_at_once(images: list[Array]) -> None:
    histogram = collect(images).histogram
    assert histogram is not None
    values = np.concatenate(images).astype(np.float64)
    edges = histogram.edges()
    # numpy closes the last bin on the right; a value there would belong to a bin further on.
    expected, _ = np.histogram(values[values < edges[-1]], edges)
    assert (histogram.counts == expected).all()
    assert histogram.total == values.size
    assert histogram.zeros == (values == 0).sum()


def test_all_zero_image_does_not_coarsen_the_next() -> None:
    tiny = np.linspace(0, 1e-9, 100, dtype=np.float32)
    for images in ([np.zeros(5, np.float32), tiny], [tiny, np.zeros(5, np.float32)]):
        histogram = collect(images).histogram
        assert histogram is not None
        assert histogram.width < 1e-12


@settings(deadline=None)
@given(IMAGES)
def test_histogram_is_as_fine_as_its_bins_allow(images: list[Array]) -> None:
    histogram = collect(images).histogram
    assert histogram is not None
    values = np.concatenate(images).astype(np.float64)
    low, high, finer = values.min(), values.max(), histogram.width / 2
    bins_if_finer = math.floor(high / finer) - math.floor(low / finer) + 1
    exact_to = 2.0**23 * finer
    assert bins_if_finer > BINS or max(abs(low), abs(high)) >= exact_to or histogram.width == 2.0**-100


@settings(deadline=None)
@given(st.data(), IMAGES, st.sampled_from(sorted(METHODS)))
def test_order_of_images_does_not_matter(data: st.DataObject, images: list[Array], name: str) -> None:
    shuffled = data.draw(st.permutations(images))
    first, second = (range_method(name).choose(collect(order)) for order in (images, shuffled))
    if name == "moving-average":
        # A mean in float64: equal up to rounding, which is relative to the largest extreme that went in.
        scale = max(float(np.abs(image).max()) for image in images)
        assert first == pytest.approx(second, rel=1e-12, abs=1e-12 * scale)
    else:
        assert first == second


@settings(deadline=None)
@given(IMAGES, st.sampled_from(sorted(METHODS)))
def test_every_range_is_usable(images: list[Array], name: str) -> None:
    values = np.concatenate(images)
    low, high = range_method(name).choose(collect(images))
    assert low <= 0.0 <= high
    assert high - low >= MINIMUM_WIDTH * 0.999
    assert low >= min(float(values.min()), 0.0) - MINIMUM_WIDTH
    assert high <= max(float(values.max()), 0.0) + MINIMUM_WIDTH


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("constant", [0.0, 3.0, -3.0, 1e-9, -1e-9, 1e30])
def test_constant_tensor_has_a_range(name: str, constant: float) -> None:
    low, high = range_method(name).choose(collect([np.full(100, constant, np.float32)] * 3))
    # A range ends within the bin the constant is in, and a bin is at most 2^-22 of it.
    slack = abs(constant) * 2.0**-22
    assert low <= min(constant, 0.0) + slack
    assert high >= max(constant, 0.0) - slack
    assert high - low >= MINIMUM_WIDTH * 0.999


@by_distribution()
def test_minmax_is_exact(values: Array) -> None:
    low, high = range_method("minmax").choose(collect(np.array_split(values, 7), histogram=False))
    assert (low, high) == (min(float(values.min()), 0.0), max(float(values.max()), 0.0))


@by_distribution()
def test_moving_average_is_the_mean_of_extremes(values: Array) -> None:
    parts = np.array_split(values, 7)
    low, high = range_method("moving-average").choose(collect(parts, histogram=False))
    assert low == pytest.approx(np.mean([p.min() for p in parts], dtype=np.float64), rel=1e-12)
    assert high == pytest.approx(np.mean([p.max() for p in parts], dtype=np.float64), rel=1e-12)


@by_distribution()
@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99, 100.0])
def test_percentile_is_numpys_within_a_bin(values: Array, percentile: float) -> None:
    statistics = collect(np.array_split(values, 7))
    assert statistics.histogram is not None
    low, high = RangeMethod("percentile", {"percentile": percentile}).choose(statistics)
    cut = (100 - percentile) / 2
    for got, q in ((low, cut), (high, 100 - cut)):
        # One bin, and the two order statistics the rank lies between.
        slack = statistics.histogram.width
        near = [float(np.percentile(values.astype(np.float64), q, method=m)) for m in ("lower", "higher")]
        assert min(*near, 0.0) - slack <= got <= max(*near, 0.0) + slack
        if got != 0.0:
            assert near[0] - slack <= got <= near[1] + slack


def divergence_by_the_book(counts: NDArray[np.float64], size: int) -> float:
    """Migacz's pseudo-code, GTC 2017, for one candidate."""
    reference = counts[:size].copy()
    reference[-1] += counts[size:].sum()
    quantized = np.zeros(size)
    levels = [[j for j in range(size) if 128 * j // size == level] for level in range(128)]
    for members in levels:
        filled = [j for j in members if counts[j] > 0]
        for j in filled:
            quantized[j] = sum(counts[j] for j in filled) / len(filled)
    p, q = reference / reference.sum(), quantized / quantized.sum()
    if (q[p > 0] == 0).any():
        return math.inf
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


@settings(max_examples=15, deadline=None)
@given(st.integers(129, 400), st.floats(0.0, 0.9), st.integers(0, 2**32 - 1))
def test_divergences_follow_the_published_algorithm(bins: int, empty: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.floor(rng.exponential(1000 * np.exp(-np.arange(bins) / 60)))
    counts[rng.random(bins) < empty] = 0
    counts[0] = 5
    divergences, sizes = kl_divergences(counts)
    assert sizes[0] == 128
    assert sizes[-1] == bins
    for k in rng.choice(len(sizes), 4):
        assert divergences[k] == pytest.approx(divergence_by_the_book(counts, int(sizes[k])), rel=1e-9, abs=1e-9)


def test_entropy_cuts_outliers_and_keeps_a_uniform_range() -> None:
    low, high = range_method("entropy").choose(collect([DISTRIBUTIONS["outliers"]]))
    assert 3.0 < high < 12.0
    assert -12.0 < low < -3.0
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    low, high = range_method("entropy").choose(collect([uniform]))
    assert high > 0.95
    assert low < -0.95


def test_zeros_of_a_relu_do_not_move_the_entropy_threshold() -> None:
    positive = DISTRIBUTIONS["relu"][DISTRIBUTIONS["relu"] > 0]
    drowned = np.concatenate([positive, np.zeros(50 * positive.size, np.float32)])
    assert range_method("entropy").choose(collect([drowned])) == range_method("entropy").choose(collect([positive]))


def test_percentile_at_a_gap_leaves_the_cut_values_outside() -> None:
    values = np.repeat(np.array([-100.0, 1.0, 50.0], np.float32), [10, 980, 10])
    low, high = RangeMethod("percentile", {"percentile": 98.0}).choose(collect([values]))
    assert low == 0.0
    assert high == pytest.approx(1.0, rel=0.05)


def squared_error(values: Array, low: float, high: float) -> float:
    """Mean squared error of plain 8-bit asymmetric quantization of every value."""
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    levels = np.clip(np.round(values.astype(np.float64) / scale) + zero_point, 0, 255)
    return float(np.mean(((levels - zero_point) * scale - values) ** 2))


@by_distribution()
def test_mse_is_close_to_the_best_of_a_brute_force_search(values: Array) -> None:
    low, high = range_method("mse").choose(collect(np.array_split(values, 7)))
    lows = np.unique(np.linspace(0.04, 1, 16) * min(float(values.min()), 0.0))
    highs = np.unique(np.linspace(0.04, 1, 16) * max(float(values.max()), 0.0))
    best = min(squared_error(values, a, b) for a in lows for b in highs if b > a)
    assert squared_error(values, low, high) <= 1.05 * best


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'entropy'"):
        range_method("entrpy")
