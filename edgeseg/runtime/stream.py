"""Segment frame after frame while the next is being read and the last is being used."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from edgeseg.arguments import count_of, shortened
from edgeseg.closing import Closing
from edgeseg.errors import SpecError
from edgeseg.runtime.overlap import Overlapped
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.runtime.sources import Picture, Video, open_source


@dataclass(frozen=True, eq=False)
class Frame:
    """An image and its mask.

    Attributes:
        index: position in the source, from 0; gaps where a live source's frames were dropped.
        timestamp_s: seconds since the start of a video or the first frame of a camera; ``None`` for images and arrays.
        image: ``(H, W, C)`` of the engine's dtype; RGB, or as given for a source of arrays.
        mask: as the segmenter returns it for one image.
        path: the image file, for a folder, glob or list.
    """

    index: int
    timestamp_s: float | None
    image: NDArray[Any]
    mask: NDArray[Any]
    path: Path | None = None


class Stream(Closing):
    """An iterator of :class:`Frame`; see :func:`stream`. Close it, or use ``with``, to stop at a certain moment."""

    def __init__(
        self, pictures: Video | Iterable[Picture], segmenter: Segmenter, ahead: int, drop: bool | None
    ) -> None:
        live = isinstance(pictures, Video) and pictures.live
        newest_wins = live if drop is None else drop
        # Pairing a frame with the next one costs a frame of delay: not where the newest is what counts.
        work = partial(_one_by_one if newest_wins else _pipelined, segmenter)
        self._frames: Overlapped[Frame] = Overlapped(pictures, work, ahead=ahead, newest_wins=newest_wins)

    @property
    def dropped(self) -> int:
        """Frames skipped so far because the engine was busy and a newer one had come."""
        return self._frames.dropped

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        return next(self._frames)

    def close(self) -> None:
        """End the threads and give back the file or camera. The segmenter stays open."""
        self._frames.close()


Source: TypeAlias = "str | Path | int | Iterable[NDArray[Any]] | Sequence[str | Path]"


def stream(
    source: Source | Segmenter,
    segmenter: Segmenter | Source,
    *,
    ahead: int = 2,
    drop: bool | None = None,
) -> Stream:
    """Yield frames and their masks, in order, with reading, inference and the caller's own work overlapped.

    Args:
        source: a video file; a camera's index (``0`` or ``"0"``); a folder, glob or ``.txt`` list of images; a list
            of paths; or any iterable of arrays (drawn from in another thread, and copied: the source may use a buffer
            again), in the segmenter's channel order.
        segmenter: from :func:`edgeseg.load`; the two may change places.
        ahead: frames read ahead, and masks waiting for the caller, at most. Of image files one per core, 2 to 4, are being
            decoded beside.
        drop: skip older frames when the engine cannot keep up, so that the newest is always next; ``None``: for
            cameras only. :attr:`Stream.dropped` counts them.

    A TensorRT engine copies one frame while it computes another, so a mask comes when the next frame has been read; not
    where frames are dropped, where the newest must not wait.

    Returns:
        an iterator of :class:`Frame` that ends its threads when exhausted, closed or dropped.

    Raises:
        SpecError: no segmenter, or ``ahead`` below 1.
        InputError: nothing there, not readable, or not of the model's channels; also while iterating.
        MissingDependencyError: OpenCV is not installed, and the source is a video or camera.
    """
    if isinstance(source, Segmenter):
        source, segmenter = segmenter, source
    if not isinstance(segmenter, Segmenter) or isinstance(source, Segmenter):
        raise SpecError(f"segmenter is {shortened(segmenter)}; give a source of images and what edgeseg.load returns")
    ahead = count_of("ahead", ahead, 1, "how many frames may wait, at least 1")
    return Stream(open_source(source, segmenter.spec.input), segmenter, ahead, drop)


def _one_by_one(segmenter: Segmenter, pictures: Iterator[Picture]) -> Generator[Frame, None, None]:
    for picture in pictures:
        mask = segmenter(picture.image, channel_order=picture.channel_order)
        yield Frame(picture.index, picture.timestamp_s, picture.image, mask, picture.path)


def _pipelined(segmenter: Segmenter, pictures: Iterator[Picture]) -> Generator[Frame, None, None]:
    waiting: deque[Picture] = deque()

    def images(first: Picture) -> Iterator[NDArray[Any]]:
        for picture in itertools.chain((first,), pictures):
            waiting.append(picture)
            yield picture.image

    # All pictures of one source have one channel order.
    for first in pictures:
        with closing(segmenter.many(images(first), channel_order=first.channel_order)) as masks:
            for mask in masks:
                picture = waiting.popleft()
                yield Frame(picture.index, picture.timestamp_s, picture.image, mask, picture.path)
