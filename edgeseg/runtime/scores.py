"""From the engine's scores to a mask, at the size of the image.

A mask engine has already decided inside its graph. An engine that returns logits or probabilities leaves the decision
until its scores are at the size of the image, where it is more exact. The rules are those of the graph's own outputs
(see ``edgeseg/convert/heads.py``): the class with the highest score, the first of equals; or the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.images.placement import Placement
from edgeseg.images.resize import linear_taps
from edgeseg.spec import PipelineSpec

# Pixels interpolated at a time: their scores stay in the cache.
CHUNK_PIXELS = 1 << 15


@dataclass(frozen=True)
class ScoreRule:
    """How float scores ``(C, H, W)`` become a mask.

    Attributes:
        task: ``multiclass``, ``binary`` or ``multilabel``.
        activation: what turns a score into a probability: ``softmax``, ``sigmoid``, ``tanh`` (read as ``2 p - 1``),
            ``clamp``, or ``none`` when scores are probabilities already.
        threshold: probability above which ``binary`` and ``multilabel`` pixels are 1.
        dtype: of a multiclass mask.
    """

    task: str
    activation: str
    threshold: float
    dtype: str

    @classmethod
    def of(cls, spec: PipelineSpec) -> ScoreRule:
        """The rule for an engine whose output kind is ``logits`` or ``probabilities``."""
        if spec.output.kind == "probabilities":
            activation = "none"
        else:
            usual = "softmax" if spec.model.task == "multiclass" else "sigmoid"
            named = {"softmax2d": "softmax", "logsoftmax": "softmax"}.get(str(spec.model.activation))
            activation = named or str(spec.model.activation)
            activation = activation if activation in {"softmax", "sigmoid", "tanh", "clamp"} else usual
        return cls(spec.model.task, activation, spec.output.threshold, spec.mask_dtype)

    def probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 ``(C, H, W)`` in [0, 1]."""
        if self.activation == "none":
            return scores
        if self.activation == "clamp":
            return np.clip(scores, 0.0, 1.0)
        if self.activation == "softmax":
            exponent = np.exp(scores - scores.max(axis=0))
            return np.asarray(exponent / exponent.sum(axis=0))
        doubled = 2.0 * scores if self.activation == "tanh" else scores
        # exp of a large positive number overflows; a logit beyond 80 is certain in float32 anyway.
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(doubled, -80.0, 80.0))), dtype=np.float32)

    def mask(self, scores: NDArray[np.float32]) -> NDArray[Any]:
        """Decide each pixel: ``(H, W)`` classes, or 0/1 for binary; ``(C, H, W)`` 0/1 for multilabel."""
        if self.task == "multiclass":
            return argmax_planes(self._comparable(scores)).astype(self.dtype, copy=False)
        above = self._above(scores).view(np.uint8)
        return above[0] if self.task == "binary" else above

    def mask_at_source(self, scores: NDArray[np.float32], placement: Placement) -> NDArray[Any]:
        """Resize the scores of one fitted image back to the image's size, then decide each pixel."""
        if self.task == "multiclass":
            inner = self._comparable(placement.crop(scores))
            return argmax_resized(inner, placement.source).astype(self.dtype, copy=False)
        return self.mask(placement.restore(scores))

    def confidence(self, scores: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
        """Float32 probability of the chosen class, shaped like ``mask``."""
        probabilities = self.probabilities(scores)
        if self.task == "multiclass":
            return np.asarray(np.take_along_axis(probabilities, mask[None].astype(np.intp), axis=0)[0])
        probabilities = probabilities[0] if self.task == "binary" else probabilities
        return np.where(mask == 1, probabilities, np.float32(1.0) - probabilities)

    def margin(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """How far, in scores, each pixel of :meth:`mask` is from another value."""
        if self.task == "multiclass":
            best = np.partition(self._comparable(scores), -2, axis=0)
            return np.asarray(best[-1] - best[-2])
        if self.activation in {"none", "clamp", "softmax"}:
            away = np.abs(self.probabilities(scores) - np.float32(self.threshold))
        else:
            away = np.abs(scores - np.float32(self._limit()))
        return np.asarray(away[0] if self.task == "binary" else away)

    def _comparable(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        # Softmax, sigmoid and tanh keep the order of scores; clamping makes ties of everything above 1.
        return np.clip(scores, 0.0, 1.0) if self.activation == "clamp" else scores

    def _above(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        if self.activation in {"none", "clamp", "softmax"}:
            return np.asarray(self.probabilities(scores) > np.float32(self.threshold))
        return np.asarray(scores > np.float32(self._limit()))

    def _limit(self) -> float:
        odds = math.log(self.threshold / (1.0 - self.threshold))
        return odds / 2.0 if self.activation == "tanh" else odds


def argmax_planes(scores: NDArray[np.float32]) -> NDArray[Any]:
    """Index of the highest plane at each pixel of ``(C, H, W)``, the lowest index of equals; uint8 up to 256 planes.

    The same as ``scores.argmax(0)``, but plane by plane over bands of rows that stay in the cache: numpy's argmax over
    the first axis walks memory with a stride of a whole plane.
    """
    planes, height, width = scores.shape
    winner = np.zeros((height, width), np.uint8 if planes <= 256 else np.uint16)
    rows = max(1, CHUNK_PIXELS // max(width, 1))
    for start in range(0, height, rows):
        band = scores[:, start : start + rows]
        best = band[0].copy()
        for plane in range(1, planes):
            np.copyto(winner[start : start + rows], plane, where=band[plane] > best)
            np.maximum(best, band[plane], out=best)
    return winner


def argmax_resized(scores: NDArray[np.float32], size: tuple[int, int]) -> NDArray[Any]:
    """``argmax`` of ``(C, h, w)`` scores resized to ``size``, without resizing most of them.

    Where one class wins all four scores that a pixel is blended from, it wins the blend, which is a convex combination
    of them. Only pixels between different winners are interpolated, so neither time nor memory grows with classes x
    pixels of the image.
    """
    height, width = scores.shape[1:]
    winner = argmax_planes(scores)
    if (height, width) == size:
        return winner
    top, bottom, down = linear_taps(height, size[0])
    left, right, across = linear_taps(width, size[1])
    mask = winner.take(top, axis=0).take(left, axis=1)
    rows, columns = np.nonzero(_crossed(winner).take(top, axis=0).take(left, axis=1))
    flat = scores.reshape(len(scores), -1)
    for start in range(0, len(rows), CHUNK_PIXELS):
        y, x = rows[start : start + CHUNK_PIXELS], columns[start : start + CHUNK_PIXELS]
        v, u = down[y].astype(np.float32), across[x].astype(np.float32)
        first, second = top[y] * width, bottom[y] * width
        blended = np.empty((len(scores), len(y)), np.float32)
        for plane, target in zip(flat, blended, strict=True):
            # Step by step as in resize_scores, so that rounding is the same.
            above = plane.take(first + left[x]) * (1 - u)
            above += plane.take(first + right[x]) * u
            below = plane.take(second + left[x]) * (1 - u)
            below += plane.take(second + right[x]) * u
            np.multiply(above, 1 - v, out=target)
            target += below * v
        mask[y, x] = argmax_planes(blended[:, None])[0]
    return mask


def _crossed(winner: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a class boundary runs between a pixel and its neighbours to the right, below, or diagonally below."""
    below = np.concatenate((winner[1:], winner[-1:]))
    crossed = np.asarray(winner != below)
    crossed[:, :-1] |= (winner[:, :-1] != winner[:, 1:]) | (winner[:, :-1] != below[:, 1:])
    return crossed
