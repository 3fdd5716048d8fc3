"""Mask files, read into class indices: what they may hold, and what their values mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.images.arrays import ARRAY_SUFFIXES, read_array
from edgeseg.images.decoding import JPEG_SUFFIXES, MAX_ARRAY_BYTES, decoder_errors, open_picture
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
        ignore_index: the value of unlabelled pixels, if there is one; a value that ``coding`` makes a class is that class.
        white: files of a set with two values (binary, multilabel, two classes) hold 255 for "yes".
        met: the values of all files the reader was made from, in order.
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
                both for "yes"; classes counted from 1; a value that is a class or unlabelled, and nobody knows which.
                The message names a file that holds the value.
        """
        reader = cls(model, coding or LabelCoding(), ignore_index)
        first: dict[int, Path] = {}
        for path in paths:
            for value in _present(reader._raw(path)):
                first.setdefault(value, path)
        reader = replace(reader, met=tuple(sorted(first)))
        limit = reader._limit
        coded = {reader._coded(value): value for value in first if reader._class_of(value) != IGNORED}
        if limit == 2 and 255 in coded:
            if 1 not in coded:
                reader = replace(reader, white=True)
            elif model.task != "multiclass" and coded.keys() <= {0, 1, 255}:
                raise InputError(
                    f"{first[coded[1]]} holds 1 and {first[coded[255]]} 255, so these masks use both 1 and 255; if 255 means "
                    "unlabelled give --ignore-index 255"
                )
        odd = {reader._coded(value): value for value in sorted(first) if reader._class_of(value) is None}
        if len(odd) == 1 and ignore_index is None and odd.keys() <= {limit, 255, 65535}:
            _refuse_counting_from_one(coded, limit)
            unlabelled, guessed = odd.popitem()
            reader = replace(reader, ignore_index=unlabelled)
            if len({reader._class_of(value) for value in first} - {IGNORED}) < 2:
                raise InputError(
                    f"the masks hold {_listed(sorted(first))}, so {guessed} may be a class or mean unlabelled: give "
                    f"--ignore-index {guessed} if it does, else correct the masks (bench: --label-map {guessed}=CLASS)"
                )
        if odd:
            raise reader._refusal({value: first[value] for value in odd.values()})
        return reader

    @property
    def meaning(self) -> str:
        """What the values of the files were taken for, in words, where that is not plain: or ``""``."""
        words = ["255 read as 1"] if self.white else []
        unlabelled = [v for v in self.met if v not in self.coding.values and self._class_of(v) == IGNORED]
        words += [f"{value} read as unlabelled" for value in unlabelled]
        if not words:
            return ""
        is_run = len(self.met) > 2 and self.met[-1] - self.met[0] == len(self.met) - 1
        shown = f"{self.met[0]}..{self.met[-1]}" if is_run else _listed(self.met)
        doubt = " (if 0 is that, their classes count from 1)" if unlabelled == [self._limit] and 0 in self.met else ""
        return f"masks hold {shown}, {' and '.join(words)}{doubt}"

    def read(self, path: Path) -> NDArray[np.int32]:
        """Return int32 class indices with :data:`IGNORED` for unlabelled pixels.

        Raises:
            InputError: unreadable, a colour image, or values that are neither classes nor the ignore value.
        """
        raw = self._raw(path)
        mask = raw.astype(np.int32)
        odd = {}
        for value in sorted(_present(raw)):
            read_as = self._class_of(value)
            if read_as is None:
                odd[value] = path
            elif read_as != value:
                mask[raw == value] = read_as
        if odd:
            raise self._refusal(odd)
        return mask

    @property
    def _limit(self) -> int:
        return self.model.classes if self.model.task == "multiclass" else 2

    def _coded(self, value: int) -> int:
        return self.coding.values.get(value, value)

    def _class_of(self, value: int) -> int | None:
        """The class a value of the files stands for, or :data:`IGNORED`; ``None`` for a value that is neither."""
        coded = self._coded(value)
        is_mapped, is_class = value in self.coding.values, 0 <= coded < self._limit
        # 0 made a class is one, though the 0 of the files be unlabelled; what is made 255 is unlabelled as 255 is.
        if (is_mapped and coded == IGNORED) or (coded == self.ignore_index and not (is_mapped and is_class)):
            return IGNORED
        if self.white and coded == 255:
            return 1
        return coded if is_class else None

    def _raw(self, path: Path) -> NDArray[np.integer[Any]]:
        raw = read_label_file(path, self.coding.colours)
        if self.model.task == "multilabel":
            expected = (self.model.classes, "H", "W")
            if raw.ndim != 3 or raw.shape[0] != self.model.classes:
                raise InputError(f"{path} has shape {raw.shape}; a multilabel mask is a .npy of shape {expected}")
            return raw
        plane = raw
        if raw.ndim == 3 and 1 in (raw.shape[0], raw.shape[-1]):
            plane = raw[0] if raw.shape[0] == 1 else raw[..., 0]
        if plane.ndim != 2:
            raise InputError(f"{path} has shape {raw.shape}; a mask has one class index per pixel, (H, W)")
        return plane

    def _refusal(self, odd: Mapping[int, Path]) -> InputError:
        """For values that are no class, each with a file that holds it; two of the files are named."""
        files = list(dict.fromkeys(odd.values()))[:2]
        held = " and ".join(f"{file} holds {_listed([v for v in odd if odd[v] == file])}" for file in files)
        also = "" if self.ignore_index is None else f" and {self.ignore_index} (ignored)"
        jpeg = " (JPEG does not keep values: make them PNG)" if files[0].suffix.lower() in JPEG_SUFFIXES else ""
        return InputError(
            f"{held}; this model's masks hold 0..{self._limit - 1}{also}: correct the masks{jpeg}, or give "
            "--ignore-index N for the value of unlabelled pixels"
        )


