"""A loaded TensorRT engine: host arrays or device arrays in, masks out, from any number of threads.

Uses only what TensorRT 8.5 to 11 have in common (``set_input_shape``, ``set_tensor_address``, ``execute_async_v3``); what
differs between versions is in :mod:`edgeseg.backends.tensorrt.backend`.
"""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import StageTimes, grey_batch
from edgeseg.backends.cuda.arrays import DeviceTensor, device_images
from edgeseg.backends.cuda.device import Cuda
from edgeseg.backends.cuda.result_memory import Lease, ResultMemory
from edgeseg.backends.signature import check_signature
from edgeseg.backends.tensorrt.lane import Lane, io_tensors
from edgeseg.backends.tensorrt.lanes import LanePool
from edgeseg.backends.tensorrt.options import SessionOptions
from edgeseg.closing import Closing
from edgeseg.errors import DeviceError, InputError
from edgeseg.spec import PipelineSpec

if TYPE_CHECKING:
    from tensorrt import ICudaEngine
    from tensorrt_surface import TensorRT

    from edgeseg.backends.tensorrt.rtx_cache import CachingEngine

_open: weakref.WeakSet[TensorRTSession] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # TensorRT's objects must be gone before the driver is, which Python's order of ending does not promise.
    for session in list(_open):
        session.close()


def _warn(text: str) -> None:
    """Say what was asked for and cannot be had here."""
    warnings.warn(f"edgeseg: {text}", RuntimeWarning, stacklevel=2)


