"""The images a model is calibrated on: where they come from, which are taken, and what identifies them."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import EdgesegError, InputError, refusals_as
from edgeseg.images.arrays import ARRAY_SUFFIXES, open_arrays
from edgeseg.images.decoding import IMAGE_SUFFIXES, MAX_ARRAY_BYTES, file_digest, list_images, pixel_digest, read_image
from edgeseg.images.dtypes import in_dtype, refusal, takes
from edgeseg.images.pairs import find_images
from edgeseg.images.placement import fit_windows
from edgeseg.spec import InputDtype, InputSpec

MINIMUM_IMAGES = 8
"""Fewest images a calibration is made from, unless fewer are asked for."""

MAX_ARCHIVE_BYTES = 2 << 30
"""Most bytes the arrays of a ``.npz`` may have, which are kept in memory; a ``.npy`` is read from the disk as needed."""

MAX_STACKED_IMAGES = 100_000
"""Most images in one array."""

SMALLEST_SIDE = 16
"""Images with a side of fewer pixels are thumbnails or accidents, and are skipped."""

CalibrationSource: TypeAlias = "str | Path | Iterable[NDArray[Any] | str | Path]"


@dataclass(frozen=True)
class _File:
    """A candidate: its pixels, ``(H, W, channels)``, and the SHA-256 of the stored content. Both raise ``InputError``."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, channels: int, dtype: InputDtype) -> NDArray[Any]:
        return read_image(self.path, channels, dtype)

    def digest(self) -> str:
        return file_digest(self.path)


@dataclass(frozen=True)
class _Array:
    """A candidate in memory; see :class:`_File`."""

    name: str
    pixels: NDArray[Any]

    def read(self, channels: int, dtype: InputDtype) -> NDArray[Any]:
        if self.pixels.shape[2] != channels:
            raise InputError(f"{self.name} has {self.pixels.shape[2]} channels, the model takes {channels}")
        return np.ascontiguousarray(in_dtype(self.pixels, dtype, f"{self.name} is"))

    def digest(self) -> str:
        return pixel_digest(self.pixels)


