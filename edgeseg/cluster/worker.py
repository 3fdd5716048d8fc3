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
from dataclasses import dataclass, replace
from pathlib import Path

from edgeseg.backends.cpu.options import CPU_OPTIONS, saved_options
from edgeseg.closing import Closing
from edgeseg.cluster.places import Bucket, download, is_url
from edgeseg.errors import EdgesegError, InputError, SpecError, StaleEngineError
from edgeseg.machine.cpu import this_cpu
from edgeseg.runtime.run import run_inputs
from edgeseg.runtime.segmenter import Segmenter, load
from edgeseg.spec import FitPolicy
from edgeseg.store.artifacts import Engine, engine_files, open_engine
from edgeseg.store.atomic import scratch_folder
from edgeseg.store.cache import cached_folder, software, usable_cache
from edgeseg.version import __version__

# Of a bucket: most of a request is waiting.
_TRANSFERS = 8


@dataclass(frozen=True)
class Settings:
    """How masks are made and written: options of ``edgeseg run`` by these names."""

    fit: FitPolicy | None = None
    tile_overlap: float = 0.25
    overlay: bool = False
    alpha: float = 0.5


@dataclass(frozen=True)
class Job:
    """What a worker is told once.

    Attributes:
        folder: of the engine, as the user knows it.
        engine_key: of the engine; what a node unpacks once.
        version: edgeseg's, which must be the worker's.
        settings: of the run.
        recompile: build the engine again where it was built for another device.
        output: folder that every node sees, or URL.
        cores: that the worker may use.
        folders: that every node must see.
    """

    folder: str
    engine_key: str
    version: str
    settings: Settings
    recompile: bool
    output: str
    cores: int
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """An image: where it is, what the user calls it, and the NAME of its mask."""

    place: str
    label: str
    name: str


class Worker(Closing):
    """An engine, loaded, and the images it is given.

    Args:
        job: see there.
        files: gives the content of the engine folder by name; called once a node.

    Raises:
        EdgesegError: the engine cannot run here.
    """

    def __init__(self, job: Job, files: Callable[[], Mapping[str, bytes]]) -> None:
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

        def unpack(folder: Path) -> None:
            for name, data in files().items():
                (folder / name).write_bytes(data)

        try:
            self._held.enter_context(usable_cache(lambda note: None))
            # A shared home has nodes of several kinds, each of which may have to compile its own.
            folder, _ = cached_folder("shipped", [job.engine_key, this_cpu().isa], unpack)
            try:
                self._segmenter = self._held.enter_context(self._loaded(open_engine(folder)))
            except EdgesegError as exc:
                # What only this node knows, in the user's words.
                exc.args = (str(exc).replace(str(folder), job.folder),)
                raise
        except BaseException:
            self._held.close()
            raise

    def _loaded(self, engine: Engine) -> Segmenter:
        def segmenter(engine: Engine) -> Segmenter:
            settings, cores = self._job.settings, self._job.cores
            return load(
                on_cores(engine, cores), fit=settings.fit, tile_overlap=settings.tile_overlap, streams=max(2, cores)
            )

        try:
            return segmenter(engine)
        except StaleEngineError:
            if not self._job.recompile:
                raise
        folder, _ = cached_folder(
            "shipped", [self._job.engine_key, software()], lambda folder: _compile(engine, folder)
        )
        return segmenter(open_engine(folder))

    def close(self) -> None:
        """Free the engine."""
        self._held.close()

    def segment(self, items: Sequence[Item], *, overwrite: bool) -> list[str | None]:
        """Make and write the masks of images; why each could not be read, or ``None``.

        Raises:
            OutputExistsError: an output exists, and ``overwrite`` is false.
            InputError: an output cannot be written.
            EdgesegError: the engine failed.
        """
        with _scratch() as scratch:
            here = [
                scratch / f"{number}{Path(item.place).suffix}" if is_url(item.place) else Path(item.place)
                for number, item in enumerate(items)
            ]
            with ThreadPoolExecutor(_TRANSFERS) as threads:
                reasons = list(threads.map(_fetched, items, here))
            ready = [number for number, reason in enumerate(reasons) if reason is None]
            output = scratch / "out" if self._bucket is not None else Path(self._job.output)
            summary = run_inputs(
                self._segmenter,
                [here[number] for number in ready],
                output,
                overlay=self._job.settings.overlay,
                alpha=self._job.settings.alpha,
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
        return reasons

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


def on_cores(engine: Engine, cores: int) -> Engine:
    """``engine`` to be loaded for so many of a machine's processors: other workers have the rest."""
    manifest = engine.manifest
    if "threads" not in CPU_OPTIONS.get(manifest.target, ()):
        return engine
    threads = min(saved_options(engine, manifest.target)["threads"] or cores, cores)
    return replace(engine, manifest=replace(manifest, options={**manifest.options, "threads": threads}))
