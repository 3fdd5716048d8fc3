"""Finding image files, and reading them as arrays of the dtype the engine expects.

What :func:`read_image` makes of unusual files, so that a mask does not depend on how a picture was stored:

- Orientation noted by a camera (EXIF) is applied.
- Grey becomes three equal channels; colour becomes grey by ITU-R 601 luma where the model has one channel.
- Palettes are looked up. Transparency is dropped, the colours under it stay: that is what ``convert("RGB")`` and
  OpenCV give at training time.
- CMYK, YCbCr and HSV are converted without colour profiles. Of an animation or a stack the first frame is read.
- Samples of another dtype than the engine's are refused, never scaled or cut: 16 bits for a uint8 engine, 8 bits for a
  uint16 one. A float32 engine takes floats and signed integers, by their values (:mod:`edgeseg.images.dtypes`).
- Of uint16 and float32, grey becomes three equal channels, alpha beside three colours is dropped; nothing else is converted.
- CIELAB is refused.
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
from edgeseg.images.dtypes import in_dtype, refusal
from edgeseg.images.tiff import TiffLayout, read_bands, tiff_layout
from edgeseg.silence import without_warnings
from edgeseg.spec import InputDtype
from edgeseg.store.files import read_lines, require_file
from edgeseg.store.hashing import sha256_file

# EPS (which runs Ghostscript) and rarely exercised decoders stay closed to files of unknown origin.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
JPEG_SUFFIXES = frozenset({".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"})
IMAGE_SUFFIXES = (
    ARRAY_SUFFIXES
    | JPEG_SUFFIXES
    | {".apng", ".bmp", ".gif", ".jp2", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
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

_ORIENTATION = 0x0112
# EXIF's orientation -> PIL.Image.Transpose, by number: Pillow is imported when it is needed.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_WIDE_GREY = {"I;16", "I;16L", "I;16B", "I;16N"}


@refusals_as(InputError)
def read_image(path: str | Path, channels: int = 3, dtype: InputDtype = "uint8") -> NDArray[Any]:
    """Read an image file; see the module for how unusual ones are handled.

    Args:
        path: PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG 2000, or ``.npy``/``.npz`` holding one ``(H, W)`` or
            ``(H, W, C)`` array (never unpickled).
        channels: what the model takes.
        dtype: what the engine takes.

    Returns:
        ``dtype`` ``(H, W, channels)``, RGB for three channels; the caller owns it.

    Raises:
        InputError: no such file, not an image, truncated, too large, or of a kind that cannot be ``channels`` x ``dtype``.
    """
    path = Path(path)
    require_file(path, "image")
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _from_array(path, read_array(path, "image", MAX_ARRAY_BYTES), channels, dtype)
    with decoder_errors(path):
        return _read_with_pillow(path, channels, dtype)


def file_digest(path: Path) -> str:
    """SHA-256 of an image file's content, hex. Raises ``InputError``."""
    try:
        return sha256_file(path)
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror}") from exc


def pixel_digest(image: NDArray[Any]) -> str:
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


def _from_array(path: Path, array: NDArray[Any], channels: int, dtype: InputDtype) -> NDArray[Any]:
    array = in_dtype(array, dtype, f"{path} holds")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"{path} has shape {array.shape}; an image has (H, W) or (H, W, {channels})")
    if array.shape[2] == 1 and channels == 3:
        array = np.repeat(array, 3, axis=2)
    if array.shape[2] != channels:
        raise InputError(f"{path} has {array.shape[2]} channels, shape {array.shape}; this model takes {channels}")
    return np.ascontiguousarray(array)


@contextmanager
def open_picture(path: Path) -> Iterator[Any]:
    """Open an image file of one of :data:`FORMATS` with Pillow; nothing is decoded yet.

    Raises:
        InputError: more than :data:`MAX_PIXELS`.
        Exception: whatever Pillow raises for what is no image, or a damaged one.
    """
    from PIL import Image

    # Not by its path: that file Pillow would map into memory, where it takes height for width in a TIFF turned by 90 degrees.
    with path.open("rb") as file:
        try:
            # Among others Pillow warns of half the pixels it refuses.
            with without_warnings():
                image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as exc:
            raise InputError(f"cannot read {path}: more than {MAX_PIXELS} pixels; cut it into parts") from exc
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"cannot read {path}: more than {MAX_PIXELS} pixels; cut it into parts")
            yield image


