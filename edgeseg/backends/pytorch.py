"""The PyTorch model itself as a :class:`~edgeseg.backends.base.Session`: reference for accuracy, baseline for speed.

Written from the model's definition and not with the module that export uses, so that a mistake in what edgeseg puts
around the network shows up as disagreement.
"""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeseg.backends.base import StageTimes
from edgeseg.closing import Closing
from edgeseg.convert.architectures import ACTIVATIONS
from edgeseg.convert.geometry import noise
from edgeseg.convert.heads import APPLIED, without_activation
from edgeseg.errors import BuildError, DeviceError, InputError, SpecError, first_line, one_line
from edgeseg.spec import PipelineSpec

if TYPE_CHECKING:
    from edgeseg.convert.loaded import LoadedModel

# SMP makes these without a dimension, which PyTorch warns about on every call; applied here, over the classes.
_IMPLICIT_DIM = {"softmax", "logsoftmax"}


def why_no_cuda() -> str | None:
    """Why the PyTorch here cannot use a GPU, as a clause; ``None`` where it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # a driver that is too old is told by a warning alone
        if torch.cuda.is_available():
            return None
    if torch.version.cuda is None:
        return f"the PyTorch here ({torch.__version__}) is built without CUDA"
    told = f": {one_line(str(said[0].message).partition('(')[0])}" if said else ""
    return f"the PyTorch here ({torch.__version__}, for CUDA {torch.version.cuda}) finds no GPU it can use{told}"


def _timed_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class CudaRuntime:
    """What a session on a GPU asks of CUDA beside tensors; tests have one without.

    Attributes:
        pin: a copy of a CPU tensor in page-locked memory.
        event: makes an event with ``record()``, ``synchronize()`` and ``elapsed_time(later)``, milliseconds.
        name: of a device.
        peak_bytes: most memory PyTorch has held on a device so far.
        release: give back what PyTorch holds and does not use.
    """

    pin: Callable[[Tensor], Tensor] = Tensor.pin_memory
    event: Callable[[], Any] = _timed_event
    name: Callable[[torch.device], str] = torch.cuda.get_device_name
    peak_bytes: Callable[[torch.device], int] = torch.cuda.max_memory_reserved
    release: Callable[[], None] = torch.cuda.empty_cache


class PyTorchSession(Closing):
    """Runs a loaded model in PyTorch: images in, the outputs of ``spec`` out, both in the CPU's memory.

    On a GPU a call is what it is for an engine: images into page-locked memory, to the device, the network, the outputs
    back into page-locked memory, and the wait for all of it.

    Args:
        loaded: the model; it stays on the CPU and is not changed.
        spec: input, preprocessing and output contract; the engine's own, so that names and dtypes are the same.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        channels_last: run in the ``channels_last`` memory format (same results up to rounding, usually faster on CPU).
        compiled: run through ``torch.compile``; the first call takes tens of seconds.
        bfloat16: run the network under bfloat16 autocast, which some CPUs multiply faster; its outputs are float32 again.
        float16: the same with float16, on GPUs.
        exact: of a GPU, the accuracy reference: float32 products in float32 and always the same kernels. Otherwise TF32 is
            allowed, as TensorRT allows it, and cuDNN tries its kernels first (PyTorch's ``benchmark``). Recorded in
            :attr:`options`; what the process had before comes back when the session is closed.
        threads: of PyTorch's intra-op pool, for the whole process until the session is closed; ``None`` leaves it. Recorded
            in :attr:`options`.
        with_scores: return what a mask is made of as well: ``logits``, or ``probabilities`` of a model with an
            activation.
        runtime: CUDA; another one in tests.

    Raises:
        DeviceError: the PyTorch here cannot use a GPU, or the model does not fit its memory.
        SpecError: float16 on a CPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        spec: PipelineSpec,
        *,
        device: str = "cpu",
        channels_last: bool = False,
        compiled: bool = False,
        bfloat16: bool = False,
        float16: bool = False,
        exact: bool = False,
        threads: int | None = None,
        with_scores: bool = False,
        runtime: CudaRuntime | None = None,
    ) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and (reason := why_no_cuda()) is not None:
            raise DeviceError(f"{reason}: install a PyTorch for CUDA, or run it on the CPU (--baseline pytorch-cpu)")
        self._runtime = CudaRuntime() if runtime is None and self._device.type == "cuda" else runtime
        if float16 and self._runtime is None:
            raise SpecError("PyTorch in float16 is for a GPU; on a CPU give --baseline pytorch-bf16")
        self._threads_before = None if threads is None else torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self.spec = spec
        self.options: dict[str, Any] = {
            "channels_last": channels_last,
            "compiled": compiled,
            "bfloat16": bfloat16,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        self._channels_last = channels_last
        self._compiled = compiled
        self._autocast = torch.bfloat16 if bfloat16 else torch.float16 if float16 else None
        self._with_scores = with_scores
        self._module = loaded.module
        self._activation = None if ACTIVATIONS[spec.model.activation] == "none" else spec.model.activation
        self._stripped = False
        if self._activation in _IMPLICIT_DIM or (self._activation is not None and spec.output.kind == "logits"):
            image = noise(spec.input.channels, spec.input.height, spec.input.width)
            self._module, self._stripped = without_activation(self._module, self._activation, image)
        self._mean = _channels(spec.preprocess.mean)
        self._std = _channels(spec.preprocess.std)
        self._lanes = threading.local()
        self._numerics = _EXACT if exact else _FAST
        self._numerics_before: _Numerics | None = None
        if self._runtime is not None:
            self.options |= {"float16": float16, "device": str(self._device), "gpu": self._runtime.name(self._device)}
            self._enter_device()
        elif channels_last:
            # Module.to changes the module in place, and this one is the caller's.
            self._module = copy.deepcopy(self._module).to(memory_format=torch.channels_last)
        self._call: Callable[[Tensor], dict[str, Tensor]] = torch.compile(self._forward) if compiled else self._forward

    def _enter_device(self) -> None:
        self._numerics_before = _Numerics.now()
        self.options |= {
            "cudnn_benchmark": self._numerics.benchmark,
            "cudnn_deterministic": self._numerics.deterministic,
            "tf32": self._numerics.conv_tf32,
        }
        try:
            with _gpu_errors(self._device):
                self._module = copy.deepcopy(self._module).to(self._device)
                if self._channels_last:
                    self._module = self._module.to(memory_format=torch.channels_last)
                self._mean, self._std = self._mean.to(self._device), self._std.to(self._device)
        except DeviceError:
            self.close()
            raise

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`.

        Raises:
            InputError: not ``(N, H, W, C)`` of the contract's dtype and channels.
            BuildError: ``torch.compile`` failed.
            DeviceError: out of the GPU's memory.
        """
        return self.run_timed(images)[0]

    def run_timed(self, images: NDArray[Any]) -> tuple[Mapping[str, NDArray[Any]], StageTimes | None]:
        """Like :meth:`run`, and the times by the GPU's events; ``None`` on a CPU."""
        wanted = self.spec.input
        if images.dtype != wanted.dtype or images.ndim != 4 or images.shape[-1] != wanted.channels:
            raise InputError(
                f"got {images.dtype} {images.shape}; the model takes {wanted.dtype} (N, H, W, {wanted.channels})"
            )
        with torch.inference_mode():
            if self._runtime is not None:
                with _gpu_errors(self._device):
                    return self._run_on_device(self._runtime, images)
            # torch warns about arrays it could write to but must not; a copy of one image costs nothing here.
            owned = images if images.flags.writeable and images.flags.c_contiguous else images.copy(order="C")
            outputs = self._called(torch.from_numpy(owned))
            return {name: value.contiguous().numpy() for name, value in outputs.items()}, None

    def _called(self, images: Tensor) -> dict[str, Tensor]:
        try:
            return self._call(images)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            if not self._compiled:
                raise
            raise BuildError(
                f"torch.compile failed: {first_line(exc)}; it needs a C++ compiler, or run without it"
            ) from exc

    def _run_on_device(self, runtime: CudaRuntime, images: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], StageTimes]:
        """One batch through this thread's page-locked memory, on the stream all threads share."""
        lane: _Lane | None = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = _Lane(runtime)
        self._numerics.apply()  # the process's: another session may have set its own since
        start, copied, computed, done = lane.marks
        staged = lane.host(
            "image", torch.empty(images.shape, dtype=getattr(torch, self.spec.input.dtype), device="meta")
        )
        np.copyto(staged.numpy(), images)
        start.record()
        on_device = staged.to(self._device, non_blocking=True)
        copied.record()
        before = time.perf_counter()
        outputs = self._called(on_device)
        enqueue_ms = (time.perf_counter() - before) * 1e3
        computed.record()
        host = {name: lane.host(name, value).copy_(value, non_blocking=True) for name, value in outputs.items()}
        done.record()
        done.synchronize()
        times = StageTimes(
            h2d_ms=start.elapsed_time(copied),
            compute_ms=copied.elapsed_time(computed),
            d2h_ms=computed.elapsed_time(done),
            enqueue_ms=enqueue_ms,
        )
        return {name: value.numpy().copy() for name, value in host.items()}, times

    @property
    def gpu_bytes(self) -> int | None:
        """Most memory PyTorch has held on the GPU, without the CUDA context; ``None`` on a CPU."""
        return None if self._runtime is None else int(self._runtime.peak_bytes(self._device))

    def close(self) -> None:
        """Forget the model. The caller's :class:`LoadedModel` keeps it; the GPU keeps nothing."""
        self._call = _closed
        if self._runtime is not None:
            self._module, self._lanes = torch.nn.Identity(), threading.local()
            self._mean, self._std = self._mean.cpu(), self._std.cpu()
            if self._compiled:
                torch.compiler.reset()  # compiled code holds the weights it was made for
            self._runtime.release()
        if self._numerics_before is not None:
            self._numerics_before.apply()
            self._numerics_before = None
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self._device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            raw = self._module(self._normalize(images))
        main, *aux = raw if isinstance(raw, (tuple, list)) else (raw,)
        if self._autocast is not None:
            main, aux = main.float(), [head.float() for head in aux]
        outputs = self._outputs(main)
        if aux:
            outputs["aux_logits"] = aux[0]
        return outputs

    def _normalize(self, images: Tensor) -> Tensor:
        """NHWC RGB -> ``(clip(x) * scale - mean) / std``, NCHW in the network's channel order."""
        if self.spec.preprocess.channel_order == "bgr":
            images = images.flip(-1)
        memory = torch.channels_last if self._channels_last else torch.contiguous_format
        # A copy, of float32 too: what follows is done in place.
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory, copy=True)
        if self.spec.preprocess.clip is not None:
            x.clamp_(*self.spec.preprocess.clip)
        return x.mul_(self.spec.preprocess.scale).sub_(self._mean).div_(self._std)

    def _outputs(self, raw: Tensor) -> dict[str, Tensor]:
        kind = self.spec.output.kind
        output: dict[str, Tensor] = {}
        if kind == "logits":
            output[kind] = raw
        elif kind == "probabilities":
            output[kind] = self._probabilities(raw)
        else:
            output[kind] = self._mask(raw)
        if self._with_scores and kind == "mask":
            if self._activation is None:
                output["logits"] = raw
            else:
                output["probabilities"] = self._probabilities(raw)
        if self.spec.output.confidence:
            output["confidence"] = self._confidence(raw)
        return output

    def _mask(self, raw: Tensor) -> Tensor:
        if self.spec.model.task == "multiclass":
            return raw.argmax(dim=1).to(torch.uint16 if self.spec.mask_dtype == "uint16" else torch.uint8)
        above = (self._probabilities(raw) > self.spec.output.threshold).to(torch.uint8)
        return above[:, 0] if self.spec.model.task == "binary" else above

    def _probabilities(self, raw: Tensor) -> Tensor:
        """Probabilities from what the network returned; a model without activation gets its task's."""
        if self._activation is None:
            return raw.softmax(dim=1) if self.spec.model.task == "multiclass" else raw.sigmoid()
        if self._stripped:
            raw = APPLIED[ACTIVATIONS[self._activation]](raw)
        if self._activation == "logsoftmax":
            return raw.exp()
        return (raw + 1.0) / 2.0 if self._activation == "tanh" else raw

    def _confidence(self, raw: Tensor) -> Tensor:
        p = self._probabilities(raw)
        if self.spec.model.task == "multiclass":
            return p.amax(dim=1)
        p = torch.where(p > self.spec.output.threshold, p, 1.0 - p)
        return p[:, 0] if self.spec.model.task == "binary" else p


class _Lane:
    """One thread's page-locked memory and events."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self.marks = tuple(runtime.event() for _ in range(4))
        self._pin = runtime.pin
        self._host: dict[str, Tensor] = {}

    def host(self, name: str, like: Tensor) -> Tensor:
        """Memory for a tensor of the shape and type of ``like``; the same one as long as these stay."""
        known = self._host.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            known = self._host[name] = self._pin(torch.empty(like.shape, dtype=like.dtype))
        return known


@dataclass(frozen=True)
class _Numerics:
    """How the GPUs of this process multiply float32 and which kernels they take."""

    benchmark: bool
    deterministic: bool
    conv_tf32: bool
    matmul_precision: str

    @classmethod
    def now(cls) -> _Numerics:
        cudnn = torch.backends.cudnn
        return cls(cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision())

    def apply(self) -> None:
        cudnn = torch.backends.cudnn
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = self.benchmark, self.deterministic, self.conv_tf32
        torch.set_float32_matmul_precision(self.matmul_precision)


_FAST = _Numerics(benchmark=True, deterministic=False, conv_tf32=True, matmul_precision="high")
_EXACT = _Numerics(benchmark=False, deterministic=True, conv_tf32=False, matmul_precision="highest")


@contextmanager
def _gpu_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as exc:
        raise DeviceError(
            f"PyTorch has too little memory on {device}: {first_line(exc)}; close other programs on the GPU"
        ) from exc


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def _closed(_: Tensor) -> dict[str, Tensor]:
    raise BuildError("this PyTorch session was closed; make a new one")
