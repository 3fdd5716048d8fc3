"""Which image sizes a model can take: found by its own rule, then by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgeseg.convert.onnx_network import OnnxNetwork
from edgeseg.errors import SpecError, one_line
from edgeseg.silence import without_warnings
from edgeseg.spec import nearest_size

DEFAULT_PIXELS = 256
_CUSTOM_STRIDES = (1, 2, 4, 8, 16, 32, 64)
PROBE_SIZES = (64, 128, 224, 256, 384, 512)


def noise(channels: int, height: int, width: int) -> torch.Tensor:
    """One random image, always the same: float32 ``(1, channels, height, width)`` in [0, 1]."""
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def run_raw(module: Callable[..., Any], image: torch.Tensor) -> tuple[Any, str]:
    """Run a model: whatever it returned and "", or ``None`` and the reason in a few words."""
    try:
        with torch.no_grad(), without_warnings():
            return module(image), ""
    except Exception as exc:  # a user's forward may raise anything; all of it means "does not take this image"
        return None, one_line(exc)


def first_of(output: Any) -> Any:
    """The map, which a model returns alone or first in a tuple or list."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def run_on(module: Callable[..., Any], image: torch.Tensor) -> torch.Tensor | None:
    """Return the first output tensor for ``image``, ``None`` when the model cannot take it."""
    output = first_of(run_raw(module, image)[0])
    return output if isinstance(output, torch.Tensor) else None


def classes_at(module: torch.nn.Module, channels: int, height: int, width: int) -> int | None:
    """Number of output channels where the model runs at a size and returns a map of that size; else ``None``."""
    output = run_on(module, noise(channels, height, width))
    fits = output is not None and output.dim() == 4 and tuple(output.shape[2:]) == (height, width)
    return int(output.shape[1]) if output is not None and fits else None


def accepts(module: torch.nn.Module, channels: int, height: int, width: int) -> bool:
    """Whether the model runs at a size and returns a map of that size."""
    return classes_at(module, channels, height, width) is not None


def larger_size(runs: Callable[[int, int], bool], height: int, width: int, stride: int) -> tuple[int, int] | None:
    """A larger size at which a model runs, the smallest whose shorter side decides; ``None`` up to 512 pixels."""
    sides = range((min(height, width) // stride + 1) * stride, PROBE_SIZES[-1] + 1, stride)
    return next((size for s in sides if runs(*(size := (max(s, height), max(s, width))))), None)


def exported_shape(module: torch.nn.Module) -> tuple[int | None, ...]:
    """``(N, C, H, W)`` of the image that a graph of ``torch.export`` or an ONNX file takes, ``None`` for what it leaves open.

    All is open of a module that is neither.
    """
    if isinstance(module, OnnxNetwork):
        return tuple(module.image_shape)
    graph = getattr(module, "graph", None)  # of many classes of torch; a user's own may be anything
    for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
        given: Any = getattr(node.meta.get("val"), "shape", ()) if node.op == "placeholder" else ()
        if len(given) == 4:
            return tuple(side if type(side) is int else None for side in given)
    return (None,) * 4


def exported_size(module: torch.nn.Module) -> tuple[int, int] | None:
    """Height and width of that image, ``None`` where one of them is open."""
    height, width = exported_shape(module)[2:]
    return None if height is None or width is None else (height, width)


def smp_size_multiple(module: torch.nn.Module, channels: int) -> int:
    """Return what height and width must be multiples of, for an SMP model.

    SMP checks its rule (the encoder's output stride) itself, but not while a model is traced. The rule is not the whole
    truth for two architectures, so there it is tried on a small image: Unet has none, since its decoder resizes to
    the skip connections; DPT's decoder halves the patch grid, so the grid must be even.
    """
    encoder: Any = module.encoder
    rule = int(encoder.output_stride)
    if not getattr(module, "requires_divisible_input_shape", True):
        return 1 if accepts(module, channels, 2 * rule + 1, 3 * rule - 5) else rule
    if type(encoder).__name__ == "TimmViTEncoder" and not accepts(module, channels, 3 * rule, 5 * rule):
        return 2 * rule
    return rule


def smp_fixed_size(
    module: torch.nn.Module, channels: int, stride: int, img_size: int | Sequence[int] | None
) -> tuple[int, int] | None:
    """Return the only size a timm encoder takes, ``None`` when there is no such limit.

    timm marks encoders whose *weights* are for one size; whether the built module insists on it (windows, position
    embeddings) depends on its arguments, so a marked encoder is tried at another size.
    """
    native = smp_native_size(module, img_size)
    if native is None:
        return None
    # A small size first, since it costs little; PAN needs more than 128 pixels, so one failure is no proof.
    others = ((5 * stride, 7 * stride), (native[0] + 2 * stride, native[1] + 4 * stride))
    return None if any(accepts(module, channels, *other) for other in others) else native


def smp_native_size(module: torch.nn.Module, img_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """The size that a timm encoder marked as made for one was built for; ``None`` for any other encoder."""
    encoder: Any = module.encoder
    settings = getattr(getattr(encoder, "model", None), "pretrained_cfg", None) or {}
    if not settings.get("fixed_input_size", False):
        return None
    given = (img_size, img_size) if isinstance(img_size, int) else img_size
    sizes = (getattr(part, "img_size", None) for part in encoder.modules())
    built = next((size for size in sizes if isinstance(size, (tuple, list)) and len(size) == 2), None)
    height, width = built or given or settings["input_size"][-2:]
    return int(height), int(width)


def default_size(stride: int, fixed: tuple[int, int] | None) -> tuple[int, int]:
    """Return 256x256, or the nearest size the model takes."""
    return nearest_size(DEFAULT_PIXELS, DEFAULT_PIXELS, stride) if fixed is None else fixed


def custom_geometry(
    module: torch.nn.Module, channels: int, fixed: tuple[int, int] | None = None
) -> tuple[int, tuple[int, int], int]:
    """Find out by running it what sizes a module takes; ``fixed``: the only height and width it can be.

    Returns:
        the size multiple, a size it takes, and its number of output channels.

    Raises:
        SpecError: it runs at no size tried, or does not return ``(N, C, H, W)`` of the input's size.
    """
    if fixed is not None and (classes := classes_at(module, channels, *fixed)) is not None:
        return 1, fixed, classes
    tried = ((side, classes_at(module, channels, side, side)) for side in PROBE_SIZES)
    base, classes = next(((side, seen) for side, seen in tried if seen is not None), (0, None))
    if classes is None:
        output = run_on(module, noise(channels, DEFAULT_PIXELS, DEFAULT_PIXELS))
        got = "does not run at 256x256" if output is None else f"returns {tuple(output.shape)} for 256x256"
        raise SpecError(f"the module {got}; it must return (N, classes, H, W) of the height and width of its input")
    for stride in _CUSTOM_STRIDES:
        # Odd multiples: an even one would also be a multiple of the next stride.
        if accepts(module, channels, base + stride, base + 3 * stride):
            return stride, default_size(stride, None), classes
    return base, (base, base), classes
