"""Where cells are built: in processes of this machine, or on a Ray cluster. Measuring is neither's business."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from edgeseg.cluster.connection import connected
from edgeseg.errors import EdgesegError, one_line
from edgeseg.machine.orphans import end_with_parent
from edgeseg.store.engine import engine_folder
from edgeseg.sweep.config import Cell


@dataclass(frozen=True)
class Built:
    """How one cell's build ended: ``reason`` is ``None`` when its engine folder is there."""

    cell: Cell
    seconds: float
    reason: str | None = None


Builder = Callable[[Cell], Built]
_SECONDS_TO_END = 5.0


def build_cell(cell: Cell) -> Built:
    """Build one engine folder; whatever goes wrong becomes the cell's reason, so that the others go on."""
    from edgeseg.pipeline.build import run_build
    from edgeseg.progress import SilentReporter

    begin = time.perf_counter()
    reason = None
    try:
        run_build(cell.request, model=None, reporter=SilentReporter())
    except EdgesegError as exc:
        reason = str(exc)
    except Exception as exc:
        reason = f"internal error, {type(exc).__name__}: {one_line(exc)}"
    return Built(cell, time.perf_counter() - begin, reason)


def build_locally(cells: Sequence[Cell], jobs: int, builder: Builder = build_cell) -> Iterator[Built]:
    """Build in ``jobs`` processes at a time, a fresh one for each cell: one that is killed takes no other with it.

    Yields each cell when it is done. What is being built when the generator is closed or interrupted is ended, too.
    """
    builders = _Builders()
    with ThreadPoolExecutor(jobs) as threads:
        waiting = [threads.submit(builders.build, cell, builder) for cell in cells]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()
            builders.end()


class _Builders:
    """The processes that build now. ``kill`` and a service that stops tell the sweep alone, which is to end within seconds."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._running = set[int]()
        self._ended = False

    def build(self, cell: Cell, builder: Builder) -> Built:
        begin = time.perf_counter()
        # Not forked: a child of a process with threads can hang in a lock that one of them held.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_builder) as pool:
            try:
                process_id = pool.submit(os.getpid).result()
                with self._changing:
                    if self._ended:
                        return Built(cell, 0.0, "interrupted")
                    self._running.add(process_id)
                try:
                    return pool.submit(_build_until_told, cell, builder).result()
                finally:
                    with self._changing:
                        self._running.remove(process_id)
            except BrokenProcessPool:
                reason = "the building process was killed (out of memory?); try fewer --jobs"
                return Built(cell, time.perf_counter() - begin, reason)

    def end(self) -> None:
        """Interrupt what runs, and start nothing more."""
        with self._changing:
            self._ended = True
            for process_id in self._running:
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGTERM)


def _start_builder() -> None:
    # Ctrl-C reaches all processes of a terminal: a second signal would fall into the cleaning up after the first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _build_until_told(cell: Cell, builder: Builder) -> Built:
    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Compiled code does not hear of it, and libraries catch everything here and there. What is left then the next build
        # of the folder puts right.
        last = threading.Timer(_SECONDS_TO_END, os._exit, (1,))
        last.daemon = True
        last.start()
        raise KeyboardInterrupt  # as Ctrl-C: nothing is left half-written

    signal.signal(signal.SIGTERM, interrupt)
    return builder(cell)


def build_on_ray(cells: Sequence[Cell], address: str | None, builder: Builder = build_cell) -> Iterator[Built]:
    """Build on a Ray cluster, one task of one CPU a cell; the finished folders come back to this machine.

    Weights and images must be at the same paths on every node. An engine built on another machine is built
    again here from its portable graph, for this machine's processor.

    Args:
        cells: what to build.
        address: of the cluster; see :func:`edgeseg.cluster.connection.connected`.
        builder: builds one cell (tests bring their own).

    Raises:
        MissingDependencyError: ray is not installed.
        InputError: no cluster at the address.
    """
    with connected(address, extra="sweep", purpose="build on a Ray cluster") as ray:
        task = ray.remote(num_cpus=1, max_retries=0, max_calls=1)(_build_and_pack)
        waiting = {task.remote(cell, builder): cell for cell in cells}
        while waiting:
            (reference,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(reference)
            try:
                yield _unpack(cell, ray.get(reference))
            except ray.exceptions.RayError as exc:
                yield Built(cell, 0.0, f"the Ray task failed, {type(exc).__name__}: {one_line(exc)}")


@dataclass(frozen=True)
class _Packed:
    built: Built
    files: dict[str, bytes]
    node: str


def _build_and_pack(cell: Cell, builder: Builder) -> _Packed:
    """Runs on the worker: build in a scratch folder of its own, return the files."""
    with tempfile.TemporaryDirectory(prefix="edgeseg-") as scratch:
        folder = Path(scratch) / cell.name
        built = builder(replace(cell, request=replace(cell.request, folder=folder)))
        files = {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()}
    return _Packed(built, files, platform.node())


def _unpack(cell: Cell, packed: Any) -> Built:
    built = Built(cell, packed.built.seconds, packed.built.reason)
    if built.reason is not None:
        return built
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with engine_folder(cell.folder, force=True) as scratch:
        for name, data in packed.files.items():
            (scratch / name).write_bytes(data)
    if packed.node == platform.node():
        return built
    from edgeseg.backends.compile import compile_folder

    try:
        compile_folder(cell.folder)
    except EdgesegError as exc:
        return replace(built, reason=f"built on {packed.node}, but not for this machine: {exc}")
    return built
