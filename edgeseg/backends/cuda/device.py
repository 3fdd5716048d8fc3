"""CUDA memory, streams and events: what a TensorRT session needs of the driver, and nothing else.

Two packages reach the driver, ``cuda-bindings`` (a wheel; has CUDA graphs) and ``pycuda``; each is a class of
thin calls. Ownership lives here, once for both: a resource is freed exactly once, by its ``close``, or by
:meth:`Cuda.close`, which frees all that is left. The device's primary context is used, the one the CUDA runtime inside
TensorRT uses too; it is pushed for the calling thread and popped again, so any thread may call.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import one_of
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.closing import Closing
from edgeseg.errors import DeviceError, MissingDependencyError

if TYPE_CHECKING:
    from edgeseg.backends.cuda.bindings import BindingsDriver
    from edgeseg.backends.cuda.pycuda import PycudaDriver


class Resource(Closing):
    """Something the driver made. ``close`` frees it; closing again, or after the device, does nothing."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda = cuda
        self.handle: Any = handle
        cuda.adopt(self)

    def close(self) -> None:
        """Free it. Raises :class:`DeviceError` when the driver refuses; it counts as freed all the same."""
        if not self._cuda.forked and self._cuda.disown(self):
            with self._cuda.active():
                try:
                    self._free(self.handle)
                finally:
                    self.handle = None  # in the context: dropping the handle is what frees a stream of pycuda

    def _free(self, handle: Any) -> None:
        raise NotImplementedError


class DeviceMemory(Resource):
    """Memory of the GPU.

    Attributes:
        address: where it begins.
        size_bytes: how much it is.
    """

    def __init__(self, cuda: Cuda, handle: Any, size_bytes: int) -> None:
        self.address = cuda.driver.address(handle)
        self.size_bytes = size_bytes
        super().__init__(cuda, handle)

    def _free(self, handle: Any) -> None:
        self._cuda.driver.free(handle)


class HostMemory(Resource):
    """Page-locked memory of the CPU, which the GPU can copy from and to while the CPU does something else.

    Attributes:
        array: the memory, uint8 ``(size_bytes,)``; must not be touched after ``close``.
        address: where the GPU sees it, if it is mapped; else ``None``.
    """

    def __init__(self, cuda: Cuda, handle: Any, array: NDArray[np.uint8], address: int | None) -> None:
        self.array = array
        self.address = address
        self.size_bytes = array.nbytes
        super().__init__(cuda, handle)

    def _free(self, handle: Any) -> None:
        # The view goes first: pycuda's own array keeps its memory alive, ours must not outlive it.
        self.array = np.empty(0, np.uint8)
        self._cuda.driver.free_host(handle)


