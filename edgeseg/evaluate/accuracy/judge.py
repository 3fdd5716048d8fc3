"""One image through one model: the counts that every accuracy figure is made of, as they are kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import SpecError
from edgeseg.evaluate.accuracy.boundary import DEFAULT_BOUNDARY_PX, boundary_band, contour_counts
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.accuracy.loss import LossSums
from edgeseg.evaluate.accuracy.meters import AccuracyMeter
from edgeseg.evaluate.results import Resolution
from edgeseg.images.placement import Placement, plan_fit
from edgeseg.images.resize import resize_nearest
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import ModelSpec, PipelineSpec


@dataclass(frozen=True)
class TruthCounts:
    """One image against its mask.

    Attributes:
        right, pixels, ignored: pixels whose class is right, labelled pixels, unlabelled pixels.
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


@dataclass(frozen=True)
class ImageRecord:
    """What is kept of one image; a line of the evaluation's JSONL file.

    ``ignore_index``: the value of the mask files that was read as unlabelled, if one was met. ``loss``: ``None`` without
    a mask, of an engine that returns masks, and of several tiles.
    """

    index: int
    name: str
    truth: TruthCounts | None = None
    agreement: AgreementCounts | None = None
    ignore_index: int | None = None
    loss: LossSums | None = None


def at_resolution(pair: Pair, spec: PipelineSpec, resolution: Resolution) -> tuple[NDArray[np.uint8], Any]:
    """(image to segment, mask to judge with) at the source's or the engine's size.

    At the engine's size the mask is moved by nearest neighbour, and padding is unlabelled.

    Raises:
        SpecError: engine resolution of an image that is several tiles.
    """
    if resolution == "source":
        return pair.image, pair.mask
    plan = plan_fit(pair.image.shape[0], pair.image.shape[1], spec.input)
    if not isinstance(plan, Placement):
        raise SpecError(
            f"{pair.name} is several tiles of the engine's size; judge fit policy tile at --resolution source"
        )
    return plan.apply(pair.image), None if pair.mask is None else _moved(pair.mask, plan)


def truth_of_scores(pair: Pair, spec: PipelineSpec) -> NDArray[np.int32] | None:
    """The mask where the network makes its scores, at the engine's size; ``None`` without a mask or of several tiles."""
    plan = plan_fit(pair.image.shape[0], pair.image.shape[1], spec.input)
    return None if pair.mask is None or not isinstance(plan, Placement) else _moved(pair.mask, plan)


def _moved(mask: NDArray[np.int32], plan: Placement) -> NDArray[np.int32]:
    if plan.is_identity:
        return mask
    moved = np.full((*mask.shape[:-2], *plan.canvas), IGNORED, np.int32)
    plan.crop(moved)[:] = resize_nearest(mask, plan.content)
    return moved


def judge(
    index: int,
    pair: Pair,
    prediction: NDArray[Any],
    truth: NDArray[np.int32] | None,
    reference: NDArray[Any] | None,
    model: ModelSpec,
    loss: LossSums | None = None,
) -> ImageRecord:
    """Count one image.

    Args:
        index: in the data set.
        pair: for its name.
        prediction: the engine's mask.
        truth: of the same shape, :data:`IGNORED` where unlabelled; ``None`` without a mask.
        reference: the baseline's mask; ``None`` without a baseline.
        model: classes and task.
        loss: what the image adds to the losses, if the engine tells its scores.
    """
    return ImageRecord(
        index,
        pair.name,
        None if truth is None else count_truth(prediction, truth, model, pair.name),
        None if reference is None else count_agreement(prediction, reference, model),
        pair.ignore_index,
        loss,
    )


def count_truth(prediction: NDArray[Any], truth: NDArray[np.int32], model: ModelSpec, name: str = "") -> TruthCounts:
    """Count a mask against the truth. Raises ``InputError`` for other shapes or values that are no class."""
    meter = AccuracyMeter(model.classes, model.task, ignore_index=IGNORED)
    image = meter.update(prediction, truth, name)
    valid = truth != IGNORED
    counts = []
    for position, value in enumerate(int(c) for c in image.classes):
        if model.task == "multiclass":
            contour = contour_counts(prediction == value, truth == value, valid, DEFAULT_BOUNDARY_PX)
        else:
            planes = [a if model.task == "binary" else a[value] for a in (prediction == 1, truth == 1, valid)]
            contour = contour_counts(planes[0], planes[1], planes[2], DEFAULT_BOUNDARY_PX)
        counts.append((*(int(n) for n in image.counts[position]), *contour))
    matrix = meter.matrix
    cells = () if matrix is None else tuple((int(t), int(p), int(matrix[t, p])) for t, p in np.argwhere(matrix))
    return TruthCounts(
        right=image.right,
        pixels=image.pixels,
        ignored=int(np.count_nonzero(~valid)),
        classes=tuple(int(c) for c in image.classes),
        counts=tuple(counts),
        confusion=cells,
    )


def count_agreement(prediction: NDArray[Any], reference: NDArray[Any], model: ModelSpec) -> AgreementCounts:
    """Count where two models' masks of one image are the same."""
    equal = prediction == reference
    band = boundary_band(reference, DEFAULT_BOUNDARY_PX)
    if model.task == "multiclass":
        pixels = np.bincount(reference.ravel(), minlength=model.classes)
        hits = np.bincount(reference[equal].ravel(), minlength=model.classes)
    else:
        shape = (-1, *reference.shape[-2:])
        said = (reference == 1).reshape(shape)
        pixels = np.count_nonzero(said, axis=(1, 2))
        hits = np.count_nonzero(said & equal.reshape(shape), axis=(1, 2))
    return AgreementCounts(
        equal=int(np.count_nonzero(equal)),
        pixels=int(equal.size),
        edge_equal=int(np.count_nonzero(equal & band)),
        edge_pixels=int(np.count_nonzero(band)),
        classes=tuple((int(c), int(hits[c]), int(pixels[c])) for c in np.flatnonzero(pixels)),
    )


def segment(segmenter: Segmenter, image: NDArray[np.uint8]) -> NDArray[Any]:
    """The mask of one image, a copy the caller owns."""
    mask: NDArray[Any] = segmenter(image)
    return mask
