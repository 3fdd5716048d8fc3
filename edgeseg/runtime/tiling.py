"""Joining the windows of an image that is larger than the engine.

Scores (logits, probabilities) of overlapping windows are blended with weights that fall linearly from the middle of a
window to its border, where a network sees least context. Weights are separable and normalized, so that they add up to
one at every pixel. Class indices cannot be averaged: each pixel is taken from the window whose centre is nearest
along each axis (the upper, the left one of two equally near), which cuts every overlap in the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.images.placement import Tiling

RunRow = Callable[[int, range], Iterable[tuple[int, Mapping[str, NDArray[Any]]]]]
"""Runs windows of one row of a tiling, given its index and columns; yields the column and the outputs, without a batch
axis, of one window after the other. A window that is left out counts as zeros."""


@dataclass(frozen=True)
class Part:
    """What of a tiling is asked for: some of its rows of windows and some of its columns.

    Windows beside these that reach into the part are run as well where scores are blended, so that the parts of an image
    are what the whole would be.
    """

    rows: range
    columns: range

    @classmethod
    def all_of(cls, tiling: Tiling) -> Part:
        """The whole image."""
        return cls(range(len(tiling.tops)), range(len(tiling.lefts)))


@dataclass(frozen=True)
class Strip:
    """A finished piece of the image.

    Attributes:
        row: of windows; one strip is finished with each.
        rows, columns: of the image.
        outputs: by name ``(..., rows, columns)``, owned by the receiver; without a name of which no window was run yet.
    """

    row: int
    rows: slice
    columns: slice
    outputs: dict[str, NDArray[Any]]


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


def boundaries(starts: tuple[int, ...], window: int, length: int, *, blended: bool) -> tuple[int, ...]:
    """Where the pieces begin and end along one axis, that each row of windows finishes, or each column of a part."""
    return (*starts, length) if blended else cuts(starts, window, length)


def blended_strips(run: RunRow, tiling: Tiling, names: Sequence[str], part: Part | None = None) -> Iterator[Strip]:
    """Run the windows of a part and yield the blended float32 outputs ``(C, rows, columns)`` from top to bottom.

    Only one row of windows is held at a time, so memory grows with the width of the part, not with its area.
    """
    part = Part.all_of(tiling) if part is None else part
    (height, width), (window_height, window_width) = tiling.source, tiling.window
    down = blend_weights(tiling.tops, window_height, height)
    across = blend_weights(tiling.lefts, window_width, width)
    ends = (*tiling.tops[1:], height)
    begin, end = tiling.lefts[part.columns.start], (*tiling.lefts, max(width, window_width))[part.columns.stop]
    columns = range(_reaching(tiling.lefts, window_width, begin), part.columns.stop)
    bands: dict[str, NDArray[np.float32]] = {}
    for row in range(_reaching(tiling.tops, window_height, tiling.tops[part.rows.start]), part.rows.stop):
        for column, outputs in run(row, columns):
            left = tiling.lefts[column]
            inside = slice(max(begin - left, 0), min(end - left, window_width))
            to = slice(left + inside.start - begin, left + inside.stop - begin)
            weight = down[row][:, None] * across[column][inside]
            for name in names:
                scores = outputs[name]
                if name not in bands:
                    bands[name] = np.zeros((len(scores), window_height, end - begin), np.float32)
                bands[name][:, :, to] += scores[:, :, inside] * weight
        done = ends[row] - tiling.tops[row]
        if row in part.rows:
            where = slice(tiling.tops[row], ends[row]), slice(begin, min(end, width))
            whole = slice(0, where[1].stop - begin)
            yield Strip(row, *where, {name: band[:, :done, whole].copy() for name, band in bands.items()})
        for band in bands.values():
            band[:, : window_height - done] = band[:, done:].copy()
            band[:, window_height - done :] = 0.0


def stitched_strips(run: RunRow, tiling: Tiling, names: Sequence[str], part: Part | None = None) -> Iterator[Strip]:
    """Run the windows of a part and yield their outputs, ``(..., H, W)`` of any dtype, cut together, from top to bottom."""
    part = Part.all_of(tiling) if part is None else part
    rows = cuts(tiling.tops, tiling.window[0], tiling.source[0])
    columns = cuts(tiling.lefts, tiling.window[1], tiling.source[1])
    begin, end = columns[part.columns.start], columns[part.columns.stop]
    for row in part.rows:
        height, top = rows[row + 1] - rows[row], rows[row] - tiling.tops[row]
        strip = Strip(row, slice(rows[row], rows[row + 1]), slice(begin, end), {})
        for column, outputs in run(row, part.columns):
            left = tiling.lefts[column]
            here = slice(columns[column] - left, columns[column + 1] - left)
            for name in names:
                window = outputs[name]
                if name not in strip.outputs:
                    strip.outputs[name] = np.zeros((*window.shape[:-2], height, end - begin), window.dtype)
                to = slice(columns[column] - begin, columns[column + 1] - begin)
                strip.outputs[name][..., to] = window[..., top : top + height, here]
        yield strip


def joined(strips: Iterable[tuple[slice, Mapping[str, NDArray[Any]]]], height: int) -> dict[str, NDArray[Any]]:
    """Arrays ``(..., height, W)`` from those of all strips, each with its rows."""
    whole: dict[str, NDArray[Any]] = {}
    for rows, arrays in strips:
        for name, array in arrays.items():
            if name not in whole:
                whole[name] = np.empty((*array.shape[:-2], height, array.shape[-1]), array.dtype)
            whole[name][..., rows, :] = array
    return whole


def _reaching(starts: tuple[int, ...], window: int, pixel: int) -> int:
    """The first window that holds ``pixel`` or one after it."""
    return next(index for index, start in enumerate(starts) if start + window > pixel)
