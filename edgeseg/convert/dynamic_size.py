"""Models of dynamic size: which sizes one graph can serve, and padding that is the same at all of them.

torch.export follows the one path that a model's code takes at the size it is traced with. Code that asks for the size
(MobileViT resizes features whose side is odd, TinyViT pads its windows) takes another path at another size, and the
graph is wrong there without a word. So the path is compared at several sizes before the export.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.convert.geometry import first_of, larger_size
from edgeseg.convert.loaded import LoadedModel
from edgeseg.errors import SpecError
from edgeseg.silence import without_warnings
from edgeseg.spec import InputSpec, nearest_size

_MULTIPLES = (1, 2, 4)


@dataclass(frozen=True)
class DynamicSizes:
    """Sizes that one graph serves, pixels.

    Attributes:
        stride: height and width must be multiples of this.
        min_size: smallest height and width.
        notes: where that is less than the model itself takes.
    """

    stride: int
    min_size: tuple[int, int]
    notes: tuple[str, ...] = ()


def dynamic_sizes(loaded: LoadedModel, height: int, width: int) -> DynamicSizes:
    """Find the sizes at which ``loaded`` does the same as at ``height`` x ``width``, by running it.

    Raises:
        SpecError: it takes one size only, or its code does something else at every other size.
    """
    module, channels, name = loaded.module, loaded.model.in_channels, loaded.model.display_name
    if loaded.fixed_size is not None:
        raise SpecError(
            f"{loaded.model.encoder} takes {loaded.fixed_size[0]}x{loaded.fixed_size[1]} only; leave --dynamic-size out"
        )
    stride = loaded.stride
    if _same_padded(module):
        stride = math.lcm(stride, int(getattr(getattr(module, "encoder", None), "output_stride", 32)))
    own = _path(module, channels, height, width)
    if own is None:
        size = larger_size(lambda h, w: _path(module, channels, h, w) is not None, height, width, stride)
        least = "" if size is None else f", it needs at least {size[0]}x{size[1]}; give that as --size"
        raise SpecError(f"{name} does not take {height}x{width} images{least}")
    for step in (stride * multiple for multiple in _MULTIPLES):
        # Odd and even multiples of the step, unequal for height and width.
        others = ((height + step, width + 2 * step), (height + 2 * step, width + 3 * step))
        if all(_path(module, channels, *other) == own for other in others):
            break
    else:
        raise SpecError(
            f"{name} cannot have a dynamic size: its code does something else at {height}x{width} than at other sizes, and a "
            f"graph holds one of the two; build it with --size HxW and without --dynamic-size"
        )
    if height % step or width % step:
        near = nearest_size(height, width, step)
        raise SpecError(
            f"size {height}x{width} does not fit {name} with --dynamic-size: its code does the same at multiples of {step} only; "
            f"nearest is {near[0]}x{near[1]}"
        )
    notes: tuple[str, ...] = ()
    if step != loaded.stride:
        notes = (f"dynamic size: any multiple of {step} (with a static size, of {loaded.stride}); others are padded",)
    sides = range(step, min(height, width), step)
    side = next((s for s in sides if _path(module, channels, s, s) == own), min(height, width))
    return DynamicSizes(step, (side, side), notes)


def _path(module: torch.nn.Module, channels: int, height: int, width: int) -> list[str] | None:
    """Names of the torch functions a model calls for an image of a size, in order; ``None`` where it returns no map of it."""
    calls = _calls(module, channels, height, width)
    return None if calls is None else [name for name, _ in calls]


def _calls(module: torch.nn.Module, channels: int, height: int, width: int) -> list[tuple[str, Any]] | None:
    """As :func:`_path`, each with what it pads by, if it pads."""
    called: list[tuple[str, Any]] = []

    class Listener(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", str(func))
            padding = (kwargs or {}).get("pad", args[1] if len(args) > 1 else None) if name == "pad" else None
            called.append((name, padding))
            return func(*args, **(kwargs or {}))

    image = torch.zeros(1, channels, height, width)
    try:
        with Listener(), torch.no_grad(), without_warnings():
            output: Any = module(image)
    except Exception:  # a model may refuse a size with any error
        return None
    return called if tuple(first_of(output).shape[-2:]) == (height, width) else None


def pads_by_size(module: torch.nn.Module, spec: InputSpec) -> bool:
    """Whether ``module`` pads by amounts that depend on the image's size, as attention in windows of 7 does."""
    step = spec.stride
    sizes = [(spec.height + rows * step, spec.width + columns * step) for rows, columns in ((0, 0), (1, 2), (2, 3))]
    calls = [_calls(module, spec.channels, *size) or [] for size in sizes]
    first, *others = ([padding for name, padding in made if name == "pad"] for made in calls)
    return any(other != first for other in others)


