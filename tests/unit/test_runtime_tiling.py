"""Windows over large images, and joining what the engine says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseg.images.placement import Tiling, plan_fit
from edgeseg.runtime.tiling import Part, RunRow, blend_weights, blended_strips, cuts, joined, stitched_strips
from edgeseg.spec import InputSpec

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 70))
OVERLAPS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75])
WINDOWS = st.tuples(st.integers(1, 20), st.integers(1, 20))


def tiling_of(size: tuple[int, int], window: tuple[int, int], overlap: float) -> Tiling:
    plan = plan_fit(*size, InputSpec(*window, stride=1, fit="tile"), overlap)
    if isinstance(plan, Tiling):
        return plan
    return Tiling(size, window, (0,), (0,))


@settings(max_examples=60, deadline=None)
@given(size=SIZES, window=WINDOWS, overlap=OVERLAPS)
def test_windows_cover_the_image_with_the_overlap_asked_for(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    tiling = tiling_of(size, window, overlap)
    for starts, length, extent in zip((tiling.tops, tiling.lefts), size, window, strict=True):
        assert starts[0] == 0
        if length <= extent:
            assert starts == (0,)
            continue
        assert starts[-1] + extent == length
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert steps.max() <= max(1, int(extent * (1 - overlap)))


@settings(max_examples=60, deadline=None)
@given(size=SIZES, window=WINDOWS, overlap=OVERLAPS)
def test_weights_add_up_to_one_and_are_positive(size: tuple[int, int], window: tuple[int, int], overlap: float) -> None:
    tiling = tiling_of(size, window, overlap)
    weights = blend_weights(tiling.tops, window[0], size[0])
    total = np.zeros(max(size[0], window[0]))
    for start, weight in zip(tiling.tops, weights, strict=True):
        total[start : start + window[0]] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (weights > 0).all()


@settings(max_examples=60, deadline=None)
@given(size=SIZES, window=WINDOWS, overlap=OVERLAPS)
def test_each_pixel_comes_from_the_window_with_the_nearest_centre(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    tiling = tiling_of(size, window, overlap)
    boundaries = cuts(tiling.tops, window[0], size[0])
    centres = [start + (window[0] - 1) / 2 for start in tiling.tops]
    for pixel in range(size[0]):
        used = next(i for i in range(len(centres)) if boundaries[i] <= pixel < boundaries[i + 1])
        nearest = min(range(len(centres)), key=lambda i: (abs(centres[i] - pixel), i))
        assert used == nearest


def each(windows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """An engine that looks at each pixel by itself."""
    for window in windows:
        yield {
            "mask": (window[..., 0] % 7).astype(np.uint8),
            "planes": (window % 2).transpose(2, 0, 1),
            "logits": window.transpose(2, 0, 1).astype(np.float32),
        }


def runs(image: np.ndarray, tiling: Tiling, run: Callable[[np.ndarray], Iterable[dict[str, np.ndarray]]]) -> RunRow:
    padded = tiling.pad(image)

    def row(index: int, columns: range) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        yield from zip(columns, run(tiling.row(padded, index)[columns.start : columns.stop]), strict=True)

    return row


@settings(max_examples=60, deadline=None)
@given(size=SIZES, window=WINDOWS, overlap=OVERLAPS, seed=st.integers(0, 9))
def test_tiles_of_a_per_pixel_engine_equal_the_whole(
    size: tuple[int, int], window: tuple[int, int], overlap: float, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    tiling = tiling_of(size, window, overlap)
    (whole,) = each(image[None])
    run = runs(image, tiling, each)
    parts = joined(((strip.rows, strip.outputs) for strip in stitched_strips(run, tiling, ("mask", "planes"))), size[0])
    np.testing.assert_array_equal(parts["mask"], whole["mask"])
    np.testing.assert_array_equal(parts["planes"], whole["planes"])
    strips = list(blended_strips(run, tiling, ("logits",)))
    assert [strip.rows.start for strip in strips] == list(tiling.tops)
    assert strips[-1].rows.stop == size[0]
    logits = np.concatenate([strip.outputs["logits"] for strip in strips], axis=1)
    np.testing.assert_allclose(logits, whole["logits"], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, window=WINDOWS, overlap=OVERLAPS, pieces=st.integers(1, 5), seed=st.integers(0, 9))
def test_parts_are_what_the_whole_would_be(
    size: tuple[int, int], window: tuple[int, int], overlap: float, pieces: int, seed: int
) -> None:
    """To the bit, for windows that disagree; and each pixel belongs to one part."""
    tiling = tiling_of(size, window, overlap)
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)

    def run(row: int, columns: range) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for column in columns:
            scores = np.random.default_rng((seed, row, column)).normal(size=(2, *window)).astype(np.float32)
            yield column, {"logits": scores, "mask": (scores[0] > 0).astype(np.uint8)}

    for strips_of, name in ((blended_strips, "logits"), (stitched_strips, "mask")):
        whole = np.concatenate([strip.outputs[name] for strip in strips_of(run, tiling, (name,))], axis=-2)
        together = np.full_like(whole, 77)
        for rows in split(len(tiling.tops), pieces):
            for columns in split(len(tiling.lefts), pieces):
                for strip in strips_of(run, tiling, (name,), Part(rows, columns)):
                    assert (together[..., strip.rows, strip.columns] == 77).all()
                    together[..., strip.rows, strip.columns] = strip.outputs[name]
        np.testing.assert_array_equal(together, whole)
        assert whole.shape[-2:] == image.shape[:2]


def split(count: int, pieces: int) -> list[range]:
    step = -(-count // pieces)
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), window=st.tuples(st.integers(2, 8), st.integers(2, 8)))
def test_disagreeing_windows_are_blended_by_distance_from_their_border(
    size: tuple[int, int], window: tuple[int, int]
) -> None:
    """Against the definition: a weighted mean over all windows that hold a pixel, computed pixel by pixel."""
    tiling = tiling_of(size, window, 0.5)
    places = [(top, left) for top in tiling.tops for left in tiling.lefts]
    values = np.random.default_rng(1).normal(size=(len(places), 2, *window)).astype(np.float32)
    answers = iter(values)

    def run(windows: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        for _ in windows:
            yield {"logits": next(answers)}

    image = np.zeros((*size, 3), np.uint8)
    strips = blended_strips(runs(image, tiling, run), tiling, ("logits",))
    blended = np.concatenate([strip.outputs["logits"] for strip in strips], axis=1)
    for y in range(size[0]):
        for x in range(size[1]):
            total, mean = 0.0, np.zeros(2)
            for (top, left), scores in zip(places, values, strict=True):
                if top <= y < top + window[0] and left <= x < left + window[1]:
                    to_border = [min(p + 1, n - p) for p, n in ((y - top, window[0]), (x - left, window[1]))]
                    total += to_border[0] * to_border[1]
                    mean += to_border[0] * to_border[1] * scores[:, y - top, x - left]
            np.testing.assert_allclose(blended[:, y, x], mean / total, atol=1e-4)
