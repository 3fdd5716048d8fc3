"""A trained network made badly scaled: the same function, channels that differ by up to a thousand times."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch

from edgeseg.convert.load import load_model
from edgeseg.spec import ModelRequest, Preprocess

SPREAD = 32.0


def badly_scaled(arch: str, seed: int = 0) -> tuple[torch.nn.Module, Preprocess]:
    """The demo model of ``arch`` with channels scaled by factors log-uniform in 1/32..32, and its normalization.

    A batch normalization's output channel c times s_c, the input channel of the only convolution that reads it divided by
    s_c: ReLU passes a positive factor on, so all outputs stay as they were, up to rounding. Weight decay, pruning and models
    that were merged from branches leave such networks behind; here it is done on purpose.
    """
    loaded = load_model(ModelRequest(arch=arch))
    module = copy.deepcopy(loaded.module).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm, reader in _pairs(module):
            channels = norm.num_features
            scale = torch.exp((torch.rand(channels, generator=generator) * 2 - 1) * torch.log(torch.tensor(SPREAD)))
            norm.weight *= scale
            norm.bias *= scale
            # A depthwise convolution reads channel c in its row c alone.
            reader.weight /= scale.reshape(-1, 1, 1, 1) if reader.groups == channels else scale.reshape(1, -1, 1, 1)
    return module, loaded.preprocess


def _pairs(module: torch.nn.Module) -> list[tuple[torch.nn.BatchNorm2d, torch.nn.Conv2d]]:
    """Batch normalizations whose output one convolution alone reads: inside a block, in its order."""
    pairs = []
    for block in module.modules():
        # timm's inverted residual blocks and SMP's double convolutions run their children one after the other.
        if type(block).__name__ not in ("UniversalInvertedResidual", "InvertedResidual", "UnetDecoderBlock"):
            continue
        layers = [m for m in block.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Conv2d))]
        for norm, reader in pairwise(layers):
            if isinstance(norm, torch.nn.BatchNorm2d) and isinstance(reader, torch.nn.Conv2d):
                pairs.append((norm, reader))
    return pairs
