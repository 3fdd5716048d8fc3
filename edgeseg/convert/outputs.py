"""Modules that return more than one map, or probabilities instead of logits: found out by running them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgeseg.convert.geometry import PROBE_SIZES, first_of, noise, run_raw
from edgeseg.convert.onnx_network import OnnxNetwork
from edgeseg.errors import SpecError
from edgeseg.silence import without_warnings

# What torchvision, transformers and others call the map in a mapping of outputs.
_MAP_KEYS = ("out", "logits", "masks", "mask", "pred", "sem_seg")


def adapt_outputs(
    module: torch.nn.Module, channels: int, fixed: tuple[int, int] | None, *, keep_aux: bool
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return a module whose output is the map alone (with a kept auxiliary output: a tuple, map first), and notes.

    Args:
        module: in evaluation mode.
        channels: of its input image.
        fixed: the only height and width it can be.
        keep_aux: keep a second output of shape ``(N, K)``.

    Raises:
        SpecError: it runs at no size tried, or returns no float map.
    """
    output = None
    reason = ""
    for size in ((side, side) for side in PROBE_SIZES) if fixed is None else (fixed,):
        output, reason = run_raw(module, noise(channels, *size))
        if output is not None:
            break
    if output is None:
        raise SpecError(
            f"the {type(module).__name__} does not run on images of {channels} channels and {PROBE_SIZES[0]} to "
            f"{PROBE_SIZES[-1]} pixels ({reason}); it must take float32 (N, C, H, W); if it takes one size only, give --size; "
            "where it makes channels of its own, in_channels says how many its image has"
        )
    if isinstance(output, torch.Tensor):
        _checked(module, output)
        return module, ()
    if isinstance(output, Mapping):
        key = _place_of_map(output, (*(k for k in _MAP_KEYS if k in output), *output), size)
        _checked(module, output.get(key))
        return _choose(module, key), (f"output {key!r} of the module is converted, its others are dropped",)
    if isinstance(output, (tuple, list)) and output:
        place = _place_of_map(output, range(len(output)), size)
        _checked(module, output[place])
        auxiliary = len(output) == 2 and isinstance(output[1], torch.Tensor) and output[1].dim() == 2
        if keep_aux and auxiliary:
            return module, ()
        which = "the first" if place == 0 else f"number {place + 1}"
        return _choose(module, place), (
            f"{which} of the module's {len(output)} outputs is converted, the rest dropped",
        )
    raise SpecError(f"the {type(module).__name__} returns a {type(output).__name__}; it must return (N, classes, H, W)")


def _place_of_map(output: Any, places: Iterable[Any], size: tuple[int, int]) -> Any:
    """The first of the places where a map of the image's size is; the first of all where none is one."""
    tried = list(places)
    sizes = {place: tuple(getattr(output[place], "shape", ()))[2:] for place in tried}
    return next((place for place in tried if sizes[place] == size), tried[0] if tried else None)


def _checked(module: torch.nn.Module, output: Any) -> None:
    shape = tuple(output.shape) if hasattr(output, "shape") else type(output).__name__
    if not hasattr(output, "is_floating_point") or output.dim() != 4 or not output.is_floating_point():
        kind = str(getattr(output, "dtype", "")).removeprefix("torch.")
        raise SpecError(
            f"{type(module).__name__} returns {kind} {shape}; it must return floats (N, classes, H, W), before argmax"
        )
    if output.dtype == torch.bfloat16:
        raise SpecError(
            f"{type(module).__name__} computes in bfloat16 (an autocast in its forward?), of which no engine is made: let it "
            "compute in float32; --precision says what an engine computes in"
        )


def _choose(module: torch.nn.Module, key: Any) -> torch.nn.Module:
    class ChosenOutput(torch.nn.Module):
        """One of the outputs of ``network``."""

        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            chosen: torch.Tensor = self.network(image)[key]
            return chosen

    return ChosenOutput().eval()


@dataclass(frozen=True)
class Ending:
    """What a module's output ends in, told by its last operator and its values.

    Attributes:
        activation: SMP's name, ``None`` for raw scores.
        sure: whether that can be told: ``False`` for values in 0..1 that no known operator explains, and for what is
            computed from an activation, such as 255 times a sigmoid.
        low, high: least and largest value.
    """

    activation: str | None
    sure: bool
    low: float
    high: float


def output_ending(module: torch.nn.Module, inputs: torch.Tensor) -> Ending:
    """Find out whether a module returns raw scores or the result of an activation.

    Args:
        module: returns ``(N, classes, H, W)``, or a tuple that starts with it.
        inputs: what it gets from real images, float32 ``(N, C, H, W)``.
    """
    own_end = module.end if isinstance(module, OnnxNetwork) else None
    with torch.enable_grad(), without_warnings():
        output = first_of(module(inputs.clone().requires_grad_(own_end is None)))
    end = output.grad_fn if own_end is None else own_end
    values = output.detach()
    low, high = float(values.min()), float(values.max())
    shares = values.shape[1] > 1 and _sums_to_one(values)
    log_shares = values.shape[1] > 1 and high <= 0 and _sums_to_one(values.exp())
    name = _last_operator(end)
    last = "clamp" if name in ("Clip", "Hardtanh") else name.lower()
    if last == "softmax" and not shares:
        return Ending(None, False, low, high)  # over another axis than the classes
    if shares or log_shares:
        return Ending("softmax" if shares else "logsoftmax", True, low, high)
    within = low >= 0 and high <= 1
    if last in ("sigmoid", "tanh") or (last == "clamp" and within):
        return Ending(last, True, low, high)
    return Ending(None, not within and not _is_of_activations(end), low, high)


# Operators as autograd calls them, without the word Backward and what follows it, and as ONNX does.
# Between an activation and the output these change no value, or only blend neighbours.
_KEEPS_RANGE = frozenset(
    ("Alias", "AsStrided", "Clone", "Contiguous", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")
    + ("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest2D", "View")
    + ("Identity", "Cast", "Reshape", "Resize", "QuantizeLinear", "DequantizeLinear")
)
_BOUNDED = frozenset(("Sigmoid", "Softmax", "LogSigmoid", "Hardsigmoid", "HardSigmoid", "Tanh"))
_ARITHMETIC = frozenset(("Add", "Div", "Exp", "Log", "Mul", "Neg", "Pow", "Rsub", "Sub"))


def _is_of_activations(end: Any) -> bool:
    """Whether nothing but arithmetic lies between activations and an autograd node, or what stands for one."""
    seen, ahead = set(), [end]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        name = "" if node is None else _name_of(node)
        if name in _BOUNDED:
            continue
        before = [n for n, _ in node.next_functions if n is not None] if name in _ARITHMETIC | _KEEPS_RANGE else []
        if not before:
            return False
        ahead.extend(before)
    return True


def _name_of(node: Any) -> str:
    name: str = node.name().split("::")[-1].split("Backward")[0]
    return name


def _last_operator(end: Any) -> str:
    """Name of the operator that made the values of a node's output, ``""`` where autograd was switched off."""
    node = end
    while node is not None:
        name = _name_of(node)
        if name not in _KEEPS_RANGE or not node.next_functions:
            return name
        node = node.next_functions[0][0]
    return ""


def _sums_to_one(values: torch.Tensor) -> bool:
    sums = values.sum(dim=1)
    return bool(values.min() >= 0) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
