"""What the packages that reach the CUDA driver have in common: the device, and how errors read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
        name: as the driver gives it, such as ``Orin``: of a Nano and of an AGX alike.
        compute_capability: ``(major, minor)``, such as ``(8, 7)``.
        multiprocessors: how many are on. A Jetson's power mode changes that, so engines are not refused by it.
        integrated: shares the memory of the CPU (Jetson).
        maps_host_memory: can use host memory without a copy.
        cuda_version: newest CUDA the driver supports, such as ``12.6``.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    integrated: bool
    maps_host_memory: bool
    cuda_version: str

    @property
    def capability_text(self) -> str:
        return f"{self.compute_capability[0]}.{self.compute_capability[1]}"


def cuda_error(function: str, code: str, text: str) -> DeviceError:
    """Translate a driver's error: ``function`` is the CUDA call, ``code`` CUDA's name of the error."""
    sticky = code.startswith(("CUDA_ERROR_LAUNCH", "CUDA_ERROR_ILLEGAL", "CUDA_ERROR_HARDWARE", "CUDA_ERROR_ECC"))
    hint = _HINTS.get(code, _LOST if sticky else "")
    return DeviceError(f"{function} failed: {code} ({text})" + (f"; {hint}" if hint else ""), code)
