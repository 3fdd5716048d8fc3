"""Validation images and their masks, found on disk, read one at a time, in a fixed order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from edgeseg.errors import InputError, refusals_as
from edgeseg.images.arrays import read_array
from edgeseg.images.decoding import FORMATS, MAX_ARRAY_BYTES, list_images, open_picture, pixel_digest, read_image
from edgeseg.spec import ModelSpec
from edgeseg.store.files import reason, require_file

T = TypeVar("T")

IGNORED = -1
"""What an unlabelled pixel is in the masks this module returns, whatever the files use."""

IMAGE_FOLDERS = ("images", "image", "img", "img_dir")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ann_dir")
PART_PIXELS = 1 << 22
MASK_SUFFIXES = ("_mask", "_label", "_labels", "_gt")


@dataclass(frozen=True)
class Pair:
    """One image and its mask.

    Attributes:
        name: the file's name, for messages and reports.
        image: uint8 ``(H, W, C)``, RGB for three channels.
        mask: int32 ``(H, W)`` of class indices (binary: 0 and 1), or ``(classes, H, W)`` of 0 and 1 for multilabel;
            :data:`IGNORED` where unlabelled. ``None`` without a mask.
        digest: SHA-256 of the image file, hex.
        ignore_index: the value of the set's mask files that is read as unlabelled, if one was met or given.
    """

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.int32] | None
    digest: str = ""
    ignore_index: int | None = None


@dataclass(frozen=True)
class LabelCoding:
    """How mask files are read whose values are not the model's class indices.

    Attributes:
        values: file value -> class index, or :data:`IGNORED`; a value not named stays as it is.
        colours: RGB -> file value, for masks that are colour images; every pixel must have one of these colours.
    """

    values: dict[int, int] = field(default_factory=dict)
    colours: dict[tuple[int, int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationSet:
    """Image files and, where there are any, their mask files.

    What masks may hold: class indices ``0..classes-1``, as 8- or 16-bit grey, 1-bit, or palette PNG (the index counts,
    not the colour), or ``.npy``; for ``binary`` 0 and 1, or 0 and 255; for ``multilabel`` a ``.npy`` of 0 and 1,
    ``(classes, H, W)``. One further value may mark unlabelled pixels. Without ``ignore_index`` it is recognized only
    where there can be little doubt: it must be 255 (65535 in 16 bits) or the number of classes, and the only such value
    in the whole set, which is read once to decide (:attr:`labels`). Every other value is an error that names the file,
    because a wrong label map that is quietly ignored yields figures that look right.

    Attributes:
        source: the folder.
        images: in name order.
        masks: one for each image, or empty.
        classes, task: of the model the set is to judge.
        ignore_index: the value of unlabelled pixels in the files; ``None`` to recognize it.
        unpaired: images left out because they have no mask though others have.
        coding: how the values of the mask files become class indices.
    """

    source: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    model: ModelSpec
    ignore_index: int | None = None
    unpaired: tuple[str, ...] = ()
    coding: LabelCoding = field(default_factory=lambda: LabelCoding())

    @classmethod
    @refusals_as(InputError)
    def open(
        cls,
        source: str | Path,
        model: ModelSpec,
        *,
        ignore_index: int | None = None,
        limit: int | None = None,
        split: str | None = None,
    ) -> ValidationSet:
        """Find the images and masks of a folder; nothing is decoded yet.

        Understood: ``images/`` beside ``masks/`` (or ``labels/``, ``annotations/``) with equal stems; one folder with
        ``NAME.jpg`` and ``NAME_mask.png`` (``_label``, ``_gt``) or ``NAME.jpg`` and ``NAME.png``; images alone.

        Args:
            source: the folder.
            model: classes, task and channels.
            ignore_index: see the class.
            limit: keep this many, evenly spread over the name order; ``None`` for all.
            split: folder to take in both, where there is one (``images/val`` beside ``masks/val``).

        Raises:
            InputError: no such folder, no images, or a mask folder in which no mask belongs to an image.
        """
        folder = Path(source)
        if not os.path.isdir(folder):
            raise InputError(f"validation data {folder} is not a folder; give one with images/ and masks/")
        if limit is not None and limit < 1:
            raise InputError(f"{limit} validation images asked for; at least 1 is needed")
        images, masks = _find(folder, split)
        unpaired = tuple(i.name for i in images if i not in masks) if masks else ()
        chosen = _spread([i for i in images if not masks or i in masks], limit)
        return cls(folder, tuple(chosen), tuple(masks[i] for i in chosen if masks), model, ignore_index, unpaired)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        return bool(self.masks)

    def without(self, pixels: Collection[str]) -> ValidationSet:
        """The set without the pictures whose :func:`pixel_digest` is among these (images used for calibration).

        Every image is decoded: a copy under another name or in another format shows the same.
        """
        channels = self.model.in_channels
        return self._subset(
            [k for k, path in enumerate(self.images) if pixel_digest(read_image(path, channels)) not in pixels]
        )

    def only(self, digests: Collection[str]) -> ValidationSet:
        """The set with just the images whose file content has one of these SHA-256; of equal files the first."""
        first: dict[str, int] = {}
        for k, path in enumerate(self.images):
            first.setdefault(file_digest(path), k)
        return self._subset([k for digest, k in first.items() if digest in digests])

    def _subset(self, keep: list[int]) -> ValidationSet:
        masks = tuple(self.masks[k] for k in keep) if self.masks else ()
        return replace(self, images=tuple(self.images[k] for k in keep), masks=masks)

    def limited(self, limit: int | None) -> ValidationSet:
        """``limit`` of the images, evenly spread over their order; all with ``None``."""
        return self._subset(_spread(list(range(len(self))), limit))

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

    def read(self, position: int) -> Pair:
        """Read one pair. Errors are those of iterating."""
        labels = self.labels
        path = self.images[position]
        image = read_image(path, self.model.in_channels)
        mask = labels.read(self.masks[position]) if self.masks else None
        if mask is not None and mask.shape[-2:] != image.shape[:2]:
            (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[-2:]
            raise InputError(
                f"{self.masks[position]} is {mask_width}x{mask_height} and its image {path.name} {width}x{height} "
                "pixels; a mask must have the size of its image"
            )
        return Pair(path.name, image, mask, file_digest(path), labels.ignore_index)


@dataclass(frozen=True)
class LabelReader:
    """Reads mask files into class indices, each alike, whichever comes first and whoever reads it.

    Attributes:
        model: classes and task.
        coding: how the values of the files become class indices.
        ignore_index: the value of unlabelled pixels, if there is one.
        white: files of a binary or multilabel set hold 255 for "yes".
        met: the values of all files the reader was made from, after ``coding``, in order.
    """

    model: ModelSpec
    coding: LabelCoding = field(default_factory=LabelCoding)
    ignore_index: int | None = None
    white: bool = False
    met: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, paths: Iterable[Path], model: ModelSpec, ignore_index: int | None = None, coding: LabelCoding | None = None
    ) -> LabelReader:
        """Read all masks of a set and decide what their values mean: one meaning for the whole set.

        Raises:
            InputError: a file that is unreadable or no mask; values that are neither classes nor unlabelled; 1 and 255
                both for "yes"; classes counted from 1. The message names a file that holds the value.
        """
        reader = cls(model, coding or LabelCoding(), ignore_index)
        first: dict[int, Path] = {}
        for path in paths:
            for value in reader._coded(_present(reader._raw(path))):
                first.setdefault(value, path)
        if model.task != "multiclass" and ignore_index != 255:
            if {1, 255} <= first.keys():
                raise InputError(
                    f"{first[1]} holds 1 and {first[255]} 255, so these masks use both 1 and 255; if 255 means unlabelled "
                    "give --ignore-index 255"
                )
            reader = replace(reader, white=255 in first)
        limit = reader._limit
        odd = sorted(v for v in first if not reader._is_known(v))
        if len(odd) == 1 and ignore_index is None and odd[0] in {limit, 255, 65535}:
            _refuse_counting_from_one(first, limit)
            reader = replace(reader, ignore_index=odd.pop())
        if odd:
            raise reader._refusal({v: first[v] for v in odd})
        return replace(reader, met=tuple(sorted(first)))

    @property
    def meaning(self) -> str:
        """What the values of the files were taken for, in words, where that is not plain: or ``""``."""
        words = ["255 read as 1"] if self.white else []
        if self.ignore_index in self.met:
            words.append(f"{self.ignore_index} read as unlabelled")
        if not words:
            return ""
        shown = f"{self.met[0]}..{self.met[-1]}" if _is_run(self.met) and len(self.met) > 2 else _listed(self.met)
        return f"masks hold {shown}, {' and '.join(words)}"

    def read(self, path: Path) -> NDArray[np.int32]:
        """Return int32 class indices with :data:`IGNORED` for unlabelled pixels.

        Raises:
            InputError: unreadable, a colour image, or values that are neither classes nor the ignore value.
        """
        raw = self._raw(path)
        present = _present(raw)
        odd = {v: path for v in sorted(self._coded(present)) if not self._is_known(v)}
        if odd:
            raise self._refusal(odd)
        mask = raw.astype(np.int32)
        for value in present & self.coding.values.keys():
            mask[raw == value] = self.coding.values[value]
        if self.white:
            mask[mask == 255] = 1
        if self.ignore_index is not None:
            mask[mask == self.ignore_index] = IGNORED
        return mask

    @property
    def _limit(self) -> int:
        return self.model.classes if self.model.task == "multiclass" else 2

    def _is_known(self, value: int) -> bool:
        return 0 <= value < self._limit or value == self.ignore_index or (self.white and value == 255)

    def _raw(self, path: Path) -> NDArray[np.integer[Any]]:
        raw = read_label_file(path, self.coding.colours)
        if self.model.task == "multilabel":
            expected = (self.model.classes, "H", "W")
            if raw.ndim != 3 or raw.shape[0] != self.model.classes:
                raise InputError(f"{path} has shape {raw.shape}; a multilabel mask is a .npy of shape {expected}")
        elif raw.ndim != 2:
            raise InputError(f"{path} has shape {raw.shape}; a mask has one class index per pixel, (H, W)")
        return raw

    def _coded(self, values: set[int]) -> set[int]:
        """Values of a file after ``coding``, without those it says are unlabelled."""
        coding = self.coding.values
        return {coding.get(value, value) for value in values if coding.get(value) != IGNORED}

    def _refusal(self, odd: Mapping[int, Path]) -> InputError:
        """For values that are no class, each with a file that holds it; two of the files are named."""
        files = list(dict.fromkeys(odd.values()))[:2]
        held = " and ".join(f"{file} holds {_listed([v for v in odd if odd[v] == file])}" for file in files)
        also = "" if self.ignore_index is None else f" and {self.ignore_index} (ignored)"
        return InputError(
            f"{held}; this model's masks hold 0..{self._limit - 1}{also}: correct the masks, or give "
            "--ignore-index N for the value of unlabelled pixels"
        )


def _refuse_counting_from_one(first: Mapping[int, Path], limit: int) -> None:
    """Refuse masks in which 0 never occurs and the number of classes does: its last class would count as unlabelled."""
    if limit in first and 0 not in first and len(first) > 1:
        raise InputError(
            f"the masks hold {_listed(sorted(first))} and never 0, so their classes seem to count from 1: subtract 1 (bench: "
            f"--label-map 1=0,2=1{',...' if limit > 2 else ''}), or give --ignore-index {limit} if {limit} means unlabelled"
        )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _is_run(values: Sequence[int]) -> bool:
    return values[-1] - values[0] == len(values) - 1


def read_label_file(path: Path, colours: Mapping[tuple[int, int, int], int] | None = None) -> NDArray[np.integer[Any]]:
    """Read a mask file as stored integers: ``(H, W)`` from an image of one of :data:`FORMATS`, any shape from ``.npy``.

    Args:
        path: the file.
        colours: RGB -> value for colour images; without it they are refused.

    Raises:
        InputError: unreadable, too large, not integers, a colour image, or one with a colour that is not listed.
    """
    if path.suffix.lower() == ".npy":
        array = read_array(path, "mask", MAX_ARRAY_BYTES)
        if array.dtype == bool:
            return np.asarray(array, dtype=np.uint8)
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{path} holds {array.dtype}; a mask holds integers")
        return array
    require_file(path, "mask")
    try:
        with open_picture(path) as image:
            if colours and image.mode in {"RGB", "RGBA", "P"}:
                return _decoded(np.asarray(image.convert("RGB")), colours, path)
            if image.mode not in {"1", "L", "P", "I", "I;16", "I;16B", "I;16L"}:
                raise InputError(
                    f"{path} is a colour image (mode {image.mode}); a mask holds one class index per pixel: "
                    "make it a grey or palette PNG"
                )
            array = np.asarray(image)
    except InputError:
        raise
    except UnidentifiedImageError as exc:
        raise InputError(f"cannot read mask {path}: not one of {', '.join(FORMATS)}, or damaged") from exc
    except Exception as exc:
        # Decoders raise whatever their parsing of a damaged file trips over: OSError, SyntaxError, struct.error, ...
        raise InputError(f"cannot read mask {path}: {reason(exc)}") from exc
    return array.astype(np.uint8) if array.dtype == bool else array


def _decoded(pixels: NDArray[np.uint8], colours: Mapping[tuple[int, int, int], int], path: Path) -> NDArray[np.int32]:
    codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    known = np.array(sorted((r << 16 | g << 8 | b, value) for (r, g, b), value in colours.items()), np.int32)
    index = np.searchsorted(known[:, 0], codes).clip(max=len(known) - 1)
    odd = codes != known[index, 0]
    if odd.any():
        row, column = (int(v) for v in np.argwhere(odd)[0])
        colour = tuple(int(v) for v in pixels[row, column])
        raise InputError(f"{path} has the colour {colour} at row {row}, column {column}, which is no class's colour")
    return np.asarray(known[index, 1])


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror}") from exc


def _present(raw: NDArray[np.integer[Any]]) -> set[int]:
    """The values of a mask file."""
    flat, values = raw.ravel(), set[int]()
    # A part at a time: numpy counts in 64 bits, and sorts copies.
    for start in range(0, flat.size, PART_PIXELS):
        part = flat[start : start + PART_PIXELS]
        # np.unique sorts all pixels; a histogram of 8-bit values is 20 times as fast.
        values.update((np.flatnonzero(np.bincount(part)) if part.dtype == np.uint8 else np.unique(part)).tolist())
    return values


def _find(folder: Path, split: str | None) -> tuple[list[Path], dict[Path, Path]]:
    image_folder = next((folder / n for n in IMAGE_FOLDERS if os.path.isdir(folder / n)), None)
    if image_folder is None:
        return _find_flat(folder)
    mask_folder = next((folder / n for n in MASK_FOLDERS if os.path.isdir(folder / n)), None)
    if split and os.path.isdir(image_folder / split):
        image_folder = image_folder / split
        mask_folder = mask_folder / split if mask_folder is not None and os.path.isdir(mask_folder / split) else None
    images = _images(image_folder)
    if mask_folder is None:
        return images, {}
    by_stem: dict[str, Path] = {}
    for path in _mask_files(mask_folder):
        stem = next((path.stem.removesuffix(s) for s in MASK_SUFFIXES if path.stem.endswith(s)), path.stem)
        by_stem.setdefault(path.stem, path)
        by_stem.setdefault(stem, path)
    pairs = {i: by_stem[i.stem] for i in images if i.stem in by_stem}
    if not pairs:
        raise InputError(
            f"no file in {mask_folder} belongs to an image in {image_folder}; the names must be equal up to the suffix"
        )
    return images, pairs


def _find_flat(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    images = _images(folder)
    files = {p.name: p for p in (*images, *_mask_files(folder))}
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(files.values()):
        by_stem.setdefault(path.stem, []).append(path)
    pairs: dict[Path, Path] = {}
    for stem, paths in by_stem.items():
        photo = next((p for p in paths if p.suffix.lower() in {".jpg", ".jpeg"}), None) or paths[0]
        rest = [p for p in paths if p != photo and p.suffix.lower() in {".png", ".npy"}]
        named = [p for s in MASK_SUFFIXES for p in by_stem.get(stem + s, []) if p.suffix.lower() in {".png", ".npy"}]
        for mask in (named or rest)[:1]:
            pairs[photo] = mask
    used = set(pairs.values())
    return [p for p in images if p not in used], pairs


def _images(folder: Path) -> list[Path]:
    try:
        return list_images(folder)
    except InputError as exc:
        raise InputError(f"no images in {folder}; give a folder with images/ and masks/, or with image files") from exc


def _mask_files(folder: Path) -> list[Path]:
    try:
        files = list(folder.iterdir())
    except OSError as exc:
        raise InputError(f"cannot list {folder}: {exc.strerror}") from exc
    return sorted(p for p in files if p.suffix.lower() in {".png", ".npy", ".tif", ".tiff", ".bmp", ".gif"})


def _spread(items: list[T], limit: int | None) -> list[T]:
    if limit is None or limit >= len(items):
        return items
    return [items[k * len(items) // limit] for k in range(limit)]
