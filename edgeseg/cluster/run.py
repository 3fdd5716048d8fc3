"""``edgeseg run --executor ray``: the images of folders and buckets, segmented by the workers of a cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from edgeseg.cluster.connection import connected, kept_stdout
from edgeseg.cluster.ledger import LEDGER, Ledger
from edgeseg.cluster.places import Bucket, is_url, without_protocol
from edgeseg.cluster.plan import Image, Plan
from edgeseg.cluster.pool import Batch, Finished, Lost, Pool, RayPool
from edgeseg.cluster.worker import Job, Outcome
from edgeseg.errors import ArtifactError, InputError, OutputExistsError, SpecError, refusals_as
from edgeseg.evaluate.tables import counted
from edgeseg.images.raster import RASTER_SUFFIXES
from edgeseg.runtime.bar import Bar, Silent
from edgeseg.runtime.raster import RasterOptions, is_installed, raster_outputs
from edgeseg.runtime.run import Failure, RunSettings, RunSummary, image_outputs, tell_what_overlays_show
from edgeseg.spec import PipelineSpec
from edgeseg.store.atomic import HeldError, lock
from edgeseg.store.engine import Engine, open_engine
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import MANIFEST_NAME
from edgeseg.version import __version__

# Images whose beginning the ledger notes at once.
_CHUNK = 1024
# Of work lost with a worker, and of work between two lines of the ledger.
_SECONDS_A_BATCH = 2.0
_FIRST_BATCH, _LARGEST_BATCH = 8, 256
# The images of a lost batch are tried again in so many parts, in the end each alone: one may be what kills workers.
_PARTS = 8
_MOST_DEATHS = 3

Workers = Callable[[Job, Sequence[Engine], Silent], "AbstractContextManager[Pool]"]
"""Gives the workers of a run (tests bring their own)."""


def run_on_cluster(
    folder: Path,
    inputs: Iterable[str | Path],
    output: str | Path,
    settings: RunSettings,
    *,
    ensemble: Sequence[Path] = (),
    workers: int | None = None,
    address: str | None = None,
    recompile: bool = False,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    pool: Workers | None = None,
) -> RunSummary:
    """Segment the images of ``inputs`` on a Ray cluster; masks, names and summary are those of a run on one machine.

    Every image is done once. What a worker had in hand when it died is done again, and an image that kills every worker that
    takes it is a failure. ``ledger.jsonl`` in ``output`` says what is done: a second run with the same engine and settings
    does what is missing and tries again what failed. Paths must lead to the same files on every node; the engine is sent.

    Args:
        folder: of the engine, on this machine.
        inputs: images, folders (their own files), globs and ``.txt`` lists, or URLs of the first three.
        output: folder that all nodes see, or URL.
        settings: how masks are made and written.
        ensemble: folders of further engines; the probabilities of all are averaged.
        workers: how many; ``None``: as many as the cluster has room for.
        address: of the cluster; see :func:`edgeseg.cluster.connection.connected`.
        recompile: workers build the engine again where it was built for another device.
        limit: stop after so many images, those done before included.
        overwrite: replace files that are there, but those the ledger knows as done.
        progress: show a progress bar, and failures, on standard error.
        pool: replaces Ray (tests bring their own).

    Raises:
        OutputExistsError: an output exists that the ledger does not know, and ``overwrite`` is false.
        SpecError: a video or a camera; an output would replace an input.
        InputError: an input that is not there, an output that cannot be written, a store that refuses.
        ArtifactError: the engine folder or the ledger cannot be used; another run writes in ``output``.
        MissingDependencyError: ray or fsspec is not installed.
        BuildError: the engine failed on a worker.
    """
    engines = [open_engine(path) for path in (folder, *ensemble)]
    spec = engines[0].manifest.spec
    target = _target(output)
    with ExitStack() as held:
        plan = held.enter_context(Plan(inputs))
        held.enter_context(_alone_in(target))
        _check_rasters(plan, settings.rasters)
        keys = [engine.manifest.engine_key for engine in engines]
        about = {"engines": keys, "edgeseg": __version__, **asdict(settings)}
        names = [engine.manifest.name for engine in engines]
        ledger = held.enter_context(Ledger(target, sha256_json(about), {**about, "names": names}))
        ledger.read_into(plan)
        reused = _check_outputs(plan, target, spec, settings, overwrite)
        job = Job(
            engines=tuple(zip(map(str, (folder, *ensemble)), keys, strict=True)),
            version=__version__,
            settings=settings,
            recompile=recompile,
            output=target.url if isinstance(target, Bucket) else os.path.abspath(target),
            cores=1,
            folders=_folders(plan, target),
            has_rasterio=is_installed(),
        )
        ledger.start()
        most = None if limit is None else max(0, limit - reused)
        with Bar(plan.images - reused, most) if progress else nullcontext(Silent()) as bar:
            if settings.overlay:
                tell_what_overlays_show(spec, bar)
            run = _Run(plan, ledger, bar, most, overwrite)
            if not run.is_done():
                with (pool or _on_ray(workers, address))(job, engines, bar) as hands:
                    run.all(hands)
        seconds = 0.0 if run.begin is None else time.perf_counter() - run.begin
        outputs = (name for image in plan.finished() for name in _outputs(image, spec, settings))
        return RunSummary(
            images=run.images,
            frames=0,
            dropped=0,
            seconds=seconds,
            written=tuple(_joined(target, name) for name in outputs),
            failed=tuple(Failure(source, reason) for source, reason in plan.failed()),
            frames_per_second=run.images / seconds if run.images else None,
            reused=reused,
        )


def _folders(plan: Plan, target: Path | Bucket) -> tuple[str, ...]:
    """Folders of this machine that the run reads from, as far as one image tells, and writes to."""
    first = next(plan.todo(), None)
    places = [] if first is None or is_url(first.place) else [os.path.dirname(first.place)]
    return tuple(places if isinstance(target, Bucket) else [*places, os.path.abspath(target)])


def _target(output: str | Path) -> Path | Bucket:
    text = without_protocol(str(output))
    return Bucket(text) if is_url(text) else Path(text)


def _joined(target: Path | Bucket, name: str) -> str:
    return f"{target.url}/{name}" if isinstance(target, Bucket) else str(target / name)


@contextmanager
def _alone_in(target: Path | Bucket) -> Generator[None, None, None]:
    """Keep a second run out of a folder; a bucket knows no locks."""
    if isinstance(target, Bucket):
        yield
        return
    with ExitStack() as held:
        try:
            with refusals_as(ArtifactError):
                target.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock(target / f".{LEDGER}.lock", timeout_s=0))
        except HeldError as exc:
            raise ArtifactError(f"another run is writing in {target}; wait for it or give another --output") from exc
        yield


def _on_ray(workers: int | None, address: str | None) -> Workers:
    @contextmanager
    def hands(job: Job, engines: Sequence[Engine], bar: Silent) -> Generator[Pool, None, None]:
        if job.output.startswith("memory:"):
            raise SpecError("memory:// is this process's own memory, which no worker sees; give a folder or a bucket")
        targets = [engine.manifest.target for engine in engines]
        files = [engine_content(engine) for engine in engines]
        with (
            kept_stdout(),
            connected(address, extra="cluster", purpose="run on a Ray cluster") as ray,
            closing(RayPool(ray, job, targets, files, workers, bar.say)) as ray_pool,
        ):
            yield ray_pool

    return hands


def engine_content(engine: Engine) -> dict[str, bytes]:
    """The files of an engine folder by name."""
    names = [MANIFEST_NAME, *(file.name for file in engine.manifest.files)]
    return {name: (engine.folder / name).read_bytes() for name in names}


def _outputs(image: Image, spec: PipelineSpec, settings: RunSettings) -> list[str]:
    """What this run has written of an image, below the output."""
    if image.is_raster:
        return _raster_outputs(image, settings)
    return image_outputs(image.name, spec, overlay=settings.overlay)


def _raster_outputs(image: Image, settings: RunSettings) -> list[str]:
    return [path.as_posix() for path in raster_outputs(Path(), image.name, settings.rasters)]


def _check_rasters(plan: Plan, rasters: RasterOptions) -> None:
    """Refuse, before the work, what is no raster where rasters are asked for. Raises ``SpecError``."""
    if rasters.for_all:
        for image in plan.todo():
            rasters.applies_to(Path(image.source))


def _check_outputs(
    plan: Plan, target: Path | Bucket, spec: PipelineSpec, settings: RunSettings, overwrite: bool
) -> int:
    """Refuse, before the work, what must not be written; how many images are done already."""

    def outputs(image: Image) -> list[list[str]]:
        sets = [image_outputs(image.name, spec, overlay=settings.overlay)]
        # Which of them it is, its worker sees.
        if settings.rasters.use is not False and Path(image.source).suffix.lower() in RASTER_SUFFIXES:
            sets.append(_raster_outputs(image, settings))
        return sets

    def refuse(image: Image, name: str) -> None:
        path = _joined(target, name)
        if plan.holds(path if isinstance(target, Bucket) else os.path.realpath(path)):
            raise SpecError(f"{path} would replace the input {path}; give another --output")
        if not overwrite and not image.begun:
            raise OutputExistsError(f"{path} exists; give --force to replace it, or another output")

    folders = ("masks", "overlays", "probabilities")
    there = (f"{folder}/{name}" for folder in folders for name in _names(target, folder))
    return plan.check_outputs(there, outputs, refuse)


def _names(target: Path | Bucket, folder: str) -> Iterator[str]:
    if isinstance(target, Bucket):
        yield from target.names(folder)
        return
    with refusals_as(InputError), contextlib.suppress(FileNotFoundError), os.scandir(target / folder) as entries:
        for entry in entries:
            yield entry.name


@dataclass(eq=False)
class _Run:
    plan: Plan
    ledger: Ledger
    bar: Silent
    limit: int | None
    overwrite: bool
    images: int = 0
    begin: float | None = None
    _drawn: int = 0
    _failed: int = 0
    _given: int = 0
    _chunk: deque[Image] = field(default_factory=deque)
    _waiting: deque[Batch] = field(default_factory=deque)
    _batch_size: int = _FIRST_BATCH

    def __post_init__(self) -> None:
        self._todo = self.plan.todo()

    def is_done(self) -> bool:
        """Whether there is nothing left to do; what is next waits to be given."""
        if not self._waiting and (images := self._draw()):
            self._waiting.append(Batch(images, self.overwrite or images[0].begun))
        return not self._waiting and not self._given

    def all(self, pool: Pool) -> None:
        """Give the workers what there is to do until nothing is left."""
        while not self.is_done():
            if self._waiting and pool.has_room(self._waiting[0]):
                if self.begin is None:
                    # As on one machine, loading the engine is not part of it.
                    self.begin = time.perf_counter()
                pool.give(self._waiting.popleft())
                self._given += 1
                continue
            lost: list[Lost] = []
            for event in pool.wait():
                self._given -= 1
                if isinstance(event, Finished):
                    self._batch_size = _next_size(event)
                    self._finish(list(zip(event.batch.images, event.outcomes, strict=True)))
                else:
                    lost.append(event)
            if lost:
                self._again(lost)

    def _draw(self) -> tuple[Image, ...]:
        """The next images, no more than are wanted; the ledger knows of them."""
        wanted = self._batch_size
        if self.limit is not None:
            # Where some fail, there is another turn.
            wanted = min(wanted, self.limit - (self._drawn - self._failed))
        if wanted <= 0:
            return ()
        if not self._chunk:
            self._chunk.extend(islice(self._todo, _CHUNK if self.limit is None else wanted))
            if self._chunk:
                self.ledger.begin(self._chunk)
        images: list[Image] = []
        # Only what an earlier run has begun may be replaced.
        while self._chunk and len(images) < wanted and (not images or self._chunk[0].begun == images[0].begun):
            images.append(self._chunk.popleft())
        self._drawn += len(images)
        return tuple(images)

    def _finish(self, results: Sequence[tuple[Image, Outcome]]) -> None:
        self.plan.finish(results)
        self.ledger.finish(results)
        for _, outcome in results:
            if outcome.reason is None:
                self.images += 1
            else:
                self._failed += 1
                self.bar.say(f"skipped: {outcome.reason}")
            self.bar.advance(failed=outcome.reason is not None)

    def _again(self, lost: Sequence[Lost]) -> None:
        count = sum(len(event.batch.images) for event in lost)
        self.bar.say(f"a worker died; what it had in hand ({counted(count, 'image')}) is done again")
        for event in lost:
            batch = event.batch
            if batch.is_suspect and len(batch.images) == 1 and batch.deaths + 1 == _MOST_DEATHS:
                image = batch.images[0]
                reason = f"{image.source} was given to {_MOST_DEATHS} workers alone, and each died (out of memory?)"
                self._finish([(image, Outcome(f"{reason}: {event.reason}"))])
                continue
            size = max(1, len(batch.images) // _PARTS)
            parts = [batch.images[start : start + size] for start in range(0, len(batch.images), size)]
            deaths = batch.deaths + (batch.is_suspect and len(batch.images) == 1)
            self._waiting.extend(Batch(part, True, is_suspect=True, deaths=deaths) for part in parts)


def _next_size(event: Finished) -> int:
    images = int(_SECONDS_A_BATCH * len(event.batch.images) / max(event.seconds, 1e-3))
    return max(1, min(images, _LARGEST_BATCH))
