"""Accuracy figures from per-image counts, with bootstrap intervals over the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.evaluate.results import AccuracyVerdict, Drop, Interval

RESAMPLES = 1000
MIN_IMAGES = 5
"""With fewer images a drop is not judged: resampling three images says nothing about the next one."""
SAME_WITHIN = 0.01
"""Two scores are called the same when the whole interval of their difference lies within a point."""
METRICS = ("miou", "dice", "pixel_accuracy", "boundary_iou", "boundary_f")
COLUMNS = 9
"""True positives, false positives, false negatives; boundary intersection and union; predicted contour pixels and those
confirmed; true contour pixels and those confirmed."""


@dataclass(frozen=True)
class Counts:
    """What one model's masks add up to, image by image.

    Whole numbers as float64, where BLAS is: counts of pixels are far below 2**53, so their sums are exact.

    Attributes:
        classes: ``(N, K, COLUMNS)``.
        right: ``(N,)``: pixels whose class is right.
        pixels: ``(N,)``: labelled pixels.
    """

    classes: NDArray[np.float64]
    right: NDArray[np.float64]
    pixels: NDArray[np.float64]

    def totals(self, weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Sums over images, each counted ``weights`` ``(R, N)`` times: ``(R, K, COLUMNS)``, ``(R,)``, ``(R,)``."""
        images, classes, columns = self.classes.shape
        times = weights.astype(np.float64)
        summed = times @ self.classes.reshape(images, -1)
        return summed.reshape(len(weights), classes, columns), times @ self.right, times @ self.pixels


def per_class(metric: str, totals: NDArray[Any]) -> NDArray[np.float64]:
    """A score per class from totals ``(..., K, COLUMNS)``; NaN where a class occurs in neither masks nor predictions."""
    tp, fp, fn, edge_hits, edge_union, predicted, predicted_right, wanted, wanted_right = np.moveaxis(totals, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "miou":
            return np.asarray(tp / (tp + fp + fn))
        if metric == "dice":
            return np.asarray(2 * tp / (2 * tp + fp + fn))
        if metric == "boundary_iou":
            return np.asarray(edge_hits / edge_union)
        if metric != "boundary_f":
            raise ValueError(f"no score per class: {metric}")
        # A class with a contour on one side only has precision or recall 0; without any it has no score.
        precision = np.where(predicted > 0, predicted_right / np.maximum(predicted, 1), 0.0)
        recall = np.where(wanted > 0, wanted_right / np.maximum(wanted, 1), 0.0)
        score = np.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0.0)
        return np.where(predicted + wanted > 0, score, np.nan)


def figure(metric: str, totals: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]) -> NDArray[np.float64]:
    """One of :data:`METRICS` for each of R totals, ``(R,)``: the mean over classes that occur (pixel accuracy: of pixels)."""
    classes, right, pixels = totals
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "pixel_accuracy":
            return np.asarray(right / pixels)
        scores = per_class(metric, classes)
        known = ~np.isnan(scores)
        return np.asarray(np.where(known, scores, 0.0).sum(axis=-1) / known.sum(axis=-1))


def interval(images: int, statistic: Callable[[NDArray[Any]], NDArray[Any]]) -> Interval | None:
    """95 % percentile-bootstrap interval over images; ``None`` where the statistic has no value.

    Args:
        images: N.
        statistic: weights ``(R, N)`` -> R values, NaN for none. All ones give the figure itself.
    """
    value = float(statistic(np.ones((1, images), np.int64))[0])
    if np.isnan(value):
        return None
    # Always the same, so that the resamples of figures that are compared are paired.
    rng = np.random.default_rng(0)
    # Memory stays at some ten MB for any number of images.
    step = max(1, 1_000_000 // images)
    samples = []
    for start in range(0, RESAMPLES, step):
        weights = rng.multinomial(images, np.full(images, 1.0 / images), size=min(step, RESAMPLES - start))
        samples.append(statistic(weights))
    values = np.concatenate(samples)
    low, high = np.percentile(values[~np.isnan(values)], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def drops(baseline_name: str, baseline: Counts, engine: Counts) -> tuple[Drop, ...]:
    """What is lost against the baseline on the same images, each metric with the interval of the paired difference."""
    images = len(engine.right)
    if images < MIN_IMAGES:
        return ()
    result = []
    for metric in METRICS:

        def difference(weights: NDArray[Any], metric: str = metric) -> NDArray[Any]:
            return figure(metric, baseline.totals(weights)) - figure(metric, engine.totals(weights))

        lost = interval(images, difference)
        if lost is not None:
            is_same = lost.low >= -SAME_WITHIN and lost.high <= SAME_WITHIN
            verdict: AccuracyVerdict = "no difference" if is_same else "cannot tell"
            if not lost.low <= 0.0 <= lost.high:
                verdict = "loss" if lost.value > 0 else "gain"
            result.append(Drop(baseline_name, metric, lost, verdict))
    return tuple(result)
