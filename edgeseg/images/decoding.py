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
- Four and more channels: RGBA or CMYK files (raw), TIFF stacks with a page per channel, ``.npy``, ``.npz``.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError, refusals_as
from edgeseg.images.placement import Placement, fit, fit_windows

__all__ = ["IMAGE_SUFFIXES", "Placement", "fit", "fit_windows", "list_images", "natural_key", "read_image"]

# EPS (which runs Ghostscript) and rarely exercised decoders stay closed to files of unknown origin.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
IMAGE_SUFFIXES = ARRAY_SUFFIXES | frozenset(
    {".bmp", ".gif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pillow's own limit for image files, applied to arrays too.
MAX_ARRAY_BYTES = 1 << 30

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
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise InputError(f"cannot read image {path}: it {what}")
    if path.stat().st_size == 0:
        raise InputError(f"cannot read image {path}: the file is empty (0 bytes)")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _from_array(path, _load_array(path), channels)
    return _read_with_pillow(path, channels)


@refusals_as(InputError)
def list_images(source: str | Path | Iterable[str | Path], *, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Find image files, in an order that is the same on every machine: ``img2`` before ``img10``.

    Args:
        source: a folder (its own images, not those of folders within), a glob (``**`` descends), a list file (``.txt``:
            a path per line, relative to the file, blank lines and ``#`` comments skipped), one image file, or paths.
            Lists keep their order.
        suffixes: what counts as an image in a folder, lower case.

    Raises:
        InputError: nothing there, no image in a folder, or a glob without a match.
    """
    if not isinstance(source, (str, Path)):
        return [Path(item) for item in source]
    path = Path(source)
    if path.is_dir():
        return _list_folder(path, suffixes)
    if path.is_file():
        return _read_list(path) if path.suffix.lower() == ".txt" else [path]
    if glob.has_magic(str(source)):
        found = sorted((Path(p) for p in glob.glob(str(source), recursive=True) if os.path.isfile(p)), key=natural_key)
        if not found:
            raise InputError(f"no file matches {source}; quote the pattern, and use ** for folders within folders")
        return found
    raise InputError(f"{source} does not exist; give an image, a folder, a glob or a .txt list of images")


def natural_key(path: Path) -> tuple[Any, ...]:
    """Sort key that compares runs of digits as numbers, and without regard to case or locale."""
    parts = re.split(r"([0-9]+)", path.as_posix().casefold())
    return tuple((int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)), path.as_posix()


def _list_folder(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    try:
        files = [p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    except OSError as exc:
        raise InputError(f"cannot list {folder}: {exc.strerror}") from exc
    found = sorted((p for p in files if p.is_file()), key=natural_key)
    if not found:
        raise InputError(
            f"no images in {folder} (looked for {' '.join(sorted(suffixes))}); "
            f"for folders within it give a glob such as '{folder}/**/*.png'"
        )
    return found


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the list {path}: {_reason(exc)}") from exc
    found = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        image = path.parent / name
        if not image.is_file():
            raise InputError(f"{path}, line {number}: {name} does not exist")
        found.append(image)
    if not found:
        raise InputError(f"the list {path} names no images; write one path per line")
    return found


def _load_array(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    raise InputError(f"{path} holds {len(names)} arrays; an image file holds one")
                _check_bytes(path, archive.getinfo(names[0]).file_size)
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[arrays.files[0]])
        with path.open("rb") as stream:
            # The header alone decides how much numpy allocates.
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(stream)
            _check_bytes(path, int(np.prod(shape, dtype=object)) * dtype.itemsize)
        return np.asarray(np.load(path, allow_pickle=False))
    except InputError:
        raise
    except Exception as exc:
        # numpy raises whatever its parsing of a damaged header trips over: ValueError, tokenize.TokenError, ...
        raise InputError(f"cannot read image {path}: {_reason(exc)}") from exc


def _check_bytes(path: Path, size_bytes: int) -> None:
    if size_bytes > MAX_ARRAY_BYTES:
        raise InputError(
            f"cannot read image {path}: {size_bytes} bytes decoded, more than the {MAX_ARRAY_BYTES} allowed"
        )


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


def _read_with_pillow(path: Path, channels: int) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=FORMATS) as image:
            return _from_pillow(path, image, channels)
    except InputError:
        raise
    except UnidentifiedImageError as exc:
        raise InputError(f"cannot read image {path}: not one of {', '.join(FORMATS)}, or damaged") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise InputError(f"cannot read image {path}: {_reason(exc)}; cut it into parts") from exc
    except Exception as exc:
        # Decoders raise whatever their parsing of a damaged file trips over: OSError, SyntaxError, struct.error, ...
        raise InputError(f"cannot read image {path}: {_reason(exc)}") from exc


def _from_pillow(path: Path, image: Any, channels: int) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if channels not in (1, 3):
        return _bands(path, image, channels)
    image = ImageOps.exif_transpose(_eight_bit(path, image))
    # Pillow would warn about transparency it cannot carry over.
    image.info.pop("transparency", None)
    converted = image.convert("RGB" if channels == 3 else "L")
    array = np.array(converted, np.uint8)
    return array if channels == 3 else array[..., None]


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


def _reason(exc: BaseException) -> str:
    """An exception's text on one line, without the file name that decoders like to repeat."""
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return " ".join(text.split())[:200] or type(exc).__name__
