"""Joining the windows of an image that is larger than the engine.

Scores (logits, probabilities) of overlapping windows are blended with weights that fall linearly from the middle of a
window to its border, where a network sees least context. Weights are separable and normalized, so that they add up to
one at every pixel. Class indices cannot be averaged: each pixel is taken from the window whose centre is nearest
along each axis (the upper, the left one of two equally near), which cuts every overlap in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.images.placement import Tiling

RunWindows = Callable[[NDArray[Any]], Iterable[Mapping[str, NDArray[Any]]]]
"""Runs ``(windows, H, W, C)`` and yields the outputs of one window after the other, without a batch axis."""


def blend_weights(starts: tuple[int, ...], window: int, length: int) -> NDArray[np.float32]:
    """Weight of each pixel of each window along one axis, ``(windows, window)``; at any pixel they add up to one."""
    position = np.arange(window)
    ramp = np.minimum(position + 1, window - position).astype(np.float64)
    total = np.zeros(max(length, window))
    for start in starts:
        total[start : start + window] += ramp
    return np.stack([ramp / total[start : start + window] for start in starts]).astype(np.float32)


def cuts(starts: tuple[int, ...], window: int, length: int) -> tuple[int, ...]:
    """Boundaries between the windows along one axis: window ``i`` provides pixels ``cuts[i]`` up to ``cuts[i + 1]``.

    Pixel ``p`` is nearer to the centre of window ``i + 1`` than of window ``i`` from the middle of their overlap on.
    """
    middles = ((first + second + window + 1) // 2 for first, second in pairwise(starts))
    return (0, *middles, length)


def blended_rows(
    image: NDArray[Any], tiling: Tiling, run: RunWindows, names: tuple[str, ...]
) -> Iterator[tuple[slice, dict[str, NDArray[np.float32]]]]:
    """Run every window of ``image`` and yield the blended float outputs from top to bottom.

    Only one row of windows is held at a time, so memory grows with the width of the image, not with its area.

    Yields:
        rows of the image that are finished, and per output ``(C, rows, W)`` float32, owned by the receiver.
    """
    padded = tiling.pad(image)
    (height, width), (window_height, window_width) = tiling.source, tiling.window
    down = blend_weights(tiling.tops, window_height, height)
    across = blend_weights(tiling.lefts, window_width, width)
    bands: dict[str, NDArray[np.float32]] = {}
    ends = (*tiling.tops[1:], height)
    for index, (top, end) in enumerate(zip(tiling.tops, ends, strict=True)):
        for column, outputs in enumerate(run(tiling.row(padded, index))):
            weight = down[index][:, None] * across[column]
            left = tiling.lefts[column]
            for name in names:
                scores = outputs[name]
                if name not in bands:
                    bands[name] = np.zeros((len(scores), window_height, padded.shape[1]), np.float32)
                bands[name][:, :, left : left + window_width] += scores * weight
        done = end - top
        yield slice(top, end), {name: band[:, :done, :width].copy() for name, band in bands.items()}
        for band in bands.values():
            band[:, : window_height - done] = band[:, done:].copy()
            band[:, window_height - done :] = 0.0


def stitched(image: NDArray[Any], tiling: Tiling, run: RunWindows, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Run every window of ``image`` and cut its outputs, ``(..., H, W)`` of any dtype, together at source size."""
    padded = tiling.pad(image)
    height, width = tiling.source
    rows = cuts(tiling.tops, tiling.window[0], height)
    columns = cuts(tiling.lefts, tiling.window[1], width)
    whole: dict[str, NDArray[Any]] = {}
    for index, top in enumerate(tiling.tops):
        for column, outputs in enumerate(run(tiling.row(padded, index))):
            left = tiling.lefts[column]
            to = (..., slice(rows[index], rows[index + 1]), slice(columns[column], columns[column + 1]))
            here = (
                ...,
                slice(rows[index] - top, rows[index + 1] - top),
                slice(columns[column] - left, columns[column + 1] - left),
            )
            for name in names:
                part = outputs[name]
                if name not in whole:
                    whole[name] = np.empty((*part.shape[:-2], height, width), part.dtype)
                whole[name][to] = part[here]
    return whole
