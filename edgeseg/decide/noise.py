"""In which interval a figure of a row could come out if the run were made again, on the same machine and data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgeseg.decide.entries import Entry
from edgeseg.evaluate.latency.batches import bootstrap_interval
from edgeseg.evaluate.latency.protocol import percentile_of_rows

Interval = tuple[float, float]


def of_mean(entry: Entry) -> Interval | None:
    """Of the mean of a call, milliseconds; ``None`` without raw samples."""
    return _of_samples(entry, lambda samples: np.asarray(samples.mean(axis=1)))


def of_percentile(percent: float) -> Callable[[Entry], Interval | None]:
    """Reads that of a percentile of a call, milliseconds."""
    return partial(_of_samples, statistic=partial(percentile_of_rows, percent=percent))


def of_rate(entry: Entry) -> Interval | None:
    """Of images per second, as the mean of a call lets them vary."""
    latency, mean_ms = entry.row.latency, of_mean(entry)
    if latency is None or mean_ms is None:
        return None
    images_in_mean = latency.images_per_s * latency.end_to_end.mean_ms
    return images_in_mean / mean_ms[1], images_in_mean / mean_ms[0]


def of_processes(entry: Entry) -> Interval | None:
    """Of a cold start: from the fastest to the slowest of a few fresh processes, which are too few for an interval."""
    cold = entry.row.cold_start
    return None if cold is None or len(cold.totals_ms) < 2 else (min(cold.totals_ms), max(cold.totals_ms))


def _of_samples(entry: Entry, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Interval | None:
    latency = entry.row.latency
    if latency is None or len(latency.samples_ms) < 2:
        return None
    return bootstrap_interval(np.asarray(latency.samples_ms, np.float64), statistic)
