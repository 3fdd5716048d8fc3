"""What lives on a GPU or belongs to it: memory, streams, events, graphs. Made by :class:`edgeseg.backends.cuda.Cuda`."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import DeviceError

if TYPE_CHECKING:
    from typing_extensions import Self

    from edgeseg.backends.cuda import Cuda


class Resource:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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

    def launch(self, stream: Stream) -> None:
        """Add the work to ``stream``. Call inside :meth:`Cuda.active`."""
        self._cuda.driver.launch(self.handle, stream.handle)

    def _free(self, handle: Any) -> None:
        self._cuda.driver.destroy_graph(handle)


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
        """Do nothing more until the work given so far to a stream of somebody else is done.

        Args:
            foreign: its ``cudaStream_t``; 1 and 2 are CUDA's legacy and per-thread default streams.
            event: recorded on it to find out when.
        """
        self._cuda.driver.wait_for_foreign(self.handle, foreign, event.handle)

    def synchronize(self) -> None:
        """Wait, without holding the GIL, until all its work is done."""
        self._cuda.driver.synchronize(self.handle)

    def capture(self) -> Capture:
        """Return a context manager that records the work given to this stream instead of doing it."""
        return Capture(self._cuda, self)

    def _free(self, handle: Any) -> None:
        self._cuda.driver.destroy_stream(handle)


class Capture:
    """Records a stream's work: ``with stream.capture() as capture: ...``, then ``capture.graph``.

    When the block raises, the recording is dropped and the exception goes on.
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda = cuda
        self._stream = stream
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        """The recorded work, to be closed by the caller; after the block only."""
        assert self._graph is not None, "the capture has not ended"
        return self._graph

    def __enter__(self) -> Capture:
        self._cuda.driver.begin_capture(self._stream.handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        driver = self._cuda.driver
        if error is None:
            self._graph = Graph(self._cuda, driver.end_capture(self._stream.handle))
            return
        try:
            # The stream records until told to stop, whatever went wrong in between.
            driver.abort_capture(self._stream.handle)
        except DeviceError:
            # The driver reports the broken recording a second time; the exception on its way says what broke it.
            return
