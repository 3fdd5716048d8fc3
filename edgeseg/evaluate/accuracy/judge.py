"""One image through one model: what is judged at which size, and what is kept of it on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import SpecError
from edgeseg.evaluate.accuracy.counts import AgreementCounts, TruthCounts, count_agreement, count_truth
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.accuracy.loss import LossSums
from edgeseg.evaluate.results import Resolution
from edgeseg.images.placement import Placement, plan_fit
from edgeseg.images.resize import resize_nearest
from edgeseg.spec import ModelSpec, PipelineSpec


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


def at_resolution(pair: Pair, spec: PipelineSpec, resolution: Resolution) -> tuple[NDArray[Any], Any]:
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
    """Count one image."""
    return ImageRecord(
        index,
        pair.name,
        None if truth is None else count_truth(prediction, truth, model.classes, model.task, name=pair.name),
        None if reference is None else count_agreement(prediction, reference, model.classes, model.task),
        pair.ignore_index,
        loss,
    )
