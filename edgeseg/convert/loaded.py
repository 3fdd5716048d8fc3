"""The result of loading: a model ready for export, and everything that is known about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from edgeseg.convert.architectures import name_softmax_axis
from edgeseg.convert.saved_preprocessing import Fitting, SavedPreprocessing
from edgeseg.errors import SpecError
from edgeseg.spec import ModelSpec, Preprocess, nearest_size
from edgeseg.store.manifest import WeightsOrigin

if TYPE_CHECKING:
    import torch

    from edgeseg.convert.fake_quantizers import Reading

ImageSource: TypeAlias = "Callable[[int], Sequence[NDArray[Any]]]"
"""Given the number of channels: a few of the user's images, ``(H, W, C)`` of any size; empty when there are none."""


def no_images(_: int) -> Sequence[NDArray[Any]]:
    """An :data:`ImageSource` for where the user gave none."""
    return ()


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for export: evaluation mode, float32, no gradients.

    Attributes:
        module: forward takes normalized float32 ``(N, C, H, W)`` and returns the network's raw output
            ``(N, classes, H, W)``, SMP's activation included; with a kept auxiliary head, a tuple with ``(N, K)``
            second.
        model: what it is.
        preprocess: how its input is normalized.
        weights: where the weights came from, in words.
        weights_sha256: of the values, whatever file they came in; see :func:`hash_weights`.
        stride: height and width must be multiples of this.
        size: height and width it was made for, pixels; a default to build with.
        notes: everything assumed, stripped or dropped, a sentence each, for the user.
        is_demo: these are the shipped demo weights.
        fixed_size: the only height and width its encoder takes, or ``None``.
        saved: the preprocessing that was saved beside the weights.
        fitting: how it brings images to the engine, once it is settled with the user's size and fit policy.
        origin: the hub's repository or the model card beside the weights.
        trained: the fake-quantizers of ``module``, :class:`~edgeseg.convert.fake_quantizers.FakeQuantizer` all, where it was
            trained with them.
        users_module: an object of the user's: neither ``model`` nor the weights tell what its code computes, so nothing
            made of it may be found again by them.
        fixed_batch: the only number of images it takes at a time, or ``None``.
        onnx_bytes: size of the ONNX file that is the model; ``None`` of any other.
    """

    module: torch.nn.Module
    model: ModelSpec
    preprocess: Preprocess
    weights: str
    weights_sha256: str
    stride: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()
    is_demo: bool = False
    fixed_size: tuple[int, int] | None = None
    users_module: bool = False
    saved: SavedPreprocessing | None = None
    origin: WeightsOrigin | None = None
    fitting: Fitting = field(default_factory=Fitting)
    trained: Reading | None = None
    fixed_batch: int | None = None
    onnx_bytes: int | None = None

    @property
    def reference(self) -> str:
        """What its engines are compared with, for the user."""
        return "PyTorch" if self.onnx_bytes is None else "the ONNX file"

    @property
    def size_bytes(self) -> int:
        """Of its parameters, or of the file."""
        own = sum(p.numel() * p.element_size() for p in self.module.parameters())
        return own if self.onnx_bytes is None else self.onnx_bytes

    def as_timed(self) -> LoadedModel:
        """The same as a user runs it: without fake-quantizers, which cost time that only training spends; an ONNX file as
        ONNX Runtime runs it by default."""
        if self.onnx_bytes is None:
            return self.in_float()
        timed: Any = self.module
        return replace(self, module=timed.as_timed())

    def in_float(self) -> LoadedModel:
        """The same with its fake-quantizers off."""
        if self.trained is None:
            return self
        from edgeseg.convert.fake_quantizers import switched_off

        return replace(self, module=switched_off(self.module), trained=None)

    @property
    def has_own_size(self) -> bool:
        """Whether ``size`` is one the model was made for, not a default."""
        return self.is_demo or self.fixed_size is not None or self.fitting.size is not None

    def check_size(self, height: int, width: int) -> None:
        """Raise :class:`SpecError` unless the model takes images of this size, naming one that fits."""
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            only = f"{self.fixed_size[0]}x{self.fixed_size[1]}"
            what = f"{self.model.encoder} takes {only} only, got {height}x{width}"
            raise SpecError(
                f"{what}; give --size {only}{'' if self.model.arch == 'custom' else ', or --model-arg img_size=N'}"
            )
        if height % self.stride or width % self.stride:
            near = nearest_size(height, width, self.stride)
            raise SpecError(
                f"size {height}x{width} does not fit {self.model.display_name}: multiples of {self.stride} do; "
                f"nearest is {near[0]}x{near[1]}"
            )


def hash_weights(module: torch.nn.Module) -> str:
    """SHA-256 over the sorted (name, dtype, shape, bytes) of a state dict.

    The counters ``num_batches_tracked`` are left out: they take no part in inference, and not every format keeps them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        values = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def hash_structure(module: torch.nn.Module) -> str:
    """SHA-256 over every submodule's name, class and plain attributes, and the buffers its state dict leaves out.

    Beside the weights, what decides an SMP model's results: padding, eps, dilation, activations. Complete for classes of
    one installed version only, since it knows no code.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        plain = {k: v for k, v in sorted(vars(part).items()) if is_plain(v)}
        digest.update(f"{name} {type(part).__module__}.{type(part).__qualname__} {plain!r}\n".encode())
    kept = module.state_dict().keys()
    for name, buffer in sorted(module.named_buffers()):
        if name not in kept:
            digest.update(
                f"{name} {tuple(buffer.shape)}\n".encode() + buffer.detach().cpu().contiguous().numpy().tobytes()
            )
    return digest.hexdigest()


def is_plain(value: object) -> bool:
    """Whether ``value`` is a word or number, or a list of such."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def freeze(module: torch.nn.Module) -> None:
    """Bring a filled model into the state :class:`LoadedModel` promises, in place."""
    module.float().eval().requires_grad_(False)
    name_softmax_axis(module)
