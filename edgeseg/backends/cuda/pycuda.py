"""The CUDA driver through ``pycuda``, for systems whose CUDA has no ``cuda-bindings`` wheel; it has no CUDA graphs."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.cuda.driver import CudaDevice, DriverName, cuda_error
from edgeseg.errors import DeviceError, one_line

# pycuda keeps the text of an error, not its name.
_NAMES = {
    "out of memory": "CUDA_ERROR_OUT_OF_MEMORY",
    "no CUDA-capable device is detected": "CUDA_ERROR_NO_DEVICE",
    "invalid device ordinal": "CUDA_ERROR_INVALID_DEVICE",
    "unspecified launch failure": "CUDA_ERROR_LAUNCH_FAILED",
    "an illegal memory access was encountered": "CUDA_ERROR_ILLEGAL_ADDRESS",
    "invalid device context": "CUDA_ERROR_INVALID_CONTEXT",
    "invalid argument": "CUDA_ERROR_INVALID_VALUE",
    "invalid resource handle": "CUDA_ERROR_INVALID_HANDLE",
}

# CUpointer_attribute, part of the driver's stable binary interface.
_DEVICE_POINTER, _DEVICE_ORDINAL = 3, 9


class PycudaDriver:
    """The calls of :class:`edgeseg.backends.cuda.bindings.BindingsDriver`.

    pycuda destroys a stream or event when its object is dropped, and leaks it unless the context is current then. So
    handles of these are numbers: the objects are kept here alone, where the traceback of an error does not hold them.

    What pycuda does not offer is called in the driver's library itself.
    """

    name: DriverName = "pycuda"
    has_graphs: Literal[False] = False

    def __init__(self, api: Any, index: int) -> None:
        self._api = api
        self._objects: dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._pushed = threading.local()
        self._call(api.init)
        self._library = ctypes.CDLL("libcuda.so.1")
        device = self._call(api.Device, index)
        self.device = self._describe(device, index)
        # Retained, not made: pycuda.autoinit makes a second context that TensorRT does not share.
        self._context: Any = self._call(device.retain_primary_context)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._api.Error as exc:
            # "cuMemAlloc failed: out of memory"
            call, _, text = str(exc).partition(" failed: ")
            text = text.split(" - ")[0].strip()
            del function, arguments  # this frame lives as long as the error
            raise cuda_error(call, _NAMES.get(text, type(exc).__name__), text or "no description") from exc

    def _describe(self, device: Any, index: int) -> CudaDevice:
        attributes = self._api.device_attribute
        version = int(self._call(self._api.get_driver_version))
        return CudaDevice(
            index=index,
            name=str(self._call(device.name)),
            compute_capability=self._call(device.compute_capability),
            multiprocessors=int(self._call(device.get_attribute, attributes.MULTIPROCESSOR_COUNT)),
            integrated=bool(self._call(device.get_attribute, attributes.INTEGRATED)),
            maps_host_memory=bool(self._call(device.get_attribute, attributes.CAN_MAP_HOST_MEMORY)),
            cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        )

    def _keep(self, made: Any) -> int:
        number = next(self._numbers)
        self._objects[number] = made
        return number

    def _call_library(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name, text = ctypes.c_char_p(), ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            self._library.cuGetErrorString(code, ctypes.byref(text))
            spelled = (name.value or b"error %d" % code).decode()
            raise cuda_error(function.removesuffix("_v2"), spelled, (text.value or b"no description").decode())

    def _current(self) -> int | None:
        context = ctypes.c_void_p()
        self._call_library("cuCtxGetCurrent", ctypes.byref(context))
        return context.value

    def _befores(self) -> list[int | None]:
        """What was current in this thread before each push that is not undone yet."""
        if not hasattr(self._pushed, "befores"):
            self._pushed.befores = []
        befores: list[int | None] = self._pushed.befores
        return befores

    def push(self) -> None:
        befores = self._befores()
        if not befores:
            before = self._current()
            try:
                self._call(self._context.push)
            except DeviceError:
                self._restore(before)
                raise
            befores.append(before)
        else:
            # pycuda takes the current context off before it puts one on, and a failure in between is not undone.
            befores.append(befores[-1])

    def pop(self) -> None:
        befores = self._befores()
        before = befores.pop()
        if not befores:
            self._call(self._api.Context.pop)
            self._restore(before)

    def _restore(self, context: int | None) -> None:
        # pycuda takes whatever is current for its own: where the application has a pycuda context and, above it, one of
        # another library, that one would be gone now.
        if self._current() != context:
            self._call_library("cuCtxSetCurrent", ctypes.c_void_p(context))

    def release(self) -> None:
        # pycuda releases only a context that is current (or of this thread), and then leaves it on the driver's stack of
        # this thread, where the next user of CUDA would find a dead context. It has no call to pop it: the driver has.
        context, self._context = self._context, None
        before = self._current()
        with contextlib.suppress(DeviceError):  # then it is pushed by detach itself, in the thread that opened it
            self._call(context.push)
        self._call(context.detach)
        self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        self._restore(before)

    def allocate(self, size_bytes: int) -> Any:
        return self._call(self._api.mem_alloc, size_bytes)

    def address(self, allocation: Any) -> int:
        return int(allocation)

    def free(self, allocation: Any) -> None:
        self._call(allocation.free)

    def allocate_host(self, size_bytes: int, mapped: bool) -> tuple[Any, NDArray[np.uint8]]:
        flags = self._api.host_alloc_flags.DEVICEMAP if mapped else 0
        array: NDArray[np.uint8] = self._call(self._api.pagelocked_empty, size_bytes, np.uint8, "C", flags)
        return array.base, array

    def host_address(self, allocation: Any) -> int:
        return int(self._call(allocation.get_device_pointer))

    def free_host(self, allocation: Any) -> None:
        self._call(allocation.free)

    def create_stream(self) -> Any:
        return self._keep(self._call(self._api.Stream, 1))  # CU_STREAM_NON_BLOCKING

    def stream_address(self, stream: Any) -> int:
        return int(self._objects[stream].handle)

    def synchronize(self, stream: Any) -> None:
        self._call(self._objects[stream].synchronize)

    def destroy_stream(self, stream: Any) -> None:
        del self._objects[stream]

    def create_event(self, timing: bool) -> Any:
        flags = self._api.event_flags
        return self._keep(self._call(self._api.Event, flags.DEFAULT if timing else flags.DISABLE_TIMING))

    def record(self, event: Any, stream: Any) -> None:
        self._call(self._objects[event].record, self._objects[stream])

    def wait(self, stream: Any, event: Any) -> None:
        self._call(self._objects[stream].wait_for_event, self._objects[event])

    def wait_for_foreign(self, stream: Any, foreign: int, event: Any) -> None:
        # pycuda cannot name a stream it did not make: wait for the whole device.
        self.synchronize_context()

    def synchronize_context(self) -> None:
        self._call(self._api.Context.synchronize)

    def locate(self, address: int) -> tuple[int, int]:
        seen, index = ctypes.c_uint64(), ctypes.c_int()
        given = ctypes.c_uint64(address)
        self._call_library("cuPointerGetAttribute", ctypes.byref(seen), _DEVICE_POINTER, given)
        self._call_library("cuPointerGetAttribute", ctypes.byref(index), _DEVICE_ORDINAL, given)
        return seen.value, index.value

    def synchronize_event(self, event: Any) -> None:
        self._call(self._objects[event].synchronize)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call(self._objects[end].time_since, self._objects[start]))

    def destroy_event(self, event: Any) -> None:
        del self._objects[event]

    def copy_to_device(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        self._call(self._api.memcpy_htod_async, address, host, self._objects[stream])

    def copy_to_host(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        self._call(self._api.memcpy_dtoh_async, host, address, self._objects[stream])

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        self._call(self._api.memcpy_dtod_async, target, source, size_bytes, self._objects[stream])

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call(self._api.mem_get_info)
        return int(free), int(total)


def open_driver(index: int) -> PycudaDriver:
    """Retain the primary context of a GPU. Raises ``ModuleNotFoundError`` or :class:`DeviceError`."""
    try:
        import pycuda.driver
    except ModuleNotFoundError:
        raise
    except ImportError as exc:
        raise DeviceError(f"pycuda does not load: {one_line(exc)}") from exc
    return PycudaDriver(pycuda.driver, index)
