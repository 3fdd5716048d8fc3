"""Merge the parallel branches that MobileOne, RepVGG, FastViT and their like train with into one convolution each.

Method: convolutions and batch norms side by side are linear in the same input, so their kernels add up (Ding et al.,
"RepVGG: Making VGG-style ConvNets Great Again", 2021). SMP's and timm's blocks know how; no graph simplifier does it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.convert.geometry import first_of, noise
from edgeseg.silence import without_warnings

# Relative to the largest output: float32 sums in another order.
_TOLERANCE = 1e-4


def merge_branches(module: torch.nn.Module, channels: int, side: int) -> tuple[torch.nn.Module, int]:
    """Return a copy of an SMP model with its encoder's training branches merged, and how many layers that saved.

    The copy is tried against the original on a random image; when the results differ, or there is nothing to merge,
    the original is returned with 0.
    """
    encoder: Any = getattr(module, "encoder", None)
    # timm's own criterion; it is asked of the encoder only, where these names mean this.
    merging = ("fuse", "reparameterize", "switch_to_deploy")
    parts = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    if not any(callable(getattr(part, name, None)) for part in parts for name in merging):
        return module, 0
    manipulate = import_for_conversion("timm.models")
    merged: Any = copy.deepcopy(module)
    image = noise(channels, side, side)
    with torch.no_grad(), without_warnings():
        before = first_of(module(image))
        try:
            merged.encoder = manipulate.reparameterize_model(merged.encoder, inplace=True)
            after = first_of(merged.eval().requires_grad_(False)(image))
        except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError):
            return module, 0  # a method of that name with another meaning
    if not bool((before - after).abs().max() <= _TOLERANCE * before.abs().max().clamp(min=1.0)):
        return module, 0
    saved = _layers(module) - _layers(merged)
    return (merged, saved) if saved > 0 else (module, 0)


def _layers(module: torch.nn.Module) -> int:
    return sum(1 for part in module.modules() if not list(part.children()) and list(part.parameters(recurse=False)))
