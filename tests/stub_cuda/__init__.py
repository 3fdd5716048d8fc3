"""A stub of the CUDA driver for tests: built from ``stub_cuda.c``, found through ``LD_LIBRARY_PATH``, steered by ctypes.

It launches no kernel. See the head of ``stub_cuda.c`` for what it checks.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("stub_cuda.c")
KINDS = ("device memory", "host memory", "streams", "events", "graphs", "graph execs", "context pushes", "retains")
OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719

HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> dict[str, str]:
    """Compile the stub into ``folder``; returns the environment in which CUDA programs find it."""
    cc = compiler()
    assert cc is not None
    library = folder / "libcuda.so.1"
    # The name inside is what a program linked with it asks for.
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([cc, *flags, "-o", str(library), str(SOURCE), "-ldl", "-lpthread"], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "STUB_CUDA_LIBRARY": str(library)}


class Stub:
    """The stub loaded into this process: counters, failures to order, and work for its streams."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["STUB_CUDA_LIBRARY"])
        self._library.stub_log_text.restype = ctypes.c_char_p
        for name in ("stub_live", "stub_made", "stub_violations", "stub_device_bytes"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.stub_enqueue.argtypes = [ctypes.c_void_p, HostFunction, ctypes.c_void_p]
        self._library.stub_is_live.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._library.stub_contexts.restype = ctypes.c_long
        # The driver calls these later, or again from a graph: they must not be collected.
        self._kept: list[object] = []
        self.errors: list[BaseException] = []

    def live(self) -> dict[str, int]:
        """What is allocated, made or pushed and not yet given back; without zeros."""
        counts = {kind: self._library.stub_live(index) for index, kind in enumerate(KINDS)}
        return {kind: n for kind, n in counts.items() if n}

    def made(self, kind: str) -> int:
        """How many of a kind were made so far."""
        return int(self._library.stub_made(KINDS.index(kind)))

    def violations(self) -> int:
        """Double frees, and copies to or from memory that was not allocated."""
        return int(self._library.stub_violations())

    def fail(self, function: str, k: int, code: int, *, sticky: bool = False) -> None:
        """Make the ``k``-th call from now of a driver function fail; ``sticky``: and every call after it."""
        self._library.stub_fail(function.encode(), ctypes.c_long(k), code, int(sticky))

    def work_again(self) -> None:
        """Order no failure any more."""
        self._library.stub_fail(b"", ctypes.c_long(0), 0, 0)

    def record_calls(self) -> None:
        """Begin a new list of calls."""
        self._library.stub_log(1)

    def calls(self) -> list[str]:
        """The calls since :meth:`record_calls`, in order."""
        text: str = self._library.stub_log_text().decode()
        self._library.stub_log(0)
        return text.splitlines()

    def push_application_context(self, number: int) -> None:
        """What an application does with a context of its own, 1 or 2, in this thread."""
        self._library.stub_application_context(number)

    def pop_application_context(self) -> None:
        """Undo the last push."""
        self._library.stub_application_context(0)

    def contexts(self) -> list[int]:
        """This thread's stack of contexts, the current one last; the primary one is 0."""
        return [int(digit) for digit in str(self._library.stub_contexts())[1:]]

    def enqueue(self, stream: int, work: Callable[[], None]) -> int:
        """Add ``work`` to a stream, as a kernel launch would; 0, or the code of the failure ordered for ``kernel``."""

        def call(_: int | None) -> None:
            try:
                work()
            except BaseException as exc:  # cannot cross C; the fixture fails the test with it
                self.errors.append(exc)

        function = HostFunction(call)
        self._kept.append(function)
        return int(self._library.stub_enqueue(stream, function, None))

    def is_live(self, address: int, size_bytes: int) -> bool:
        """Whether the device may touch these bytes."""
        return bool(self._library.stub_is_live(address, size_bytes))