class Event(Resource):
    """A point in a stream's work."""

    def record(self, stream: Stream) -> None:
        """Mark the work given to ``stream`` so far. Call inside :meth:`Cuda.active`."""
        self._cuda.driver.record(self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait, without holding the GIL, until the marked work is done. Call inside :meth:`Cuda.active`."""
        self._cuda.driver.synchronize_event(self.handle)

    def elapsed_ms(self, start: Event) -> float:
        """Milliseconds on the GPU from ``start`` to this event; both are done. Call inside :meth:`Cuda.active`."""
        return self._cuda.driver.elapsed_ms(start.handle, self.handle)

    def _free(self, handle: Any) -> None:
        self._cuda.driver.destroy_event(handle)


class Graph(Resource):
    """Recorded work of a stream, launched again with one call. Only with ``cuda-bindings``."""

    def __init__(self, cuda: Cuda, driver: BindingsDriver, handle: Any) -> None:
        self._driver = driver
        super().__init__(cuda, handle)

    def launch(self, stream: Stream) -> None:
        """Add the work to ``stream``. Call inside :meth:`Cuda.active`."""
        self._driver.launch(self.handle, stream.handle)

    def _free(self, handle: Any) -> None:
        self._driver.destroy_graph(handle)


class Stream(Resource):
    """A queue of work for the GPU. Call every method inside :meth:`Cuda.active`; none but ``synchronize`` waits."""

    @property
    def address(self) -> int:
        """The ``cudaStream_t``, as TensorRT's ``execute_async_v3`` takes it."""
        return self._cuda.driver.stream_address(self.handle)

    def copy_to_device(self, address: int, host: NDArray[np.uint8]) -> None:
        """Copy C-contiguous bytes to the device; ``host`` must live, unchanged, until they are copied."""
        self._cuda.driver.copy_to_device(address, host, self.handle)

    def copy_to_host(self, host: NDArray[np.uint8], address: int) -> None:
        """Copy ``host.nbytes`` bytes from the device; ``host`` must live until they are copied."""
        self._cuda.driver.copy_to_host(host, address, self.handle)

    def copy_on_device(self, target: int, source: int, size_bytes: int) -> None:
        """Copy bytes from one place of the device's memory to another."""
        self._cuda.driver.copy_on_device(target, source, size_bytes, self.handle)

    def wait(self, event: Event) -> None:
        """Do nothing more until ``event`` has happened."""
        self._cuda.driver.wait(self.handle, event.handle)

    def wait_for_stream(self, foreign: int, event: Event) -> None:
        """Do nothing more until the work given so far to a stream of somebody else is done."""
        self._cuda.driver.wait_for_foreign(self.handle, foreign, event.handle)

    def synchronize(self) -> None:
        """Wait, without holding the GIL, until all its work is done."""
        self._cuda.driver.synchronize(self.handle)

    def recorded(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` gives to this stream instead of doing it. What ``work`` raises goes on."""
        driver = self._cuda.driver
        if not driver.has_graphs:
            raise DeviceError(
                f"{driver.name} has no CUDA graphs; pip install 'edgeseg[jetson]' for cuda-bindings, which has"
            )
        driver.begin_capture(self.handle)
        try:
            work()
        except BaseException:
            # The stream records until told to stop, whatever went wrong in between. The driver reports a broken recording a
            # second time; the exception on its way says what broke it.
            with suppress(DeviceError):
                driver.abort_capture(self.handle)
            raise
        return Graph(self._cuda, driver, driver.end_capture(self.handle))

    def _free(self, handle: Any) -> None:
        self._cuda.driver.destroy_stream(handle)


def do_all(steps: Iterable[Callable[[], None]]) -> None:
    """Take every step, whatever the driver refuses. Raises the first :class:`DeviceError`."""
    refused: DeviceError | None = None
    for step in steps:
        try:
            step()
        except DeviceError as exc:
            refused = refused or exc
    if refused is not None:
        raise refused


_DRIVERS: dict[str, tuple[str, str]] = {
    "cuda-bindings": ("edgeseg.backends.cuda.bindings", "jetson"),
    "pycuda": ("edgeseg.backends.cuda.pycuda", "pycuda"),
}
"""Module and pip extra of each driver package, in the order they are tried."""

LEGACY_STREAM = 1
"""CUDA's default stream. It waits for the work of all streams but those made not to (ours, and PyTorch's side streams)."""

_opened: weakref.WeakSet[Cuda] = weakref.WeakSet()
_FORKED = (
    "this process was forked after the GPU was opened, and CUDA does not survive that; start the process with "
    "multiprocessing's spawn, and load the engine in it"
)


class _Process:
    """Whether this process may use CUDA; a fork of one that did may not."""

    used_cuda = False
    inherited_cuda = False

    @classmethod
    def after_fork(cls) -> None:
        cls.inherited_cuda = cls.used_cuda
        for cuda in _opened:
            cuda.forked = True


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_Process.after_fork)


class Cuda(Closing):
    """An opened GPU. Use as a context manager, or call :meth:`close`.

    Attributes:
        driver: the package that reaches it.
        device: which it is.
        forked: this process is a fork of the one that opened it; nothing can be done with it here, not even closing.
    """

    def __init__(self, driver: BindingsDriver | PycudaDriver) -> None:
        self.driver = driver
        self.device = driver.device
        self.forked = False
        # Reentrant: collecting garbage while it is held may free a resource.
        self._lock = threading.RLock()
        self._live: dict[int, Resource] = {}
        self._closed = False
        _Process.used_cuda = True
        _opened.add(self)

    @contextmanager
    def active(self) -> Iterator[None]:
        """``with cuda.active():`` makes the context current in this thread, and restores the one before."""
        self.check_process()
        self.driver.push()
        try:
            yield
        finally:
            self.driver.pop()

    def device_memory(self, size_bytes: int) -> DeviceMemory:
        """Allocate memory of the GPU. Raises :class:`DeviceError`."""
        with self._usable():
            try:
                handle = self.driver.allocate(size_bytes)
            except DeviceError as exc:
                raise self._sized(exc, size_bytes) from exc
            return DeviceMemory(self, handle, size_bytes)

    def stream(self) -> Stream:
        """Make a stream that does not wait for the default stream."""
        with self._usable():
            return Stream(self, self.driver.create_stream())

    def event(self, *, timing: bool = True) -> Event:
        """Make an event; without ``timing`` it is cheaper, and only says whether it happened."""
        with self._usable():
            return Event(self, self.driver.create_event(timing))

    def synchronize(self) -> None:
        """Wait, without holding the GIL, for all work of the context, also of other libraries."""
        with self.active():
            self.driver.synchronize_context()

    def locate(self, address: int) -> tuple[int, int] | None:
        """Where we can use memory that somebody else made, and the number of its GPU.

        ``None`` for an address that CUDA does not know: memory of the CPU, unless it is page-locked.
        """
        with self._usable():
            try:
                return self.driver.locate(address)
            except DeviceError as exc:
                if exc.code == "CUDA_ERROR_INVALID_VALUE":
                    return None
                raise

    def memory_info(self) -> tuple[int, int]:
        """Bytes of GPU memory ``(free, total)``, counting what other processes use."""
        with self._usable():
            return self.driver.memory_info()

    @property
    def live(self) -> int:
        """Resources not closed yet."""
        return len(self._live)

    def close(self) -> None:
        """Free everything that is left, newest first, and give up the context. In a forked process it does nothing.

        Raises:
            DeviceError: the first thing the driver refused to free; the rest is freed all the same.
        """
        if self.forked:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            left = list(self._live.values())[::-1]
        do_all([*(resource.close for resource in left), self.driver.release])

    def adopt(self, resource: Resource) -> None:
        """Remember a resource, to free it when the device is closed."""
        with self._lock:
            self._live[id(resource)] = resource

    def disown(self, resource: Resource) -> bool:
        """Forget a resource; whether it was remembered, so that only one caller frees it."""
        with self._lock:
            return self._live.pop(id(resource), None) is not None

    def host_memory(self, size_bytes: int, *, mapped: bool = False) -> HostMemory:
        """Allocate page-locked memory of the CPU, which copies to and from the GPU need to be asynchronous.

        ``mapped``: the GPU uses it where it is: no copy on an integrated GPU, slow on any other.
        """
        with self._usable():
            try:
                handle, array = self.driver.allocate_host(size_bytes, mapped)
            except DeviceError as exc:
                raise self._sized(exc, size_bytes) from exc
            try:
                address = self.driver.host_address(handle) if mapped else None
            except BaseException:
                self.driver.free_host(handle)
                raise
            return HostMemory(self, handle, array, address)

    def _sized(self, exc: DeviceError, size_bytes: int) -> DeviceError:
        return DeviceError(f"{exc} ({size_bytes / 2**20:.1f} MiB asked of {self.device.name})", exc.code)

    def check_process(self) -> None:
        """Raise :class:`DeviceError` in a process forked from the one that opened the GPU."""
        if self.forked:
            raise DeviceError(_FORKED)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """:meth:`active`, of a device that is not closed."""
        if self._closed:
            raise DeviceError("this CUDA device is closed; open it again")
        with self.active():
            yield


def open_cuda(preferred: DriverName | None = None, index: int = 0) -> Cuda:
    """Open a GPU through ``cuda-bindings``, or ``pycuda`` where only that is installed.

    Raises:
        MissingDependencyError: the package, or both, are not installed; names the pip line.
        DeviceError: no driver, no GPU of this number, the driver refuses, or this process was forked after using CUDA.
        SpecError: no such package.
    """
    if _Process.inherited_cuda:
        raise DeviceError(_FORKED)
    if preferred is not None:
        one_of("CUDA package", preferred, get_args(DriverName))
    names = (preferred,) if preferred is not None else tuple(_DRIVERS)
    missing: MissingDependencyError | None = None
    for name in names:
        module, extra = _DRIVERS[name]
        try:
            return Cuda(importlib.import_module(module).open_driver(index))
        except ModuleNotFoundError as exc:
            missing = missing or _missing(name, extra, exc)
    assert missing is not None
    raise missing


def _missing(name: str, extra: str, cause: ModuleNotFoundError) -> MissingDependencyError:
    error = MissingDependencyError(name, extra, "use the GPU")
    error.__cause__ = cause
    return error
