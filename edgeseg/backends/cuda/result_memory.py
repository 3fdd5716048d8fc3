"""Memory of results that stay on the GPU: lent to whoever has the result, used again when nobody has it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeAlias

from edgeseg.backends.cuda.device import Cuda, DeviceMemory, do_all

SPARES = 16
"""Kept for later results, at most: a few outputs of a few results in use at a time."""

Readers: TypeAlias = Literal["none", "default stream", "any stream"]
"""Whose work may still read memory that was given back."""


class Lease:
    """Memory of one result. It goes back when the last of its holders, the tensor and DLPack takers, lets go of it.

    Attributes:
        memory: what is lent.
        before: who may still read it from the time before; wait for them before writing.
        readers: who may still read it when it goes back.
    """

    def __init__(
        self, memory: DeviceMemory, before: Readers, give_back: Callable[[DeviceMemory, Readers | None], None]
    ):
        self.memory = memory
        self.before = before
        self.readers: Readers = "none"
        self._give_back: Callable[[DeviceMemory, Readers | None], None] | None = give_back

    def spoil(self) -> None:
        """Have it freed, not used again: work that failed may still write it."""
        self._return(None)

    def __del__(self) -> None:
        self._return(self.readers)

    def _return(self, readers: Readers | None) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.memory, readers)


class ResultMemory:
    """Lends memory of a GPU, and keeps what comes back."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # Reentrant: collecting garbage while it is held may give memory back.
        self._lock = threading.RLock()
        self._spare: list[tuple[DeviceMemory, Readers]] = []
        self._lent = 0
        self._closed = False
        self._device_too = False

    def lease(self, size_bytes: int) -> Lease:
        """Lend memory of at least a size. Raises :class:`DeviceError` when there is none."""
        memory, before = self._take(size_bytes) or (self._cuda.device_memory(size_bytes), "none")
        with self._lock:
            self._lent += 1
        return Lease(memory, before, self._give_back)

    def close(self) -> None:
        """Free what is not lent; what is, when it comes back."""
        with self._lock:
            self._closed = True
            spare, self._spare = self._spare, []
        do_all(memory.close for memory, _ in spare)

    def close_device(self) -> None:
        """Close the GPU as soon as nothing is lent any more. Call once, when nobody else uses it."""
        with self._lock:
            self._device_too = True
            now = not self._lent
        if now:
            self._cuda.close()

    def _take(self, size_bytes: int) -> tuple[DeviceMemory, Readers] | None:
        with self._lock:
            fitting = [index for index, (memory, _) in enumerate(self._spare) if memory.size_bytes >= size_bytes]
            if not fitting:
                return None
            # The latest of the smallest: a loop that closes its results gets the same each time, and one CUDA graph.
            return self._spare.pop(min(fitting, key=lambda index: (self._spare[index][0].size_bytes, -index)))

    def _give_back(self, memory: DeviceMemory, readers: Readers | None) -> None:
        if self._cuda.forked:
            return
        surplus: list[DeviceMemory] = []
        with self._lock:
            if self._closed or readers is None:
                surplus.append(memory)
            else:
                self._spare.append((memory, readers))
                if len(self._spare) > SPARES:
                    surplus.append(self._spare.pop(0)[0])
        # The driver waits for work that uses it.
        do_all(memory.close for memory in surplus)
        with self._lock:
            self._lent -= 1
            last = self._device_too and not self._lent
        if last:
            self._cuda.close()
