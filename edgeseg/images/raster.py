"""Large and georeferenced images: GeoTIFF, COG and JPEG 2000, read window by window through rasterio, an extra.

GDAL reads a hundred formats, some of which name other files and addresses on the network. A file of unknown origin is
opened by the driver its first bytes call for, and by no other; files beside it (``.aux.xml``, ``.ovr``, ``.msk``, world
files) are not looked for, and one whose overviews are said to be elsewhere is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import INT32, MOST, Kind, argument, counts, number, whole
from edgeseg.errors import EdgesegError, InputError, MissingDependencyError, imported, one_line
from edgeseg.images.decoding import MAX_ARRAY_BYTES, MAX_PIXELS
from edgeseg.images.dtypes import takes
from edgeseg.images.tiff import tiff_layout
from edgeseg.silence import without_warnings
from edgeseg.spec import InputDtype, PipelineSpec
from edgeseg.store.files import require_file

RASTER_SUFFIXES = frozenset({".tif", ".tiff", ".jp2", ".j2k"})
MAX_SIDE = 1 << 20
"""Pixels of a raster's height or width."""
MAX_BLOCK_BYTES = 1 << 28
"""Of the tiles or strips a file is stored in: what a decoder takes at a time."""
CACHE_BYTES = 1 << 26
"""Decoded blocks GDAL keeps; it would take a twentieth of the machine's memory."""

SAME_RESOLUTION = 1e-4
"""Ratio of two ground resolutions, less 1, up to which they are one: a pixel in a row of 10,000."""

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


@dataclass(frozen=True)
class _Grid:
    height: int
    width: int
    transform: Any


@dataclass(frozen=True, eq=False)
class Raster:
    """An open raster, one of its overviews, or either read at a coarser resolution.

    Attributes:
        path: of the file.
        dataset: rasterio's.
        bands: read, from 1, one per channel.
        dtype: of the pixels read.
        fill: what a float32 pixel without data is read as, by channel: a float's nodata value may be NaN or -3e38, and
            spoils whatever the network computes beside it. Other dtypes have their own values there.
        is_masked: whether GDAL knows where there is no data: by a nodata value or a mask.
        mask_band: of the dataset, 0 where there is no data: its alpha band. GDAL goes by one of uint8 or uint16 only, and not
            beside a nodata value.
        nodata: the value of pixels without data that the dataset does not know of.
        crs, transform, control_points, rpcs: where it lies, as rasterio has it.
    """

    path: Path
    dataset: Any
    bands: tuple[int, ...]
    dtype: InputDtype
    fill: tuple[float, ...]
    is_masked: bool
    mask_band: int | None
    nodata: float | None
    crs: Any
    transform: Any
    control_points: tuple[Any, Any]
    rpcs: Any

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return int(self.dataset.height), int(self.dataset.width)

    @property
    def has_nodata(self) -> bool:
        return self.is_masked or self.mask_band is not None or self.nodata is not None

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return a window, ``(H, W, C)`` of :attr:`dtype`. Raises ``InputError`` where the file is damaged, or holds NaN."""
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        with _clear_errors(self.path, rows), without_warnings():
            planes = self.dataset.read(self.bands, window=window)
            if self.dtype == "float32":
                planes = planes.astype(np.float32)
                if self.has_nodata:
                    fill = np.array(self.fill, np.float32)[:, None, None]
                    planes = np.where(self._data(self.bands, window), planes, fill)
        if self.dtype == "float32" and not np.isfinite(planes).all():
            raise InputError(
                f"cannot read {self.path}, rows {rows.start} to {rows.stop}: NaN or infinite values that its nodata value does "
                "not cover; --nodata nan says that NaN is no data"
            )
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))

    def valid(self, rows: slice, columns: slice) -> NDArray[np.bool_] | None:
        """Where a window holds data in any of the bands, ``(H, W)``; ``None`` for everywhere."""
        if not self.has_nodata:
            return None
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        with _clear_errors(self.path, rows), without_warnings():
            return np.asarray(self._data(sorted(set(self.bands)), window).any(axis=0))

    def _data(self, bands: Sequence[int], window: Any) -> NDArray[np.bool_]:
        """Where each band holds data, ``(bands, H, W)``."""
        data = np.ones((len(bands), 1, 1), np.bool_)
        if self.is_masked:
            data = data & (self.dataset.read_masks(bands, window=window) != 0)
        if self.mask_band is not None:
            data = data & (self.dataset.read(self.mask_band, window=window) != 0)
        if self.nodata is not None:
            planes = self.dataset.read(bands, window=window)
            data = data & (~np.isnan(planes) if math.isnan(self.nodata) else planes != planes.dtype.type(self.nodata))
        return data


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


_NODATA = Kind(
    "a pixel's value, nan, or none", lambda word: word if word == "none" else float(word), metavar="VALUE|none"
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a raster is read.

    Attributes:
        bands: from 1, one per channel in the model's order; ``None``: the colours, or all that are no alpha.
        overview: read the overview that is so many times smaller.
        resolution: ground size of a pixel, in units of the raster's coordinate system: what is read is the mean of the
            raster's pixels, or of those of its next finer overview, that lie in it. ``None``: as the file has them.
        nodata: value of the pixels without data, in place of the one that the file names; ``none``: no value is.
    """

    bands: tuple[int, ...] | None = argument(
        counts(MOST, "4,3,2", what="band numbers", repeats=True),
        help="Bands of a raster, from 1, in the model's order, such as 4,3,2.",
    )
    overview: int | None = argument(whole(2, INT32, 4), help="Read the overview that is so many times smaller.")
    resolution: float | None = argument(
        number(1e-9, 1e9, "the size of a pixel on the ground, such as 0.5"),
        help="Ground size of a pixel, in a raster's own units: coarser than its own, as the model was trained.",
    )
    nodata: float | Literal["none"] | None = argument(
        _NODATA,
        help="Value of a raster's pixels without data, in place of the one it names; none: no value is.",
    )


