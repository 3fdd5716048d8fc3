"""Finding image files, reading them as the uint8 arrays the engine expects, and fitting those to its size.

What :func:`read_image` makes of unusual files, so that a mask does not depend on how a picture was stored:

- Orientation noted by a camera (EXIF) is applied.
- Grey becomes three equal channels; colour becomes grey by ITU-R 601 luma where the model has one channel.
- Palettes are looked up. Transparency is dropped, the colours under it stay: that is what ``convert("RGB")`` and
  OpenCV give at training time.
- 16-bit samples keep their high byte, so 65535 becomes 255 and nothing is clipped. The range is that of the container:
  a 12-bit sensor stored in 16 bits comes out dark, scale it first.
- CMYK, YCbCr and HSV are converted without colour profiles. Of an animation or a stack the first frame is read.
- 32-bit integers, floats and CIELAB have no one meaning as 0..255 and are refused.
- Larger than 178956970 pixels (Pillow's limit), or 1 GiB as an array or a stack, is refused.
- Four and more channels: RGBA or CMYK files (raw), TIFF with all bands in one page (extra ``tiff``) or a page per channel,
  ``.npy``, ``.npz``.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import EdgesegError, InputError, one_line, refusals_as
from edgeseg.images.arrays import ARRAY_SUFFIXES, read_array
from edgeseg.images.placement import Placement, fit, fit_windows
from edgeseg.images.tiff import TiffLayout, read_bands, tiff_layout
from edgeseg.store.files import read_lines, require_file, without_warnings

__all__ = [
    "IMAGE_SUFFIXES",
    "Placement",
    "fit",
    "fit_windows",
    "list_images",
    "natural_key",
    "pixel_digest",
    "read_image",
]

# EPS (which runs Ghostscript) and rarely exercised decoders stay closed to files of unknown origin.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = ARRAY_SUFFIXES | frozenset(
    {".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# The number from which Pillow refuses a file itself.
MAX_PIXELS = 178_956_970
MAX_ARRAY_BYTES = 1 << 30
# Taken from Pillow at a time: what fits the cache. Whole pictures of 1080p made a run take a third more CPU time, in page
# faults of the copies.
BAND_PIXELS = 1 << 16
# They log what they raise anyway, and what they tolerate; without a handler Python prints it.
for _name in ("PIL", "tifffile"):
    logging.getLogger(_name).addHandler(logging.NullHandler())

_WIDE_GREY = {"I;16", "I;16L", "I;16B", "I;16N"}


@refusals_as(InputError)
def read_image(path: str | Path, channels: int = 3) -> NDArray[np.uint8]:
    """Read an image file; see the module for how unusual ones are handled.

    Args:
        path: PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG 2000, or ``.npy``/``.npz`` holding one ``(H, W)`` or
            ``(H, W, C)`` uint8 or uint16 array (never unpickled).
        channels: what the model takes.

    Returns:
        uint8 ``(H, W, channels)``, RGB for three channels; the caller owns it.

    Raises:
        InputError: no such file, not an image, truncated, too large, or of a kind that cannot be ``channels`` x uint8.
    """
    path = Path(path)
    require_file(path, "image")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _from_array(path, read_array(path, "image", MAX_ARRAY_BYTES), channels)
    return _read_with_pillow(path, channels)


def pixel_digest(image: NDArray[np.uint8]) -> str:
    """SHA-256 of what an image shows, hex: equal for copies of a picture, whatever their names and file formats."""
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


@refusals_as(InputError)
def list_images(source: str | Path | Iterable[str | Path], *, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Find image files, in an order that is the same on every machine: ``img2`` before ``img10``.

    Args:
        source: a folder (its own images, not those of folders within), a glob (``**`` descends), a list file (``.txt``:
            a path per line, relative to the file, blank lines and ``#`` comments skipped), one image file, or paths.
            Lists keep their order.
        suffixes: what counts as an image in a folder, lower case.

    Raises:
        InputError: nothing there, no file, no image in a folder, or a glob without a match.
    """
    if not isinstance(source, (str, Path)):
        return [Path(item) for item in source]
    path = Path(source)
    if os.path.isdir(path):
        return _list_folder(path, suffixes)
    if os.path.isfile(path):
        return _read_list(path) if path.suffix.lower() == ".txt" else [path]
    if os.path.lexists(path):
        return [path]  # a link to nothing, a pipe: whoever reads it says so
    if not glob.has_magic(str(source)):
        try:
            os.lstat(path)
        except (FileNotFoundError, ValueError):
            why = "does not exist"
        except OSError as exc:
            why = f"cannot be reached ({one_line(exc)})"
        raise InputError(f"{source} {why}; give an image, a folder, a glob or a .txt list of images")
    paths = sorted((p for p in glob_matches(path) if not os.path.isdir(p)), key=natural_key)
    if not paths:
        raise InputError(f"no file matches {source}; quote the pattern, and use ** for folders within folders")
    return paths


