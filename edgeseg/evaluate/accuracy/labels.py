"""Mask files, read into class indices: what they may hold, and what their values mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from edgeseg.errors import InputError, one_line
from edgeseg.images.arrays import read_array
from edgeseg.images.decoding import FORMATS, MAX_ARRAY_BYTES, open_picture
from edgeseg.spec import ModelSpec
from edgeseg.store.files import require_file

IGNORED = -1
"""What an unlabelled pixel is in the masks this module returns, whatever the files use."""

PART_PIXELS = 1 << 22


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
        is_run = len(self.met) > 2 and self.met[-1] - self.met[0] == len(self.met) - 1
        shown = f"{self.met[0]}..{self.met[-1]}" if is_run else _listed(self.met)
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
        raise InputError(f"cannot read mask {path}: {one_line(exc)}") from exc
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


def _present(raw: NDArray[np.integer[Any]]) -> set[int]:
    """The values of a mask file."""
    flat, values = raw.ravel(), set[int]()
    # A part at a time: numpy counts in 64 bits, and sorts copies.
    for start in range(0, flat.size, PART_PIXELS):
        part = flat[start : start + PART_PIXELS]
        # np.unique sorts all pixels; a histogram of 8-bit values is 20 times as fast.
        values.update((np.flatnonzero(np.bincount(part)) if part.dtype == np.uint8 else np.unique(part)).tolist())
    return values
