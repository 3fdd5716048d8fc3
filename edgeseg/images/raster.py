"""Large and georeferenced images: GeoTIFF, COG and JPEG 2000, read window by window through rasterio, an extra.

GDAL reads a hundred formats, some of which name other files and addresses on the network. A file of unknown origin is
opened by the driver its first bytes call for, and by no other; files beside it (``.aux.xml``, ``.ovr``, ``.msk``, world
files) are not looked for, and one whose overviews are said to be elsewhere is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import EdgesegError, InputError, MissingDependencyError, one_line
from edgeseg.images.decoding import MAX_ARRAY_BYTES, MAX_PIXELS
from edgeseg.images.dtypes import takes
from edgeseg.images.tiff import tiff_layout
from edgeseg.spec import InputDtype, PipelineSpec
from edgeseg.store.files import require_file, without_warnings

RASTER_SUFFIXES = frozenset({".tif", ".tiff", ".jp2", ".j2k"})
MAX_SIDE = 1 << 20
"""Pixels of a raster's height or width."""
MAX_BLOCK_BYTES = 1 << 28
"""Of the tiles or strips a file is stored in: what a decoder takes at a time."""
CACHE_BYTES = 1 << 26
"""Decoded blocks GDAL keeps; it would take a twentieth of the machine's memory."""

_DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
_SETTINGS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    # No address is ever given to GDAL; should a file bring one in a way not known here, no name is allowed.
    "CPL_VSIL_CURL_ALLOWED_FILENAME": "none",
    "GDAL_CACHEMAX": CACHE_BYTES,
    # What goes wrong is raised; decoders' threads would print it, too.
    "CPL_LOG": "/dev/null",
}
# It logs what it raises anyway; without a handler Python prints it.
logging.getLogger("rasterio").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class Raster:
    """An open raster, or one of its overviews.

    Attributes:
        path: of the file.
        dataset: rasterio's.
        bands: read, from 1, one per channel.
        dtype: of the pixels read.
        fill: what a float32 pixel without data is read as, by channel: a float's nodata value may be NaN or -3e38, and
            spoils whatever the network computes beside it. Other dtypes have their own values there.
        has_nodata: whether some pixels may hold no data: by a nodata value, a mask or an alpha band.
        crs, transform, control_points, rpcs: where it lies, as rasterio has it.
    """

    path: Path
    dataset: Any
    bands: tuple[int, ...]
    dtype: InputDtype
    fill: tuple[float, ...]
    has_nodata: bool
    crs: Any
    transform: Any
    control_points: tuple[Any, Any]
    rpcs: Any

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return int(self.dataset.height), int(self.dataset.width)

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return a window, ``(H, W, C)`` of :attr:`dtype`. Raises ``InputError`` where the file is damaged, or holds NaN."""
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        with _clear_errors(self.path, rows), without_warnings():
            planes = self.dataset.read(self.bands, window=window)
            if self.dtype == "float32":
                planes = planes.astype(np.float32)
                if self.has_nodata:
                    nothing = self.dataset.read_masks(self.bands, window=window) == 0
                    planes = np.where(nothing, np.array(self.fill, np.float32)[:, None, None], planes)
        if self.dtype == "float32" and not np.isfinite(planes).all():
            raise InputError(
                f"cannot read {self.path}, rows {rows.start} to {rows.stop}: NaN or infinite values that its nodata value does "
                "not cover; rio edit-info --nodata nan says that NaN is no data"
            )
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))

    def valid(self, rows: slice, columns: slice) -> NDArray[np.bool_] | None:
        """Where a window holds data in any of the bands, ``(H, W)``; ``None`` for everywhere."""
        if not self.has_nodata:
            return None
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        with _clear_errors(self.path, rows), without_warnings():
            return np.asarray(self.dataset.read_masks(sorted(set(self.bands)), window=window).any(axis=0))


def raster_driver(path: Path) -> str | None:
    """GDAL's name of the driver that reads a file, by its first bytes; ``None`` for what is no raster."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except (OSError, ValueError):
        return None
    return next((driver for magic, driver in _DRIVERS.items() if head.startswith(magic)), None)


