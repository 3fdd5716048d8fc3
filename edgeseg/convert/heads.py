"""What surrounds the network inside the graph: preprocessing of the uint8 image, and the outputs made of its logits.

One torch module, :class:`Pipeline`, is both what is exported and the PyTorch reference a graph is compared with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Literal

import torch
from segmentation_models_pytorch.base.modules import Activation
from torch import nn

from edgeseg.errors import SpecError, did_you_mean
from edgeseg.spec import PipelineSpec, Preprocess

ActivationKind = Literal["none", "sigmoid", "softmax", "tanh", "clamp"]

ACTIVATIONS: Mapping[str | None, ActivationKind] = {
    None: "none",
    "identity": "none",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "softmax2d": "softmax",
    "logsoftmax": "softmax",
    "tanh": "tanh",
    "clamp": "clamp",
    "argmax": "none",
    "argmax2d": "none",
}
"""SMP's ``activation`` names and the probabilities they stand for. ``logsoftmax`` is softmax's logarithm, and an
``argmax`` was put on raw logits."""

LOGITS = "logits"


class Normalize(nn.Module):
    """uint8 ``(N, H, W, C)`` RGB -> float32 ``(N, C, H, W)`` in the network's channel order and range.

    ``(x * scale - mean) / std`` as one multiply-add. The mean is not folded into the first convolution: that
    convolution pads with zeros, so folding is exact everywhere but at the image border.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        weight, bias = preprocess.scale / std, -mean / std
        self.swap = preprocess.channel_order == "bgr"
        if self.swap:  # normalized in the image's order first, so that the swap stands right before the network
            weight, bias = weight.flip(0), bias.flip(0)
        self.register_buffer("weight", weight.float().reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("bias", bias.float().reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image.to(torch.float32).permute(0, 3, 1, 2)
        x = x * self.weight + self.bias
        return x.flip(1) if self.swap else x


class Outputs(nn.Module):
    """Float32 logits ``(N, C, H, W)`` -> the outputs asked for, by name.

    Masks come from logits: softmax, sigmoid and tanh are strictly increasing, so a class wins or a threshold is passed
    by the logits exactly where it is by the probabilities, without their rounding.
    """

    def __init__(self, spec: PipelineSpec, kind: ActivationKind) -> None:
        super().__init__()
        self.task = spec.model.task
        self.kind = spec.output.kind
        self.confidence = spec.output.confidence
        self.threshold = spec.output.threshold
        self.mask_dtype = torch.uint16 if spec.mask_dtype == "uint16" else torch.uint8
        self.activation = self._probability(kind, spec)

    def _probability(self, kind: ActivationKind, spec: PipelineSpec) -> ActivationKind:
        if kind == "softmax" and spec.model.classes == 1:
            raise SpecError("softmax over 1 class is 1 everywhere; give --activation sigmoid or none, or more classes")
        if kind == "none":
            return "softmax" if self.task == "multiclass" else "sigmoid"
        return kind

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 ``(N, C, H, W)`` in [0, 1]; tanh is read as ``2 p - 1``."""
        if self.activation == "softmax":
            return torch.softmax(logits, dim=1)
        if self.activation == "sigmoid":
            return torch.sigmoid(logits)
        if self.activation == "tanh":
            return torch.sigmoid(2.0 * logits)
        return torch.clamp(logits, 0.0, 1.0)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """``(N, H, W)`` class indices, or 0/1 for binary; ``(N, C, H, W)`` 0/1 for multilabel."""
        if self.task == "multiclass":
            scores = self.probabilities(logits) if self.activation == "clamp" else logits
            return torch.argmax(scores, dim=1).to(self.mask_dtype)
        above = self.above(logits).to(torch.uint8)
        return above.squeeze(1) if self.task == "binary" else above

    def above(self, logits: torch.Tensor) -> torch.Tensor:
        """Bool ``(N, C, H, W)``: where the probability passes the threshold."""
        if self.activation == "softmax":
            return self.probabilities(logits) > self.threshold
        if self.activation == "clamp":
            return logits > self.threshold
        limit = math.log(self.threshold / (1.0 - self.threshold))
        return logits > (limit / 2.0 if self.activation == "tanh" else limit)

    def chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Float32 probability of the chosen class, shaped like the mask."""
        p = self.probabilities(logits)
        if self.task == "multiclass":
            return p.amax(dim=1)
        p = torch.where(self.above(logits), p, 1.0 - p)
        return p.squeeze(1) if self.task == "binary" else p

    def forward(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        make = {"mask": self.mask, "probabilities": self.probabilities, "logits": lambda x: x}
        outputs = {self.kind: make[self.kind](logits)}
        if self.confidence:
            outputs["confidence"] = self.chosen(logits)
        return outputs


class Pipeline(nn.Module):
    """uint8 image in, the outputs of ``spec`` out, plus always ``logits`` (and ``aux_logits`` of a kept head).

    Args:
        module: float32 normalized ``(N, C, H, W)`` -> raw output; an SMP model or anything that behaves like one.
            It is not changed; parameters are shared.
        spec: input, preprocessing and output contract.

    Raises:
        SpecError: an activation that no mask or no logits can be made of.
    """

    def __init__(self, module: nn.Module, spec: PipelineSpec) -> None:
        super().__init__()
        self.preprocess = Normalize(spec.preprocess)
        self.model, found = without_activation(module)
        self.postprocess = Outputs(spec, _activation_kind(spec, found))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        raw = self.model(self.preprocess(image))
        logits, *aux = raw if isinstance(raw, (tuple, list)) else (raw,)
        outputs = dict(self.postprocess(logits))
        if aux:
            outputs["aux_logits"] = aux[0]
        outputs[LOGITS] = logits
        return outputs


def _activation_kind(spec: PipelineSpec, found: bool) -> ActivationKind:
    name = spec.model.activation
    if name not in ACTIVATIONS:
        allowed = [a for a in ACTIVATIONS if a]
        raise SpecError(f"unknown activation {name!r}{did_you_mean(str(name), allowed)} (allowed: {', '.join(allowed)})")
    kind = ACTIVATIONS[name]
    if not found and name not in (None, "identity"):
        raise SpecError(
            f"activation {name} was named, but the module has no SMP Activation layer that could be taken out; "
            "hand over the module that returns logits, with activation none"
        )
    if name in ("argmax", "argmax2d") and spec.model.task != "multiclass":
        raise SpecError(f"activation {name} gives class indices, which task {spec.model.task} has none of; use sigmoid")
    return kind


def without_activation(module: nn.Module) -> tuple[nn.Module, bool]:
    """Return ``module`` with the segmentation head's SMP ``Activation`` replaced by identity, and whether there was one.

    Works on a copy of the modules on the way to it; the module given is not changed, parameters are shared.
    """
    paths = [
        name
        for name, child in module.named_modules()
        if isinstance(child, Activation) and "classification_head" not in name.split(".")
    ]
    for path in paths:
        module = _replaced(module, path.split("."), nn.Identity())
    return module, bool(paths)


def _replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    child = module._modules[path[0]]
    assert child is not None
    clone._modules[path[0]] = new if len(path) == 1 else _replaced(child, path[1:], new)
    return clone
