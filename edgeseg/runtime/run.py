"""What ``edgeseg run`` does: images, folders, globs, videos and cameras in; masks, overlays and videos out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import FLAG, INT32, argument, choice, number, settle, whole
from edgeseg.errors import InputError, MissingDependencyError, SpecError
from edgeseg.images.decoding import IMAGE_SUFFIXES, list_images, read_image
from edgeseg.runtime.averaging import AUGMENTATION, Augmentation
from edgeseg.runtime.bar import Bar, Silent
from edgeseg.runtime.outputs import VideoFile, cut_to_bytes, unique_names, write_mask, write_picture
from edgeseg.runtime.overlap import in_parallel, parallel_threads
from edgeseg.runtime.overlay import SHOWN_PERCENTILES, add_legend, colorize, legend_entries
from edgeseg.runtime.overlay import overlay as lay_over
from edgeseg.runtime.raster import RasterOptions, raster_outputs, require_rasters_engine, segment_raster, unanswered
from edgeseg.runtime.segmenter import TILE_OVERLAP, Segmenter
from edgeseg.runtime.sources import VIDEO_SUFFIXES, Video, camera_index
from edgeseg.runtime.stream import Stream
from edgeseg.spec import FitPolicy, PipelineSpec
from edgeseg.store.files import check_outputs, refuse_existing

# A camera that does not say how fast it is.
USUAL_FPS = 25.0
# Of a class in a file's name, which holds 255 bytes at most.
MAX_CLASS_NAME_BYTES = 40

# Of an image's pixels: larger ones are segmented and written one at a time, which takes several times that.
LARGE_BYTES = 1 << 26
# Images a thread may be ahead of the slowest; of a finished one only the names of its files are held.
PATHS_AHEAD = 4


@dataclass(frozen=True)
class RunSettings:
    """How masks are made and written: options of ``edgeseg run``. Raises ``SpecError``.

    Attributes:
        rasters: which files are rasters, and how they are read.
    """

    overlay: bool = argument(FLAG, False, help="Also write colour overlays with a legend.")
    alpha: float = argument(number(0, 1, "an opacity from 0 to 1"), 0.5, help="Opacity of the overlay.")
    fit: FitPolicy | None = argument(
        choice(get_args(FitPolicy)), help="How images of another size are brought to the engine's.  [default: as built]"
    )
    tile_overlap: float = argument(
        TILE_OVERLAP, 0.25, help="Share of a tile that its neighbour covers too, with --fit tile."
    )
    tta: Augmentation | None = argument(
        AUGMENTATION,
        help="Average the probabilities of the image and its mirror images (flips: 4 runs), of quarter turns too (d4: 8 runs).",
    )
    threads: int | None = argument(
        whole(1, INT32, 2), help="Take no more of this machine: of a CPU engine, and images at a time."
    )
    rasters: RasterOptions = field(default_factory=RasterOptions)

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Failure:
    """An input that could not be used, and why, in one line."""

    input: str
    reason: str


@dataclass(frozen=True)
class RunSummary:
    """What :func:`run_inputs` did.

    Attributes:
        images: image files segmented.
        frames: frames of videos and cameras segmented.
        dropped: camera frames skipped because a newer one had come.
        seconds: from the first input to the last output written.
        written: files, in order.
        failed: inputs that could not be used, or not to their end.
        frames_per_second: images and frames over seconds, reading and writing included; ``None`` when there were none.
        interrupted: a camera was stopped with Ctrl-C.
        reused: images that an earlier run had done, by its ledger (``--executor ray``).
    """

    images: int
    frames: int
    dropped: int
    seconds: float
    written: tuple[str, ...]
    failed: tuple[Failure, ...]
    frames_per_second: float | None
    interrupted: bool = False
    reused: int = 0


def run_inputs(
    segmenter: Segmenter,
    inputs: Iterable[str | Path | int],
    output: str | Path,
    settings: RunSettings | None = None,
    *,
    frame_masks: bool = False,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> RunSummary:
    """Segment everything named and write the results: several images, or reading, inference and writing, at a time.

    Written below ``output``:

    - ``masks/NAME.png`` for each image: class indices as pixel values, with the palette (16-bit grey above 256
      classes). For a multilabel model ``masks/NAME.0-road.png`` and so on, one plane of 0 and 1 per class.
    - ``overlays/NAME.png`` with ``overlay``: the classes' colours over the image, and a legend with their shares.
    - ``masks/NAME.tif`` for each raster (:mod:`edgeseg.runtime.raster`), with ``probabilities/NAME.tif`` where asked for.
    - ``videos/NAME.mp4`` for each video or camera: the colours alone, or over the frames with ``overlay``, and a
      legend. With ``frame_masks`` also ``masks/NAME/000000.png`` and so on.

    NAME is the input's stem, cut where it is very long and made unique where inputs share one. Images that cannot be
    read are listed in the summary, and the others are processed; so is a video of which frames are lost. A camera runs
    until Ctrl-C or ``limit``.

    Args:
        segmenter: from :func:`edgeseg.load`.
        inputs: image and video files, folders (their own files), globs, ``.txt`` lists of images, camera indices.
        output: folder, made if it does not exist.
        settings: how masks are made and written, as the segmenter was loaded with; ``None`` for the defaults.
        frame_masks: see above.
        limit: stop after so many images and frames.
        overwrite: replace files that exist.
        progress: show a progress bar with frames per second, and failures, on standard error.
        names: NAME of each of ``inputs``, which are files then, where somebody else has chosen them.

    Raises:
        OutputExistsError: an output exists, and ``overwrite`` is false.
        SpecError: an output would replace an input; what rasters cannot be asked for.
        InputError: an input that is not there at all, an output that cannot be written.
        MissingDependencyError: OpenCV is not installed, and there is a video or camera.
        BuildError: the engine failed.
    """
    settings = settings or RunSettings()
    rasters = settings.rasters
    if names is None:
        tasks = _plan(inputs, rasters)
    else:
        files = [Path(str(item)) for item in inputs]
        tasks = [_Task(file, name, rasters.applies_to(file)) for file, name in zip(files, names, strict=True)]
    run = _Run(segmenter, Path(output), settings, frame_masks, limit, overwrite)
    large = [task for task in tasks if task.is_raster]
    _require_possible(tasks, settings)
    if large:
        require_rasters_engine(segmenter, rasters)
    check_outputs(
        [path for task in tasks for path in run.unwritten(task)],
        force=overwrite,
        inputs=[task.source for task in tasks if isinstance(task.source, Path)],
    )
    for task in tasks:
        if task.is_video and frame_masks:
            refuse_existing(run.output / "masks" / task.name, overwrite)
    begin = time.perf_counter()
    with Bar(len(tasks), limit, unit="tiles" if large else "frames") if progress else nullcontext(Silent()) as bar:
        for note in _notes_on_rasters(tasks, rasters, segmenter):
            bar.say(note)
        if settings.overlay:
            tell_what_overlays_show(segmenter.spec, bar)
        interrupted = run.all(tasks, bar)
    seconds, count = time.perf_counter() - begin, run.images + run.frames
    return RunSummary(
        images=run.images,
        frames=run.frames,
        dropped=run.dropped,
        seconds=seconds,
        written=tuple(str(path) for path in run.written),
        failed=tuple(run.failed),
        frames_per_second=count / seconds if count else None,
        interrupted=interrupted,
    )


def _require_possible(tasks: Sequence[_Task], settings: RunSettings) -> None:
    """Raise :class:`SpecError` for what rasters cannot be asked for."""
    large = next((task for task in tasks if task.is_raster), None)
    if large is None:
        return
    if settings.fit not in (None, "tile"):
        raise SpecError(f"rasters are cut into tiles; leave out --fit {settings.fit}, or give --no-raster")
    if settings.overlay:
        raise SpecError(f"no overlay is drawn over a raster ({large.label}); leave out --overlay, or give --no-raster")


def streams_of(inputs: Iterable[str | Path | int], settings: RunSettings) -> int:
    """How many threads :func:`run_inputs` calls the segmenter from: one for videos and rasters, several for images.

    Asked before the engine is loaded, so that what cannot be done is refused before.

    Raises:
        InputError: nothing there.
        SpecError: a file that is to be a raster and cannot be one; what rasters cannot be asked for.
    """
    tasks = _plan(inputs, settings.rasters)
    _require_possible(tasks, settings)
    alone = any(task.is_video or task.is_raster for task in tasks)
    return 1 if alone else min(len(tasks), parallel_threads(settings.threads))


def _notes_on_rasters(tasks: Sequence[_Task], rasters: RasterOptions, segmenter: Segmenter) -> Iterator[str]:
    missed = next((t.source for t in tasks if isinstance(t.source, Path) and rasters.is_missed(t.source)), None)
    if missed is not None:
        yield f"note: {missed} is georeferenced; its mask will be, too, with pip install 'edgeseg[raster]'"
    cut = next((task for task in tasks if task.is_raster), None)
    fit = segmenter.spec.input.fit
    if cut is not None and fit != "tile" and rasters.use is None:
        yield f"note: {cut.label} is cut into tiles at its own scale; --no-raster brings it to the engine's size ({fit})"


def tell_what_overlays_show(spec: PipelineSpec, bar: Silent) -> None:
    """Say which values of images that are not uint8 are black and white in overlays."""
    if spec.input.dtype != "uint8":
        low, high = SHOWN_PERCENTILES
        bar.say(f"overlays show {spec.input.dtype} images from percentile {low:g} (black) to {high:g} (white)")


def image_outputs(name: str, spec: PipelineSpec, *, overlay: bool) -> list[str]:
    """The files, below the output folder, that an image of this NAME is written to by :func:`run_inputs`."""
    paths = _mask_paths(Path("masks", name), spec)
    return [path.as_posix() for path in paths] + ([f"overlays/{name}.png"] if overlay else [])


def _mask_paths(base: Path, spec: PipelineSpec) -> list[Path]:
    if spec.model.task != "multilabel":
        return [base.with_name(f"{base.name}.png")]
    names = (
        cut_to_bytes("".join(c if c.isalnum() else "_" for c in name), MAX_CLASS_NAME_BYTES)
        for name in spec.model.names
    )
    return [base.with_name(f"{base.name}.{index}-{name}.png") for index, name in enumerate(names)]


@dataclass(frozen=True)
class _Task:
    source: Path | int
    name: str
    is_raster: bool = False

    @property
    def is_video(self) -> bool:
        return isinstance(self.source, int) or self.source.suffix.lower() in VIDEO_SUFFIXES

    @property
    def label(self) -> str:
        return f"camera {self.source}" if isinstance(self.source, int) else str(self.source)


def _plan(inputs: Iterable[str | Path | int], rasters: RasterOptions) -> list[_Task]:
    """Expand folders, globs and lists; each file once, in the order given."""
    files: dict[str, Path | int] = {}
    for item in inputs:
        camera = camera_index(item)
        if camera is not None:
            files.setdefault(f"camera {camera}", camera)
            continue
        for path in list_images(str(item), suffixes=IMAGE_SUFFIXES | VIDEO_SUFFIXES):
            files.setdefault(os.path.realpath(path), path)
    if not files:
        raise InputError("no input; give images, folders, globs, videos or a camera index")
    sources = list(files.values())
    names = unique_names([Path(f"camera{s}") if isinstance(s, int) else s for s in sources])
    return [
        _Task(source, name, isinstance(source, Path) and rasters.applies_to(source))
        for source, name in zip(sources, names, strict=True)
    ]


@dataclass(eq=False)
class _Run:
    segmenter: Segmenter
    output: Path
    settings: RunSettings
    frame_masks: bool
    limit: int | None
    overwrite: bool
    images: int = 0
    frames: int = 0
    dropped: int = 0
    written: list[Path] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    _large: threading.Lock = field(default_factory=threading.Lock)

    def outputs(self, task: _Task) -> list[Path]:
        """The files a task will write, masks of frames apart."""
        if task.is_video:
            return [self.output / "videos" / f"{task.name}.mp4"]
        if task.is_raster:
            return raster_outputs(self.output, task.name, self.settings.rasters)
        return [
            self.output / name for name in image_outputs(task.name, self.segmenter.spec, overlay=self.settings.overlay)
        ]

    def unwritten(self, task: _Task) -> list[Path]:
        """Those of :meth:`outputs` that are not there already, the same as they would be."""
        outputs = self.outputs(task)
        if self.overwrite or not task.is_raster or not isinstance(task.source, Path):
            return outputs
        return unanswered(self.segmenter, task.source, outputs, self.settings.rasters)

    def all(self, tasks: Sequence[_Task], bar: Silent) -> bool:
        """Process every task; true if a camera was stopped by Ctrl-C."""
        position = 0
        while position < len(tasks) and not self._finished():
            task = tasks[position]
            if task.is_video:
                position += 1
                if self._video(task, bar):
                    return True
                continue
            if task.is_raster:
                position += 1
                self._raster(task, bar)
                continue
            end = next((i for i in range(position, len(tasks)) if tasks[i].is_video or tasks[i].is_raster), len(tasks))
            if self.limit is not None:
                # No more than are wanted; where some fail, there is another turn.
                end = min(end, position + self.limit - self.images - self.frames)
            self._images(tasks[position:end], bar)
            position = end
        return False

    def _finished(self) -> bool:
        return self.limit is not None and self.images + self.frames >= self.limit

    def _raster(self, task: _Task, bar: Silent) -> None:
        assert isinstance(task.source, Path)
        outputs = self.outputs(task)
        try:
            segment_raster(self.segmenter, task.source, outputs, self.settings.rasters, bar, overwrite=self.overwrite)
        except (InputError, MissingDependencyError) as exc:
            self._fail(task, str(exc), bar)
            return
        self.written += outputs
        self.images += 1

    def _images(self, tasks: Sequence[_Task], bar: Silent) -> None:
        with closing(in_parallel(tasks, self._image, ahead=PATHS_AHEAD, most=self.settings.threads)) as results:
            for task, reason, paths in results:
                if reason is None:
                    self.written += paths
                    self.images += 1
                else:
                    self._fail(task, reason, bar)
                bar.advance(failed=reason is not None)

    def _image(self, task: _Task) -> tuple[_Task, str | None, list[Path]]:
        """Read, segment and write one image: why it could not be read, the files written. Called in several threads."""
        assert isinstance(task.source, Path)
        wanted = self.segmenter.spec.input
        try:
            image = read_image(task.source, wanted.channels, wanted.dtype)
        except (InputError, MissingDependencyError) as exc:
            return task, str(exc), []
        with self._large if image.nbytes > LARGE_BYTES else nullcontext():
            mask = self.segmenter(image, channel_order="rgb" if wanted.channels == 3 else None)
            return task, None, self._write_image(task, image, mask)

    def _write_image(self, task: _Task, image: NDArray[Any], mask: NDArray[Any]) -> list[Path]:
        written = self._write_masks(self.output / "masks" / task.name, mask)
        if self.settings.overlay:
            path = self.output / "overlays" / f"{task.name}.png"
            # Not kept under a name: of a large picture every copy counts.
            picture = add_legend(
                lay_over(image, mask, alpha=self.settings.alpha, palette=self.segmenter.palette), self._legend(mask)
            )
            write_picture(path, picture, overwrite=self.overwrite)
            written.append(path)
        return written

    def _write_masks(self, base: Path, mask: NDArray[Any]) -> list[Path]:
        palette = self.segmenter.palette
        paths = _mask_paths(base, self.segmenter.spec)
        planes = mask if mask.ndim == 3 else mask[None]
        for index, (path, plane) in enumerate(zip(paths, planes, strict=True)):
            colours = palette if mask.ndim == 2 else np.stack((np.zeros(3, np.uint8), palette[index]))
            write_mask(path, plane, colours, overwrite=self.overwrite)
        return paths

    def _legend(self, mask: NDArray[Any] | None) -> Any:
        binary = self.segmenter.spec.model.task == "binary"
        return legend_entries(mask, self.segmenter.class_names, self.segmenter.palette, binary=binary)

    def _video(self, task: _Task, bar: Silent) -> bool:
        """Process one video or camera; true if a camera was stopped by Ctrl-C."""
        try:
            video = Video(task.source, self.segmenter.spec.input)
            bar.expect(video.frames)
            (path,) = self.outputs(task)
            with (
                Stream(video, self.segmenter, 2, None) as frames,
                VideoFile(path, video.fps or USUAL_FPS, overwrite=self.overwrite) as file,
            ):
                interrupted = self._write_frames(task, video, frames, file, bar)
                self.dropped += frames.dropped
            self.written.append(path)
            if video.damage and not self._finished():  # what is read ahead beyond the limit was not asked for
                self._fail(task, f"{task.label}: {video.damage}", bar, "incomplete")
        except InputError as exc:
            self._fail(task, str(exc), bar)
            return False
        return interrupted

    def _write_frames(self, task: _Task, video: Video, frames: Stream, file: VideoFile, bar: Silent) -> bool:
        palette, legend = self.segmenter.palette, self._legend(None)
        fps = video.fps or USUAL_FPS
        try:
            for frame in frames:
                if self.settings.overlay:
                    picture = lay_over(frame.image, frame.mask, alpha=self.settings.alpha, palette=palette)
                else:
                    picture = colorize(frame.mask, palette)
                picture = add_legend(picture, legend)
                # Dropped camera frames leave gaps; repeating the frame keeps the video at the speed of the scene.
                due = int((frame.timestamp_s or 0.0) * fps) + 1 if video.live else 0
                # At most a second of them: writing must not be what keeps the next frame waiting.
                for _ in range(min(max(1, due - file.frames), max(1, int(fps)))):
                    file.write(picture)
                if self.frame_masks:
                    self.written += self._write_masks(
                        self.output / "masks" / task.name / f"{frame.index:06d}", frame.mask
                    )
                self.frames += 1
                bar.advance()
                if self._finished():
                    break
        except KeyboardInterrupt:
            if not video.live or not file.frames:
                raise
            return True
        return False

    def _fail(self, task: _Task, reason: str, bar: Silent, what: str = "skipped") -> None:
        self.failed.append(Failure(task.label, reason))
        bar.say(f"{what}: {reason}")
