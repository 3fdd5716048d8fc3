"""Which pixels lie at a boundary between classes: where quantization shows first, and where masks are judged by eye."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_BOUNDARY_PX = 2


def boundary_band(
    mask: NDArray[np.integer[Any]],
    width_px: int = DEFAULT_BOUNDARY_PX,
    *,
    image_border: bool = False,
    ignore_index: int | None = None,
) -> NDArray[np.bool_]:
    """Mark the pixels within ``width_px`` of a pixel of another class.

    A pixel is in the band when the ``(2 * width_px + 1)`` square window around it holds more than one class, that is
    when a pixel of another class is within Chebyshev distance ``width_px``. For one class this is its mask minus
    the mask eroded ``width_px`` times by a 3x3 square: the inner boundary region (``G_d`` intersected with ``G``) of
    Cheng, Girshick, Dollar, Berg and Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation"
    (CVPR 2021), here for all classes of a mask at once.

    Args:
        mask: integer ``(..., H, W)``; each leading index is a mask of its own.
        width_px: distance in pixels, at least 1. (The paper takes 2 % of the diagonal; a fixed small distance is what
            shows on an edge device's low resolutions.)
        image_border: also count pixels within ``width_px`` of the edge of the image, as the paper's code does.
        ignore_index: pixels of this value are no class: they neither make a boundary nor lie in the band.

    Returns:
        bool, of the shape of ``mask``.
    """
    if width_px < 1:
        raise ValueError(f"width_px is {width_px}; at least 1")
    high, low = mask, mask
    ignored: NDArray[np.bool_] | None = None
    if ignore_index is not None:
        ignored = np.asarray(mask == ignore_index)
        limits = np.iinfo(mask.dtype)
        high = np.where(ignored, mask.dtype.type(limits.min), mask)
        low = np.where(ignored, mask.dtype.type(limits.max), mask)
    band: NDArray[np.bool_] = _window(high, width_px, np.maximum) != _window(low, width_px, np.minimum)
    if image_border:
        band[..., :width_px, :] = band[..., -width_px:, :] = True
        band[..., :, :width_px] = band[..., :, -width_px:] = True
    if ignored is not None:
        band &= ~ignored
    return band


def contour_counts(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], valid: NDArray[np.bool_], tolerance_px: int
) -> tuple[int, int, int, int]:
    """Contour pixels of one class, and how many of them the other mask's contour confirms.

    The contour is the region's outermost pixels, those with another class within one pixel (the image's border makes no
    contour). A contour pixel is confirmed when one of the other contour lies within ``tolerance_px`` (Chebyshev). Precision
    and recall of these counts make the boundary F-score (Csurka, Larlus and Perronnin, "What is a good evaluation measure
    for semantic segmentation?", BMVC 2013; Perazzi et al., DAVIS, CVPR 2016).

    Args:
        prediction: bool ``(H, W)``: where the class is predicted.
        truth: bool ``(H, W)``: where it is true.
        valid: bool ``(H, W)``: labelled pixels; others neither lie on a contour nor make one.
        tolerance_px: pixels, at least 1.

    Returns:
        (predicted contour pixels, those confirmed, true contour pixels, those confirmed).
    """
    contours = []
    for region in (prediction, truth):
        coded = np.where(valid, region.astype(np.int8), np.int8(-1))
        contours.append(boundary_band(coded, 1, ignore_index=-1) & region & valid)
    predicted, wanted = contours
    near_wanted = _window(wanted, tolerance_px, np.logical_or)
    near_predicted = _window(predicted, tolerance_px, np.logical_or)
    counts = (predicted, predicted & near_wanted, wanted, wanted & near_predicted)
    return tuple(int(np.count_nonzero(c)) for c in counts)  # type: ignore[return-value]


def _window(values: NDArray[Any], radius: int, combine: np.ufunc) -> NDArray[Any]:
    """Maximum or minimum over a square window cut off at the image's edge (separable: rows, then columns)."""
    for axis in (-2, -1):
        source = np.moveaxis(values, axis, 0)
        result = source.copy()
        for step in range(1, min(radius, len(source) - 1) + 1):
            combine(result[step:], source[:-step], out=result[step:])
            combine(result[:-step], source[step:], out=result[:-step])
        values = np.moveaxis(result, 0, axis)
    return values