@contextmanager
def open_raster(path: Path, wanted: PipelineSpec, how: Reading) -> Iterator[Raster]:
    """Open a GeoTIFF, COG or JPEG 2000 file.

    Args:
        path: of the file.
        wanted: what the engine takes: channels and dtype.
        how: see :class:`Reading`.

    Raises:
        InputError: no such file, none of these formats, damaged, or not of such bands, overviews, resolutions or values.
        MissingDependencyError: rasterio is not installed.
    """
    with opened_raster(path) as full, ExitStack() as stack:
        with _clear_errors(path):
            levels = full.overviews(1)
        level, grid = how.overview, None
        if how.resolution is not None:
            level, grid = _coarser(path, full, levels, how.resolution)
        if level is not None and level not in levels:
            has = f"has overviews {', '.join(map(str, levels))}" if levels else "has no overviews within it"
            raise InputError(f"{path} {has}, none that is {level} times smaller; rio overview --build 2,4,8 makes them")
        dataset = full
        if level is not None:
            dataset = stack.enter_context(opened_raster(path, overview_level=levels.index(level)))
        # GDAL reads much of a header when it is asked.
        with _clear_errors(path):
            chosen = _chosen_bands(path, dataset, wanted.input.channels, how.bands)
            for name in (dataset.dtypes[band - 1] for band in chosen):
                _require_dtype(path, name, wanted.input.dtype)
                _require_value(path, name, how.nodata)
            by_value = _has_flag(dataset, chosen, "nodata")
            mask_band = next((n for n, colour in enumerate(dataset.colorinterp, 1) if colour.name == "alpha"), None)
            is_masked = _is_masked(dataset, chosen) and (how.nodata is None or not by_value)
            nodata = None if how.nodata == "none" else how.nodata
            if grid is not None:
                value = dataset.nodata if how.nodata is None and by_value else nodata
                adds_alpha = is_masked and value is None
                if adds_alpha and mask_band is not None:
                    raise InputError(
                        f"{path} has an alpha band and a mask, and --resolution goes by one of them; leave it out"
                    )
                dataset = stack.enter_context(_warped(dataset, grid, value, adds_alpha=adds_alpha))
                mask_band = dataset.count if adds_alpha else mask_band
                is_masked, nodata = _is_masked(dataset, chosen), None
            low, high = (np.array(values) for values in wanted.preprocess.usual_values(wanted.input.dtype))
            raster = Raster(
                path,
                dataset,
                chosen,
                dtype=wanted.input.dtype,
                fill=tuple((low + high) / 2),
                is_masked=is_masked,
                mask_band=mask_band,
                nodata=nodata,
                crs=full.crs,
                transform=dataset.transform,
                control_points=dataset.gcps,
                rpcs=None if grid is not None else dataset.rpcs,
            )
        yield raster


