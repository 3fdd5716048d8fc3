"""A mask against the truth or against another model's mask: the counts every accuracy figure is made of.

Meters sum them over images, so that no image stays in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.boundary import DEFAULT_BOUNDARY_PX, boundary_band, contour_counts
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.intervals import COLUMNS, figure, per_class
from edgeseg.spec import Task
from edgeseg.store.manifest import AccuracyFigures

MATRIX_CLASSES_LIMIT = 1024
"""Above this many classes the full confusion matrix (8 bytes a cell) is not kept; all per-class figures still are."""
AREA_COLUMNS = 3

Mask = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class TruthCounts:
    """One image against its mask.

    Attributes:
        right, pixels, ignored: pixels whose class is right, labelled pixels, unlabelled pixels (multilabel: decisions, one
            a pixel and class).
        classes: those that occur in the prediction or the truth.
        counts: per such class, the columns of :data:`edgeseg.evaluate.intervals.COLUMNS`.
        confusion: ``(truth, prediction, pixels)`` where pixels > 0; empty unless multiclass.
    """

    right: int
    pixels: int
    ignored: int
    classes: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    confusion: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class AgreementCounts:
    """One image against the baseline's mask of it.

    Attributes:
        equal, pixels: pixels on which both say the same, and all.
        edge_equal, edge_pixels: the same near the class boundaries of the baseline's mask.
        classes: ``(class, equal, pixels)`` of the pixels to which the baseline gave the class.
    """

    equal: int
    pixels: int
    edge_equal: int
    edge_pixels: int
    classes: tuple[tuple[int, int, int], ...]


def count_truth(
    prediction: Mask,
    truth: Mask,
    classes: int,
    task: Task = "multiclass",
    *,
    name: str = "",
    boundary_px: int | None = DEFAULT_BOUNDARY_PX,
) -> TruthCounts:
    """Count a mask against the truth (or against another model's mask taken as truth), class by class.

    Args:
        prediction: integers: multiclass ``(H, W)`` of class indices, binary ``(H, W)`` of 0 and 1, multilabel
            ``(classes, H, W)`` of 0 and 1.
        truth: of the same shape; pixels that are :data:`~edgeseg.evaluate.accuracy.labels.IGNORED` are not judged.
        classes: number of classes, 1 for ``binary``.
        task: of the model.
        name: of the image, for messages.
        boundary_px: width of the region boundary IoU looks at, and tolerance of contours, pixels; ``None``: neither is
            counted, their columns are 0.

    Raises:
        InputError: shapes differ, or a value is no class.
    """
    _check(prediction, truth, classes, task, f" of {name}" if name else "")
    valid = truth != IGNORED
    if task == "multiclass":
        areas, cells = _class_areas(prediction, truth, valid, classes)
        right, pixels = int(areas[:, 0].sum()), int(np.count_nonzero(valid))
    else:
        areas, cells = _plane_areas(prediction, truth, valid, classes), ()
        pixels = int(np.count_nonzero(valid))
        right = pixels - int(areas[:, 1:].sum())
    present = np.flatnonzero(areas.any(axis=1))
    counts = np.zeros((len(present), COLUMNS), np.int64)
    counts[:, :AREA_COLUMNS] = areas[present]
    if boundary_px is not None:
        bands = (
            boundary_band(prediction, boundary_px, image_border=True) & valid,
            boundary_band(truth, boundary_px, image_border=True, ignore_index=IGNORED),
        )
        for row, value in zip(counts, present, strict=True):
            if task == "multiclass":
                predicted, true, judged, (near_predicted, near_true) = prediction == value, truth == value, valid, bands
            else:
                shape = (classes, *truth.shape[-2:])
                predicted, true, judged, near_predicted, near_true = (
                    plane.reshape(shape)[value] for plane in (prediction == 1, truth == 1, valid, *bands)
                )
            edge_predicted, edge_true = predicted & near_predicted, true & near_true
            row[AREA_COLUMNS:] = (
                np.count_nonzero(edge_predicted & edge_true),
                np.count_nonzero(edge_predicted | edge_true),
                *contour_counts(predicted, true, judged, boundary_px),
            )
    return TruthCounts(
        right=right,
        pixels=pixels,
        ignored=truth.size - pixels,
        classes=tuple(present.tolist()),
        counts=tuple(map(tuple, counts.tolist())),
        confusion=cells,
    )


def _check(prediction: Mask, truth: Mask, classes: int, task: Task, what: str) -> None:
    if prediction.shape != truth.shape:
        raise InputError(
            f"mask{what} has shape {truth.shape} and the prediction {prediction.shape}; they must be of one size"
        )
    planes = (classes,) if task == "multilabel" else ()
    if truth.ndim != 2 + len(planes) or truth.shape[:-2] != planes:
        raise InputError(f"mask{what} has shape {truth.shape}; a {task} mask is {(*planes, 'H', 'W')}")
    limit = classes if task == "multiclass" else 2
    for values, whose in ((prediction, "prediction"), (truth[truth != IGNORED], "mask")):
        if values.size and (values.min() < 0 or values.max() >= limit):
            odd = sorted({int(v) for v in np.unique(values) if not 0 <= v < limit})
            raise InputError(
                f"{whose}{what} holds {odd[:5]}; allowed are 0..{limit - 1} (and the ignore index in masks)"
            )


def _class_areas(
    prediction: Mask, truth: Mask, valid: NDArray[np.bool_], classes: int
) -> tuple[NDArray[np.int64], tuple[tuple[int, int, int], ...]]:
    """True positives, false positives, false negatives ``(classes, 3)``, and the confusion matrix's cells."""
    predicted, true = prediction[valid], truth[valid]
    cells: tuple[tuple[int, int, int], ...] = ()
    if classes > MATRIX_CLASSES_LIMIT:
        hits, said, wanted = (np.bincount(v, minlength=classes) for v in (true[predicted == true], predicted, true))
    else:
        # One histogram of (truth, prediction) pairs holds all others.
        matrix = np.bincount(true.astype(np.intp) * classes + predicted, minlength=classes**2)
        matrix = matrix.reshape(classes, classes)
        cells = tuple((int(t), int(p), int(matrix[t, p])) for t, p in np.argwhere(matrix))
        hits, said, wanted = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
    return np.stack([hits, said - hits, wanted - hits], axis=1), cells


def _plane_areas(prediction: Mask, truth: Mask, valid: NDArray[np.bool_], planes: int) -> NDArray[np.int64]:
    predicted, true = (prediction == 1) & valid, (truth == 1) & valid
    areas = [m.reshape(planes, -1) for m in (predicted & true, predicted & ~true, true & ~predicted)]
    return np.stack([np.count_nonzero(area, axis=1) for area in areas], axis=1)


def count_agreement(prediction: Mask, reference: Mask, classes: int, task: Task = "multiclass") -> AgreementCounts:
    """Count where two models' masks of one image are the same, and where within ``DEFAULT_BOUNDARY_PX`` of a boundary.

    Raises:
        InputError: shapes differ, or the masks are empty.
    """
    if prediction.shape != reference.shape or not reference.size:
        raise InputError(
            f"masks to compare have shapes {prediction.shape} and {reference.shape}; they must be of one size"
        )
    equal = prediction == reference
    band = boundary_band(reference, DEFAULT_BOUNDARY_PX)
    if task == "multiclass":
        pixels = np.bincount(reference.ravel(), minlength=classes)
        hits = np.bincount(reference[equal].ravel(), minlength=classes)
    else:
        said = (reference == 1).reshape(classes, -1)
        pixels = np.count_nonzero(said, axis=1)
        hits = np.count_nonzero(said & equal.reshape(classes, -1), axis=1)
    return AgreementCounts(
        equal=int(np.count_nonzero(equal)),
        pixels=equal.size,
        edge_equal=int(np.count_nonzero(equal & band)),
        edge_pixels=int(np.count_nonzero(band)),
        classes=tuple((int(c), int(hits[c]), int(pixels[c])) for c in np.flatnonzero(pixels)),
    )


class AccuracyMeter:
    """Counts of classes, and the figures that need no boundaries.

    Conventions, the ones of ``segmentation_models_pytorch.metrics`` (counts summed over all images, then one score per
    class, then the mean): ``binary`` has one class, the foreground; ``multilabel`` judges each class plane by itself. A
    class that occurs neither in the truth nor in the predictions has no score (``None``) and takes no part in the mean.

    Args:
        classes, task: see :func:`~edgeseg.evaluate.accuracy.counts.count_truth`.

    Attributes:
        right, pixels: labelled pixels whose class is right, and all of them.
        counts: int64 ``(classes, COLUMNS)``.
    """

    def __init__(self, classes: int, task: Task = "multiclass") -> None:
        self.task: Task = task
        self.right = self.pixels = 0
        self.counts: NDArray[np.int64] = np.zeros((classes, COLUMNS), dtype=np.int64)

    def update(self, prediction: Mask, truth: Mask, name: str = "") -> None:
        """Add one image; see :func:`~edgeseg.evaluate.accuracy.counts.count_truth` for shapes and errors."""
        image = count_truth(prediction, truth, len(self.counts), self.task, name=name, boundary_px=None)
        if image.classes:
            self.counts[list(image.classes)] += image.counts
        self.right += image.right
        self.pixels += image.pixels

    def figures(self) -> AccuracyFigures:
        """What a verification reports; all ``None``, and no classes, while no labelled pixel was seen."""
        if not self.pixels:
            return AccuracyFigures()
        totals = self.counts[None], np.array([self.right]), np.array([self.pixels])
        miou, dice, pixel_accuracy = (optional(figure(m, totals))[0] for m in ("miou", "dice", "pixel_accuracy"))
        return AccuracyFigures(miou, dice, pixel_accuracy, optional(per_class("miou", self.counts)))


class AgreementMeter:
    """Share of pixels on which two models say the same, split at the reference's class boundaries."""

    def __init__(self, classes: int, task: Task = "multiclass") -> None:
        self.task: Task = task
        self.classes: NDArray[np.int64] = np.zeros((classes, 2), np.int64)
        self._totals = np.zeros(4, np.int64)

    def update(self, prediction: Mask, reference: Mask) -> None:
        """Add one image; see :func:`~edgeseg.evaluate.accuracy.counts.count_agreement` for shapes and errors."""
        self.add(count_agreement(prediction, reference, len(self.classes), self.task))

    def add(self, image: AgreementCounts) -> None:
        """Add the counts of one image."""
        self._totals += (image.equal, image.pixels, image.edge_equal, image.edge_pixels)
        for index, hits, pixels in image.classes:
            self.classes[index] += (hits, pixels)

    @property
    def agreement(self) -> float | None:
        """Share of all pixels; ``None`` before the first image."""
        equal, pixels, _, _ = self._totals
        return _share(equal, pixels)

    @property
    def boundary(self) -> float | None:
        """Share of the pixels near a class boundary; ``None`` when the reference shows no boundary."""
        _, _, equal, pixels = self._totals
        return _share(equal, pixels)

    @property
    def interior(self) -> float | None:
        """Share of the pixels away from class boundaries; ``None`` when there are none."""
        equal, pixels, edge_equal, edge_pixels = self._totals
        return _share(equal - edge_equal, pixels - edge_pixels)

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """Share of the pixels to which the reference gives a class; ``None`` for classes it never gives."""
        return tuple(_share(hits, pixels) for hits, pixels in self.classes)


def optional(values: NDArray[Any]) -> tuple[float | None, ...]:
    """NaN, which stands for no score, as ``None``."""
    return tuple(None if np.isnan(value) else float(value) for value in values)


def _share(part: Any, whole: Any) -> float | None:
    return int(part) / int(whole) if whole else None
