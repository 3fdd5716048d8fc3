"""From the counts of all images to what a report says about a model's accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.evaluate.accuracy.boundary import DEFAULT_BOUNDARY_PX
from edgeseg.evaluate.accuracy.counts import MATRIX_CLASSES_LIMIT, AgreementMeter, optional
from edgeseg.evaluate.accuracy.judge import ImageRecord
from edgeseg.evaluate.accuracy.loss import losses
from edgeseg.evaluate.intervals import COLUMNS, Counts, drops, figure, interval, per_class
from edgeseg.evaluate.results import Accuracy, Agreement, Drop, Resolution, Truth, WorstImage
from edgeseg.spec import ModelSpec


def accuracy_of(
    records: Callable[[], Iterable[ImageRecord]],
    images: int,
    model: ModelSpec,
    *,
    data: str,
    data_sha256: str,
    resolution: Resolution,
    baseline: tuple[str, Counts | None] | None = None,
    worst: tuple[WorstImage, ...] = (),
) -> Accuracy:
    """Sum the records of one contender up.

    Args:
        records: gives one per image, in order, each time it is called; they are read one at a time.
        images: how many.
        model: classes and task.
        data: where the images came from, in words.
        data_sha256: of their content.
        resolution: at which they were judged.
        baseline: its name and counts of the same images, for drops; agreement is in ``records`` already.
        worst: the images to show.
    """
    counts = truth_counts(records(), images, model.classes)
    return Accuracy(
        data=data,
        data_sha256=data_sha256,
        images=images,
        resolution=resolution,
        ignored_share=_ignored_share(records()),
        truth=None if counts is None else _truth(counts, records, model, baseline),
        agreement=None if baseline is None else _agreement(records(), images, model, baseline[0]),
        worst=worst,
    )


def truth_counts(records: Iterable[ImageRecord], images: int, classes: int) -> Counts | None:
    """The records' counts as arrays, ``classes * COLUMNS`` numbers an image; ``None`` unless every image has a mask."""
    dense = np.zeros((images, classes, COLUMNS))
    right, pixels = np.zeros(images), np.zeros(images)
    position = -1
    for position, record in enumerate(records):
        truth = record.truth
        if truth is None:
            return None
        if truth.classes:
            dense[position, list(truth.classes)] = truth.counts
        right[position], pixels[position] = truth.right, truth.pixels
    return Counts(dense, right, pixels) if images and position == images - 1 else None


def _ignored_share(records: Iterable[ImageRecord]) -> float | None:
    shares = [r.truth.ignored / size for r in records if r.truth and (size := r.truth.ignored + r.truth.pixels)]
    return float(np.mean(shares)) if shares else None


def _truth(
    counts: Counts,
    records: Callable[[], Iterable[ImageRecord]],
    model: ModelSpec,
    baseline: tuple[str, Counts | None] | None,
) -> Truth:
    totals = counts.totals(np.ones((1, len(counts.right)), np.int64))
    classes = {name: optional(per_class(name, totals[0][0])) for name in ("miou", "dice", "boundary_iou", "boundary_f")}
    lost: tuple[Drop, ...] = ()
    if baseline is not None:
        assert baseline[1] is not None  # the same images, so with the same masks
        lost = drops(baseline[0], baseline[1], counts)
    loss = losses(record.loss for record in records())
    return Truth(
        miou=interval(len(counts.right), lambda weights: figure("miou", counts.totals(weights))),
        dice=optional(figure("dice", totals))[0],
        pixel_accuracy=optional(figure("pixel_accuracy", totals))[0],
        boundary_iou=optional(figure("boundary_iou", totals))[0],
        boundary_f=optional(figure("boundary_f", totals))[0],
        per_class_iou=classes["miou"],
        per_class_dice=classes["dice"],
        per_class_boundary_iou=classes["boundary_iou"],
        per_class_boundary_f=classes["boundary_f"],
        confusion=_confusion(records(), model),
        drops=lost,
        loss=None if loss is None else loss.dice_loss,
        cross_entropy=None if loss is None else loss.cross_entropy,
    )


def _confusion(records: Iterable[ImageRecord], model: ModelSpec) -> tuple[tuple[int, ...], ...] | None:
    if model.task != "multiclass" or model.classes > MATRIX_CLASSES_LIMIT:
        return None
    matrix = np.zeros((model.classes, model.classes), np.int64)
    for record in records:
        for true, predicted, pixels in record.truth.confusion if record.truth is not None else ():
            matrix[true, predicted] += pixels
    return tuple(tuple(int(n) for n in row) for row in matrix)


def _agreement(records: Iterable[ImageRecord], images: int, model: ModelSpec, baseline: str) -> Agreement | None:
    equal, pixels = np.zeros(images), np.zeros(images)
    meter = AgreementMeter(model.classes, model.task)
    for position, record in enumerate(records):
        if record.agreement is None:
            return None
        equal[position], pixels[position] = record.agreement.equal, record.agreement.pixels
        meter.add(record.agreement)

    def share(weights: NDArray[Any]) -> NDArray[Any]:
        return np.asarray((weights @ equal) / (weights @ pixels))

    overall = interval(images, share)
    assert overall is not None  # no image is empty
    return Agreement(
        baseline=baseline,
        overall=overall,
        boundary=meter.boundary,
        interior=meter.interior,
        per_class=meter.per_class,
        boundary_px=DEFAULT_BOUNDARY_PX,
    )


def image_miou(record: ImageRecord) -> float | None:
    """mIoU of one image over the classes that occur in it; ``None`` without a mask."""
    if record.truth is None or not record.truth.classes:
        return None
    return float(np.nanmean(per_class("miou", np.array(record.truth.counts, np.int64))))