def glob_matches(pattern: Path) -> Iterator[Path]:
    """Expand a pattern, in no order; leading folders that exist under their very name are no pattern, brackets or not."""
    base, parts = Path(pattern.anchor), list(pattern.parts[1 if pattern.anchor else 0 :])
    while len(parts) > 1 and os.path.isdir(base / parts[0]):
        base /= parts.pop(0)
    return (base / name for name in glob.glob(os.path.join(*parts), root_dir=base, recursive=True))


def natural_key(path: Path) -> tuple[Any, ...]:
    """Sort key that compares runs of digits as numbers, and without regard to case or locale."""
    parts = re.split(r"([0-9]+)", path.as_posix().casefold())
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)), path.as_posix()


def _list_folder(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    try:
        files = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    except OSError as exc:
        raise InputError(f"cannot list {folder}: {exc.strerror}") from exc
    # Links to nothing and the like are listed: whoever reads them says so.
    paths = sorted((p for p in files if not os.path.isdir(p)), key=natural_key)
    if not paths:
        raise InputError(
            f"no images in {folder} (looked for {' '.join(sorted(suffixes))}); "
            f"for folders within it give a glob such as '{folder}/**/*.png'"
        )
    return paths


def _read_list(path: Path) -> list[Path]:
    lines = read_lines(path, "the list")
    paths = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        image = path.parent / name
        if not os.path.isfile(image):
            raise InputError(f"{path}, line {number}: {name} does not exist")
        paths.append(image)
    if not paths:
        raise InputError(f"the list {path} names no images; write one path per line")
    return paths


def _from_array(path: Path, array: NDArray[Any], channels: int) -> NDArray[np.uint8]:
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{path} holds {array.dtype}; an image holds uint8 or uint16: scale it to 0..255 first")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; an image has (H, W) or (H, W, {channels})")
    if array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, axis=2)
    if array.shape[2] != channels:
        raise InputError(f"{path} has {array.shape[2]} channels, shape {array.shape}; this model takes {channels}")
    return np.ascontiguousarray(array, np.uint8)


@contextmanager
def open_picture(path: Path) -> Iterator[Any]:
    """Open an image file of one of :data:`FORMATS` with Pillow; nothing is decoded yet.

    Raises:
        InputError: more than :data:`MAX_PIXELS`.
        Exception: whatever Pillow raises for what is no image, or a damaged one.
    """
    from PIL import Image

    try:
        # Among others Pillow warns of half the pixels it refuses.
        with without_warnings():
            image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as exc:
        raise InputError(f"cannot read {path}: more than {MAX_PIXELS} pixels; cut it into parts") from exc
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"cannot read {path}: more than {MAX_PIXELS} pixels; cut it into parts")
        yield image


def _read_with_pillow(path: Path, channels: int) -> NDArray[np.uint8]:
    from PIL import UnidentifiedImageError

    layout = tiff_layout(path)
    if layout is not None and not layout.is_plain:
        if layout.samples == channels:
            return _from_tiff(path, layout, channels)
        if channels not in (1, 3) or not layout.has_colours_for_pillow:
            raise InputError(f"{path} holds {layout}; this model takes {channels} channels")
    try:
        with open_picture(path) as image:
            return _from_pillow(path, image, channels)
    except InputError:
        raise
    except UnidentifiedImageError as exc:
        if layout is not None:
            raise InputError(
                f"cannot read image {path}: a TIFF with {layout}, or damaged; store 8 or 16 unsigned bits per sample"
            ) from exc
        raise InputError(f"cannot read image {path}: not one of {', '.join(FORMATS)}, or damaged") from exc
    except Exception as exc:
        # Decoders raise whatever their parsing of a damaged file trips over: OSError, SyntaxError, struct.error, ...
        raise InputError(f"cannot read image {path}: {one_line(exc)}") from exc


def is_picture(value: object) -> bool:
    """Whether ``value`` is a PIL image; Pillow is not imported for the question."""
    pillow = sys.modules.get("PIL.Image")
    # Another thread may be importing it; whoever holds a picture has imported it whole.
    kind = getattr(pillow, "Image", None)
    return kind is not None and isinstance(value, kind)