def constant_same_padding(module: torch.nn.Module, channels: int, stride: int) -> torch.nn.Module:
    """Return a copy of ``module`` with TensorFlow's "SAME" padding as constants, for images that are multiples of ``stride``.

    SAME padding depends on the size of a layer's input modulo the layer's stride. torch.export carries this along as a symbolic
    expression that doubles with every layer: an export of seconds takes many minutes. Where the input is a multiple of
    the layer's stride, which the image's stride decides, it is a constant.

    The module itself is returned when it has no such layer. A layer whose input is no whole fraction of the image
    stays as it is.
    """
    if not _same_padded(module):
        return module
    copied: Any = copy.deepcopy(module)
    # Unequal, so that a layer's reduction is known on both axes; large enough for every decoder.
    height, width = 8 * stride, 9 * stride
    sizes: dict[Any, tuple[int, int]] = {}

    def note(layer: Any, inputs: tuple[Any, ...]) -> None:
        sizes[layer] = tuple(inputs[0].shape[-2:])

    hooks = [layer.register_forward_pre_hook(note) for layer in _same_padded(copied)]
    with torch.no_grad(), without_warnings():
        copied(torch.zeros(1, channels, height, width))
    for hook in hooks:
        hook.remove()
    for layer, given in sizes.items():
        if (padding := _padding(layer, (height, width), given, stride)) is not None:
            _take_as_it_is(layer)
            layer.register_forward_pre_hook(_pads(padding, -math.inf if isinstance(layer, nn.MaxPool2d) else 0.0))
    return copied  # type: ignore[no-any-return]


def _padding(
    layer: Any, image: tuple[int, int], given: tuple[int, int], stride: int
) -> tuple[int, int, int, int] | None:
    """Left, right, top and bottom padding of ``layer``, which got ``given`` rows and columns of ``image``'s.

    ``None`` where it depends on the image's size.
    """
    to_2tuple = import_for_conversion("timm.layers").to_2tuple
    step, kernel, dilation = (to_2tuple(getattr(layer, name, 1)) for name in ("stride", "kernel_size", "dilation"))
    reduction = image[0] // given[0]
    whole = all(side * reduction == full for side, full in zip(given, image, strict=True))
    if not whole or any(stride % (reduction * s) for s in step):
        return None
    rows, columns = (max((k - 1) * d + 1 - s, 0) for k, s, d in zip(kernel, step, dilation, strict=True))
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def _pads(sides: tuple[int, int, int, int], value: float) -> Callable[[Any, tuple[Any, ...]], Any]:
    return lambda layer, inputs: nn.functional.pad(inputs[0], sides, value=value)


def _same_padded(module: torch.nn.Module) -> list[Any]:
    """The layers of timm that compute their padding from their input's size."""
    layers, pools = import_for_conversion("timm.layers"), import_for_conversion("timm.layers.pool2d_same")
    plain = (layers.Conv2dSame, pools.MaxPool2dSame, pools.AvgPool2dSame)
    flagged = (layers.StdConv2dSame, layers.ScaledStdConv2dSame)
    return [m for m in module.modules() if isinstance(m, plain) or (isinstance(m, flagged) and m.same_pad)]


def _take_as_it_is(layer: Any) -> None:
    """Let ``layer`` pad no more: it becomes one of torch's class, with the same parameters."""
    if hasattr(layer, "same_pad"):
        layer.same_pad = False
    else:
        layer.__class__ = next(kind for kind in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d) if isinstance(layer, kind))
        layer.padding = (0, 0)
