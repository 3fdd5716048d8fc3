"""Everything an engine says about an image."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """Everything an engine says about an image; ``None`` for what it was not built to return.

    For a batch every array has a leading axis N. Sizes are those of the image.

    Attributes:
        mask: ``(H, W)`` uint8 (uint16 above 256 classes) class indices, 0/1 for binary; ``(C, H, W)`` uint8 0/1 for
            multilabel.
        confidence: float32, shaped like ``mask``: the probability of the chosen class.
        probabilities: float32 ``(C, H, W)``, of an engine with output kind ``probabilities``.
        logits: float32 ``(C, H, W)``, of an engine with output kind ``logits``.
        aux_logits: float32 ``(K,)`` of a kept auxiliary head; over tiles, their mean.
    """

    mask: NDArray[Any]
    confidence: NDArray[np.float32] | None = None
    probabilities: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None
    aux_logits: NDArray[np.float32] | None = None


def stacked(predictions: list[Prediction]) -> Prediction:
    """One prediction of a batch, from those of its images: every array gets a leading axis."""

    def stack(name: str) -> Any:
        arrays = [getattr(prediction, name) for prediction in predictions]
        return None if arrays[0] is None else np.stack(arrays)

    return Prediction(*(stack(name) for name in ("mask", "confidence", "probabilities", "logits", "aux_logits")))


def arrays_of(prediction: Prediction | None) -> dict[str, NDArray[Any]]:
    """What a prediction holds, by name."""
    named = {} if prediction is None else {field.name: getattr(prediction, field.name) for field in fields(prediction)}
    return {name: array for name, array in named.items() if array is not None}
