"""Fake-quantizers in edgeseg's own terms: one class, whatever tool a module was trained with.

:mod:`edgeseg.convert.training_tools` puts it in the place of every tool's own; it computes the same, can be switched off, and
leaves a mark in an exported graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgeseg.errors import SpecError
from edgeseg.graph.grid import Grid
from edgeseg.silence import silenced

Mode = Literal["on", "weights", "marked", "off"]

DOMAIN, MARK = "edgeseg", "FakeQuantizer"

TOLERANCE = 0.02
"""Mean difference of the outputs, relative to their mean magnitude, that rounding ties may make between a module and what was
read of it; a quantizer that was read wrongly makes more."""


class FakeQuantizer(nn.Module):
    """Rounds a tensor as the module it stands for did.

    Modes: ``on`` rounds; ``weights`` rounds weights only; ``marked`` the same and leaves a mark for activations in the graph
    that is exported; ``off`` returns what it was given.

    Args:
        scale: float32, one, or one per channel.
        zero_point: int32 of the same shape.
        low, high: smallest and largest integer.
        axis: of the channels; ``None`` for one scale.
    """

    scale: Tensor
    zero_point: Tensor
    rounded: Tensor | None

    def __init__(self, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().reshape(-1).clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).reshape(-1).clone())
        self.low, self.high, self.axis = low, high, axis
        self.mode: Mode = "on"
        self.is_activation: bool | None = None
        # Of a weight: what it is rounded to.
        self.register_buffer("rounded", None, persistent=False)
        single = self.scale.numel() == 1
        self.grid = Grid(float(self.scale), int(self.zero_point), low, high) if single else None
        """``None`` with a scale per channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, or mark it."""
        if self.mode == "off":
            return x
        if self.rounded is not None:
            return self.rounded
        if self.mode == "on" or not self.is_activation:
            return self.round(x)
        grid = self.grid if self.mode == "marked" else None
        return x if grid is None else _mark(x, grid)

    def round(self, x: Tensor) -> Tensor:
        """The nearest integer's value; torch's own operator, whose ties are those of training."""
        if self.scale.numel() == 1:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)
        assert self.axis is not None
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, self.low, self.high)


def _mark(x: Tensor, grid: Grid) -> Tensor:
    """A node of an exported graph that stands for rounding ``x``; it cannot be run."""
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARK}", (x,), attrs=dataclasses.asdict(grid), dtype=x.dtype, shape=x.shape, version=1
    )
    return marked


class Refused(nn.Module):
    """Stands for a fake-quantizer that cannot be taken over, which matters only where it takes part."""

    def __init__(self, reason: SpecError) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor) -> Tensor:
        return x

    def refuse(self, _inputs: Any, _result: Any) -> None:
        raise self.reason


@dataclass(frozen=True)
class Reading:
    """What was read of a module.

    Attributes:
        tools: what put its fake-quantizers there.
        off: names of those that were switched off, and of observers, which only watch.
        quantizers: by name, as :func:`settled` left them.
    """

    tools: tuple[str, ...]
    off: tuple[str, ...]
    quantizers: Mapping[str, FakeQuantizer] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """How many of what, for the user."""
        activations = sum(bool(part.is_activation) for part in self.quantizers.values())
        weights = len(self.quantizers) - activations
        by_channel = sum(part.grid is None for part in self.quantizers.values() if part.is_activation)
        left_out = [f"{by_channel} round activations by channel, which no engine does"] if by_channel else []
        left_out += [f"{len(self.off)} are off, or observers"] if self.off else []
        words = f"fake-quantizers of {' and '.join(self.tools)}: {activations} of activations, {weights} of weights"
        return f"{words}; left out: {' and '.join(left_out)}" if left_out else words


def quantizer_of(name: str, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int | None) -> FakeQuantizer:
    """The fake-quantizer of these numbers. Raises :class:`SpecError` for one that no int8 engine can take over."""
    if high - low > 255:
        raise refused(name, f"has {high - low + 1} levels, int8 has 256", "train it with 8 bits")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise refused(name, "has a scale that is not positive and finite", "calibrate or train it again")
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        raise refused(name, "cannot hold 0 exactly", "train it with a zero point among its integers")
    return FakeQuantizer(scale, zero_point, low, high, axis)


def refused(name: str, what: str, advice: str) -> SpecError:
    """The error for a fake-quantizer that no int8 engine can take over."""
    return SpecError(f"the fake-quantizer {name} {what}, which an int8 engine cannot take over; {advice}")


def settled(module: nn.Module, reading: Reading, image: Tensor) -> Reading:
    """Find out which fake-quantizers round weights, and keep what they make of them; those that took part are in the result.

    Args:
        module: from :func:`read_fake_quantizers`, its parameters frozen.
        reading: what was read of it.
        image: float32 ``(N, C, H, W)`` it runs on.

    Raises:
        SpecError: one whose rounding no int8 engine can take over: not calibrated, computed anew for each image, floating
            point, blocks, more than 8 bits, for several weights.
    """
    took_part: dict[FakeQuantizer, str] = {}
    weights: dict[FakeQuantizer, Tensor] = {}

    def watch(name: str, part: FakeQuantizer, x: Tensor, result: Tensor) -> None:
        # Everything else is frozen: a gradient comes from the image only.
        took_part[part] = name
        if x.requires_grad:
            part.is_activation = True
        elif part in weights and not torch.equal(weights[part], result):
            raise refused(name, "rounds several weights", "give each its own")
        else:
            weights[part] = result.detach()

    hooks = [
        part.register_forward_hook(lambda part, inputs, result, name=name: watch(name, part, inputs[0], result))
        for name, part in module.named_modules()
        if isinstance(part, FakeQuantizer)
    ]
    hooks += [part.register_forward_hook(Refused.refuse) for part in module.modules() if isinstance(part, Refused)]
    try:
        with silenced(), torch.enable_grad():
            module(image.detach().clone().requires_grad_(True))
    finally:
        for hook in hooks:
            hook.remove()
    for part, rounded in weights.items():
        if part.is_activation:
            raise refused(took_part[part], "rounds a weight and an activation", "give each its own")
        part.is_activation, part.rounded = False, rounded
    return dataclasses.replace(reading, quantizers={name: part for part, name in took_part.items()})


def require_same(original: nn.Module, read: nn.Module, image: Tensor) -> None:
    """Raise :class:`SpecError` unless the module that was read computes what the original computes, rounding ties aside."""
    twin = copy.deepcopy(original)
    for part in twin.modules():
        if "FakeQuantizeBase" in {c.__name__ for c in type(part).__mro__}:
            part.disable_observer()  # type: ignore[operator]  # its scales are those of training
    with silenced(), torch.no_grad():
        expected, got = (_first(network(image)) for network in (twin, read))
    off = float((expected - got).abs().mean() / expected.abs().mean().clamp(min=1e-12))
    if not off <= TOLERANCE:
        raise SpecError(
            f"the module's fake-quantizers were read, but computing with them gives an output {off:.1%} off the module's own: "
            "it does something else beside them; please report the model"
        )


def _first(output: Any) -> Tensor:
    first: Any = output
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return first


def switched_off(module: nn.Module) -> nn.Module:
    """A copy that rounds nothing: the float network it was trained as."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        if isinstance(part, FakeQuantizer):
            part.mode = "off"
    return twin


@contextmanager
def mode(module: nn.Module, wanted: Mode) -> Iterator[None]:
    """Let the fake-quantizers of ``module`` do so while it is open; those that were switched off stay off."""
    parts = [part for part in module.modules() if isinstance(part, FakeQuantizer) and part.mode != "off"]
    before = [part.mode for part in parts]
    for part in parts:
        part.mode = wanted
    try:
        yield
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.mode = earlier
