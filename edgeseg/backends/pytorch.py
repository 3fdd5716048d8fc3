"""The PyTorch model itself as a :class:`~edgeseg.backends.base.Session`: reference for accuracy, baseline for speed.

Written from the model's definition and not with the module that export uses, so that a mistake in what edgeseg puts
around the network shows up as disagreement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeseg.closing import Closing
from edgeseg.errors import BuildError, InputError
from edgeseg.spec import PipelineSpec

if TYPE_CHECKING:
    from edgeseg.convert.load import LoadedModel

# SMP makes these without a dimension, which PyTorch warns about on every call; applied here, over the classes.
_IMPLICIT_DIM = {"softmax", "logsoftmax"}
_NO_ACTIVATION = {None, "identity", "argmax", "argmax2d"}


class PyTorchSession(Closing):
    """Runs a loaded model in PyTorch: uint8 images in, the outputs of ``spec`` out.

    Args:
        loaded: the model.
        spec: input, preprocessing and output contract; the engine's own, so that names and dtypes are the same.
        channels_last: run in the ``channels_last`` memory format (same results up to rounding, usually faster on CPU).
        compiled: run through ``torch.compile``; the first call takes tens of seconds.
        bfloat16: run the network under bfloat16 autocast, which some CPUs multiply faster; its outputs are float32 again.
        threads: of PyTorch's intra-op pool, for the whole process until the session is closed; ``None`` leaves it. Recorded
            in :attr:`options`.
        with_scores: return what a mask is made of as well: ``logits``, or ``probabilities`` of a model with an
            activation; nothing of one that ends in an argmax.

    Raises:
        BuildError: ``torch.compile`` failed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        spec: PipelineSpec,
        *,
        channels_last: bool = False,
        compiled: bool = False,
        bfloat16: bool = False,
        threads: int | None = None,
        with_scores: bool = False,
    ) -> None:
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
        self._bfloat16 = bfloat16
        self._with_scores = with_scores
        self._module = loaded.module
        if channels_last:
            # Module.to changes the module in place, and this one is the caller's.
            self._module = copy.deepcopy(loaded.module).to(memory_format=torch.channels_last)
        self._activation = None if spec.model.activation in _NO_ACTIVATION else spec.model.activation
        self._stripped = False
        if self._activation in _IMPLICIT_DIM or (self._activation is not None and spec.output.kind == "logits"):
            from edgeseg.convert.heads import without_activation

            side = (spec.input.height, spec.input.width)
            noise = torch.rand(1, spec.input.channels, *side, generator=torch.Generator().manual_seed(0))
            self._module, self._stripped = without_activation(self._module, self._activation, noise)
        self._mean = _channels(spec.preprocess.mean)
        self._std = _channels(spec.preprocess.std)
        self._call: Callable[[Tensor], dict[str, Tensor]] = torch.compile(self._forward) if compiled else self._forward

    def run(self, images: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`.

        Raises:
            InputError: not uint8 ``(N, H, W, C)`` of the model's channels.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != self.spec.input.channels:
            raise InputError(
                f"got {images.dtype} {images.shape}; the model takes uint8 (N, H, W, {self.spec.input.channels})"
            )
        # torch warns about arrays it could write to but must not; a copy of one image costs nothing here.
        owned = images if images.flags.writeable and images.flags.c_contiguous else images.copy(order="C")
        with torch.inference_mode():
            try:
                outputs = self._call(torch.from_numpy(owned))
            except RuntimeError as exc:
                if not self._compiled:
                    raise
                first = str(exc).strip().splitlines()[0]
                raise BuildError(f"torch.compile failed: {first}; it needs a C++ compiler, or run without it") from exc
            return {name: value.contiguous().numpy() for name, value in outputs.items()}

    def close(self) -> None:
        """Forget the model. The caller's :class:`LoadedModel` keeps it."""
        self._call = _closed
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
            self._threads_before = None

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            raw = self._module(self._normalize(images))
        main, *aux = raw if isinstance(raw, (tuple, list)) else (raw,)
        if self._bfloat16:
            main, aux = main.float(), [head.float() for head in aux]
        outputs = self._outputs(main)
        if aux:
            outputs["aux_logits"] = aux[0]
        return outputs

    def _normalize(self, images: Tensor) -> Tensor:
        """uint8 NHWC RGB -> ``(x * scale - mean) / std``, NCHW in the network's channel order."""
        if self.spec.preprocess.channel_order == "bgr":
            images = images.flip(-1)
        memory = torch.channels_last if self._channels_last else torch.contiguous_format
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory)
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
        if self._with_scores and kind == "mask" and raw.ndim == 4:
            output["logits" if self._activation is None else "probabilities"] = (
                raw if self._activation is None else self._probabilities(raw)
            )
        if self.spec.output.confidence:
            output["confidence"] = self._confidence(raw)
        return output

    def _mask(self, raw: Tensor) -> Tensor:
        if self.spec.model.task == "multiclass":
            # An argmax activation inside the model has left class indices already.
            indices = raw if raw.ndim == 3 else raw.argmax(dim=1)
            return indices.to(torch.uint16 if self.spec.mask_dtype == "uint16" else torch.uint8)
        above = (self._probabilities(raw) > self.spec.output.threshold).to(torch.uint8)
        return above[:, 0] if self.spec.model.task == "binary" else above

    def _probabilities(self, raw: Tensor) -> Tensor:
        """Probabilities from what the network returned; a model without activation gets its task's."""
        if self._activation is None:
            return raw.softmax(dim=1) if self.spec.model.task == "multiclass" else raw.sigmoid()
        if self._stripped:
            raw = _activate(raw, self._activation)
        if self._activation == "logsoftmax":
            return raw.exp()
        return (raw + 1.0) / 2.0 if self._activation == "tanh" else raw

    def _confidence(self, raw: Tensor) -> Tensor:
        p = self._probabilities(raw)
        if self.spec.model.task == "multiclass":
            return p.amax(dim=1)
        p = torch.where(p > self.spec.output.threshold, p, 1.0 - p)
        return p[:, 0] if self.spec.model.task == "binary" else p


def _activate(logits: Tensor, name: str) -> Tensor:
    """What the activation that was taken off would have returned."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid,
        "softmax": lambda x: x.softmax(dim=1),
        "softmax2d": lambda x: x.softmax(dim=1),
        "logsoftmax": lambda x: x.log_softmax(dim=1),
        "tanh": torch.tanh,
        "clamp": lambda x: x.clamp(0.0, 1.0),
    }
    return activations[name](logits)


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def _closed(_: Tensor) -> dict[str, Tensor]:
    raise BuildError("this PyTorch session was closed; make a new one")