_Image: TypeAlias = _File | _Array


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate on, checked and in a fixed order. Made by :meth:`open`; holds no pixels of files.

    Attributes:
        source: where they came from, in words.
        content: SHA-256 of each image taken, in order: of the file's bytes, or of an array's pixels.
        pixels: SHA-256 of what each shows, which copies in other files or formats have in common; no two are equal.
        skipped: name and reason of every image that could not be used.
        dtype: of the images.
    """

    source: str
    content: tuple[str, ...]
    pixels: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    dtype: InputDtype
    _images: tuple[_Image, ...]

    @classmethod
    def open(
        cls,
        source: CalibrationSource,
        *,
        limit: int | None = None,
        seed: int = 0,
        channels: int = 3,
        dtype: InputDtype = "uint8",
        minimum: int = MINIMUM_IMAGES,
    ) -> CalibrationSet:
        """Find the images, take a subset, and make sure that each can be decoded and shows something else.

        A picture that is there twice, in whatever files, is taken once: it would count twice in every statistic, and
        its copy would be held out to verify what was calibrated on it.

        Args:
            source: a folder of images (or one with them in ``images/``; of a data set those that are no masks), a glob
                pattern, a ``.txt`` list with one path a line relative to the list, a ``.npy`` or ``.npz`` of
                ``(N, H, W, C)``, or an iterable of paths and of ``(H, W, C)``, ``(H, W)`` or ``(N, H, W, C)`` arrays (kept
                in memory). RGB for three channels.
            limit: take at most this many, chosen by ``seed``; an image that cannot be used is replaced by another.
            seed: of the choice; the same images and seed give the same subset.
            channels: of the model's input.
            dtype: of the engine's input; images of another one are skipped, with the reason.
            minimum: refuse to calibrate on fewer; a smaller ``limit`` lowers it.

        Raises:
            InputError: nothing there, not readable, too few usable images (says which were skipped and why), or
                nothing but images of a single colour.
        """
        if limit is not None and limit < 1:
            raise InputError(f"calibration limit is {limit}; give at least 1 image, or none for all of them")
        words, sources = _find(source, dtype)
        order = list(range(len(sources)))
        if limit is not None and limit < len(sources):
            random.Random(seed).shuffle(order)
        taken: list[tuple[int, _Content]] = []
        skipped: list[tuple[str, str]] = []
        name_of: dict[str, str] = {}
        for index in order:
            if len(taken) == limit:
                break
            try:
                content = _check(sources[index], channels, dtype)
                if content.pixels in name_of:
                    raise InputError(f"the same picture as {name_of[content.pixels]}")
                name_of[content.pixels] = sources[index].name
                taken.append((index, content))
            except EdgesegError as exc:
                skipped.append((sources[index].name, str(exc)))
        needed = min(minimum, limit) if limit is not None else minimum
        if len(taken) < max(needed, 1):
            raise InputError(_too_few(words, len(taken), len(sources), needed, skipped))
        if all(content.is_one_colour for _, content in taken):
            raise InputError(
                f"each of the {len(taken)} images in {words} is of a single colour; ranges taken from them would fit no "
                "real image: give images like those the model will see"
            )
        taken.sort(key=lambda item: item[0])
        return cls(
            source=words,
            content=tuple(content.stored for _, content in taken),
            pixels=tuple(content.pixels for _, content in taken),
            skipped=tuple(sorted(skipped)),
            dtype=dtype,
            _images=tuple(sources[index] for index, _ in taken),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the content of the images taken; neither their names nor their order change it."""
        return hashlib.sha256("\n".join(sorted(self.content)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def hold_out(self, every: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Split into a set to calibrate on and one of every ``every``-th image, kept to verify on."""
        numbers = range(len(self))
        return self.take(k for k in numbers if (k + 1) % every), self.take(k for k in numbers if not (k + 1) % every)

    def take(self, numbers: Iterable[int]) -> CalibrationSet:
        """The images of these numbers; those past the last are left out."""
        indices = [k for k in numbers if k < len(self)]
        return replace(
            self,
            content=tuple(self.content[k] for k in indices),
            pixels=tuple(self.pixels[k] for k in indices),
            _images=tuple(self._images[k] for k in indices),
        )

    def named_images(self, channels: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each image's name and pixels, ``(H, W, channels)``, at its own size.

        Raises:
            InputError: an image changed or vanished since :meth:`open`.
        """
        for image in self._images:
            yield image.name, image.read(channels, self.dtype)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the images taken, in order."""
        return tuple(image.name for image in self._images)

    def images(self, spec: InputSpec) -> Iterator[NDArray[Any]]:
        """Yield what the engine would see, ``(1, H, W, C)``: one array an image, several with policy ``tile``.

        Raises:
            InputError: an image changed or vanished since :meth:`open`.
        """
        for _, windows in self.named_windows(spec):
            yield from windows

    def named_windows(self, spec: InputSpec) -> Iterator[tuple[str, list[NDArray[Any]]]]:
        """Yield each image's name with all that the engine sees of it; see :meth:`images`."""
        for name, pixels in self.named_images(spec.channels):
            yield name, [np.ascontiguousarray(window[None]) for window in fit_windows(pixels, spec)]


def check_source(
    source: CalibrationSource, limit: int | None, dtype: InputDtype, minimum: int = MINIMUM_IMAGES
) -> None:
    """Raise ``InputError`` where a look at the names, or at the arrays' shapes, shows fewer images than ``minimum`` and
    ``limit``, or another dtype than the engine's. What can be gone through only once is left alone."""
    if isinstance(source, (str, Path, Sequence, np.ndarray)):
        words, sources = _find(source, dtype)
        needed = minimum if limit is None else min(minimum, limit)
        if len(sources) < needed:
            raise InputError(_too_few(words, len(sources), len(sources), needed, ()))


@dataclass(frozen=True)
class _Content:
    """What tells one candidate from another: SHA-256 of the stored bytes and of the pixels."""

    stored: str
    pixels: str
    is_one_colour: bool


def _check(image: _Image, channels: int, dtype: InputDtype) -> _Content:
    pixels = image.read(channels, dtype)
    height, width = pixels.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"{height}x{width} pixels, at least {SMALLEST_SIDE}x{SMALLEST_SIDE} are needed")
    return _Content(
        image.digest(), pixel_digest(pixels), bool((pixels.min(axis=(0, 1)) == pixels.max(axis=(0, 1))).all())
    )


def _too_few(words: str, taken: int, given: int, needed: int, skipped: Sequence[tuple[str, str]]) -> str:
    if not given:
        return f"{words} holds no images; give a folder with at least {needed} images like those the model will see"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    reasons += f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    why = f" ({len(skipped)} skipped: {reasons})" if skipped else ""
    count = (
        f"{given} image{'' if given == 1 else 's'} in {words}"
        if taken == given
        else f"{taken} of {given} images in {words} can be used"
    )
    return f"only {count}{why}; calibration needs at least {needed}: add some"


@refusals_as(InputError)
def _find(source: CalibrationSource, dtype: InputDtype) -> tuple[str, Sequence[_Image]]:
    """What ``source`` is called in messages, and its candidates in a fixed order."""
    if not isinstance(source, (str, Path)):
        return "the given images", _from_items(source, dtype)
    path = Path(source).expanduser()
    if os.path.isfile(path) and path.suffix.lower() in ARRAY_SUFFIXES:
        return str(path), _from_array_file(path, dtype)
    if os.path.isfile(path) and path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(
            f"{path} is one image; calibration takes a folder, a glob, a .txt list, or a .npy or .npz of many"
        )
    files = find_images(path) if os.path.isdir(path) else list_images(path)
    # An image named twice would count twice in every statistic.
    return str(path), [_File(p) for p in dict.fromkeys(files)]


def _from_array_file(path: Path, dtype: InputDtype) -> list[_Image]:
    try:
        arrays = open_arrays(path, "calibration images", MAX_ARCHIVE_BYTES)
    except InputError as exc:
        raise InputError(f"{exc}; save (N, H, W, C) arrays, without pickled objects") from exc
    return [image for name, array in arrays.items() for image in _split(name, array, dtype)]


def _from_items(source: Iterable[NDArray[Any] | str | Path], dtype: InputDtype) -> list[_Image]:
    images: list[_Image] = []
    for index, item in enumerate(source):
        if isinstance(item, (str, Path)):
            images.append(_File(Path(item)))
        else:
            images.extend(_split(f"array {index}", np.asarray(item), dtype))
    return images


def _split(name: str, array: NDArray[np.generic], dtype: InputDtype) -> list[_Image]:
    """One candidate per image of ``(H, W)``, ``(H, W, C)`` or ``(N, H, W, C)``; views, not copies."""
    if not takes(array.dtype, dtype):
        raise InputError(f"{refusal(array.dtype, dtype, f'{name} is')}; as decoded, before any normalization")
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise InputError(
            f"{name} is {array.dtype} of shape {array.shape}; calibration arrays are (H, W, C) or (N, H, W, C)"
        )
    if (array[0] if array.ndim == 4 else array).nbytes > MAX_ARRAY_BYTES:
        raise InputError(f"{name} holds an image of more than {MAX_ARRAY_BYTES} bytes; cut it into parts")
    if array.ndim == 4:
        if len(array) > MAX_STACKED_IMAGES:
            raise InputError(
                f"{name} holds {len(array)} images; calibration takes {MAX_STACKED_IMAGES} of one array at most"
            )
        return [_Array(f"{name}[{index}]", image) for index, image in enumerate(array)]
    return [_Array(name, array if array.ndim == 3 else array[..., None])]
