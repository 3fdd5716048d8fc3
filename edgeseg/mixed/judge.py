"""How a session's masks compare with a reference's, image by image: enough for figures and for their paired intervals."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import Session
from edgeseg.closing import Closing
from edgeseg.errors import SpecError
from edgeseg.evaluate.accuracy.counts import AREA_COLUMNS, AccuracyMeter, optional
from edgeseg.evaluate.accuracy.dataset import Pair, evenly_spread
from edgeseg.evaluate.intervals import COLUMNS, MIN_IMAGES, Counts, figure, interval, per_class
from edgeseg.evaluate.verify import compare_masks
from edgeseg.spec import PipelineSpec
from edgeseg.store.search import Estimate

JUDGED_NAME = "judged.json"
"""Of a judgement in the cache."""

ClassCounts = tuple[tuple[int, int, int, int], ...]
"""``(class, true positives, false positives, false negatives)`` of the classes that occur."""


@dataclass(frozen=True)
class ImageTally:
    """One image.

    Attributes:
        agreement: share of pixels to which both give the same class, at the engine's size.
        reference, session: against the mask, at the size of the source image; ``None`` without a mask.
    """

    agreement: float
    reference: ClassCounts | None = None
    session: ClassCounts | None = None


@dataclass(frozen=True)
class Judged:
    """What is known of a session on some images."""

    classes: int
    images: tuple[ImageTally, ...]

    def __post_init__(self) -> None:
        for image in self.images:
            counts = (image.reference, image.session)
            seen = [index for tallies in counts for index, *_ in tallies or ()]
            if (None in counts) != (counts == (None, None)) or not all(0 <= index < self.classes for index in seen):
                raise SpecError(f"a tally is not that of an image of {self.classes} classes")

    @property
    def has_masks(self) -> bool:
        return bool(self.images) and all(image.reference is not None for image in self.images)

    def agreement(self) -> Estimate:
        """Share of pixels that agree with the reference."""
        shares = np.array([image.agreement for image in self.images])
        estimate = _estimate(len(shares), lambda weights: (weights @ shares) / weights.sum(axis=1))
        assert estimate is not None  # every image has pixels
        return estimate

    def miou_drop(self) -> Estimate | None:
        """mIoU lost against the reference, with the interval of the paired difference; ``None`` without labels."""
        if not self.has_masks:
            return None
        before, after = self._counts("reference"), self._counts("session")

        def lost(weights: NDArray[Any]) -> NDArray[Any]:
            return figure("miou", before.totals(weights)) - figure("miou", after.totals(weights))

        return _estimate(len(self.images), lost)

    def class_drops(self) -> tuple[float | None, ...]:
        """IoU lost per class; empty without masks, ``None`` for a class that has no IoU on either side."""
        if not self.has_masks:
            return ()
        before, after = (
            per_class("miou", self._counts(which).classes.sum(axis=0)) for which in ("reference", "session")
        )
        return optional(before - after)

    def _counts(self, which: str) -> Counts:
        """Of areas; contours and pixels, which no figure here needs, are 0."""
        images = len(self.images)
        classes = np.zeros((images, self.classes, COLUMNS))
        for position, image in enumerate(self.images):
            for index, *areas in getattr(image, which):
                classes[position, index, :AREA_COLUMNS] = areas
        return Counts(classes, np.zeros(images), np.zeros(images))


def _estimate(images: int, statistic: Callable[[NDArray[Any]], NDArray[Any]]) -> Estimate | None:
    if images < MIN_IMAGES:
        value = float(statistic(np.ones((1, images), np.int64))[0])
        return None if np.isnan(value) else Estimate(value)
    result = interval(images, statistic)
    return None if result is None else Estimate(result.value, result.low, result.high)


def judge(
    reference: Session,
    session: Session,
    spec: PipelineSpec,
    pairs: Iterable[Pair],
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Run all images through both.

    Raises:
        InputError: an image that cannot be used.
    """
    tallies = []
    total = operator.length_hint(pairs)
    for pair in pairs:
        seen = compare_masks(reference, session, spec, [pair])
        agreement = seen.agreement.agreement
        assert agreement is not None  # of one image
        both = (None, None) if pair.mask is None else (_class_counts(seen.reference), _class_counts(seen.engine))
        tallies.append(ImageTally(agreement, *both))
        if progress is not None:
            progress(len(tallies), total)
    return Judged(spec.model.classes, tuple(tallies))


def _class_counts(meter: AccuracyMeter) -> ClassCounts:
    """Of a meter that saw one image."""
    rows = enumerate(meter.counts[:, :AREA_COLUMNS].tolist())
    return tuple((index, tp, fp, fn) for index, (tp, fp, fn) in rows if tp or fp or fn)


class Remembered(Closing):
    """A session that runs each batch once and reads what came out from a folder after that.

    Args:
        session: stays the caller's to close.
        folder: for the results; of one session alone.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        path = self._folder / f"{batch_key(images)}.npz"
        if not path.is_file():
            np.savez_compressed(path, **self._session.run(images))  # type: ignore[arg-type]
        with np.load(path, allow_pickle=False) as results:
            return dict(results)

    def digest(self) -> str:
        """SHA-256 over all that was returned so far, by whatever session uses the folder."""
        digest = hashlib.sha256()
        for path in sorted(self._folder.glob("*.npz")):
            with np.load(path, allow_pickle=False) as results:
                for name in sorted(results.files):
                    digest.update(f"{path.name} {name} {results[name].dtype} {results[name].shape}".encode())
                    digest.update(np.ascontiguousarray(results[name]).data)
        return digest.hexdigest()

    def close(self) -> None:
        """The session belongs to the caller."""


def batch_key(images: NDArray[Any]) -> str:
    """What a batch is recognized by: its shape and all its pixels."""
    digest = hashlib.blake2b(repr(images.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def pairs_key(pairs: Iterable[Pair]) -> str:
    """SHA-256 over images and masks, in order: what a judgement is a judgement on."""
    digest = hashlib.sha256()
    for pair in pairs:
        for array in (pair.image, pair.mask):
            if array is not None:
                digest.update(repr((array.shape, str(array.dtype))).encode())
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def spread(pairs: Iterable[Pair], limit: int) -> list[Pair]:
    """At most ``limit`` of the images, evenly spread over their order."""
    chosen = set(evenly_spread(operator.length_hint(pairs), limit))
    return [pair for k, pair in enumerate(pairs) if k in chosen]
