"""Modules that return more than one map, or probabilities instead of logits: found out by running them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgeseg.convert import architectures
from edgeseg.convert.geometry import PROBE_SIZES, run_raw
from edgeseg.errors import SpecError

if TYPE_CHECKING:
    import torch

# What torchvision, transformers and others call the map in a mapping of outputs.
_MAP_KEYS = ("out", "logits", "masks", "mask", "pred", "sem_seg")


def adapt_outputs(module: torch.nn.Module, channels: int, *, keep_aux: bool) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return a module whose output is the map alone (with a kept auxiliary output: a tuple, map first), and notes.

    Args:
        module: in evaluation mode.
        channels: of its input image.
        keep_aux: keep a second output of shape ``(N, K)``.

    Raises:
        SpecError: it runs at no size tried, or returns no float map.
    """
    torch = architectures.import_for_conversion("torch")
    output = None
    reason = ""
    for side in PROBE_SIZES:
        output, reason = run_raw(module, channels, side, side)
        if output is not None:
            break
    if output is None:
        raise SpecError(
            f"the {type(module).__name__} does not run on images of {channels} channels and {PROBE_SIZES[0]} to "
            f"{PROBE_SIZES[-1]} pixels ({reason}); it must take float32 (N, C, H, W)"
        )
    if isinstance(output, torch.Tensor):
        return module, _checked(module, output)
    if isinstance(output, Mapping):
        key = next((k for k in _MAP_KEYS if k in output), next(iter(output), None))
        _checked(module, output.get(key))
        return _choose(module, key), (f"output {key!r} of the module is converted, its others are dropped",)
    if isinstance(output, (tuple, list)) and output:
        _checked(module, output[0])
        auxiliary = len(output) == 2 and isinstance(output[1], torch.Tensor) and output[1].dim() == 2
        if keep_aux and auxiliary:
            return module, ()
        return _choose(module, 0), (f"the first of the module's {len(output)} outputs is converted, the rest dropped",)
    raise SpecError(f"the {type(module).__name__} returns a {type(output).__name__}; it must return (N, classes, H, W)")


def _checked(module: torch.nn.Module, output: Any) -> tuple[str, ...]:
    shape = tuple(output.shape) if hasattr(output, "shape") else type(output).__name__
    if not hasattr(output, "is_floating_point") or output.dim() != 4 or not output.is_floating_point():
        kind = str(getattr(output, "dtype", "")).removeprefix("torch.")
        raise SpecError(
            f"{type(module).__name__} returns {kind} {shape}; it must return floats (N, classes, H, W), before argmax"
        )
    return ()


def _choose(module: torch.nn.Module, key: Any) -> torch.nn.Module:
    import torch

    class ChosenOutput(torch.nn.Module):
        """One of the outputs of ``network``."""

        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            chosen: torch.Tensor = self.network(image)[key]
            return chosen

    return ChosenOutput().eval()


def observed_activation(module: torch.nn.Module, channels: int, size: tuple[int, int]) -> str | None:
    """Tell by the values whether a module ends in a softmax or a sigmoid; ``None`` when neither fits."""
    import torch

    output, _ = run_raw(module, channels, *size)
    if isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.min() < 0 or output.max() > 1:
        return None
    sums = output.sum(dim=1)
    return "softmax" if output.shape[1] > 1 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3) else "sigmoid"
