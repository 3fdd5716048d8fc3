"""TIFF files of more bands, or other samples, than Pillow returns, as GDAL, QGIS and tifffile write them.

Such a file holds all samples of a pixel in one page (or a plane per band, still in one page): satellite and multispectral
images of 4 to some dozen bands. Pillow drops bands it has no name for, or does not open the file. The bands are read by
tifffile, an extra; what is in a file is said without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError, imported
from edgeseg.silence import without_warnings

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Tags of the TIFF 6.0 specification.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 277, 284, 338, 339
_RGB = 2
# GeoTIFF's: pixel scale, tie points, transformation, keys.
_GEOREFERENCE = {33550, 33922, 34264, 34735}
# Samples that are colour, by the value of the photometric interpretation; those beyond are "extra".
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_STRAIGHT_ALPHA = 2
_UNCOMPRESSED = 1
# Plain ones: LZW, deflate by both of its numbers, PackBits, Zstandard. A file of unknown origin runs no other decoder.
_COMPRESSIONS = {_UNCOMPRESSED, 5, 8, 32946, 32773, 50000}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}


@dataclass(frozen=True)
class TiffLayout:
    """What the first page of a TIFF file holds, by its tags.

    Attributes:
        height, width: pixels.
        samples: per pixel.
        bits: per sample.
        sample_format: 1 unsigned, 2 signed, 3 floating-point.
        extra: meaning of each sample beyond the colours: 0 unspecified, 1 premultiplied alpha, 2 alpha.
        photometric, compression, planar, orientation: as in the specification.
        georeferenced: whether it has tags of the GeoTIFF specification.
    """

    height: int
    width: int
    samples: int
    bits: int
    sample_format: int
    extra: tuple[int, ...]
    photometric: int
    compression: int
    planar: int
    orientation: int
    georeferenced: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every sample is a colour or an alpha that Pillow returns as it is stored."""
        extra = self.samples - _COLOURS.get(self.photometric, self.samples)
        return extra <= 0 or (extra == 1 and self.extra == (_STRAIGHT_ALPHA,))

    @property
    def is_rgb(self) -> bool:
        return self.photometric == _RGB

    @property
    def is_stored_in_pillow(self) -> bool:
        """Whether Pillow returns one band in the type it is stored in: uint16, float32, or signed integers as int32."""
        return self.samples == 1 and (self.sample_format, self.bits) in {(1, 16), (2, 16), (2, 32), (3, 32)}

    @property
    def has_colours_for_pillow(self) -> bool:
        """Whether Pillow can drop the extra samples and return the colours."""
        return self.is_plain or (self.planar == 1 and self.samples <= (6 if self.photometric == _RGB else 2))

    def __str__(self) -> str:
        kind = _FORMATS.get(self.sample_format, "unknown")
        count = f"{self.samples} samples per pixel" if self.samples > 1 else "1 sample per pixel"
        return f"{count} in one page, {self.bits}-bit {kind}"


def tiff_layout(path: Path) -> TiffLayout | None:
    """Read the tags of the first page; ``None`` for what is no TIFF file, or a damaged one."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with path.open("rb") as file:
        head = file.read(8)
        if not head.startswith(_MAGIC):
            return None
        try:
            tags = ImageFileDirectory_v2(head + file.read(8) if head[2:4] in {b"+\0", b"\0+"} else head)
            file.seek(tags.next)
            with without_warnings():
                tags.load(file)
            return TiffLayout(
                height=int(tags[_HEIGHT]),
                width=int(tags[_WIDTH]),
                samples=int(tags.get(_SAMPLES, 1)),
                bits=int(_first(tags.get(_BITS, 1))),
                sample_format=int(_first(tags.get(_SAMPLE_FORMAT, 1))),
                extra=tuple(int(v) for v in tags.get(_EXTRA_SAMPLES, ())),
                photometric=int(tags.get(_PHOTOMETRIC, 1)),
                compression=int(tags.get(_COMPRESSION, _UNCOMPRESSED)),
                planar=int(tags.get(_PLANAR, 1)),
                orientation=int(tags.get(_ORIENTATION, 1)),
                georeferenced=not _GEOREFERENCE.isdisjoint(tags),
            )
        except Exception:
            # Whatever parsing trips over, the decoder says it better when it comes to the pixels.
            return None


def read_bands(path: Path, layout: TiffLayout, largest_bytes: int) -> NDArray[Any]:
    """Return all samples of the first page as ``(H, W, samples)``, in the file's own type.

    Raises:
        MissingDependencyError: tifffile is not installed, or imagecodecs, and the file is compressed.
        InputError: too large, damaged, turned by its orientation tag, or compressed in a way that is not read.
    """
    if layout.compression not in _COMPRESSIONS:
        raise InputError(
            f"cannot read image {path}: {layout}, compressed by method {layout.compression}; store it uncompressed or "
            "with deflate or LZW"
        )
    if layout.orientation != 1:
        raise InputError(
            f"cannot read image {path}: {layout}, to be turned (orientation {layout.orientation}); turn it"
        )
    purpose = f"read {path.name}, a TIFF of {layout}"
    tifffile = imported("tifffile", "tiff", purpose)
    if layout.compression != _UNCOMPRESSED:
        imported("imagecodecs", "tiff", purpose)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        for what, shape in (("a page", page.shape), ("a tile", page.chunks)):
            size_bytes = math.prod(int(n) for n in shape) * ((page.bitspersample + 7) // 8)
            if size_bytes > largest_bytes:
                raise InputError(f"cannot read image {path}: {what} of {size_bytes} bytes; {largest_bytes} are allowed")
        parts, needed = len(page.dataoffsets), math.prod(page.chunked)
        if parts != needed:
            # They would be read as black.
            raise InputError(f"cannot read image {path}: damaged, it holds {parts} of its {needed} strips or tiles")
        pixels = np.asarray(page.asarray(maxworkers=1))
    if layout.planar == 2 and layout.samples > 1:
        pixels = np.moveaxis(pixels, 0, -1)
    if layout.samples == 1:
        pixels = pixels[..., None]
    if pixels.shape != (layout.height, layout.width, layout.samples):
        raise InputError(f"cannot read image {path}: its tags say {layout}, its data have shape {pixels.shape}")
    return pixels


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