def _coarser(path: Path, full: Any, levels: Sequence[int], resolution: float) -> tuple[int | None, _Grid | None]:
    """The overview to read for a ground resolution, and the grid to bring it to; ``None`` for none needed."""
    place = full.transform
    if place.is_identity:
        raise InputError(f"{path} does not say how large its pixels are on the ground; leave out --resolution")
    sizes = math.hypot(place.a, place.d), math.hypot(place.b, place.e)
    across, down = (resolution / size for size in sizes)
    if min(across, down) < 1 - SAME_RESOLUTION:
        raise InputError(
            f"{path} has pixels of {max(sizes):g}, larger than --resolution {resolution:g}; give {max(sizes):g} or more, or "
            f"resample it, such as with gdalwarp -tr {resolution:g} {resolution:g} -r cubic"
        )
    level = max((level for level in levels if level <= min(across, down) * (1 + SAME_RESOLUTION)), default=None)
    if all(abs(factor / (level or 1) - 1) <= SAME_RESOLUTION for factor in (across, down)):
        return level, None
    height, width = max(1, round(full.height / down)), max(1, round(full.width / across))
    wider, taller = full.width / width, full.height / height
    a, b, c, d, e, f = place[:6]
    return level, _Grid(height, width, type(place)(a * wider, b * taller, c, d * wider, e * taller, f))


def _warped(dataset: Any, grid: _Grid, nodata: float | None, *, adds_alpha: bool) -> Any:
    """A dataset on another grid of the same extent: means of its pixels that hold data.

    GDAL's warper gives the same for any window; it goes by nodata values, masks and alpha bands, and by the nodata value
    of each band alone, as ``read_masks`` does.
    """
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    crs = dataset.crs or "EPSG:3857"  # of both sides: nothing is projected
    return WarpedVRT(
        dataset,
        src_crs=crs,
        crs=crs,
        height=grid.height,
        width=grid.width,
        transform=grid.transform,
        resampling=Resampling.average,
        src_nodata=nodata,
        nodata=nodata,
        add_alpha=adds_alpha,
        UNIFIED_SRC_NODATA="NO",
    )


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
    rasterio = imported("rasterio", "raster", f"segment {path.name} by windows")
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
    build = f"build with input dtype {name if name in {'uint8', 'uint16'} else 'float32'}" if name in _NUMPY else ""
    scale = "" if dtype == "float32" else f"scale it, such as with rio convert --dtype {dtype} --scale-ratio RATIO"
    raise InputError(f"{path} holds {name}, the engine takes {dtype}: {', or '.join(filter(None, (build, scale)))}")


def _require_value(path: Path, name: str, nodata: float | str | None) -> None:
    """Refuse a nodata value that no pixel of GDAL's type ``name`` can have."""
    if nodata is None or isinstance(nodata, str) or np.dtype(name).kind == "f":
        return
    limits = np.iinfo(name)
    if not (float(nodata).is_integer() and limits.min <= nodata <= limits.max):
        raise InputError(
            f"{path} holds {name}, none of whose values is {nodata:g}; give --nodata {limits.min} to {limits.max}, or none"
        )


def _has_flag(dataset: Any, bands: Sequence[int], name: str) -> bool:
    """Whether GDAL's flag of this name describes the mask of any of the bands."""
    from rasterio.enums import MaskFlags

    return any(MaskFlags[name] in dataset.mask_flag_enums[band - 1] for band in bands)


def _is_masked(dataset: Any, bands: Sequence[int]) -> bool:
    """Whether GDAL knows by more than an alpha band where there is no data."""
    return not _has_flag(dataset, bands, "all_valid") and not _has_flag(dataset, bands, "alpha")


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
