"""A trained network made badly scaled: the same function, channels that differ by up to a thousand times."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch

from edgeseg.convert.load import load_model
from edgeseg.spec import ModelRequest, Preprocess

SPREAD = 32.0


Reader = torch.nn.Conv2d | torch.nn.Linear


def badly_scaled(arch: str, seed: int = 0) -> tuple[torch.nn.Module, Preprocess]:
    """The demo model of ``arch`` with channels scaled by factors log-uniform in 1/32..32, and its normalization."""
    loaded = load_model(ModelRequest(arch=arch))
    return scaled_badly(loaded.module, seed), loaded.preprocess


def scaled_badly(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """A copy of ``module`` that computes the same with channels that differ by up to a thousand times.

    A normalization's output channel c times s_c, the input channel of all that reads it divided by s_c: ReLU passes a positive
    factor on, so all outputs stay as they were, up to rounding. Weight decay, pruning and models that were merged from branches
    leave such networks behind, and layer normalizations by themselves; here it is done on purpose.
    """
    module = copy.deepcopy(module).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, readers in _groups(module):
            channels = len(norm.weight)
            scale = torch.exp((torch.rand(channels, generator=generator) * 2 - 1) * torch.log(torch.tensor(SPREAD)))
            norm.weight.mul_(scale)
            norm.bias.mul_(scale)
            for reader in readers:
                # A depthwise convolution reads channel c in its row c alone.
                depthwise = isinstance(reader, torch.nn.Conv2d) and reader.groups == channels
                shape = (-1, 1, 1, 1) if depthwise else (1, -1, *[1] * (reader.weight.ndim - 2))
                reader.weight.div_(scale.reshape(shape))
    return module


Norm = torch.nn.BatchNorm2d | torch.nn.GroupNorm | torch.nn.LayerNorm


def _groups(module: torch.nn.Module) -> list[tuple[Norm, list[Reader]]]:
    """Normalizations and all that reads their output: inside a block, in its order."""
    groups: list[tuple[Norm, list[Reader]]] = []
    block: Any
    for block in module.modules():
        kind = type(block).__name__
        if kind == "Block" and hasattr(block, "attn"):  # of the mix transformer, SMP's mit encoders
            attention = block.attn
            reduced = attention.sr_ratio > 1
            groups.append((block.norm1, [attention.q, attention.sr if reduced else attention.kv]))
            groups += [(attention.norm, [attention.kv])] if reduced else []
            groups.append((block.norm2, [block.mlp.fc1]))
        # timm's inverted residual blocks and SMP's convolutions in a row run their children one after the other.
        if kind not in ("UniversalInvertedResidual", "InvertedResidual", "UnetDecoderBlock", "SegmentationBlock"):
            continue
        if any(isinstance(m, torch.nn.ReLU6) for m in block.modules()):
            continue  # no factor passes a clip
        layers = [
            m for m in block.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.Conv2d))
        ]
        for norm, reader in pairwise(layers):
            if isinstance(norm, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)) and isinstance(reader, torch.nn.Conv2d):
                groups.append((norm, [reader]))
    return groups
