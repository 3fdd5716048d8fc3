"""The losses a model was trained by, of whatever returns scores: PyTorch, and engines built with logits or probabilities.

An engine that returns masks has decided already and has no loss. Scores are judged where the network makes them, at the
engine's size, against the mask moved there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import Session
from edgeseg.closing import Closing
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.spec import Task

SCORES = ("logits", "probabilities")
_LEAST_PROBABILITY = 1e-12
_EPSILON = 1e-7


@dataclass(frozen=True)
class LossSums:
    """What one image adds to the losses, over its labelled pixels.

    Attributes:
        classes: per class: sum of its probabilities where it is true, sum of its probabilities, pixels where it is true.
        cross_entropy: sum over pixels (multilabel: over pixels and classes), nats.
        pixels: how many those are.
    """

    classes: tuple[tuple[float, float, int], ...]
    cross_entropy: float
    pixels: int


@dataclass(frozen=True)
class Losses:
    """Over all images, as if they were one batch.

    ``dice_loss``: ``segmentation_models_pytorch.losses.DiceLoss`` with its defaults; ``cross_entropy``: mean over labelled
    pixels, ``torch.nn.functional.cross_entropy`` (binary and multilabel: ``binary_cross_entropy_with_logits``).
    """

    dice_loss: float
    cross_entropy: float


class ScoreTap(Closing):
    """A session that keeps the scores of its last run; for one caller at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._last: tuple[str, NDArray[Any]] | None = None

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`."""
        outputs = self._session.run(images)
        self._last = next(((name, outputs[name]) for name in SCORES if name in outputs), None)
        return outputs

    def scores(self) -> tuple[str, NDArray[Any]] | None:
        """Kind (of :data:`SCORES`) and float ``(C, H, W)`` of the last image; ``None`` from an engine without."""
        return None if self._last is None else (self._last[0], self._last[1][0])

    def close(self) -> None:
        """Close the engine."""
        self._session.close()


def loss_sums(kind: str, scores: NDArray[Any], truth: NDArray[np.int32], task: Task) -> LossSums | None:
    """Sum one image's losses up.

    Args:
        kind: ``logits`` or ``probabilities``.
        scores: float ``(C, H, W)``; one channel for binary.
        truth: int32 ``(H, W)`` (multilabel: ``(C, H, W)``) of the same size, :data:`IGNORED` where unlabelled.
        task: of the model.

    Returns:
        ``None`` when the sizes differ, so that pixels of one have none in the other.
    """
    if scores.shape[-2:] != truth.shape[-2:]:
        return None
    values = scores.astype(np.float32, copy=False)
    if task == "multiclass":
        return _of_classes(kind, values, truth)
    return _of_planes(kind, values, truth.reshape(values.shape))


def _of_classes(kind: str, values: NDArray[np.float32], truth: NDArray[np.int32]) -> LossSums:
    valid = truth != IGNORED
    picked, labels = values[:, valid], truth[valid]
    here = np.arange(len(labels))
    if kind == "logits":
        shifted = picked - picked.max(axis=0, initial=-np.inf)
        exponents = np.exp(shifted)
        total = exponents.sum(axis=0)
        probabilities = exponents / total
        entropy = np.log(total) - shifted[labels, here]
    else:
        probabilities = picked
        entropy = -np.log(np.maximum(picked[labels, here], _LEAST_PROBABILITY))
    classes = len(values)
    hits = np.bincount(labels, weights=probabilities[labels, here], minlength=classes)
    sums = probabilities.sum(axis=1, dtype=np.float64)
    pixels = np.bincount(labels, minlength=classes)
    return _sums(hits, sums, pixels, float(entropy.sum(dtype=np.float64)), len(labels))


def _of_planes(kind: str, values: NDArray[np.float32], truth: NDArray[np.int32]) -> LossSums:
    valid, true = truth != IGNORED, truth == 1
    if kind == "logits":
        # Both stable for large logits of either sign.
        entropy = np.logaddexp(0.0, values) - values * true
        probabilities = np.exp(-np.logaddexp(0.0, -values))
    else:
        probabilities = values
        right = np.where(true, probabilities, 1.0 - probabilities)
        entropy = -np.log(np.maximum(right, _LEAST_PROBABILITY))
    axes = (-2, -1)
    hits = np.where(true, probabilities, 0.0).sum(axis=axes, dtype=np.float64)
    sums = np.where(valid, probabilities, 0.0).sum(axis=axes, dtype=np.float64)
    total = float(entropy[valid].sum(dtype=np.float64))
    return _sums(hits, sums, np.count_nonzero(true, axis=axes), total, int(np.count_nonzero(valid)))


def _sums(hits: Any, sums: Any, pixels: Any, entropy: float, count: int) -> LossSums:
    return LossSums(
        tuple((float(h), float(s), int(n)) for h, s, n in zip(hits, sums, pixels, strict=True)), entropy, count
    )


def losses(images: Iterable[LossSums | None]) -> Losses | None:
    """The losses of all images together; ``None`` when one has none, or nothing is labelled."""
    classes: NDArray[Any] | None = None
    entropy, pixels = 0.0, 0
    for image in images:
        if image is None:
            return None
        added = np.array(image.classes, np.float64)
        classes = added if classes is None else classes + added
        entropy += image.cross_entropy
        pixels += image.pixels
    if classes is None or not pixels:
        return None
    hits, sums, true = classes.T
    dice = 2.0 * hits / np.maximum(sums + true, 2 * _EPSILON)
    # As SMP does: a class that is never true adds nothing, but counts in the mean.
    return Losses(float(np.mean(np.where(true > 0, 1.0 - dice, 0.0))), entropy / pixels)
