"""The CUDA driver through ``cuda-bindings``, NVIDIA's own wheel; the one that has CUDA graphs."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.cuda.driver import CudaDevice, DriverName, cuda_error
from edgeseg.errors import DeviceError, one_line


class BindingsDriver:
    """The calls that :mod:`edgeseg.backends.cuda.device` makes; handles are the package's own objects.

    Every call raises :class:`DeviceError`. All but :meth:`push`, :meth:`pop` and :meth:`release` need the context pushed in
    the calling thread.
    """

    name: DriverName = "cuda-bindings"
    has_graphs: Literal[True] = True

    def __init__(self, api: Any, index: int) -> None:
        self._api = api
        try:
            self._call("cuInit", 0)
        except RuntimeError as exc:
            # cuda-bindings raises this, not a status, when it finds no libcuda.so.1.
            raise DeviceError(f"no NVIDIA driver here (libcuda.so.1 cannot be loaded): {one_line(exc)}") from exc
        device = self._call("cuDeviceGet", index)
        self.device = self._describe(device, index)
        self._device = device
        self._context = self._call("cuDevicePrimaryCtxRetain", device)

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *values = getattr(self._api, function)(*arguments)
        if status != 0:
            text = self._api.cuGetErrorString(status)[1]
            raise cuda_error(function, status.name, text.decode() if text else "no description")
        return values[0] if len(values) == 1 else tuple(values)

    def _describe(self, device: Any, index: int) -> CudaDevice:
        attributes = self._api.CUdevice_attribute

        def read(name: str) -> int:
            return int(self._call("cuDeviceGetAttribute", getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

        version = int(self._call("cuDriverGetVersion"))
        return CudaDevice(
            index=index,
            name=self._call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
            compute_capability=(read("COMPUTE_CAPABILITY_MAJOR"), read("COMPUTE_CAPABILITY_MINOR")),
            multiprocessors=read("MULTIPROCESSOR_COUNT"),
            integrated=bool(read("INTEGRATED")),
            maps_host_memory=bool(read("CAN_MAP_HOST_MEMORY")),
            cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        )

    def push(self) -> None:
        """Make the primary context current in this thread."""
        self._call("cuCtxPushCurrent", self._context)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent")

    def release(self) -> None:
        """Give up the primary context; the last call made."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def allocate(self, size_bytes: int) -> Any:
        return self._call("cuMemAlloc", size_bytes)

    def address(self, allocation: Any) -> int:
        return int(allocation)

    def free(self, allocation: Any) -> None:
        self._call("cuMemFree", allocation)

    def allocate_host(self, size_bytes: int, mapped: bool) -> tuple[Any, NDArray[np.uint8]]:
        address = int(self._call("cuMemHostAlloc", size_bytes, self._api.CU_MEMHOSTALLOC_DEVICEMAP if mapped else 0))
        return address, np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def host_address(self, allocation: Any) -> int:
        return int(self._call("cuMemHostGetDevicePointer", allocation, 0))

    def free_host(self, allocation: Any) -> None:
        self._call("cuMemFreeHost", allocation)

    def create_stream(self) -> Any:
        return self._call("cuStreamCreate", self._api.CUstream_flags.CU_STREAM_NON_BLOCKING.value)

    def stream_address(self, stream: Any) -> int:
        return int(stream)

    def synchronize(self, stream: Any) -> None:
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def create_event(self, timing: bool) -> Any:
        flags = self._api.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        return self._call("cuEventCreate", flag.value)

    def record(self, event: Any, stream: Any) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def wait_for_foreign(self, stream: Any, foreign: int, event: Any) -> None:
        self.record(event, self._api.CUstream(foreign))
        self.wait(stream, event)

    def synchronize_context(self) -> None:
        """Wait for the work of every stream of the context, whoever made it."""
        self._call("cuCtxSynchronize")

    def locate(self, address: int) -> tuple[int, int]:
        """Where the context sees memory of any maker, and the number of its GPU; fails for memory CUDA does not know."""
        attributes = self._api.CUpointer_attribute
        seen = self._call("cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address)
        index = self._call("cuPointerGetAttribute", attributes.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        return int(seen), int(index)

    def synchronize_event(self, event: Any) -> None:
        self._call("cuEventSynchronize", event)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(self._call("cuEventElapsedTime", start, end))

    def destroy_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def copy_to_device(self, address: int, host: NDArray[np.uint8], stream: Any) -> None:
        self._call("cuMemcpyHtoDAsync", address, host.ctypes.data, host.nbytes, stream)

    def copy_to_host(self, host: NDArray[np.uint8], address: int, stream: Any) -> None:
        self._call("cuMemcpyDtoHAsync", host.ctypes.data, address, host.nbytes, stream)

    def copy_on_device(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, size_bytes, stream)

    def memory_info(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def begin_capture(self, stream: Any) -> None:
        # Thread-local: another thread's allocation must not break this thread's recording.
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Any) -> Any:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            launchable = self._call("cuGraphInstantiate", graph, 0)
        except DeviceError:
            self._call("cuGraphDestroy", graph)
            raise
        try:
            self._call("cuGraphDestroy", graph)
        except DeviceError:
            self._call("cuGraphExecDestroy", launchable)
            raise
        return launchable

    def abort_capture(self, stream: Any) -> None:
        """End a capture whose work is not wanted, also one that is broken already."""
        self._call("cuGraphDestroy", self._call("cuStreamEndCapture", stream))

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)


def open_driver(index: int) -> BindingsDriver:
    """Retain the primary context of a GPU. Raises ``ModuleNotFoundError`` or :class:`DeviceError`."""
    from cuda.bindings import driver

    return BindingsDriver(driver, index)