def is_georeferenced(path: Path) -> bool:
    """Whether a file says where on Earth it lies. JPEG 2000 is asked through rasterio, if that is installed."""
    driver = raster_driver(path)
    if driver == "GTiff":
        layout = tiff_layout(path)
        return layout is not None and layout.georeferenced
    if driver is None:
        return False
    try:
        with opened_raster(path) as dataset, _clear_errors(path):
            return dataset.crs is not None or bool(dataset.gcps[0]) or not dataset.transform.is_identity
    except (InputError, MissingDependencyError):
        return False  # whoever reads it says why


def is_too_large(path: Path) -> bool:
    """Whether a TIFF or JPEG 2000 file has more pixels than an image that is read whole may have."""
    driver, size, samples = raster_driver(path), (0, 0), 1
    if driver == "GTiff":
        layout = tiff_layout(path)
        if layout is not None:
            size, samples = (layout.height, layout.width), layout.samples * ((layout.bits + 7) // 8)
    elif driver is not None:
        size, samples = _jpeg2000_size(path)
    pixels = size[0] * size[1]
    return pixels > MAX_PIXELS or pixels * samples > MAX_ARRAY_BYTES


def import_rasterio(path: Path) -> Any:
    """Import rasterio. Raises ``MissingDependencyError``."""
    try:
        import rasterio
    except ImportError as exc:
        raise MissingDependencyError("rasterio", "raster", f"segment {path.name} by windows") from exc
    return rasterio


@contextmanager
def open_raster(
    path: Path, wanted: PipelineSpec, bands: Sequence[int] | None = None, overview: int | None = None
) -> Iterator[Raster]:
    """Open a GeoTIFF, COG or JPEG 2000 file.

    Args:
        path: of the file.
        wanted: what the engine takes: channels and dtype.
        bands: to read, from 1, one per channel; ``None``: the colours, or all that are no alpha.
        overview: how many times smaller than the raster the overview is that is read; ``None`` for the raster itself.

    Raises:
        InputError: no such file, none of these formats, damaged, or not of such bands or overviews.
        MissingDependencyError: rasterio is not installed.
    """
    with opened_raster(path) as full, ExitStack() as stack:
        dataset = full
        if overview is not None:
            with _clear_errors(path):
                levels = full.overviews(1)
            if overview not in levels:
                has = f"has overviews {', '.join(map(str, levels))}" if levels else "has no overviews within it"
                raise InputError(
                    f"{path} {has}, none that is {overview} times smaller; rio overview --build 2,4,8 makes them"
                )
            dataset = stack.enter_context(opened_raster(path, overview_level=levels.index(overview)))
        # GDAL reads much of a header when it is asked.
        with _clear_errors(path):
            chosen = _chosen_bands(path, dataset, wanted.input.channels, bands)
            for name in (dataset.dtypes[band - 1] for band in chosen):
                _require_dtype(path, name, wanted.input.dtype)
            low, high = (np.array(values) for values in wanted.preprocess.usual_values(wanted.input.dtype))
            raster = Raster(
                path,
                dataset,
                chosen,
                dtype=wanted.input.dtype,
                fill=tuple((low + high) / 2),
                has_nodata=_has_nodata(dataset, chosen),
                crs=dataset.crs,
                transform=dataset.transform,
                control_points=dataset.gcps,
                rpcs=dataset.rpcs,
            )
        yield raster


def geotiff_settings() -> Any:
    """The environment in which GDAL writes: no file beside the one asked for, and little memory."""
    from rasterio.env import Env

    return Env(**_SETTINGS)


def gdal_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What rasterio raises of its own, what it passes on of GDAL, and ``others``."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError, *others


@contextmanager
def opened_raster(path: Path, **options: Any) -> Iterator[Any]:
    """Open a file as rasterio's dataset, after all checks but those of its bands.

    Raises:
        InputError: no such file, none of these formats, damaged, or too large.
        MissingDependencyError: rasterio is not installed.
    """
    require_file(path, "raster")
    driver = raster_driver(path)
    if driver is None:
        raise InputError(f"cannot read {path} as a raster: neither TIFF nor JPEG 2000")
    rasterio = import_rasterio(path)
    with ExitStack() as stack:
        stack.enter_context(geotiff_settings())
        with _clear_errors(path):
            with without_warnings():
                # An absolute path: GDAL reads "zip:..." and the like as more than a name.
                dataset = stack.enter_context(rasterio.open(path.absolute(), driver=driver, **options))
            # Before anything asks for overviews or masks, which would open what is named there.
            elsewhere = dataset.tags(ns="OVERVIEWS")
            blocks = dataset.block_shapes
            together = dataset.count if dataset.interleaving is rasterio.enums.Interleaving.pixel else 1
            itemsize = max((np.dtype(name).itemsize for name in dataset.dtypes if name in _NUMPY), default=16)
        if elsewhere:
            raise InputError(f"cannot read {path}: it says that its overviews are in another file")
        if not 0 < dataset.height <= MAX_SIDE or not 0 < dataset.width <= MAX_SIDE:
            raise InputError(
                f"cannot read {path}: {dataset.height}x{dataset.width} pixels; at most {MAX_SIDE} along a side"
            )
        block_bytes = max(height * width for height, width in blocks) * together * itemsize
        if block_bytes > MAX_BLOCK_BYTES:
            raise InputError(
                f"cannot read {path}: it is stored in pieces of {block_bytes} bytes, at most {MAX_BLOCK_BYTES}: store it "
                "in tiles, such as with rio convert --co TILED=YES"
            )
        yield dataset


@contextmanager
def _clear_errors(path: Path, rows: slice | None = None) -> Iterator[None]:
    try:
        yield
    except EdgesegError:
        raise
    except gdal_errors(UnicodeError, ValueError) as exc:
        where = "" if rows is None else f", rows {rows.start} to {rows.stop}"
        raise InputError(f"cannot read {path}{where}: {one_line(exc.__cause__ or exc)}") from exc


def _require_dtype(path: Path, name: str, dtype: InputDtype) -> None:
    """Refuse a band of GDAL's type ``name``, which may be one that numpy has not."""
    if name in _NUMPY and takes(np.dtype(name), dtype):
        return
    build = f"build with --input-dtype {name if name in {'uint8', 'uint16'} else 'float32'}" if name in _NUMPY else ""
    scale = "" if dtype == "float32" else f"scale it, such as with rio convert --dtype {dtype} --scale-ratio RATIO"
    raise InputError(f"{path} holds {name}, the engine takes {dtype}: {', or '.join(filter(None, (build, scale)))}")


def _has_nodata(dataset: Any, bands: Sequence[int]) -> bool:
    from rasterio.enums import MaskFlags

    flags = dataset.mask_flag_enums
    return all(MaskFlags.all_valid not in flags[band - 1] for band in bands)


_NUMPY = {"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"}


def _chosen_bands(path: Path, dataset: Any, channels: int, bands: Sequence[int] | None) -> tuple[int, ...]:
    names = [colour.name for colour in dataset.colorinterp]
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(names[:12], 1)) + ", ..." * (len(names) > 12)
    has = f"{path} has {dataset.count} band{'s' * (dataset.count > 1)} ({listed})"
    if bands is not None:
        if len(bands) != channels:
            raise InputError(f"{len(bands)} bands are asked for, this model takes {channels} channels; {has}")
        if not all(1 <= band <= dataset.count for band in bands):
            raise InputError(f"{has}, not {', '.join(map(str, bands))}; give --bands from 1 to {dataset.count}")
        return tuple(bands)
    if "palette" in names:
        raise InputError(f"{path} holds a palette's indices; make colours of them, such as with pct2rgb.py")
    known = [number for number, name in enumerate(names, 1) if name != "alpha"]
    if len(known) == channels:
        return tuple(known)
    if channels == 3 and {"red", "green", "blue"} <= set(names):
        return tuple(names.index(name) + 1 for name in ("red", "green", "blue"))
    if channels == 3 and len(known) == 1:
        return (known[0],) * 3  # grey, as for any other picture
    raise InputError(f"{has}, this model takes {channels} channels; name them in its order, such as --bands 4,3,2")


def _jpeg2000_size(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width, and bytes a pixel, by Pillow's reading of the header; zeros for a damaged one."""
    from PIL import Image

    try:
        with without_warnings(), Image.open(path, formats=["JPEG2000"]) as image:
            return (image.height, image.width), len(image.getbands()) * (2 if "16" in image.mode else 1)
    except Image.DecompressionBombError:
        return (MAX_SIDE, MAX_SIDE), 1
    except Exception:
        return (0, 0), 1  # whoever decodes it says what is wrong
