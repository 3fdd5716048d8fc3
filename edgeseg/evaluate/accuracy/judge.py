"""One image through one model: what is judged at which size, and what is kept of it on disk.

Of the images judged so far memory holds where each line begins, not what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import ArtifactError, SpecError, one_line
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


def at_resolution(
    pair: Pair, spec: PipelineSpec, resolution: Resolution
) -> tuple[NDArray[Any], NDArray[np.int32] | None, Callable[[NDArray[Any]], NDArray[Any]]]:
    """Image to segment at the source's or the engine's size, mask to judge with, and what cuts padding off the answer.

    At the engine's size the mask is moved by nearest neighbour.

    Raises:
        SpecError: engine resolution of an image that is several tiles.
    """
    if resolution == "source":
        return pair.image, pair.mask, lambda answer: answer
    plan = plan_fit(pair.image.shape[0], pair.image.shape[1], spec.input)
    if not isinstance(plan, Placement):
        raise SpecError(
            f"{pair.name} is several tiles of the engine's size; judge fit policy tile at --resolution source"
        )
    moved = None if pair.mask is None else resize_nearest(pair.mask, plan.content)
    return plan.apply(pair.image), moved, plan.crop


def truth_of_scores(pair: Pair, spec: PipelineSpec) -> NDArray[np.int32] | None:
    """The mask where the network makes its scores, at the engine's size, padding unlabelled; ``None`` without a mask or of
    several tiles."""
    plan = plan_fit(pair.image.shape[0], pair.image.shape[1], spec.input)
    if pair.mask is None or not isinstance(plan, Placement):
        return None
    moved = np.full((*pair.mask.shape[:-2], *plan.canvas), IGNORED, np.int32)
    plan.crop(moved)[:] = resize_nearest(pair.mask, plan.content)
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


class Ledger:
    """The lines of one contender: an append-only JSONL file.

    Attributes:
        ignore_values: values of the mask files that were read as unlabelled.

    Raises:
        ArtifactError: a line that is none of an evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignore_values: set[int] = set()
        self._places: dict[int, int] = {}
        if not path.is_file():
            return
        place = 0
        with path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    # A process that was killed while it wrote left half a line.
                    file.truncate(place)
                    break
                self._keep(self._decoded(line), place)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def append(self, record: ImageRecord) -> None:
        """Keep one image's counts, on disk at once. Raises ``ArtifactError`` when it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = msgspec.json.encode(record) + b"\n"
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                # Only now: another evaluation of the same images may have written in between.
                place = file.tell() - len(line)
        except OSError as exc:
            raise ArtifactError(
                f"cannot write {self.path}: {exc.strerror}; set EDGESEG_CACHE to another folder"
            ) from exc
        self._keep(record, place)

    def records(self) -> Iterator[ImageRecord]:
        """All records, by index of the image, one at a time."""
        if not self._places:
            return
        with self.path.open("rb") as file:
            for _, place in sorted(self._places.items()):
                file.seek(place)
                yield self._decoded(file.readline())

    def _keep(self, record: ImageRecord, place: int) -> None:
        self._places[record.index] = place
        if record.ignore_index is not None:
            self.ignore_values.add(record.ignore_index)

    def _decoded(self, line: bytes) -> ImageRecord:
        try:
            return msgspec.json.decode(line, type=ImageRecord)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise ArtifactError(
                f"{self.path} is damaged ({one_line(exc)}); remove it: its images will be judged again"
            ) from exc
