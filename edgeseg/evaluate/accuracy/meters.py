"""Segmentation accuracy, accumulated image by image; of each image only a few numbers stay in memory.

Two meters: :class:`AccuracyMeter` compares masks with the truth (or with another model's masks taken as truth) class by
class; :class:`AgreementMeter` counts pixels on which two models say the same. Both keep per-image counts that are
sufficient for bootstrap intervals over images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.boundary import DEFAULT_BOUNDARY_PX, boundary_band
from edgeseg.spec import Task
from edgeseg.store.artifacts import AccuracyFigures

MATRIX_CLASSES_LIMIT = 1024
"""Above this many classes the full confusion matrix (8 bytes a cell) is not kept; all per-class figures still are."""

Mask = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ImageCounts:
    """Sufficient statistics of one image.

    Attributes:
        name: of the image, or ``""``.
        right: pixels whose class is right (multilabel: pixel-and-class decisions that are).
        pixels: labelled pixels (multilabel: decisions).
        classes: int ``(K,)``: the classes that occur in the prediction or the truth.
        counts: int64 ``(K, 5)``, per such class: true positives, false positives, false negatives, and intersection and
            union of the boundary regions.
    """

    name: str
    right: int
    pixels: int
    classes: NDArray[np.int64]
    counts: NDArray[np.int64]


class AccuracyMeter:
    """Streaming confusion counts and the figures that follow from them.

    Conventions, the ones of ``segmentation_models_pytorch.metrics`` (counts summed over all images, then one score per
    class, then the mean): ``binary`` has one class, the foreground; ``multilabel`` judges each class plane by itself. A
    class that occurs neither in the truth nor in the predictions has no score (``None``) and takes no part in the mean.

    Args:
        classes: number of classes, 1 for ``binary``.
        task: ``multiclass`` masks are ``(H, W)`` of class indices, ``binary`` ``(H, W)`` of 0 and 1, ``multilabel``
            ``(classes, H, W)`` of 0 and 1.
        ignore_index: truth pixels of this value are not judged.
        boundary_px: width of the region that boundary IoU looks at, pixels.
    """

    def __init__(
        self,
        classes: int,
        task: Task = "multiclass",
        *,
        ignore_index: int | None = None,
        boundary_px: int = DEFAULT_BOUNDARY_PX,
    ) -> None:
        self.classes = classes
        self.task: Task = task
        self.ignore_index = ignore_index
        self.boundary_px = boundary_px
        self.right = 0
        self.pixels = 0
        self.images: list[ImageCounts] = []
        self._totals: NDArray[np.int64] = np.zeros((classes, 5), dtype=np.int64)
        keeps_matrix = task == "multiclass" and classes <= MATRIX_CLASSES_LIMIT
        self._matrix = np.zeros((classes, classes), dtype=np.int64) if keeps_matrix else None

    def update(self, prediction: Mask, truth: Mask, name: str = "") -> ImageCounts:
        """Add one image.

        Args:
            prediction: integer mask, shape as the task says.
            truth: integer mask of the same shape.
            name: kept with the per-image counts.

        Raises:
            InputError: shapes differ, or a value is no class (and not ``ignore_index``).
        """
        self._check(prediction, truth, name)
        if self.task == "multiclass":
            counts, right, pixels = self._count_classes(prediction, truth)
        else:
            planes = 1 if self.task == "binary" else self.classes
            shape = (planes, *truth.shape[-2:])
            counts, right, pixels = self._count_planes(prediction.reshape(shape), truth.reshape(shape))
        self._totals += counts
        self.right += right
        self.pixels += pixels
        present = np.flatnonzero(counts[:, :3].any(axis=1))
        image = ImageCounts(name, right, pixels, present, counts[present])
        self.images.append(image)
        return image

    def _check(self, prediction: Mask, truth: Mask, name: str) -> None:
        what = f" of {name}" if name else ""
        if prediction.shape != truth.shape:
            raise InputError(
                f"mask{what} has shape {truth.shape} and the prediction {prediction.shape}; they must be of one size"
            )
        planes = (self.classes,) if self.task == "multilabel" else ()
        if truth.ndim != 2 + len(planes) or truth.shape[:-2] != planes:
            raise InputError(f"mask{what} has shape {truth.shape}; a {self.task} mask is {(*planes, 'H', 'W')}")
        limit = self.classes if self.task == "multiclass" else 2
        labelled = truth if self.ignore_index is None else truth[truth != self.ignore_index]
        for values, whose in ((prediction, "prediction"), (labelled, "mask")):
            if values.size and (values.min() < 0 or values.max() >= limit):
                odd = sorted({int(v) for v in np.unique(values) if not 0 <= v < limit})
                raise InputError(
                    f"{whose}{what} holds {odd[:5]}; allowed are 0..{limit - 1} (and the ignore index in masks)"
                )

    def _count_classes(self, prediction: Mask, truth: Mask) -> tuple[NDArray[np.int64], int, int]:
        valid = None if self.ignore_index is None else truth != self.ignore_index
        if self._matrix is None:
            predicted, true = (prediction, truth) if valid is None else (prediction[valid], truth[valid])
            hits, in_prediction, in_truth = map(self._histogram, (true[predicted == true], predicted, true))
        else:
            # One histogram of (truth, prediction) pairs holds all others; pixels not judged go to a bin of their own.
            cells = truth.astype(np.intp) * self.classes + prediction
            if valid is not None:
                cells[~valid] = self.classes**2
            pairs = np.bincount(cells.ravel(), minlength=self.classes**2 + 1)[:-1].reshape(self._matrix.shape)
            self._matrix += pairs
            hits, in_prediction, in_truth = pairs.diagonal(), pairs.sum(axis=0), pairs.sum(axis=1)
        band_p = boundary_band(prediction, self.boundary_px, image_border=True)
        band_t = boundary_band(truth, self.boundary_px, image_border=True, ignore_index=self.ignore_index)
        if valid is not None:
            band_p &= valid
        edge_hits = self._histogram(truth[band_p & band_t & (prediction == truth)])
        edge_union = self._histogram(prediction[band_p]) + self._histogram(truth[band_t]) - edge_hits
        counts = np.stack([hits, in_prediction - hits, in_truth - hits, edge_hits, edge_union], axis=1)
        return counts.astype(np.int64), int(hits.sum()), int(in_truth.sum())

    def _histogram(self, values: Mask) -> NDArray[np.int64]:
        return np.asarray(np.bincount(values.ravel(), minlength=self.classes), dtype=np.int64)

    def _count_planes(self, prediction: Mask, truth: Mask) -> tuple[NDArray[np.int64], int, int]:
        valid = np.ones(truth.shape, dtype=bool) if self.ignore_index is None else truth != self.ignore_index
        predicted, true = (prediction == 1) & valid, (truth == 1) & valid
        edge_p = predicted & boundary_band(prediction, self.boundary_px, image_border=True)
        edge_t = true & boundary_band(truth, self.boundary_px, image_border=True, ignore_index=self.ignore_index)
        pairs = (predicted & true, predicted & ~true, true & ~predicted, edge_p & edge_t, edge_p | edge_t)
        counts = np.stack([np.count_nonzero(p, axis=(-2, -1)) for p in pairs], axis=1).astype(np.int64)
        pixels = int(np.count_nonzero(valid))
        return counts, pixels - int(counts[:, 1:3].sum()), pixels

    @property
    def matrix(self) -> NDArray[np.int64] | None:
        """Confusion matrix, int64, row = truth, column = prediction; ``None`` unless multiclass and not too large."""
        return None if self._matrix is None else self._matrix.copy()

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 ``(classes, 5)`` over all images; the columns of :attr:`ImageCounts.counts`."""
        return np.array(self._totals)

    def iou(self) -> tuple[float | None, ...]:
        """Intersection over union per class: TP / (TP + FP + FN)."""
        hits, extra, missed = self._totals[:, :3].T
        return _ratios(hits, hits + extra + missed)

    def dice(self) -> tuple[float | None, ...]:
        """Dice coefficient (F1) per class: 2 TP / (2 TP + FP + FN)."""
        hits, extra, missed = self._totals[:, :3].T
        return _ratios(2 * hits, 2 * hits + extra + missed)

    def boundary_iou(self) -> tuple[float | None, ...]:
        """Boundary IoU per class (Cheng et al. 2021; see :func:`edgeseg.evaluate.accuracy.boundary.boundary_band`)."""
        return _ratios(self._totals[:, 3], self._totals[:, 4])

    def pixel_accuracy(self) -> float | None:
        """Share of labelled pixels whose class is right (multilabel: of pixel-and-class decisions)."""
        return self.right / self.pixels if self.pixels else None

    def figures(self) -> AccuracyFigures:
        """The figures a verification reports; all ``None`` while no labelled pixel was seen."""
        iou = self.iou()
        return AccuracyFigures(mean_of(iou), mean_of(self.dice()), self.pixel_accuracy(), iou)


