"""Arrays in the GPU's memory: other libraries' as images, ours as results. By ``__cuda_array_interface__`` and DLPack.

The rules, as https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html and the Python array API standard
(``__dlpack__``) have them. Both ways nothing is copied, and nobody reads what is still being written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.cuda import dlpack
from edgeseg.backends.cuda.device import LEGACY_STREAM, Cuda, Stream
from edgeseg.backends.cuda.result_memory import Lease
from edgeseg.closing import Closing
from edgeseg.errors import InputError

PER_THREAD_STREAM = 2


@dataclass(frozen=True)
class DeviceImages:
    """Images of somebody else in the GPU's memory, C-contiguous.

    Attributes:
        address: of the first byte, as our context sees it.
        shape: ``(N, H, W, C)``, or ``(H, W, C)``.
        streams: each a ``cudaStream_t`` whose work may still write them.
        release: call when they were read.
    """

    address: int
    shape: tuple[int, ...]
    streams: tuple[int, ...]
    release: Callable[[], None]


def device_images(image: Any, cuda: Cuda, stream: Stream, dtype: np.dtype[Any]) -> DeviceImages:
    """Look at an array of another library; nothing is copied.

    Args:
        image: has ``__cuda_array_interface__`` (CuPy, Numba, PyTorch, jetson-utils) or ``__dlpack__``.
        cuda: our GPU.
        stream: ours, on which it will be read; a DLPack maker is told.
        dtype: the engine's own.

    Raises:
        InputError: in host memory or on another GPU, not of this dtype, not C-contiguous, or not described as the rules say.
    """
    if hasattr(image, "__cuda_array_interface__"):
        return _by_interface(image, cuda, dtype)
    if hasattr(image, "__dlpack__"):
        return _by_dlpack(image, cuda, stream, dtype)
    raise InputError(
        f"the image is a {type(image).__name__}; give an array in GPU memory that has __cuda_array_interface__ or "
        "__dlpack__ (CuPy, PyTorch, Numba), or call the segmenter with a numpy array"
    )


def _by_interface(image: Any, cuda: Cuda, wanted: np.dtype[Any]) -> DeviceImages:
    described = image.__cuda_array_interface__
    try:
        dtype, shape, version = np.dtype(described["typestr"]), tuple(described["shape"]), int(described["version"])
        address, strides = int(described["data"][0]), described.get("strides")
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise InputError(
            f"__cuda_array_interface__ of the {type(image).__name__} is not readable ({exc!r}): it needs shape, typestr, "
            "data and version"
        ) from exc
    if described.get("mask") is not None:
        raise InputError("the image has a mask of valid elements; give an array without one")
    _check(dtype, wanted, shape, strides)
    if version < 3:
        # Before version 3 nobody says which stream writes: the legacy default stream waits for most others.
        streams: tuple[int, ...] = (LEGACY_STREAM,)
    elif described.get("stream") is None:
        streams = ()
    elif described["stream"] == 0:
        # Not allowed, because it could be either; so both.
        streams = (LEGACY_STREAM, PER_THREAD_STREAM)
    else:
        streams = (int(described["stream"]),)
    return DeviceImages(_located(address, cuda), shape, streams, lambda: None)


def _by_dlpack(image: Any, cuda: Cuda, stream: Stream, wanted: np.dtype[Any]) -> DeviceImages:
    device_type, index = image.__dlpack_device__()
    if device_type not in (dlpack.CUDA, dlpack.CUDA_HOST, dlpack.CUDA_MANAGED) or (
        device_type == dlpack.CUDA and index != cuda.device.index
    ):
        raise InputError(
            f"the image is on DLPack device ({int(device_type)}, {index}), the engine on GPU {cuda.device.index}; "
            "move it there, or call the segmenter with a numpy array"
        )
    # Page-locked host memory has no stream to wait for: its makers take None only.
    told = None if device_type == dlpack.CUDA_HOST else stream.address
    try:
        try:
            capsule = image.__dlpack__(stream=told, max_version=dlpack.VERSION)
        except TypeError:  # made before DLPack 1.0
            capsule = image.__dlpack__(stream=told)
    except BufferError as exc:
        raise InputError(f"the {type(image).__name__} cannot be given away as DLPack: {exc}") from exc
    received = dlpack.receive(capsule)
    try:
        strides = received.strides and tuple(n * received.dtype.itemsize for n in received.strides)
        _check(received.dtype, wanted, received.shape, strides)
        # The maker was told our stream, and has made it wait.
        return DeviceImages(_located(received.address, cuda), received.shape, (), received.release)
    except BaseException:
        received.release()
        raise


def _located(address: int, cuda: Cuda) -> int:
    place = cuda.locate(address) if address else None
    if place is None:
        raise InputError(f"the image's address {address:#x} is not of memory the GPU can use; copy it to the GPU first")
    if place[1] != cuda.device.index:
        raise InputError(f"the image is on GPU {place[1]}, the engine on GPU {cuda.device.index}; move it there")
    return place[0]


def _check(
    dtype: np.dtype[Any], wanted: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> None:
    """``strides`` in bytes, ``None`` for C order."""
    if dtype != wanted:
        raise InputError(f"the image is {dtype}; give {wanted}")
    expected: list[int] = []
    step = dtype.itemsize
    for n in reversed(shape):
        expected.insert(0, step)
        step *= n
    if strides is not None and (
        len(strides) != len(shape) or any(n > 1 and s != e for n, s, e in zip(shape, strides, expected, strict=True))
    ):
        raise InputError(
            f"the image's strides are {tuple(strides)}, not those of C order {tuple(expected)}; copy it first"
        )


class DeviceTensor(Closing):
    """A result in the GPU's memory, C-contiguous, complete. Other libraries read it in place.

    ``close`` (also by ``with``, or by dropping it) gives the memory back for a later result. Arrays that other libraries
    made of it through ``__cuda_array_interface__`` must not be used after that. One that took it by DLPack has the memory
    for as long as it wants, also after the engine was closed.

    Work that a library gave to CUDA's default stream before, or to a stream it named when taking the tensor by DLPack, is
    waited for before the memory is written again. Only who reads on another stream through
    ``__cuda_array_interface__`` has to wait for that stream before closing.

    Attributes:
        shape, dtype: numpy's.
        address: of the first byte.
    """

    def __init__(self, cuda: Cuda, lease: Lease, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.address = lease.memory.address
        self._cuda = cuda
        self._lease: Lease | None = lease

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        lease = self._open()
        if lease.readers == "none":
            lease.readers = "default stream"
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
        """A capsule; of DLPack 1 for takers that read it. The tensor is complete: no ``stream`` has to wait.

        Args:
            stream: the taker's.
            max_version: newest DLPack it reads; ``None``: before 1.0.
            dl_device: ``(1, 0)`` for a copy in host memory; default where the tensor is.
            copy: ``False`` to fail rather than copy.

        Raises:
            BufferError: asked for a copy on the GPU, for host memory without a copy, or for another device; the
                protocol's own error.
            DeviceError: the GPU refused to copy.
        """
        lease = self._open()
        wanted = self.__dlpack_device__() if dl_device is None else (int(dl_device[0]), int(dl_device[1]))
        if wanted[0] == dlpack.CPU and copy is not False:
            return dlpack.give_copy(self.numpy(), max_version)
        if copy or wanted != self.__dlpack_device__():
            raise BufferError(f"this result is on GPU {self._cuda.device.index} and is given away in place only")
        if stream is not None and stream not in (LEGACY_STREAM, PER_THREAD_STREAM):
            # By the time the memory comes back the stream may be gone: nobody can ask it then.
            lease.readers = "any stream"
        elif lease.readers == "none":
            lease.readers = "default stream"
        memory = dlpack.Memory(lease, self.address, self.shape, self.dtype)
        return dlpack.give(memory, *self.__dlpack_device__(), max_version)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self._cuda.device.index

    def numpy(self) -> NDArray[Any]:
        """Copy to host memory. Raises :class:`DeviceError` when the GPU refuses."""
        self._open()
        host = np.empty(self.shape, self.dtype)
        with self._cuda.stream() as stream, self._cuda.active():
            stream.copy_to_host(host.reshape(-1).view(np.uint8), self.address)
            stream.synchronize()
        return host

    def close(self) -> None:
        """Let go of the memory; again does nothing."""
        self._lease = None

    def _open(self) -> Lease:
        if self._lease is None:
            raise InputError("this result is closed; its memory may belong to another by now")
        return self._lease