class TensorRTSession(Closing):
    """Implements :class:`edgeseg.backends.base.Session` and its timed, pipelined and device kinds.

    Close it. Dropped without, it closes itself and warns (``ResourceWarning``); at exit it closes without a word. In a
    process forked from the one that made it every call is a :class:`DeviceError`.

    Args:
        trt: the tensorrt module, of any version from 8.5 on.
        engine: a deserialized ``ICudaEngine``.
        spec: the contract it fulfils.
        cuda: an opened GPU, whose context was current when ``engine`` was deserialized; closed with the session.
        options: how to run it; default as :class:`~edgeseg.backends.tensorrt.options.SessionOptions` has it.

    Raises:
        DeviceError: an engine that is not edgeseg's, or no memory for the first context. ``cuda`` stays open then.
        ArtifactError: an engine whose input or outputs are not those of ``spec``.
    """

    def __init__(
        self,
        trt: TensorRT,
        engine: ICudaEngine | CachingEngine,
        spec: PipelineSpec,
        cuda: Cuda,
        options: SessionOptions | None = None,
    ) -> None:
        self.options = options = options or SessionOptions()
        self._trt = trt
        self._spec = spec.input
        self._cuda = cuda
        self._image, self._outputs = io_tensors(trt, engine)
        check_signature([self._image], self._outputs, spec, has_uint16=False)
        # TensorRT has no 16-bit integers: images of them are copied as float32, masks leave the engine wider.
        self._dtype = np.dtype(spec.input.dtype)
        self._mask_dtype = np.dtype(spec.mask_dtype)
        # On a Jetson (from SM 7.2) the CPU caches page-locked memory and the GPU does not: no matter for bytes that it
        # reads or writes once.
        integrated = cuda.device.integrated and cuda.device.maps_host_memory
        self._mapped = integrated if options.host_memory == "auto" else options.host_memory == "mapped"
        # Neither these nor the lanes know the session: dropped without closing, it closes at once.
        self._results = ResultMemory(cuda)
        if options.cuda_graph and not cuda.driver.has_graphs:
            _warn(f"no CUDA graph: {cuda.driver.name} has none; pip install 'edgeseg[jetson]' for cuda-bindings")
        make = partial(
            Lane,
            cuda=cuda,
            image=self._image,
            outputs=self._outputs,
            mapped=self._mapped,
            cuda_graph=options.cuda_graph and cuda.driver.has_graphs,
            on_note=cache(_warn),  # by whichever lane, each is said once
        )
        self._lanes = LanePool(engine, cuda, options.contexts, make, self._results.close_device)
        _open.add(self)

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run one batch: ``(N, H, W, C)`` of the contract's dtype in, arrays by output name out.

        Raises:
            InputError: dtype or shape the engine does not take, or a closed session.
            DeviceError: the GPU refused; the session can be used again unless the message says otherwise.
        """
        self._check(images.dtype, images.shape)
        with self._lanes.lane() as lane:
            lane.enqueue(images)
            return self._converted(lane.finish())

    def run_timed(self, images: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], StageTimes]:
        """Like :meth:`run`, and how long its stages took, by CUDA events."""
        self._check(images.dtype, images.shape)
        with self._lanes.lane() as lane:
            lane.enqueue(images, timed=True)
            return self._converted(lane.finish()), lane.stage_times()

    def layer_times(self, runs: int) -> list[tuple[str, float]]:
        """What TensorRT's ``IProfiler`` reports over ``runs`` runs of a grey batch, after one that is not counted.

        Returns:
            (layer name, milliseconds), every layer once per run, in the order they run. Their sum is more than the time
            of a run without profiler.

        Raises:
            InputError, DeviceError: see :meth:`run`.
        """
        images = grey_batch(self._spec)
        reports: list[tuple[str, float]] = []
        lane = self._lanes.take(wait=True)
        assert lane is not None
        try:
            with self._cuda.active():
                lane.report_layers_to(layer_profiler(self._trt, reports))
                for run in range(runs + 1):
                    lane.enqueue(images)
                    lane.finish()
                    if run == 0:
                        reports.clear()
        finally:
            # Its context reports, and waits, for as long as it lives: nobody else gets it.
            self._lanes.drop(lane)
        return reports

    def run_many(self, batches: Iterable[NDArray[Any]]) -> Generator[dict[str, NDArray[Any]], None, None]:
        """Run batch after batch, copying one while another is computed; results in order.

        Two batches are in flight where there are two contexts. One context stays free for other callers while the
        consumer holds a result. Closing or dropping the iterator gives back what it holds.

        Raises:
            InputError, DeviceError: see :meth:`run`; after the results of the batches before.
        """
        flying: deque[Lane] = deque()
        try:
            for images in batches:
                try:
                    self._check(images.dtype, images.shape)
                except InputError:
                    while flying:
                        yield self._landed(flying)
                    raise
                # Waiting while holding a lane could wait for a caller who waits for this one.
                lane = self._lanes.take(wait=not flying)
                while lane is None:
                    yield self._landed(flying)
                    lane = self._lanes.take(wait=not flying)
                with self._lanes.using(lane):
                    lane.enqueue(images)
                flying.append(lane)
                if len(flying) >= 2 or self.options.contexts == 1:
                    yield self._landed(flying)
            while flying:
                yield self._landed(flying)
        finally:
            with ExitStack() as stack:
                for lane in flying:
                    stack.callback(self._lanes.recall, lane)

    def run_device(self, image: object) -> dict[str, DeviceTensor]:
        """Run an image or batch that is in the GPU's memory; the results stay there. Nothing is copied.

        Args:
            image: ``(H, W, C)`` or ``(N, H, W, C)`` of the contract's dtype, float32 for uint16; C-contiguous, with
                ``__cuda_array_interface__`` or
                ``__dlpack__``. One at an address that is no multiple of 256 bytes is copied, on the device.

        Returns:
            by output name, complete; close each to have its memory used again. Masks of more than 256 classes are int32.

        Raises:
            InputError, DeviceError: see :meth:`run`.
        """
        taken: list[Lease] = []

        def lend(size_bytes: int) -> Lease:
            taken.append(self._results.lease(size_bytes))
            return taken[-1]

        with ExitStack() as afterwards:
            try:
                with self._lanes.lane() as lane:
                    images = device_images(image, self._cuda, lane.stream, np.dtype(self._image.dtype))
                    afterwards.callback(images.release)
                    shape = self._batched(images.shape)
                    self._check(self._dtype, shape)
                    results = lane.run_on_device(images, shape, lend)
            except BaseException:
                for lease in taken:
                    with suppress(DeviceError):
                        lease.spoil()
                raise
        dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in self._outputs}
        return {name: DeviceTensor(self._cuda, lease, shape, dtypes[name]) for name, (lease, shape) in results.items()}

    def close(self) -> None:
        """Free all memory, streams and contexts; what another thread still uses is freed when it is done.

        Results in the GPU's memory stay until they are closed, and with them the GPU's context.

        Raises:
            DeviceError: the driver refused to free something; the rest is freed all the same.
        """
        if self._cuda.forked:
            return
        with ExitStack() as stack:
            stack.callback(self._lanes.close)
            stack.callback(self._results.close)

    def __del__(self) -> None:
        lanes = getattr(self, "_lanes", None)  # missing when it was never complete
        if lanes is not None and not lanes.closed:
            if not self._cuda.forked:
                warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=1, source=self)
            self.close()

    def _check(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        if (refusal := replace(self._image, dtype=self._spec.dtype).refusal(dtype, shape)) is not None:
            raise refusal

    def _converted(self, outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if "mask" in outputs:
            outputs["mask"] = outputs["mask"].astype(self._mask_dtype, copy=False)
        return outputs

    def _batched(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of images that may lack the batch axis, and with one channel the channel axis."""
        if self._spec.channels == 1 and shape[-1:] != (1,):
            shape = (*shape, 1)
        return shape if len(shape) == 4 else (1, *shape)

    def _landed(self, flying: deque[Lane]) -> dict[str, NDArray[Any]]:
        """Finish the oldest batch in flight."""
        lane = flying.popleft()
        with self._lanes.using(lane):
            arrays = lane.finish()
        self._lanes.put(lane)
        return self._converted(arrays)


def open_session(
    trt: TensorRT, engine: ICudaEngine | CachingEngine, spec: PipelineSpec, cuda: Cuda, options: Mapping[str, Any]
) -> TensorRTSession:
    """Wrap a deserialized engine in a session, which closes ``cuda``. Of ``options``, the manifest's, it takes its own."""
    chosen = SessionOptions(**{f.name: options[f.name] for f in fields(SessionOptions) if f.name in options})
    return TensorRTSession(trt, engine, spec, cuda, chosen)


def layer_profiler(trt: TensorRT, reports: list[tuple[str, float]]) -> Any:
    """An ``IProfiler`` that appends (layer name, milliseconds) to ``reports``."""

    if TYPE_CHECKING:
        from tensorrt import IProfiler
    else:
        IProfiler = trt.IProfiler  # noqa: N806  # a class of the module at hand

    class LayerProfiler(IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            reports.append((layer_name, ms))

    return LayerProfiler()
