"""Segmenting rasters that do not fit memory: windows in, windows out, to be gone on with after an interruption.

The windows, their overlap and their blending are those of fit policy ``tile`` (:mod:`edgeseg.runtime.tiling`); the mask is
the one that it gives for the same pixels. A raster is worked off in panels of columns, each from top to bottom, so that
memory does not grow with it. What is finished is kept beside the output in a folder, a file a strip; at the end the output
is put together from these and appears at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import FLAG, argument, choice, settle
from edgeseg.errors import InputError, MissingDependencyError, SpecError, refusals_as
from edgeseg.images.placement import Tiling
from edgeseg.images.raster import RASTER_SUFFIXES, Raster, Reading, is_georeferenced, is_too_large, open_raster
from edgeseg.runtime.bar import Silent
from edgeseg.runtime.geotiff import REQUEST_TAG, GeoTiff, request_of, write_geotiff
from edgeseg.runtime.journal import Journal
from edgeseg.runtime.prediction import Prediction
from edgeseg.runtime.scores import ScoreRule
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.runtime.tiling import Part, Strip, boundaries
from edgeseg.spec import ChannelOrder
from edgeseg.store.atomic import HeldError, lock, replacing
from edgeseg.store.files import refuse_existing
from edgeseg.version import __version__

ProbabilityType: TypeAlias = Literal["uint8", "float32"]

PANEL_BYTES = 1 << 27
"""Of the scores and pixels of a row of windows. Narrower panels run more windows twice, at the edges they share."""
PROBABILITY_STEPS = 254
"""Of probabilities written as uint8: 255 is no data."""


@dataclass(frozen=True, kw_only=True)
class RasterOptions(Reading):
    """How rasters are read and what is written of them.

    Attributes:
        use: read TIFF and JPEG 2000 files as rasters, or never; ``None``: those that are georeferenced or too large to be
            read whole, and all where one of the other options is given.
        probabilities: also write probabilities of this type, a band per class.

    Raises:
        SpecError: a value of another kind, or options of rasters where none are to be read.
    """

    use: bool | None = argument(
        FLAG,
        name="raster",
        help="Segment TIFF and JPEG 2000 files window by window, and keep where they lie; or never.  [default: those that are "
        "georeferenced or too large to be read whole]",
    )
    probabilities: ProbabilityType | None = argument(
        choice(get_args(ProbabilityType)),
        help="Also write a raster's probabilities, a band per class; uint8: 254 is 1.",
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.overview is not None and self.resolution is not None:
            raise SpecError("overview and resolution both say how large a pixel is; give one of them")
        if self.use is False and self._asked:
            raise SpecError("bands, overviews and the like are of rasters; leave them out, or --no-raster")

    @property
    def for_all(self) -> bool:
        """Whether every file is to be a raster, which its name tells."""
        return bool(self.use) or self._asked

    @property
    def _asked(self) -> bool:
        return replace(self, use=None) != RasterOptions()

    def applies_to(self, path: Path) -> bool:
        """Whether a file is segmented as a raster.

        Raises:
            SpecError: it was asked for, and the file cannot be one.
        """
        if self.use is False:
            return False
        possible = path.suffix.lower() in RASTER_SUFFIXES
        if self.for_all:
            if not possible:
                raise SpecError(
                    f"{path} is no raster (GeoTIFF, COG or JPEG 2000); leave it out, or the options of rasters"
                )
            return True
        return possible and (is_too_large(path) or (is_installed() and is_georeferenced(path)))

    def is_missed(self, path: Path) -> bool:
        """Whether a file says where it lies, and its mask will not, for want of the extra."""
        wanted = self.use is None and path.suffix.lower() in RASTER_SUFFIXES and not is_installed()
        return wanted and is_georeferenced(path)


def is_installed() -> bool:
    """Whether rasterio is there; it is not imported for the question."""
    return importlib.util.find_spec("rasterio") is not None


def raster_outputs(folder: Path, name: str, options: RasterOptions) -> list[Path]:
    """The files that :func:`segment_raster` writes."""
    kinds = ("masks", "probabilities") if options.probabilities is not None else ("masks",)
    return [folder / kind / f"{name}.tif" for kind in kinds]


def require_rasters_engine(segmenter: Segmenter, options: RasterOptions) -> None:
    """Refuse, before the work, what no raster can be asked of an engine.

    Raises:
        SpecError: probabilities of an engine that returns masks; more classes than a mask with a value for no data holds.
    """
    if options.probabilities is not None and segmenter.spec.output.kind == "mask":
        raise SpecError(
            "this engine returns masks, no probabilities; build it with --output-kind probabilities, or leave out "
            "--probabilities"
        )
    if segmenter.spec.model.classes > 65535:
        raise SpecError("65536 classes leave no value for pixels without data; give --no-raster")


def unanswered(segmenter: Segmenter, path: Path, outputs: Sequence[Path], options: RasterOptions) -> list[Path]:
    """The outputs that are still to be written: those that are not there already, of the same raster, engine and options."""
    if not any(output.is_file() for output in outputs):
        return list(outputs)
    try:
        with open_raster(path, segmenter.spec, options) as raster:
            request = _Work(segmenter.as_tiles(), raster, options).request()
    except (InputError, MissingDependencyError):
        return list(outputs)  # whoever segments it says why
    return [output for output in outputs if request is None or request_of(output) != request]


@refusals_as(InputError)
def segment_raster(
    segmenter: Segmenter,
    path: Path,
    outputs: Sequence[Path],
    options: RasterOptions,
    progress: Silent,
    *,
    overwrite: bool = False,
) -> None:
    """Segment one raster and write its mask as a tiled GeoTIFF, and its probabilities where they are asked for.

    Args:
        segmenter: from :func:`edgeseg.load`; its fit policy does not matter.
        path: of the raster.
        outputs: from :func:`raster_outputs`.
        options: see :class:`RasterOptions`.
        progress: told how many windows are done.
        overwrite: replace files that exist.

    Raises:
        InputError: the raster cannot be read, or the output not be written; another process writes it.
        OutputExistsError: an output exists, of another engine, raster or options, and ``overwrite`` is false.
        SpecError: see :func:`require_rasters_engine`.
        MissingDependencyError: rasterio is not installed.
        BuildError: the engine failed.
    """
    require_rasters_engine(segmenter, options)
    if not overwrite and not (missing := unanswered(segmenter, path, outputs, options)):
        progress.say(f"{outputs[0]} is there already, of the same raster and engine")
        progress.advance()
        return
    tiles = segmenter.as_tiles()
    with open_raster(path, tiles.spec, options) as raster, ExitStack() as stack:
        work = _Work(tiles, raster, options)
        request = work.request()
        for output in missing if not overwrite else ():
            refuse_existing(output, force=False)
        outputs[0].parent.mkdir(parents=True, exist_ok=True)
        kept = outputs[0].with_name(f".{outputs[0].name}.unfinished")
        try:
            stack.enter_context(lock(kept.with_suffix(".lock"), timeout_s=0.2))
        except HeldError as exc:
            raise InputError(f"another process is writing {outputs[0]}; wait for it, or give another --output") from exc
        journal = Journal(kept, request)
        try:
            work.all(journal, progress)
            work.write(journal, outputs, request, overwrite)
        except KeyboardInterrupt:
            if request is not None:
                progress.say(f"{path}: what is finished is kept; the same command goes on from there")
            raise
        journal.remove()


class _Work:
    """What one raster takes: its windows in panels of columns, and what becomes of their answers."""

    def __init__(self, tiles: Segmenter, raster: Raster, options: RasterOptions) -> None:
        self._tiles, self._raster, self._options = tiles, raster, options
        spec = tiles.spec
        self._rule = None if spec.output.kind == "mask" else ScoreRule.of(spec)
        self._values = spec.model.classes if spec.model.task == "multiclass" else 2
        self._planes = spec.model.classes if spec.model.task == "multilabel" else 1
        self._dtype: type[np.unsignedinteger[Any]] = np.uint8 if self._values <= 255 else np.uint16
        self._nodata = int(np.iinfo(self._dtype).max)
        height, width = raster.size
        plan = tiles.plan(height, width)
        self._plan = plan
        if isinstance(plan, Tiling):
            blended = self._rule is not None
            self._rows = boundaries(plan.tops, plan.window[0], height, blended=blended)
            self._columns = boundaries(plan.lefts, plan.window[1], width, blended=blended)
            pixel_bytes = spec.input.channels * np.dtype(spec.input.dtype).itemsize
            per_pixel = (8 * spec.model.classes if blended else 4) + 3 * pixel_bytes
            # Narrow panels cost masks nothing: no window is run twice.
            budget_bytes = PANEL_BYTES if blended else PANEL_BYTES // 4
            self._panels = _panels(plan, budget_bytes // (plan.window[0] * per_pixel))
        else:
            self._rows, self._columns, self._panels = (0, height), (0, width), [range(1)]

    def request(self) -> str | None:
        """What the output is of, as a hash; ``None`` where the engine cannot be told from another."""
        if self._tiles.identity is None:
            return None
        status = self._raster.path.stat()
        asked = {
            "edgeseg": __version__,
            "engine": self._tiles.identity,
            "palette": self._tiles.palette.tolist(),
            "raster": (self._raster.path.name, status.st_size, status.st_mtime_ns, self._raster.bands),
            "pixels": (self._options.overview, self._options.resolution, self._options.nodata),
            "probabilities": self._options.probabilities,
            "plan": (repr(self._plan), [columns.start for columns in self._panels]),
        }
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def all(self, journal: Journal, progress: Silent) -> None:
        """Segment what the journal does not hold yet."""
        rows = len(self._rows) - 1
        windows = rows * (len(self._columns) - 1)
        progress.expect(windows)
        firsts = [next((row for row in range(rows) if not journal.has(p, row)), rows) for p in range(len(self._panels))]
        done = sum(first * len(columns) for first, columns in zip(firsts, self._panels, strict=True))
        if done:
            progress.advance(count=done)
            progress.say(f"{self._raster.path}: goes on, {done} of {windows} windows are done")
        for panel, (first, columns) in enumerate(zip(firsts, self._panels, strict=True)):
            if first < rows:
                for strip, prediction in self._strips(Part(range(first, rows), columns)):
                    journal.keep(panel, strip.row, self._answers(strip, prediction))
                    progress.advance(count=len(columns))

    def write(self, journal: Journal, outputs: Sequence[Path], request: str | None, overwrite: bool) -> None:
        """Put the outputs together; the mask, which comes first, appears last."""
        spec, tiles = self._tiles.spec, self._tiles
        names = list(tiles.class_names)
        tags = {"CLASS_NAMES": json.dumps(names, ensure_ascii=False), "TIFFTAG_SOFTWARE": f"edgeseg {__version__}"}
        if request is not None:
            tags[REQUEST_TAG] = request
        single = spec.model.task != "multilabel"
        values = ["background", *names] if spec.model.task == "binary" else names
        files = [
            GeoTiff(
                dtype=np.dtype(self._dtype).name,
                nodata=self._nodata,
                bands=("class",) if single else tuple(names),
                colours=tiles.palette if single else None,
                tags={**tags, "VALUES": json.dumps(dict(enumerate(values if single else ["no", "yes"])))},
            )
        ]
        if (kind := self._options.probabilities) is not None:
            scale = 1.0 if kind == "float32" else 1.0 / PROBABILITY_STEPS
            nodata = float("nan") if kind == "float32" else 255
            files.append(GeoTiff(dtype=kind, nodata=nodata, bands=tuple(names), scale=scale, tags=tags))
        with ExitStack() as stack:
            for output, file, name in zip(outputs, files, ("mask", "probability"), strict=False):
                output.parent.mkdir(parents=True, exist_ok=True)
                ours = request is not None and request_of(output) == request
                part = stack.enter_context(replacing(output, overwrite=overwrite or ours, suffix=".tif"))
                write_geotiff(part, file, self._raster, partial(self._read, journal, name))

    def _strips(self, part: Part) -> Iterator[tuple[Strip, Prediction | None]]:
        mask_only = self._options.probabilities is None
        if isinstance(self._plan, Tiling):
            return self._tiles.strips(self._plan, self._windows, part, mask_only=mask_only)
        whole = Strip(0, slice(*self._rows), slice(*self._columns), {})
        order: ChannelOrder | None = "rgb" if self._tiles.spec.input.channels == 3 else None
        pixels = self._raster.read(whole.rows, whole.columns)
        return iter([(whole, self._tiles.predict(pixels, channel_order=order))])

    def _windows(self, row: int, columns: range) -> tuple[list[int], NDArray[Any]]:
        """Windows of a row that hold data, and their columns: what the engine says of others nobody sees."""
        plan = self._plan
        assert isinstance(plan, Tiling)
        (height, width), (window_height, window_width) = plan.source, plan.window
        lefts = {column: plan.lefts[column] - plan.lefts[columns.start] for column in columns}
        rows = slice(plan.tops[row], min(plan.tops[row] + window_height, height))
        across = slice(plan.lefts[columns.start], min(plan.lefts[columns[-1]] + window_width, width))
        valid = self._raster.valid(rows, across)
        wanted = [c for c, left in lefts.items() if valid is None or valid[:, left : left + window_width].any()]
        if not wanted:
            return [], np.empty((0, *plan.window, len(self._raster.bands)), self._raster.dtype)
        padded = plan.pad(self._raster.read(rows, across))
        return wanted, np.stack([padded[:, lefts[column] : lefts[column] + window_width] for column in wanted])

    def _answers(self, strip: Strip, prediction: Prediction | None) -> dict[str, NDArray[Any]]:
        """What is kept of a strip: the planes of its mask and its probabilities, by kind and number."""
        size = (strip.rows.stop - strip.rows.start, strip.columns.stop - strip.columns.start)
        valid = self._raster.valid(strip.rows, strip.columns)
        nowhere = np.zeros(size, np.bool_) if valid is None else ~valid
        if prediction is None:
            nowhere = np.ones(size, np.bool_)
            mask: NDArray[Any] = np.zeros((self._planes, *size), self._dtype)
        else:
            mask = prediction.mask.astype(self._dtype).reshape(self._planes, *size)
        mask[:, nowhere] = self._nodata
        kept = {f"mask-{number}": plane for number, plane in enumerate(mask)}
        kind = self._options.probabilities
        if kind is None:
            return kept
        if prediction is None:
            probabilities = np.zeros((self._tiles.spec.model.classes, *size), np.float32)
        else:
            scores = prediction.logits if prediction.probabilities is None else prediction.probabilities
            assert scores is not None and self._rule is not None
            probabilities = self._rule.probabilities(scores)
        for number, plane in enumerate(probabilities):
            if kind == "uint8":
                written: NDArray[Any] = np.rint(plane * np.float32(PROBABILITY_STEPS)).astype(np.uint8)
                written[nowhere] = 255
            else:
                written = plane.copy()
                written[nowhere] = np.nan
            kept[f"probability-{number}"] = written
        return kept

    def _read(self, journal: Journal, name: str, band: int, rows: slice) -> NDArray[Any]:
        """Rows of a finished plane, over the whole width."""
        pieces: list[NDArray[Any]] = []
        first = bisect_right(self._rows, rows.start) - 1
        for row in range(first, bisect_left(self._rows, rows.stop)):
            here = slice(max(rows.start - self._rows[row], 0), rows.stop - self._rows[row])
            strips = [journal.plane(panel, row, f"{name}-{band}")[here] for panel in range(len(self._panels))]
            pieces.append(np.concatenate(strips, axis=1))
        return np.concatenate(pieces)


def _panels(tiling: Tiling, width: int) -> list[range]:
    """Columns of windows, so many together that they are about ``width`` pixels wide."""
    count = len(tiling.lefts)
    step = tiling.lefts[1] - tiling.lefts[0] if count > 1 else tiling.window[1]
    panels = -(-count // max(1, width // step))
    edges = [index * count // panels for index in range(panels + 1)]
    return [range(start, end) for start, end in pairwise(edges)]
