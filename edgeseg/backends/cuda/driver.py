"""What is asked of a package that reaches the CUDA driver, and how its errors read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import DeviceError

DriverName: TypeAlias = Literal["cuda-bindings", "pycuda"]

_HINTS: dict[str, str] = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close other programs on the GPU, or use a smaller batch or fewer contexts",
    "CUDA_ERROR_NO_DEVICE": "no NVIDIA GPU is visible here; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_INVALID_DEVICE": "there is no GPU of this number; check nvidia-smi and CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's files and the running kernel module differ; reboot",
    "CUDA_ERROR_NOT_INITIALIZED": "a process forked after CUDA was used cannot use it; start it with multiprocessing's spawn",
    "CUDA_ERROR_NOT_FOUND": "the NVIDIA driver is older than this package; install the cuda-bindings of its CUDA version",
}
_LOST = "the process has lost its GPU context; restart it"


@dataclass(frozen=True)
class CudaDevice:
    """A GPU.

    Attributes:
        index: as CUDA numbers the visible GPUs.
        name: as the driver gives it, such as ``Orin``.
        compute_capability: ``(major, minor)``, such as ``(8, 7)``.
        multiprocessors: how many it has; on a Jetson, how many its power mode leaves on.
        integrated: shares the memory of the CPU (Jetson).
        maps_host_memory: can use host memory without a copy.
        memory_bytes: of the GPU; on an integrated one, of the system.
        cuda_version: newest CUDA the driver supports, such as ``12.6``.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    integrated: bool
    maps_host_memory: bool
    memory_bytes: int
    cuda_version: str


class Driver(Protocol):
    """The calls of one driver package. Handles are opaque; every call raises :class:`DeviceError`.

    All but :meth:`push`, :meth:`pop` and :meth:`release` need the context pushed in the calling thread.
    """

    name: DriverName
    has_graphs: bool
    device: CudaDevice

    def push(self) -> None:
        """Make the primary context current in this thread."""
        ...

    def pop(self) -> None:
        """Undo one :meth:`push` of this thread."""
        ...

    def release(self) -> None:
        """Give up the primary context; the last call made."""
        ...

    def allocate(self, size_bytes: int) -> Any: ...
    def address(self, allocation: Any) -> int: ...
    def free(self, allocation: Any) -> None: ...

    def allocate_host(self, size_bytes: int, mapped: bool) -> tuple[Any, NDArray[np.uint8]]:
        """Page-locked host memory: its handle, and the memory as uint8 ``(size_bytes,)``."""
        ...

    def host_address(self, allocation: Any) -> int:
        """The device's address of mapped host memory."""
        ...

    def free_host(self, allocation: Any) -> None: ...
    def create_stream(self) -> Any: ...
    def stream_address(self, stream: Any) -> int: ...
    def synchronize(self, stream: Any) -> None: ...
    def destroy_stream(self, stream: Any) -> None: ...
    def create_event(self, timing: bool) -> Any: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def wait_for_foreign(self, stream: Any, foreign: int, event: Any) -> None: ...
    def synchronize_context(self) -> None:
        """Wait for the work of every stream of the context, whoever made it."""
        ...

    def locate(self, address: int) -> tuple[int, int]:
        """Where the context sees memory of any maker, and the number of its GPU; fails for memory CUDA does not know."""
        ...

    def synchronize_event(self, event: Any) -> None: ...
    def elapsed_ms(self, start: Any, end: Any) -> float: ...
    def destroy_event(self, event: Any) -> None: ...
    def copy_to_device(self, address: int, host: NDArray[np.uint8], stream: Any) -> None: ...
    def copy_to_host(self, host: NDArray[np.uint8], address: int, stream: Any) -> None: ...
    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: Any) -> None: ...
    def memory_info(self) -> tuple[int, int]: ...
    def begin_capture(self, stream: Any) -> None: ...
    def end_capture(self, stream: Any) -> Any: ...
    def abort_capture(self, stream: Any) -> None:
        """End a capture whose work is not wanted, also one that is broken already."""
        ...

    def launch(self, graph: Any, stream: Any) -> None: ...
    def destroy_graph(self, graph: Any) -> None: ...


def cuda_error(function: str, code: str, text: str) -> DeviceError:
    """Translate a driver's error: ``function`` is the CUDA call, ``code`` CUDA's name of the error."""
    sticky = code.startswith(("CUDA_ERROR_LAUNCH", "CUDA_ERROR_ILLEGAL", "CUDA_ERROR_HARDWARE", "CUDA_ERROR_ECC"))
    hint = _HINTS.get(code, _LOST if sticky else "")
    return DeviceError(f"{function} failed: {code} ({text})" + (f"; {hint}" if hint else ""), code)