def picture_pixels(picture: Any, channels: int) -> NDArray[np.uint8]:
    """Return what :func:`read_image` would of the file of a PIL image, uint8 ``(H, W, channels)``.

    Raises:
        InputError: truncated, or of a kind that cannot be ``channels`` x uint8.
    """
    name = Path(getattr(picture, "filename", "") or "the PIL image")
    try:
        return _from_pillow(name, picture.copy(), channels)
    except InputError:
        raise
    except Exception as exc:
        raise InputError(f"cannot read image {name}: {one_line(exc)}") from exc


def _from_tiff(path: Path, layout: TiffLayout, channels: int) -> NDArray[np.uint8]:
    try:
        return _from_array(path, read_bands(path, layout, MAX_ARRAY_BYTES), channels)
    except EdgesegError:
        raise
    except Exception as exc:
        # As with Pillow: anything a damaged file makes a decoder trip over.
        raise InputError(f"cannot read image {path}: {one_line(exc)}") from exc


def _from_pillow(path: Path, image: Any, channels: int) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if channels not in (1, 3):
        return _bands(path, image, channels)
    image, mode = _eight_bit(path, image), "RGB" if channels == 3 else "L"
    # In place, and converted only where that changes something: Pillow would copy.
    image.load()
    with without_warnings():
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow would warn about transparency it cannot carry over.
    image.info.pop("transparency", None)
    array = _pixels(image if image.mode == mode else image.convert(mode))
    return array if channels == 3 else array[..., None]


def _pixels(image: Any) -> NDArray[np.uint8]:
    """Pixels of a decoded image, a band of rows at a time: Pillow needs two copies of what it hands over."""
    width, height = image.size
    rows = max(1, BAND_PIXELS // width)
    if rows >= height:
        return np.array(image, np.uint8)
    bands = (image.crop((0, top, width, min(top + rows, height))) for top in range(0, height, rows))
    first = np.asarray(next(bands))
    pixels = np.empty((height, *first.shape[1:]), np.uint8)
    pixels[:rows] = first
    for number, band in enumerate(bands, start=1):
        pixels[number * rows : (number + 1) * rows] = np.asarray(band)
    return pixels


def _eight_bit(path: Path, image: Any) -> Any:
    """Bring 16-bit grey to 8 bits by its high byte, which is also what Pillow does with 16-bit colour."""
    from PIL import Image

    # Pillow reads 16-bit PGM, and older releases 16-bit PNG, into 32-bit integers of the range 0..65535.
    if image.mode in _WIDE_GREY or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        samples = np.asarray(image).astype(np.int64)
        narrow = Image.fromarray((samples >> 8).astype(np.uint8))
        narrow.info.update(image.info)
        narrow.getexif().update(image.getexif())
        return narrow
    if image.mode in {"I", "F", "LAB"}:
        raise InputError(f"{path} holds {_SAMPLES[image.mode]}; convert it to 8 or 16 bits per channel first")
    # Premultiplied colours have no direct way to RGB.
    return image.convert("RGBA") if image.mode == "RGBa" else image.convert("LA") if image.mode == "La" else image


_SAMPLES = {"I": "32-bit integers", "F": "floating-point samples", "LAB": "CIELAB colours"}


def _bands(path: Path, image: Any, channels: int) -> NDArray[np.uint8]:
    """Read 2, 4 or more channels: the bands of one picture, or the pages of a stack."""
    from PIL import ImageOps, ImageSequence

    pages = getattr(image, "n_frames", 1)
    if pages == channels:
        if pages * image.width * image.height > MAX_ARRAY_BYTES:
            raise InputError(
                f"cannot read {path}: {pages} pages of more than {MAX_ARRAY_BYTES} bytes; cut it into parts"
            )
        planes = [np.asarray(_eight_bit(path, page).convert("L")) for page in ImageSequence.Iterator(image)]
        if any(plane.shape != planes[0].shape for plane in planes):
            raise InputError(f"the {pages} pages of {path} differ in size; a page per channel is expected")
        return np.stack(planes, axis=-1)
    if len(image.getbands()) != channels or image.mode in {"P", "PA"}:
        raise InputError(
            f"{path} has {len(image.getbands())} channels (mode {image.mode}, {pages} pages); this model takes "
            f"{channels}: store them as a .npy of shape (H, W, {channels}) or a TIFF with a page per channel"
        )
    return np.array(ImageOps.exif_transpose(image), np.uint8)
