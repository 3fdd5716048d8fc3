"""Counts and meters against plain loops over pixels, and their conventions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.boundary import boundary_band
from edgeseg.evaluate.accuracy.counts import MATRIX_CLASSES_LIMIT, AccuracyMeter, AgreementMeter, count_truth, optional
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.intervals import per_class
from edgeseg.store.manifest import AccuracyFigures

CLASSES = 4


def labels(rng: np.random.Generator, classes: int, shape: tuple[int, ...] = (13, 17)) -> NDArray[np.uint8]:
    """Blocky masks, so that there are both boundaries and interiors."""
    coarse = rng.integers(0, classes, (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 4)), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, 4, axis=-2), 4, axis=-1)[..., : shape[-2], : shape[-1]].copy()


def naive_band(
    mask: NDArray[np.integer], width: int, image_border: bool, ignore: int | None = None
) -> NDArray[np.bool_]:
    height, columns = mask.shape
    band = np.zeros(mask.shape, dtype=bool)
    for y, x in itertools.product(range(height), range(columns)):
        if mask[y, x] == ignore:
            continue
        for dy, dx in itertools.product(range(-width, width + 1), repeat=2):
            inside = 0 <= y + dy < height and 0 <= x + dx < columns
            if not inside:
                band[y, x] |= image_border
            elif mask[y + dy, x + dx] not in (mask[y, x], ignore):
                band[y, x] = True
    return band


def test_band_of_a_stack_is_the_stack_of_bands() -> None:
    stack = labels(np.random.default_rng(0), 3, (5, 9, 11))
    np.testing.assert_array_equal(boundary_band(stack), np.stack([boundary_band(m) for m in stack]))


@settings(max_examples=60, deadline=None)
@given(
    mask=hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(-1, 2)),
    width=st.integers(1, 4),
    border=st.booleans(),
)
def test_band_holds_for_any_small_mask(mask: NDArray[np.int32], width: int, border: bool) -> None:
    """Images smaller than the window, signed masks with -1 as "unlabelled"."""
    expected = naive_band(mask, width, border, -1)
    np.testing.assert_array_equal(boundary_band(mask, width, image_border=border, ignore_index=-1), expected)


def test_confusion_matrix_has_truth_in_rows() -> None:
    counted = count_truth(np.array([[0, 1, 1, 2]], np.uint8), np.array([[0, 0, 1, -1]], np.int32), 3)
    assert counted.confusion == ((0, 0, 1), (0, 1, 1), (1, 1, 1))
    assert (counted.right, counted.pixels, counted.ignored) == (2, 3, 1)


def test_counts_of_an_image_are_of_the_classes_it_shows() -> None:
    rng = np.random.default_rng(2)
    assert count_truth(labels(rng, 2), labels(rng, 2), CLASSES).classes == (0, 1)  # classes 2 and 3 never occur


def test_a_class_in_neither_mask_has_no_score_and_no_part_in_the_mean() -> None:
    meter = AccuracyMeter(4)
    meter.update(np.array([[0, 0, 1, 1]], np.uint8), np.array([[0, 0, 0, 1]], np.uint8))
    assert meter.figures().per_class_iou == (2 / 3, 0.5, None, None)
    assert meter.figures().miou == pytest.approx((2 / 3 + 0.5) / 2)
    assert meter.figures().dice == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_a_class_only_predicted_scores_zero() -> None:
    """Absent from the truth but predicted: a false alarm counts against the model."""
    meter = AccuracyMeter(2)
    meter.update(np.array([[0, 1]], np.uint8), np.array([[0, 0]], np.uint8))
    assert meter.figures().per_class_iou == (0.5, 0.0)


def test_binary_judges_the_foreground() -> None:
    meter = AccuracyMeter(1, "binary")
    meter.update(np.array([[1, 1, 0, 0, 1]], np.uint8), np.array([[1, 0, 1, 0, -1]], np.int32))
    assert meter.figures().per_class_iou == (1 / 3,)
    assert tuple(per_class("dice", meter.counts)) == (1 / 2,)
    assert meter.figures().pixel_accuracy == 0.5


def test_binary_without_any_foreground_has_no_iou_but_an_accuracy() -> None:
    meter = AccuracyMeter(1, "binary")
    meter.update(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8))
    assert meter.figures().miou is None
    assert meter.figures().pixel_accuracy == 1.0


def test_multilabel_is_one_binary_problem_per_plane() -> None:
    rng = np.random.default_rng(3)
    prediction, truth = labels(rng, 2, (3, 11, 9)), labels(rng, 2, (3, 11, 9)).astype(np.int32)
    truth[:, rng.random((11, 9)) < 0.1] = IGNORED
    planes = count_truth(prediction, truth, 3, "multilabel")
    single = [count_truth(p, t, 1, "binary") for p, t in zip(prediction, truth, strict=True)]
    assert planes.counts == tuple(row for one in single for row in one.counts)
    assert (planes.right, planes.pixels) == (sum(one.right for one in single), sum(one.pixels for one in single))


def test_more_classes_than_a_byte_holds() -> None:
    classes = MATRIX_CLASSES_LIMIT + 1
    counted = count_truth(
        np.array([[300, 1024, 300]], np.uint16), np.array([[300, 1024, 7]], np.uint16), classes, boundary_px=None
    )
    assert counted.confusion == ()
    assert counted.classes == (7, 300, 1024)
    assert [row[:3] for row in counted.counts] == [(0, 0, 1), (1, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), r"shape \(3, 2\) and the prediction \(2, 3\)"),
        (np.full((2, 2), 4, np.uint8), np.zeros((2, 2), np.uint8), r"prediction of a.png holds \[4\]"),
        (np.zeros((2, 2), np.uint8), np.full((2, 2), 7, np.uint8), r"mask of a.png holds \[7\]"),
        (np.zeros((2, 2), np.int32), np.full((2, 2), -2, np.int32), r"mask of a.png holds \[-2\]"),
        (np.zeros((1, 2, 2), np.uint8), np.zeros((1, 2, 2), np.uint8), "a multiclass mask is"),
    ],
)
def test_what_is_no_mask_is_refused(prediction: NDArray, truth: NDArray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AccuracyMeter(CLASSES).update(prediction, truth, "a.png")


def test_exactly_k_wrong_pixels_are_found() -> None:
    reference = np.zeros((10, 10), np.uint8)
    reference[:, 5:] = 1
    prediction = reference.copy()
    prediction[0, 0] = prediction[9, 9] = 1 - prediction[0, 0]  # one interior pixel wrong, one right
    prediction[4, 5] = 0  # one boundary pixel wrong
    meter = AgreementMeter(2)
    meter.update(prediction, reference)
    # The boundary is columns 3..6.
    assert (meter.agreement, meter.boundary, meter.interior) == (0.98, 1 - 1 / 40, 1 - 1 / 60)
    assert meter.per_class == (1 - 1 / 50, 1 - 1 / 50)


def test_agreement_without_images_or_boundaries_is_not_a_number_of_any_kind() -> None:
    meter = AgreementMeter(2)
    assert (meter.agreement, meter.boundary, meter.interior) == (None, None, None)
    meter.update(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8))
    assert (meter.agreement, meter.boundary, meter.interior, meter.per_class) == (1.0, None, 1.0, (1.0, None))


def test_masks_of_different_sizes_do_not_compare() -> None:
    with pytest.raises(InputError, match="one size"):
        AgreementMeter(2).update(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))


def test_no_score_is_none() -> None:
    assert optional(np.array([0.5, np.nan])) == (0.5, None)
    assert AccuracyMeter(2).figures() == AccuracyFigures()