@contextmanager
def decoder_errors(path: Path, what: str = "image") -> Iterator[None]:
    """One line of whatever a decoder's parsing of a damaged file trips over: OSError, SyntaxError, struct.error, ..."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except EdgesegError:
        raise
    except UnidentifiedImageError as exc:
        kind, layout = f"not one of {', '.join(FORMATS)}, or damaged", tiff_layout(path)
        if layout is not None:
            kind = f"a TIFF with {layout}, or damaged"
            if what == "image":
                kind += "; store 8 unsigned bits per sample, or build with input dtype uint16 or float32"
        raise InputError(f"cannot read {what} {path}: {kind}") from exc
    except Exception as exc:
        raise InputError(f"cannot read {what} {path}: {one_line(exc)}") from exc


def _read_with_pillow(path: Path, channels: int, dtype: InputDtype) -> NDArray[Any]:
    layout = tiff_layout(path)
    if layout is not None and dtype != "uint8" and not layout.is_stored_in_pillow:
        return _from_tiff(path, layout, channels, dtype)
    if layout is not None and not layout.is_plain:
        if layout.samples == channels:
            return _from_tiff(path, layout, channels, dtype)
        if channels not in (1, 3) or not layout.has_colours_for_pillow:
            raise InputError(f"{path} holds {layout}; this model takes {channels} channels")
    with open_picture(path) as image:
        if dtype != "uint8" and _is_wide(image) and image.mode in {"RGB", "RGBA"} and image.format == "PNG":
            return _from_array(path, _deep_colours(path, channels), channels, dtype)
        return _from_pillow(path, image, channels, dtype)


def is_picture(value: object) -> bool:
    """Whether ``value`` is a PIL image; Pillow is not imported for the question."""
    pillow = sys.modules.get("PIL.Image")
    # Another thread may be importing it; whoever holds a picture has imported it whole.
    kind = getattr(pillow, "Image", None)
    return kind is not None and isinstance(value, kind)


def picture_pixels(picture: Any, channels: int, dtype: InputDtype = "uint8") -> NDArray[Any]:
    """Return what :func:`read_image` would of the file of a PIL image, ``dtype`` ``(H, W, channels)``.

    Raises:
        InputError: truncated, or of a kind that cannot be ``channels`` x ``dtype``.
    """
    name = Path(getattr(picture, "filename", "") or "the PIL image")
    with decoder_errors(name):
        return _from_pillow(name, picture if _is_wide(picture) else picture.copy(), channels, dtype)


def _from_tiff(path: Path, layout: TiffLayout, channels: int, dtype: InputDtype) -> NDArray[Any]:
    bands = read_bands(path, layout, MAX_ARRAY_BYTES)
    return _from_array(path, bands[..., :3] if layout.is_rgb and channels == 3 else bands, channels, dtype)


def _from_pillow(path: Path, image: Any, channels: int, dtype: InputDtype) -> NDArray[Any]:
    if channels not in (1, 3):
        return _from_array(path, _bands(path, image, channels, dtype), channels, dtype)
    if dtype != "uint8":
        return _from_array(path, _stored(path, image), channels, dtype)
    image, mode = _eight_bit(path, image), "RGB" if channels == 3 else "L"
    upright = _upright(image)
    if upright is not image:
        image.close()  # one copy is enough
    # Pillow would warn about transparency it cannot carry over.
    upright.info.pop("transparency", None)
    # Converted only where that changes something: Pillow would copy.
    array = _pixels(upright if upright.mode == mode else upright.convert(mode))
    return array if channels == 3 else array[..., None]


def _upright(image: Any) -> Any:
    """A picture turned as its EXIF orientation says; itself where there is nothing to turn.

    Pillow's own way writes all other tags anew, and fails where a camera or an editor gave one a type it should not have.
    """
    image.load()  # of a TIFF file this turns it, and forgets the tag
    with without_warnings():
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


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


def _is_wide(image: Any) -> bool:
    """Whether samples of more than 8 bits are stored, known before they are decoded: of colours Pillow keeps the high byte."""
    return image.mode in _WIDE_GREY or _bits(image) > 8


def _bits(image: Any) -> int:
    """Bits of an unsigned sample of a picture that is not decoded yet, if it has more than 8."""
    for codec, _, _, args in getattr(image, "tile", ()):
        first, *rest = args if isinstance(args, tuple) else (args,)
        if codec.startswith("ppm") and rest:
            return int(rest[0]).bit_length()
        if re.search(r";16[LBN]?$", str(first)):
            return 16
    return _jpeg2000_bits(image)


def _jpeg2000_bits(image: Any) -> int:
    """Bits of a sample of a JPEG 2000 file that is not decoded yet, by its image header (ISO 15444-1, I.5.3.1 and A.5.1)."""
    if getattr(image, "format", None) != "JPEG2000" or not image.tile:
        return 8
    image.fp.seek(0)
    head = image.fp.read(512)
    box, codestream = head.find(b"ihdr"), head.find(b"\xff\x4f\xff\x51")
    place = box + 14 if box >= 0 else codestream + 42
    return (head[place] & 0x7F) + 1 if place < len(head) and max(box, codestream) >= 0 else 8


def _stored(path: Path, image: Any) -> NDArray[Any]:
    """The samples of a picture in the type they are stored in, ``(H, W)`` or ``(H, W, bands)``.

    Raises:
        InputError: Pillow does not give them as they are stored.
    """
    wide, bits = _is_wide(image), _bits(image)
    # Of 9 to 15 bits Pillow makes the full range of 16, of colours 8 bits.
    if 8 < bits < 16 or (wide and image.mode not in _WIDE_GREY | {"I"}):
        raise InputError(f"cannot read {path}: {bits} bits of {image.mode} in this format; store it as TIFF or .npy")
    # Pillow reads 16-bit PGM, and older releases 16-bit PNG, into 32-bit integers.
    samples = np.asarray(_upright(image))
    return samples.astype(np.uint16) if wide else samples


def _deep_colours(path: Path, channels: int) -> NDArray[np.uint16]:
    """RGB or RGBA of a PNG of 16 bits a sample. Pillow unpacks one byte of each: it is asked for the high, then the low one."""
    halves = []
    for byte_order in ("16B", "16L"):
        with open_picture(path) as image:
            image.tile = [(*tile[:3], f"{image.mode};{byte_order}") for tile in image.tile]
            halves.append(np.asarray(_upright(image)).astype(np.uint16))
    colours = halves[0] << 8 | halves[1]
    return np.asarray(colours[..., :3] if channels == 3 else colours)


def _eight_bit(path: Path, image: Any) -> Any:
    """Refuse what is no picture of 8-bit samples, and bring premultiplied colours to what Pillow converts."""
    if _is_wide(image) or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        raise refusal(np.dtype(np.uint16), "uint8", f"{path} holds")
    if image.mode in {"I", "F"}:
        raise refusal(np.dtype(np.int32 if image.mode == "I" else np.float32), "uint8", f"{path} holds")
    if image.mode == "LAB":
        raise InputError(f"{path} holds CIELAB colours; convert it to RGB first")
    # Premultiplied colours have no direct way to RGB.
    return image.convert("RGBA") if image.mode == "RGBa" else image.convert("LA") if image.mode == "La" else image


def _bands(path: Path, image: Any, channels: int, dtype: InputDtype) -> NDArray[Any]:
    """Read 2, 4 or more channels: the bands of one picture, or the pages of a stack."""
    from PIL import ImageSequence

    pages = getattr(image, "n_frames", 1)
    if pages == channels:
        if pages * image.width * image.height > MAX_ARRAY_BYTES:
            raise InputError(
                f"cannot read {path}: {pages} pages of more than {MAX_ARRAY_BYTES} bytes; cut it into parts"
            )
        pages_read = ImageSequence.Iterator(image)
        if dtype == "uint8":
            planes = [np.asarray(_eight_bit(path, page).convert("L")) for page in pages_read]
        else:
            planes = [_stored(path, page) for page in pages_read]
        if any(plane.shape != planes[0].shape for plane in planes):
            raise InputError(f"the {pages} pages of {path} differ in size; a page per channel is expected")
        return np.stack(planes, axis=-1)
    if len(image.getbands()) != channels or image.mode in {"P", "PA"}:
        raise InputError(
            f"{path} has {len(image.getbands())} channels (mode {image.mode}, {pages} pages); this model takes "
            f"{channels}: store them as a .npy of shape (H, W, {channels}) or a TIFF with a page per channel"
        )
    if dtype != "uint8":
        return _stored(path, image)
    return np.array(_upright(_eight_bit(path, image)), np.uint8)
