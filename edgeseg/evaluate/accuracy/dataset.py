"""Validation images and their masks, found on disk, read one at a time, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError, refusals_as
from edgeseg.evaluate.accuracy.labels import LabelCoding, LabelReader
from edgeseg.images.decoding import file_digest, pixel_digest, read_image
from edgeseg.images.pairs import find_pairs
from edgeseg.spec import InputDtype, ModelSpec


@dataclass(frozen=True)
class Pair:
    """One image and its mask.

    Attributes:
        name: the file's name, for messages and reports.
        image: ``(H, W, C)`` of the engine's dtype, RGB for three channels.
        mask: int32 ``(H, W)`` of class indices (binary: 0 and 1), or ``(classes, H, W)`` of 0 and 1 for multilabel;
            :data:`~edgeseg.evaluate.accuracy.labels.IGNORED` where unlabelled. ``None`` without a mask.
        digest: SHA-256 of the image file, hex.
        ignore_index: the value of the set's mask files that is read as unlabelled, if one was met or given.
    """

    name: str
    image: NDArray[Any]
    mask: NDArray[np.int32] | None
    digest: str = ""
    ignore_index: int | None = None


@dataclass(frozen=True)
class ValidationSet:
    """Image files and, where there are any, their mask files.

    What masks may hold: class indices ``0..classes-1``, as 8- or 16-bit grey (in equal channels, too), 1-bit, or palette
    PNG (the index counts, not the colour), or ``.npy``; for ``binary`` and for two classes 0 and 1, or 0 and 255; for
    ``multilabel`` a ``.npy`` of 0 and 1, ``(classes, H, W)``. One further value may mark unlabelled pixels. Without
    ``ignore_index`` it is recognized only where there can be little doubt: it must be 255 (65535 in 16 bits) or the number
    of classes, and the only such value in the whole set, which is read once to decide (:attr:`labels`), beside at least two
    classes. Every other value is an error that names the file, because a wrong label map that is quietly ignored yields
    figures that look right.

    Attributes:
        source: the folder.
        images: in name order.
        masks: one for each image, or empty.
        classes, task: of the model the set is to judge.
        ignore_index: the value of unlabelled pixels in the files; ``None`` to recognize it.
        unpaired: images left out because they have no mask though others have.
        coding: how the values of the mask files become class indices.
        dtype: of the engine's input, which the images must have.
    """

    source: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    model: ModelSpec
    ignore_index: int | None = None
    unpaired: tuple[str, ...] = ()
    coding: LabelCoding = field(default_factory=lambda: LabelCoding())
    dtype: InputDtype = "uint8"

    @classmethod
    @refusals_as(InputError)
    def open(
        cls,
        source: str | Path,
        model: ModelSpec,
        *,
        ignore_index: int | None = None,
        split: str | None = None,
        dtype: InputDtype = "uint8",
    ) -> ValidationSet:
        """Find the images and masks of a folder; nothing is decoded yet.

        Args:
            source: the folder; see :func:`~edgeseg.images.pairs.find_pairs`.
            model: classes, task and channels.
            ignore_index: see the class.
            split: see :func:`~edgeseg.images.pairs.find_pairs`.
            dtype: see the class.

        Raises:
            InputError: no such folder, no images, or a mask folder in which no mask belongs to an image.
        """
        folder = Path(source)
        if not os.path.isdir(folder):
            raise InputError(f"validation data {folder} is not a folder; give one with images/ and masks/")
        images, masks = find_pairs(folder, split)
        unpaired = tuple(i.name for i in images if i not in masks) if masks else ()
        chosen = [i for i in images if not masks or i in masks]
        labelled = tuple(masks[i] for i in chosen if masks)
        return cls(folder, tuple(chosen), labelled, model, ignore_index, unpaired, dtype=dtype)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        return bool(self.masks)

    def without(self, pixels: Collection[str]) -> ValidationSet:
        """The set without the pictures whose :func:`pixel_digest` is among these (images used for calibration).

        Every image is decoded: a copy under another name or in another format shows the same.
        """
        return self._subset([k for k in range(len(self)) if pixel_digest(self.image(k)) not in pixels])

    def only(self, digests: Collection[str]) -> ValidationSet:
        """The set with just the images whose file content has one of these SHA-256; of equal files the first."""
        first: dict[str, int] = {}
        for k, path in enumerate(self.images):
            first.setdefault(file_digest(path), k)
        return self._subset([k for digest, k in first.items() if digest in digests])

    def _subset(self, keep: Sequence[int]) -> ValidationSet:
        masks = tuple(self.masks[k] for k in keep) if self.masks else ()
        subset = replace(self, images=tuple(self.images[k] for k in keep), masks=masks)
        if "labels" in vars(self):
            # What the values mean was decided by all masks; by fewer it might be something else.
            vars(subset)["labels"] = self.labels
        return subset

    def limited(self, limit: int | None) -> ValidationSet:
        """``limit`` of the images, evenly spread over their order; all with ``None``."""
        return self._subset(evenly_spread(len(self), limit))

    def __iter__(self) -> Iterator[Pair]:
        """Read the pairs in order.

        Raises:
            InputError: an unreadable file, a mask of another size than its image, or a value that is no class.
        """
        for position in range(len(self)):
            yield self.read(position)

    @cached_property
    def labels(self) -> LabelReader:
        """The reader of this set's masks. All of them are read once to decide what their values mean.

        Raises:
            InputError: see :meth:`LabelReader.of`.
        """
        return LabelReader.of(self.masks, self.model, self.ignore_index, self.coding)

    def image(self, position: int) -> NDArray[Any]:
        """Read one image. Raises ``InputError``."""
        return read_image(self.images[position], self.model.in_channels, self.dtype)

    def read(self, position: int) -> Pair:
        """Read one pair. Errors are those of iterating."""
        labels = self.labels
        path = self.images[position]
        image = self.image(position)
        mask = labels.read(self.masks[position]) if self.masks else None
        if mask is not None and mask.shape[-2:] != image.shape[:2]:
            (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[-2:]
            is_turned = (mask_height, mask_width) == (width, height)
            turned = " (an image is turned as its EXIF orientation says: turn the mask, too)" if is_turned else ""
            raise InputError(
                f"{self.masks[position]} is {mask_width}x{mask_height} and its image {path.name} {width}x{height} "
                f"pixels; a mask must have the size of its image{turned}"
            )
        return Pair(path.name, image, mask, file_digest(path), labels.ignore_index)


def evenly_spread(count: int, limit: int | None) -> Sequence[int]:
    """Positions of at most ``limit`` of ``count`` items, evenly spread over their order."""
    return range(count) if limit is None or limit >= count else [k * count // limit for k in range(limit)]
