"""Writing GeoTIFF: tiled, compressed, with the place on Earth of the raster it was made of."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError, MissingDependencyError, one_line
from edgeseg.images.raster import Raster, gdal_errors, geotiff_settings, opened_raster
from edgeseg.silence import without_warnings

BLOCK = 512
REQUEST_TAG = "EDGESEG_REQUEST"


@dataclass(frozen=True)
class GeoTiff:
    """What a file holds.

    Attributes:
        dtype: numpy name.
        nodata: the value of pixels without data.
        bands: a description for each.
        tags: metadata of the file.
        colours: uint8 ``(values, 3)`` RGB of the one band's values; ``None``: no colour table.
        scale: what a value is multiplied by to be what it means.
    """

    dtype: str
    nodata: float
    bands: tuple[str, ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    colours: NDArray[np.uint8] | None = None
    scale: float = 1.0


def write_geotiff(path: Path, what: GeoTiff, raster: Raster, read: Callable[[int, slice], NDArray[Any]]) -> None:
    """Write a file of the size and the place of ``raster``, row of blocks after row of blocks.

    Args:
        path: an existing file is overwritten.
        what: see :class:`GeoTiff`.
        raster: what it was made of.
        read: rows of a band, given its index from 0.

    Raises:
        InputError: it cannot be written.
    """
    import rasterio

    height, width = raster.size
    predictor = 3 if np.dtype(what.dtype).kind == "f" else 2 if what.colours is None else 1
    place = {} if raster.transform.is_identity else {"transform": raster.transform}
    with geotiff_settings():
        try:
            with without_warnings():
                file = rasterio.open(
                    path.absolute(),
                    "w",
                    driver="GTiff",
                    height=height,
                    width=width,
                    count=len(what.bands),
                    dtype=what.dtype,
                    nodata=what.nodata,
                    crs=raster.crs,
                    tiled=True,
                    blockxsize=BLOCK,
                    blockysize=BLOCK,
                    compress="deflate",
                    predictor=predictor,
                    interleave="band",
                    BIGTIFF="IF_SAFER",
                    **place,
                )
            with file:
                _describe(file, what, raster)
                written = [_write_band(file, band, read) for band in range(len(what.bands))]
            # What is still to be written when GDAL closes a file may fail on a full disk, and nobody is told.
            with without_warnings(), rasterio.open(path.absolute(), driver="GTiff") as file:
                kept = [_checksum(file, band) for band in range(len(what.bands))]
        except gdal_errors() as exc:
            raise InputError(f"cannot write {path}: {one_line(exc.__cause__ or exc)}; give another --output") from exc
    if kept != written:
        raise InputError(f"cannot write {path}: what is in the file is not what was written; is the disk full?")


def _write_band(file: Any, band: int, read: Callable[[int, slice], NDArray[Any]]) -> int:
    checksum = 0
    for rows in _rows_of_blocks(file.height):
        pixels = np.ascontiguousarray(read(band, rows))
        checksum = zlib.crc32(pixels.data, checksum)
        file.write(pixels, band + 1, window=((rows.start, rows.stop), (0, file.width)))
    return checksum


def _checksum(file: Any, band: int) -> int:
    checksum = 0
    for rows in _rows_of_blocks(file.height):
        pixels = file.read(band + 1, window=((rows.start, rows.stop), (0, file.width)))
        checksum = zlib.crc32(np.ascontiguousarray(pixels).data, checksum)
    return checksum


def _rows_of_blocks(height: int) -> Iterator[slice]:
    return (slice(top, min(top + BLOCK, height)) for top in range(0, height, BLOCK))


def request_of(path: Path) -> str | None:
    """The request that a finished file of ours says it is the answer to; ``None`` for any other, or none."""
    try:
        with opened_raster(path) as dataset:
            return dataset.tags().get(REQUEST_TAG)  # type: ignore[no-any-return]
    except (InputError, MissingDependencyError):
        return None


def _describe(file: Any, what: GeoTiff, raster: Raster) -> None:
    file.update_tags(**what.tags)
    if what.colours is not None:
        table = {value: (*(int(level) for level in colour), 255) for value, colour in enumerate(what.colours)}
        file.write_colormap(1, {**table, int(what.nodata): (0, 0, 0, 0)})
    for number, name in enumerate(what.bands, 1):
        file.set_band_description(number, name)
    if what.scale != 1.0:
        file.scales = (what.scale,) * len(what.bands)
    points, system = raster.control_points
    if points:
        file.gcps = (points, system)
    if raster.rpcs is not None:
        file.rpcs = raster.rpcs
