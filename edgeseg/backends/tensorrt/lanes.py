"""The lanes of an engine, shared by any number of threads; the last one out frees the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

from edgeseg.backends.cuda.device import Cuda
from edgeseg.backends.tensorrt.lane import Lane
from edgeseg.errors import DeviceError, InputError

if TYPE_CHECKING:
    from tensorrt import ICudaEngine

    from edgeseg.backends.tensorrt.rtx_cache import CachingEngine

    AnyEngine: TypeAlias = ICudaEngine | CachingEngine


class LanePool:
    """Lends lanes; makes them when needed, up to a number.

    Args:
        engine: deserialized.
        cuda: an opened GPU.
        limit: lanes at most; further callers wait.
        make: makes a lane of the engine, in an active context.
        on_gone: called once after closing, when the last lane and the engine are gone.

    Raises:
        DeviceError: no memory for the first lane.
    """

    def __init__(
        self, engine: AnyEngine, cuda: Cuda, limit: int, make: Callable[[AnyEngine], Lane], on_gone: Callable[[], None]
    ) -> None:
        self._engine: AnyEngine | None = engine
        self._cuda = cuda
        self._limit = limit
        self._make = make
        self._on_gone = on_gone
        self._condition = threading.Condition()
        self.closed = False
        # The first now: an engine that does not fit should fail when loaded, not at the first image.
        self._idle = [self._new()]
        self._made = 1

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Wait for a lane and use it in an active context. It goes back, or after a failure is closed."""
        lane = self.take(wait=True)
        assert lane is not None
        with self.using(lane):
            yield lane
        self.put(lane)

    @contextmanager
    def using(self, lane: Lane) -> Iterator[None]:
        """An active context for work with a lane from :meth:`take`, which is lost when the work fails."""
        try:
            with self._cuda.active():
                yield
        except InputError:  # raised before the GPU was given any work
            self.put(lane)
            raise
        except BaseException:
            self.drop(lane)
            raise

    def take(self, *, wait: bool) -> Lane | None:
        """An idle lane or a new one; ``None`` when all are in use and the caller does not wait.

        Raises:
            InputError: closed, also while waiting.
            DeviceError: no memory for a new one, or a forked process.
        """
        self._cuda.check_process()  # the lock may be one that a thread of the parent process holds
        with self._condition:
            while not self.closed and not self._idle and self._made >= self._limit:
                if not wait:
                    return None
                try:
                    self._condition.wait()
                except BaseException:
                    # Ctrl-C: the lane that woke us, if one did, is for the next in line.
                    self._condition.notify()
                    raise
            if self.closed:
                raise InputError("this session is closed; load the engine again")
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            return self._new()
        except BaseException:
            self._lose()
            raise

    def put(self, lane: Lane) -> None:
        """Give back a lane that works."""
        with self._condition:
            if not self.closed:
                self._idle.append(lane)
                self._condition.notify()
                return
        self._free([lane])

    def drop(self, lane: Lane) -> None:
        """Close a lane in an unknown state, a failure being on its way; the next caller makes a new one."""
        try:
            with suppress(DeviceError), self._cuda.active():
                lane.abandon()
        finally:
            self._lose()

    def recall(self, lane: Lane) -> None:
        """Give back a lane whose result nobody wants."""
        try:
            with self._cuda.active():
                lane.stream.synchronize()
        except BaseException as exc:
            self.drop(lane)
            if not isinstance(exc, DeviceError):
                raise
            # Nobody waits for this batch; a GPU that is lost says so to the next caller.
        else:
            self.put(lane)

    def close(self) -> None:
        """Free the lanes that are idle; the others when they come back. Raises :class:`DeviceError`."""
        with self._condition:
            if self.closed:
                return
            self.closed = True
            idle, self._idle = self._idle, []
            self._condition.notify_all()
        self._free(idle)

    def _new(self) -> Lane:
        assert self._engine is not None  # it is freed with the last lane
        with self._cuda.active():
            return self._make(self._engine)

    def _lose(self) -> None:
        with suppress(DeviceError):
            self._settle(1)

    def _free(self, lanes: Sequence[Lane]) -> None:
        with ExitStack() as stack:
            stack.callback(self._settle, len(lanes))
            if lanes:
                stack.enter_context(self._cuda.active())
            for lane in lanes:
                stack.callback(lane.close)

    def _settle(self, lanes_gone: int) -> None:
        with self._condition:
            self._made -= lanes_gone
            self._condition.notify(lanes_gone)
            last = self.closed and not self._made and self._engine is not None
        if last:
            with ExitStack() as stack:
                stack.callback(self._on_gone)
                stack.enter_context(self._cuda.active())
                self._engine = None
