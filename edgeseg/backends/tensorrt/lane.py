"""One inference at a time: an execution context of TensorRT with a stream, buffers and events of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import StageTimes
from edgeseg.backends.cuda.arrays import DeviceImages
from edgeseg.backends.cuda.device import LEGACY_STREAM, Cuda, DeviceMemory, Graph, HostMemory, Stream
from edgeseg.backends.cuda.result_memory import Lease
from edgeseg.backends.signature import ANY, TensorInfo
from edgeseg.errors import DeviceError, InputError

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext
    from tensorrt_surface import TensorRT

    from edgeseg.backends.tensorrt.rtx_cache import CachingEngine

ALIGNMENT_BYTES = 256
"""What TensorRT asks of the addresses of inputs and outputs."""

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


def io_tensors(trt: TensorRT, engine: ICudaEngine | CachingEngine) -> tuple[TensorInfo, tuple[TensorInfo, ...]]:
    """The engine's one image input and its outputs. Raises :class:`DeviceError` for an engine that is not edgeseg's."""
    dtypes = {getattr(trt.DataType, name): kind for name, kind in _DTYPES.items() if hasattr(trt.DataType, name)}
    inputs, outputs = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype, shape = engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))
        if dtype not in dtypes:
            raise DeviceError(f"the engine's tensor {name} is {dtype}, which numpy has not; build the engine again")
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            low, _, high = engine.get_tensor_profile_shape(name, 0) if -1 in shape else (shape, shape, shape)
            inputs.append(TensorInfo(name, dtypes[dtype], tuple(zip(low, high, strict=True))))
        else:
            outputs.append(TensorInfo(name, dtypes[dtype], tuple(ANY if n == -1 else (n, n) for n in shape)))
    if len(inputs) != 1 or inputs[0].dtype not in ("uint8", "float32") or len(inputs[0].shape or ()) != 4:
        listed = ", ".join(map(str, inputs))
        raise DeviceError(
            f"the engine's inputs are [{listed}]; edgeseg's engines have one, uint8 or float32 (N, H, W, C)"
        )
    return inputs[0], tuple(outputs)


class _Buffer:
    """Memory of one tensor: page-locked host memory and, unless the GPU uses that in place, device memory.

    Attributes:
        array: the host memory, of the tensor's shape and dtype.
        bytes: the same as bytes.
        address: where the GPU has it.
    """

    def __init__(self, cuda: Cuda, mapped: bool, tensor: TensorInfo) -> None:
        self._cuda = cuda
        self._mapped = mapped
        self._tensor = tensor
        self._host: HostMemory | None = None
        self._device: DeviceMemory | None = None
        self.bytes: NDArray[np.uint8]
        self.array: NDArray[Any]
        self.address: int
        self._forget()

    def fit(self, shape: tuple[int, ...]) -> None:
        """Make it of a shape; allocates when it was never as large."""
        if shape == self.array.shape and self._host is not None:
            return
        size_bytes = self._tensor.size_bytes(shape)
        if self._host is None or self._host.size_bytes < size_bytes:
            # Freed first: two sizes at once might not fit the device.
            self.close()
            if self._mapped:
                self._host = self._cuda.host_memory(size_bytes, mapped=True)
                assert self._host.address is not None
                self.address = self._host.address
            else:
                self._device = self._cuda.device_memory(size_bytes)
                self.address = self._device.address
                self._host = self._cuda.host_memory(size_bytes)
        self.bytes = self._host.array[:size_bytes]
        self.array = self.bytes.view(self._tensor.dtype).reshape(shape)

    def close(self) -> None:
        self._forget()
        host, self._host = self._host, None
        device, self._device = self._device, None
        with ExitStack() as stack:
            for memory in (host, device):
                if memory is not None:
                    stack.callback(memory.close)

    def _forget(self) -> None:
        # No view may outlive the memory.
        self.bytes, self.array = np.empty(0, np.uint8), np.empty(0, self._tensor.dtype)
        self.address = 0


class Lane:
    """Runs one batch at a time. Not for several threads at once; call every method inside ``cuda.active()``.

    Args:
        engine: deserialized; optimization profile 0 is used.
        cuda: an opened GPU.
        image, outputs: from :func:`io_tensors`.
        mapped: buffers in host memory that the GPU uses in place (integrated GPUs).
        cuda_graph: launch what repeats, shape and addresses, as a CUDA graph.
        on_note: told, in one line, when a CUDA graph was wanted and cannot be had.

    Raises:
        DeviceError: out of memory; nothing is left behind.
    """

    def __init__(
        self,
        engine: ICudaEngine | CachingEngine,
        cuda: Cuda,
        image: TensorInfo,
        outputs: tuple[TensorInfo, ...],
        *,
        mapped: bool,
        cuda_graph: bool,
        on_note: Callable[[str], None],
    ) -> None:
        self._cuda = cuda
        self._image = image
        self._outputs = outputs
        self._mapped = mapped
        self._wants_graph = cuda_graph
        shape = tuple(engine.get_tensor_shape(image.name))
        self._is_dynamic = -1 in shape
        self._on_note = on_note
        self._profiler: Any = None
        self._graph: Graph | None = None
        self._shape: tuple[int, ...] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        # Addresses TensorRT was told, input first.
        self._bound: tuple[int, ...] = ()
        # Runs since shape or addresses changed.
        self._runs = 0
        self._enqueue_ms = 0.0
        with ExitStack() as making:
            self._stream: Stream = making.enter_context(cuda.stream())
            self._stream_address = self._stream.address
            self._marks = tuple(making.enter_context(cuda.event()) for _ in range(4))
            self._foreign = making.enter_context(cuda.event(timing=False))
            self._input = _Buffer(cuda, mapped, image)
            making.callback(self._input.close)
            self._results = {tensor.name: _Buffer(cuda, mapped, tensor) for tensor in outputs}
            for buffer in self._results.values():
                making.callback(buffer.close)
            making.callback(self._forget_context)
            self._make_context(engine)
            if not self._is_dynamic:
                # The only shape there is: an engine that does not fit fails now, not at the first image.
                self._prepare(shape)
            self._resources = making.pop_all()

    @property
    def stream(self) -> Stream:
        """The lane's own."""
        return self._stream

    def enqueue(self, images: NDArray[Any], *, timed: bool = False) -> None:
        """Give the GPU one batch to do, ``(N, H, W, C)``; it is copied, and uint16 made float32, before this returns."""
        self._prepare(images.shape)
        np.copyto(self._input.array, images)
        start, copied, computed, done = self._marks
        if timed:
            start.record(self._stream)
        if not self._mapped:
            self._stream.copy_to_device(self._input.address, self._input.bytes)
        if timed:
            copied.record(self._stream)
        before = time.perf_counter()
        self._launch()
        self._enqueue_ms = (time.perf_counter() - before) * 1e3
        if timed:
            computed.record(self._stream)
        if not self._mapped:
            for buffer in self._results.values():
                self._stream.copy_to_host(buffer.bytes, buffer.address)
        if timed:
            done.record(self._stream)

    def finish(self) -> dict[str, NDArray[Any]]:
        """Wait for the batch and return its outputs, in arrays of the caller's own."""
        self._stream.synchronize()
        return {name: buffer.array.copy() for name, buffer in self._results.items()}

    def stage_times(self) -> StageTimes:
        """Of the last batch, which was enqueued ``timed`` and is finished."""
        start, copied, computed, done = self._marks
        return StageTimes(
            h2d_ms=None if self._mapped else copied.elapsed_ms(start),
            compute_ms=computed.elapsed_ms(copied),
            d2h_ms=None if self._mapped else done.elapsed_ms(computed),
            enqueue_ms=self._enqueue_ms,
        )

    def run_on_device(
        self, images: DeviceImages, shape: tuple[int, ...], lend: Callable[[int], Lease]
    ) -> dict[str, tuple[Lease, tuple[int, ...]]]:
        """Run images that are in the GPU's memory into memory from ``lend``; returns when it is done.

        Args:
            images: where they are.
            shape: theirs, ``(N, H, W, C)``.
            lend: called with a size in bytes for each output.

        Returns:
            by output name: the memory and the shape.
        """
        self._set_shape(shape)
        for writer in images.streams:
            self._stream.wait_for_stream(writer, self._foreign)
        address = images.address
        if address % ALIGNMENT_BYTES:
            self._input.fit(shape)
            self._stream.copy_on_device(self._input.address, address, self._image.size_bytes(shape))
            address = self._input.address
        shapes = {tensor: self._shapes[tensor.name] for tensor in self._outputs}
        results = {tensor.name: (lend(tensor.size_bytes(shape)), shape) for tensor, shape in shapes.items()}
        leases = [lease for lease, _ in results.values()]
        readers = {lease.before for lease in leases}
        if "any stream" in readers:
            self._cuda.synchronize()
        elif "default stream" in readers:
            self._stream.wait_for_stream(LEGACY_STREAM, self._foreign)
        self._bind((address, *(lease.memory.address for lease in leases)))
        self._launch()
        self._stream.synchronize()
        return results

    def report_layers_to(self, profiler: Any) -> None:
        """From now on TensorRT tells ``profiler`` (its ``IProfiler``) the time of every layer, and waits for each run."""
        # A recorded graph runs without reporting.
        self._wants_graph = False
        self._drop_graph()
        self._context.profiler = profiler
        self._profiler = profiler  # TensorRT holds a bare pointer

    def abandon(self) -> None:
        """Close after a failure, which is on its way to the caller: what fails now adds nothing to it."""
        with contextlib.suppress(DeviceError):
            # Copies may be under way still; freeing their memory before they end would be worse than waiting.
            self._stream.synchronize()
        with contextlib.suppress(DeviceError):
            self.close()

    def close(self) -> None:
        """Free everything. Raises :class:`DeviceError` when the driver refuses; the rest is freed all the same."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._resources.callback(graph.close)
        self._resources.close()

    def _make_context(self, engine: ICudaEngine | CachingEngine) -> None:
        self._context: IExecutionContext = engine.create_execution_context()
        if self._context is None:
            free, total = self._cuda.memory_info()
            raise DeviceError(
                f"TensorRT could not make an execution context with {free / 2**20:.0f} of {total / 2**20:.0f} MiB "
                "of GPU memory free; close other programs on the GPU, or use fewer contexts"
            )
        # In TensorRT 8 only the first context of an engine gets a profile by itself.
        if self._is_dynamic and not self._context.set_optimization_profile_async(0, self._stream_address):
            raise DeviceError(
                "this engine's shapes serve one context at a time (TensorRT 8 without profile sharing); "
                "run: edgeseg compile ENGINE_DIR --backend-option contexts=1"
            )

    def _forget_context(self) -> None:
        # Dropping the last reference destroys it, which takes the CUDA context: it must not be left to a traceback.
        vars(self).pop("_context", None)
        self._profiler = None

    def _prepare(self, shape: tuple[int, ...]) -> None:
        """Make the lane's own buffers ready for a shape, and tell TensorRT; nothing to do when it is that of before."""
        self._set_shape(shape)
        self._input.fit(shape)
        for name, buffer in self._results.items():
            buffer.fit(self._shapes[name])
        self._bind((self._input.address, *(buffer.address for buffer in self._results.values())))

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        if shape == self._shape:
            return
        self._drop_graph()
        self._shape = None
        if not self._context.set_input_shape(self._image.name, shape):
            raise InputError(f"TensorRT refuses images of shape {shape}; this engine takes {self._image.kind}")
        for tensor in self._outputs:
            dims = tuple(self._context.get_tensor_shape(tensor.name))
            if any(n < 0 for n in dims):
                raise DeviceError(f"the shape of output {tensor.name} is {dims} before running; build the engine again")
            self._shapes[tensor.name] = dims
        self._shape = shape

    def _bind(self, addresses: tuple[int, ...]) -> None:
        """Tell TensorRT where input and outputs are. A graph has its addresses recorded: others, and it is void."""
        if addresses == self._bound:
            return
        self._drop_graph()
        self._bound = ()
        for tensor, address in zip((self._image, *self._outputs), addresses, strict=True):
            if not self._context.set_tensor_address(tensor.name, address):
                raise DeviceError(f"TensorRT refuses memory at {address:#x} for {tensor.name}; its log says why")
        self._bound = addresses

    def _launch(self) -> None:
        if self._wants_graph and self._graph is None and self._runs >= 1:
            # Not in the first run of a shape: TensorRT allocates and chooses there, which cannot be recorded.
            self._record_graph()
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._execute()
        self._runs += 1

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream_address):
            raise DeviceError("TensorRT refuses to run the engine (execute_async_v3); its log says why")

    def _record_graph(self) -> None:
        try:
            self._graph = self._stream.recorded(self._execute)
        except DeviceError as exc:
            self._wants_graph = False
            self._on_note(f"no CUDA graph, every inference is enqueued anew: {exc}")

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        self._runs = 0
        if graph is not None:
            graph.close()
