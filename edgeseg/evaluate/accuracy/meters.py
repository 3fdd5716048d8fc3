"""Sums of :mod:`edgeseg.evaluate.accuracy.counts` over images, and the figures that follow: no image stays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.evaluate.accuracy.counts import AgreementCounts, Mask, count_agreement, count_truth
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.intervals import COLUMNS, figure, per_class
from edgeseg.spec import Task
from edgeseg.store.artifacts import AccuracyFigures


class AccuracyMeter:
    """Counts of classes, and the figures that need no boundaries.

    Conventions, the ones of ``segmentation_models_pytorch.metrics`` (counts summed over all images, then one score per
    class, then the mean): ``binary`` has one class, the foreground; ``multilabel`` judges each class plane by itself. A
    class that occurs neither in the truth nor in the predictions has no score (``None``) and takes no part in the mean.

    Args:
        classes, task, ignore_index, boundary_px: see :func:`~edgeseg.evaluate.accuracy.counts.count_truth`.

    Attributes:
        right, pixels: labelled pixels whose class is right, and all of them.
        counts: int64 ``(classes, COLUMNS)``.
    """

    def __init__(
        self,
        classes: int,
        task: Task = "multiclass",
        *,
        ignore_index: int = IGNORED,
        boundary_px: int | None = None,
    ) -> None:
        self.task: Task = task
        self.ignore_index = ignore_index
        self.boundary_px = boundary_px
        self.right = self.pixels = 0
        self.counts: NDArray[np.int64] = np.zeros((classes, COLUMNS), dtype=np.int64)

    def update(self, prediction: Mask, truth: Mask, name: str = "") -> None:
        """Add one image; see :func:`~edgeseg.evaluate.accuracy.counts.count_truth` for shapes and errors."""
        image = count_truth(
            prediction,
            truth,
            len(self.counts),
            self.task,
            name=name,
            ignore_index=self.ignore_index,
            boundary_px=self.boundary_px,
        )
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