def _refuse_counting_from_one(values: Iterable[int], limit: int) -> None:
    """Refuse masks in which 0 never occurs and the number of classes does: its last class would count as unlabelled."""
    held = sorted(values)
    if limit in held and 0 not in held and len(held) > 1:
        raise InputError(
            f"the masks hold {_listed(held)} and never 0, so their classes seem to count from 1: subtract 1 (bench: "
            f"--label-map 1=0,2=1{',...' if limit > 2 else ''}), or give --ignore-index {limit} if {limit} means unlabelled"
        )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def read_label_file(path: Path, colours: Mapping[tuple[int, int, int], int] | None = None) -> NDArray[np.integer[Any]]:
    """Read a mask file as stored integers: ``(H, W)`` from an image, any shape from ``.npy``, ``.npz``.

    Args:
        path: the file.
        colours: RGB -> value for colour images; without it they are refused, unless they are grey: channels that are equal.

    Raises:
        InputError: unreadable, too large, not whole numbers, a colour image, or one with a colour that is not listed.
    """
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _whole(path, read_array(path, "mask", MAX_ARRAY_BYTES))
    require_file(path, "mask")
    with decoder_errors(path, "mask"), open_picture(path) as image:
        if colours and image.mode in {"RGB", "RGBA", "P"}:
            return _decoded(np.asarray(image.convert("RGB")), colours, path)
        mode, array = image.mode, np.asarray(image)
        if mode == "P" and image.format == "GIF":
            # Who writes a GIF numbers its colours anew: of greys the level is what was meant.
            levels = _grey(np.asarray(image.convert("RGB")))
            array = array if levels is None else levels
        elif mode in {"RGB", "RGBA", "LA"}:
            levels = _grey(array[..., : 1 if mode == "LA" else 3])
            mode, array = (mode, array) if levels is None else ("L", levels)
        if mode not in {"1", "L", "P", "I", "F", "I;16", "I;16B", "I;16L"}:
            raise InputError(
                f"{path} is a colour image (mode {mode}); a mask holds one class index per pixel: "
                "make it a grey or palette PNG"
            )
    return _whole(path, array)


def _whole(path: Path, array: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Booleans as 0 and 1, and floats that are whole numbers, as training scripts and GIS write them, as integers."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        is_small = not array.size or bool(array.min() >= -(2**31) and array.max() < 2**31)
        if not is_small or not np.array_equal(array, array.round()):
            raise InputError(f"{path} holds {array.dtype} that are no whole numbers; a mask holds class indices")
        return array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path} holds {array.dtype}; a mask holds integers")
    return array


def _grey(channels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The one value per pixel that equal channels hold; ``None`` for colours."""
    return np.ascontiguousarray(channels[..., 0]) if (channels == channels[..., :1]).all() else None


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
