"""What one worker of a cluster does: load the engine that was sent to it, and make the masks of the images it is given."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgeseg.closing import Closing
from edgeseg.cluster.places import Bucket, download, is_url
from edgeseg.errors import EdgesegError, InputError, MissingDependencyError, SpecError, StaleEngineError
from edgeseg.machine.cpu import this_cpu
from edgeseg.runtime.raster import is_installed
from edgeseg.runtime.run import RunSettings, run_inputs
from edgeseg.runtime.segmenter import Segmenter, load
from edgeseg.store.atomic import scratch_folder
from edgeseg.store.cache import cached_folder, software, usable_cache
from edgeseg.store.engine import Engine, engine_files, open_engine
from edgeseg.version import __version__

# Of a bucket: most of a request is waiting.
_TRANSFERS = 8


@dataclass(frozen=True)
class Job:
    """What a worker is told once.

    Attributes:
        engines: folder, as the user knows it, and key of each engine; a node unpacks each once. Of several the
            probabilities are averaged.
        version: edgeseg's, which must be the worker's.
        settings: of the run.
        recompile: build the engine again where it was built for another device.
        output: folder that every node sees, or URL.
        cores: that the worker may use.
        folders: that every node must see.
        has_rasterio: of the machine where the run was begun, which decides what is a raster.
    """

    engines: tuple[tuple[str, str], ...]
    version: str
    settings: RunSettings
    recompile: bool
    output: str
    cores: int
    folders: tuple[str, ...] = ()
    has_rasterio: bool = False


@dataclass(frozen=True)
class Item:
    """An image: where it is, what the user calls it, and the NAME of its mask."""

    place: str
    label: str
    name: str


@dataclass(frozen=True)
class Outcome:
    """What became of an image: why it could not be used, or ``None``; whether it was segmented as a raster."""

    reason: str | None
    is_raster: bool = False


class Worker(Closing):
    """An engine, loaded, and the images it is given.

    Args:
        job: see there.
        files: gives the content of an engine's folder by name; called once a node for each.

    Raises:
        EdgesegError: the engine cannot run here.
    """

    def __init__(self, job: Job, files: Callable[[int], Mapping[str, bytes]]) -> None:
        self._job = job
        self._bucket = Bucket(job.output) if is_url(job.output) else None
        self._held = ExitStack()
        if job.version != __version__:
            raise SpecError(
                f"this node has edgeseg {__version__}, the run was begun with {job.version}; install the same"
            )
        for place in job.folders:
            # Else every image it is given would fail, and it would be the first to ask for more.
            if not os.path.isdir(place):
                raise InputError(f"this node does not see {place}; mount it there at the same place, or use a bucket")

        if job.has_rasterio and not is_installed():
            raise MissingDependencyError("rasterio", "raster", "write rasters as the other nodes do, on this node too,")
        try:
            self._held.enter_context(usable_cache(lambda note: None))
            self._segmenter = self._held.enter_context(self._loaded(files))
        except BaseException:
            self._held.close()
            raise

    def _loaded(self, files: Callable[[int], Mapping[str, bytes]]) -> Segmenter:
        job, settings = self._job, self._job.settings
        folders: dict[str, str] = {}

        def unpacked(number: int, key: str) -> Engine:
            def unpack(folder: Path) -> None:
                for name, data in files(number).items():
                    (folder / name).write_bytes(data)

            # A shared home has nodes of several kinds, each of which may have to compile its own.
            folder, _ = cached_folder("shipped", [key, this_cpu().isa], unpack)
            folders[str(folder)] = job.engines[number][0]
            return open_engine(folder)

        def compiled(engine: Engine, key: str) -> Engine:
            # For nodes of one kind it is the same.
            folder, _ = cached_folder("shipped", [key, software()], lambda folder: _compile(engine, folder))
            return open_engine(folder)

        def segmenter(engines: Sequence[Engine]) -> Segmenter:
            first, *others = engines
            return load(
                first,
                fit=settings.fit,
                tile_overlap=settings.tile_overlap,
                streams=max(2, job.cores),
                threads=job.cores,
                tta=settings.tta,
                ensemble=others,
            )

        keys = [key for _, key in job.engines]
        try:
            engines = [unpacked(number, key) for number, key in enumerate(keys)]
            try:
                return segmenter(engines)
            except StaleEngineError:
                if not job.recompile:
                    raise
            return segmenter([compiled(engine, key) for engine, key in zip(engines, keys, strict=True)])
        except EdgesegError as exc:
            # What only this node knows, in the user's words.
            for ours, theirs in folders.items():
                exc.args = (str(exc).replace(ours, theirs),)
            raise

    def close(self) -> None:
        """Free the engine."""
        self._held.close()

    def segment(self, items: Sequence[Item], *, overwrite: bool) -> list[Outcome]:
        """Make and write the masks of images.

        Raises:
            OutputExistsError: an output exists, and ``overwrite`` is false.
            InputError: an output cannot be written.
            SpecError: what a raster cannot be asked for.
            EdgesegError: the engine failed.
        """
        settings = self._job.settings
        with _scratch() as scratch:
            here = [
                scratch / f"{number}{Path(item.place).suffix}" if is_url(item.place) else Path(item.place)
                for number, item in enumerate(items)
            ]
            with ThreadPoolExecutor(_TRANSFERS) as threads:
                reasons = list(threads.map(_fetched, items, here))
            ready = [number for number, reason in enumerate(reasons) if reason is None]
            rasters = {number for number in ready if settings.rasters.applies_to(here[number])}
            output = scratch / "out" if self._bucket is not None else Path(self._job.output)
            summary = run_inputs(
                self._segmenter,
                [here[number] for number in ready],
                output,
                settings,
                overwrite=overwrite,
                progress=False,
                names=[items[number].name for number in ready],
            )
            failed = {failure.input: failure.reason for failure in summary.failed}
            for number in ready:
                reason = failed.get(str(here[number]))
                reasons[number] = None if reason is None else reason.replace(str(here[number]), items[number].label)
            if self._bucket is not None:
                self._upload(output, [Path(path) for path in summary.written])
        return [Outcome(reason, number in rasters) for number, reason in enumerate(reasons)]

    def _upload(self, folder: Path, files: Sequence[Path]) -> None:
        assert self._bucket is not None
        names = [file.relative_to(folder).as_posix() for file in files]
        with ThreadPoolExecutor(_TRANSFERS) as threads:
            # All of them are waited for, and the first error is raised.
            list(threads.map(self._bucket.upload, names, files))


@contextmanager
def _scratch() -> Generator[Path, None, None]:
    """A folder for the files of one batch; what killed workers left in theirs goes first."""
    parent = Path(tempfile.gettempdir(), f"edgeseg-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        parent.mkdir(mode=0o700)
    status = parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise InputError(f"{parent} is somebody else's; remove it, or set TMPDIR to another folder on this node")
    with scratch_folder(parent) as folder:
        yield folder


def _fetched(item: Item, file: Path) -> str | None:
    """Bring an image here; why it cannot be brought."""
    if not is_url(item.place):
        return None
    try:
        download(item.place, file)
    except InputError as exc:
        return str(exc)
    return None


def _compile(engine: Engine, folder: Path) -> None:
    """Build a stale engine again, for this node, into ``folder``."""
    from edgeseg.backends.compile import recompile

    with tempfile.TemporaryDirectory(prefix="edgeseg-") as scratch:
        stale = Path(scratch, "engine")
        shutil.copytree(engine.folder, stale)
        recompile(open_engine(stale))
        for name in engine_files(stale) or ():
            shutil.copyfile(stale / name, folder / name)