class AgreementMeter:
    """Share of pixels on which two models say the same, split at the reference's class boundaries.

    Args:
        boundary_px: a pixel counts as boundary within this distance of another class in the *reference's* mask.
    """

    def __init__(self, boundary_px: int = DEFAULT_BOUNDARY_PX) -> None:
        self.boundary_px = boundary_px
        self.images: list[tuple[str, float]] = []
        self._equal = self._pixels = self._edge_equal = self._edge_pixels = 0

    def update(self, prediction: Mask, reference: Mask, name: str = "") -> float:
        """Add one image: two integer masks of one shape, ``(H, W)`` or ``(C, H, W)``. Returns its agreement.

        Raises:
            InputError: shapes differ, or the masks are empty.
        """
        if prediction.shape != reference.shape or not reference.size:
            raise InputError(
                f"masks to compare have shapes {prediction.shape} and {reference.shape}; they must be of one size"
            )
        equal = prediction == reference
        band = boundary_band(reference, self.boundary_px)
        hits = int(np.count_nonzero(equal))
        self._equal += hits
        self._pixels += equal.size
        self._edge_equal += int(np.count_nonzero(equal & band))
        self._edge_pixels += int(np.count_nonzero(band))
        agreement = float(hits / equal.size)
        self.images.append((name, agreement))
        return agreement

    @property
    def agreement(self) -> float | None:
        """Share of all pixels; ``None`` before the first image."""
        return self._equal / self._pixels if self._pixels else None

    @property
    def boundary_agreement(self) -> float | None:
        """Share of the pixels near a class boundary; ``None`` when the reference shows no boundary."""
        return self._edge_equal / self._edge_pixels if self._edge_pixels else None

    @property
    def interior_agreement(self) -> float | None:
        """Share of the pixels away from class boundaries; ``None`` when there are none."""
        inside = self._pixels - self._edge_pixels
        return (self._equal - self._edge_equal) / inside if inside else None

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The ``count`` images of lowest agreement, worst first (ties in the order they came)."""
        return sorted(self.images, key=lambda item: item[1])[:count]


def mean_of(scores: Iterable[float | None]) -> float | None:
    """Mean over the classes that have a score; ``None`` when none has."""
    known = [s for s in scores if s is not None]
    return sum(known) / len(known) if known else None


def _ratios(part: NDArray[np.int64], whole: NDArray[np.int64]) -> tuple[float | None, ...]:
    return tuple(int(p) / int(w) if w else None for p, w in zip(part, whole, strict=True))
