"""Arrays in the GPU's memory: other libraries' as images, ours as results. By ``__cuda_array_interface__`` and DLPack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends import dlpack
from edgeseg.backends.cuda import Cuda, DeviceMemory, Stream
from edgeseg.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

LEGACY_STREAM = 1


@dataclass(frozen=True)
class DeviceImages:
    """Images of somebody else in the GPU's memory, uint8, C-contiguous.

    Attributes:
        address: of the first byte.
        shape: ``(N, H, W, C)``, or ``(H, W, C)``.
        stream: ``cudaStream_t`` whose work writes them; ``None`` when they are written.
        release: call when they were read.
    """

    address: int
    shape: tuple[int, ...]
    stream: int | None
    release: Callable[[], None]


def device_images(image: Any, stream: Stream, device_index: int) -> DeviceImages:
    """Look at an array of another library; nothing is copied.

    Args:
        image: has ``__cuda_array_interface__`` (CuPy, Numba, PyTorch, OpenCV's ``GpuMat``) or ``__dlpack__``.
        stream: ours, on which it will be read; a DLPack maker is told.
        device_index: of our GPU.

    Raises:
        InputError: in host memory or on another GPU, not uint8, or not C-contiguous.
    """
    if hasattr(image, "__cuda_array_interface__"):
        described = image.__cuda_array_interface__
        # Before version 3 nobody says which stream writes: the legacy default stream waits for most others.
        writer = described.get("stream") if described.get("version", 0) >= 3 else LEGACY_STREAM
        dtype, shape, strides = np.dtype(described["typestr"]), tuple(described["shape"]), described.get("strides")
        _check(dtype, shape, strides)
        return DeviceImages(int(described["data"][0]), shape, writer, lambda: None)
    if not hasattr(image, "__dlpack__"):
        raise InputError(
            f"the image is a {type(image).__name__}; give an array in GPU memory that has __cuda_array_interface__ or "
            "__dlpack__ (CuPy, PyTorch, Numba), or call the segmenter with a numpy array"
        )
    device_type, index = image.__dlpack_device__()
    if device_type not in (dlpack.CUDA, dlpack.CUDA_HOST, dlpack.CUDA_MANAGED) or index != device_index:
        raise InputError(
            f"the image is on DLPack device ({int(device_type)}, {index}), the engine on GPU {device_index}; "
            "move it there, or call the segmenter with a numpy array"
        )
    received = dlpack.receive(image.__dlpack__(stream=stream.address))
    try:
        strides = received.strides and tuple(n * received.dtype.itemsize for n in received.strides)
        _check(received.dtype, received.shape, strides)
    except BaseException:
        received.release()
        raise
    # The maker was told our stream, and has made it wait.
    return DeviceImages(received.address, received.shape, None, received.release)


def _check(dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
    """``strides`` in bytes, ``None`` for C order."""
    if dtype != np.uint8:
        raise InputError(f"the image is {dtype}; give uint8")
    expected: list[int] = []
    step = 1
    for n in reversed(shape):
        expected.insert(0, step)
        step *= n
    if strides is not None and any(n > 1 and s != e for n, s, e in zip(shape, strides, expected, strict=True)):
        raise InputError(
            f"the image's strides are {tuple(strides)}, not those of C order {tuple(expected)}; copy it first"
        )


class DeviceTensor:
    """A result in the GPU's memory, C-contiguous, complete. Other libraries read it in place.

    ``close`` (also by ``with``, or by dropping it) gives the memory back for the next result: what other libraries made
    of it through ``__cuda_array_interface__`` must not be used after that. A DLPack taker keeps it alive by itself.

    Attributes:
        shape, dtype: numpy's.
        address: of the first byte.
    """

    def __init__(
        self,
        cuda: Cuda,
        memory: DeviceMemory,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        give_back: Callable[[DeviceMemory], None],
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.address = memory.address
        self._cuda = cuda
        self._memory: DeviceMemory | None = memory
        self._give_back = give_back

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._open()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A capsule of DLPack before 1.0, which every taker reads. The tensor is complete: no ``stream`` has to wait.

        Raises:
            BufferError: asked for a copy, or for another device; the protocol's own error.
        """
        self._open()
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"this result is on GPU {self._cuda.device.index} and is given away in place only")
        return dlpack.give(self, self.address, self.shape, self.dtype, dlpack.CUDA, self._cuda.device.index)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._cuda.device.index

    def numpy(self) -> NDArray[Any]:
        """Copy to host memory."""
        self._open()
        host = np.empty(self.shape, self.dtype)
        with self._cuda.stream() as stream, self._cuda.active():
            stream.copy_to_host(host.reshape(-1).view(np.uint8), self.address)
            stream.synchronize()
        return host

    def close(self) -> None:
        """Give the memory back; again does nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._give_back(memory)

    def _open(self) -> None:
        if self._memory is None or self._memory.handle is None:
            raise InputError("this result is closed, or its engine is; its memory belongs to another by now")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
