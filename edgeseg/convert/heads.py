"""What surrounds the network inside the graph: preprocessing of the image, and the outputs made of its logits.

One torch module, :class:`Pipeline`, is what is exported and what the graph is then compared with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from segmentation_models_pytorch.base.modules import Activation
from torch import nn

from edgeseg.convert.architectures import ACTIVATIONS
from edgeseg.convert.geometry import first_of, noise
from edgeseg.errors import SpecError
from edgeseg.silence import silenced
from edgeseg.spec import PipelineSpec, Preprocess

Meaning = Literal["logits", "tanh", "clamp", "probability", "log probability", "tanh of logits"]
"""What the tensor that :class:`Outputs` gets stands for; the last three where an activation could not be taken off."""

LOGITS = "logits"


class Normalize(nn.Module):
    """``(N, H, W, C)`` RGB of any input dtype -> float32 ``(N, C, H, W)`` in the network's channel order and range.

    ``(clip(x) * scale - mean) / std``, all after the clip as one multiply-add. The mean is not folded into the first
    convolution: that pads with zeros, so folding is exact everywhere but at the image border. Cast comes first because
    TensorRT takes uint8 at a network's input only to cast it.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean = torch.tensor(preprocess.mean, dtype=torch.float64)
        std = torch.tensor(preprocess.std, dtype=torch.float64)
        weight, bias = preprocess.scale / std, -mean / std
        self.clip = preprocess.clip
        self.swap = preprocess.channel_order == "bgr"
        if self.swap:  # normalized in the image's order, so that the swap stands right before the network
            weight, bias = weight.flip(0), bias.flip(0)
        self.register_buffer("weight", weight.float().reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("bias", bias.float().reshape(1, -1, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalize one batch."""
        x = image.to(torch.float32).permute(0, 3, 1, 2)
        if self.clip is not None:
            x = x.clamp(*self.clip)
        x = x * self.weight + self.bias
        return x.flip(1) if self.swap else x


class Outputs(nn.Module):
    """The network's float32 map ``(N, C, H, W)`` -> the outputs asked for, by name.

    Masks come from logits: softmax, sigmoid and tanh are strictly increasing, so a class wins, or a threshold is
    passed, by the logits exactly where it is by the probabilities, without their rounding.
    """

    def __init__(self, spec: PipelineSpec, removed: bool) -> None:
        super().__init__()
        self.task = spec.model.task
        self.kind = spec.output.kind
        self.confidence = spec.output.confidence
        self.threshold = spec.output.threshold
        self.mask_dtype = torch.uint16 if spec.mask_dtype == "uint16" else torch.uint8
        name = ACTIVATIONS[spec.model.activation]
        self.softmax = name in ("softmax", "logsoftmax") or (name == "none" and self.task == "multiclass")
        self.meaning = _meaning(name, removed)

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 ``(N, C, H, W)`` in [0, 1]; tanh is read as ``2 p - 1``."""
        if self.meaning == "logits":
            return torch.softmax(x, dim=1) if self.softmax else torch.sigmoid(x)
        if self.meaning == "tanh":
            return torch.sigmoid(2.0 * x)
        if self.meaning == "clamp":
            return torch.clamp(x, 0.0, 1.0)
        if self.meaning == "log probability":
            return torch.exp(x)
        return (x + 1.0) / 2.0 if self.meaning == "tanh of logits" else x

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What decides: the highest of a pixel's wins (multiclass), or those above 0 are set."""
        if self.task == "multiclass":
            return self.probabilities(x) if self.meaning == "clamp" else x
        odds = math.log(self.threshold / (1.0 - self.threshold))
        if self.meaning == "logits" and not self.softmax:
            return x - odds
        if self.meaning == "tanh":
            return x - odds / 2.0
        return (x if self.meaning == "clamp" else self.probabilities(x)) - self.threshold

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, H, W)`` class indices, or 0/1 for binary; ``(N, C, H, W)`` 0/1 for multilabel."""
        if self.task == "multiclass":
            return torch.argmax(self.scores(x), dim=1).to(self.mask_dtype)
        above = (self.scores(x) > 0).to(torch.uint8)
        return above.squeeze(1) if self.task == "binary" else above

    def margin(self, x: torch.Tensor) -> torch.Tensor:
        """How far each mask pixel is from another value, in ``scores``; shaped like the mask."""
        scores = self.scores(x)
        if self.task == "multiclass":
            top = scores.topk(2, dim=1).values
            return top[:, 0] - top[:, 1]
        return scores.abs().squeeze(1) if self.task == "binary" else scores.abs()

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 probability of the chosen class, shaped like the mask."""
        p = self.probabilities(x)
        if self.task == "multiclass":
            return p.amax(dim=1)
        p = torch.where(self.scores(x) > 0, p, 1.0 - p)
        return p.squeeze(1) if self.task == "binary" else p

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs asked for."""
        if self.kind == "mask":
            outputs = {"mask": self.mask(x)}
        else:
            outputs = {LOGITS: x} if self.kind == LOGITS else {"probabilities": self.probabilities(x)}
        if self.confidence:
            outputs["confidence"] = self.chosen(x)
        return outputs


def _meaning(activation: str, removed: bool) -> Meaning:
    if removed or activation == "none":
        return "tanh" if activation == "tanh" else "clamp" if activation == "clamp" else "logits"
    names: Mapping[str, Meaning] = {"tanh": "tanh of logits", "logsoftmax": "log probability"}
    return names.get(activation, "probability")


class Pipeline(nn.Module):
    """An image in; the outputs of ``spec`` out, and always ``logits``: the network's map without its activation.

    Args:
        module: float32 normalized ``(N, C, H, W)`` -> map ``(N, classes, H, W)``, or a tuple of that and an auxiliary
            ``(N, K)``. An SMP model, or anything that behaves like one. Not changed; parameters are shared.
        spec: input, preprocessing and output contract.

    Raises:
        SpecError: logits that cannot be had, because the activation cannot be taken off.
    """

    def __init__(self, module: nn.Module, spec: PipelineSpec) -> None:
        super().__init__()
        self.preprocess = Normalize(spec.preprocess)
        image = noise(spec.input.channels, spec.input.height, spec.input.width)
        self.model, removed = without_activation(module, spec.model.activation, image)
        if spec.output.kind == LOGITS and not removed and ACTIVATIONS[spec.model.activation] != "none":
            raise SpecError(
                f"logits were asked for, but the module returns the result of {spec.model.activation} and has no SMP "
                "Activation layer that could be taken off; give output kind probabilities, or a module that returns logits"
            )
        self.postprocess = Outputs(spec, removed)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run ``(N, H, W, C)``; outputs by name, those of the contract first."""
        raw = self.model(self.preprocess(image))
        logits, *aux = raw if isinstance(raw, (tuple, list)) else (raw,)
        if logits.dtype != torch.float32:  # a module that computes in another type, by autocast say
            logits = logits.float()
        outputs = dict(self.postprocess(logits))
        if aux:
            outputs["aux_logits"] = aux[0]
        outputs[LOGITS] = logits
        return outputs


def without_activation(module: nn.Module, activation: str | None, image: torch.Tensor) -> tuple[nn.Module, bool]:
    """Return ``module`` without the SMP ``Activation`` of that name that it ends in, and whether it was taken off.

    It is only taken off when ``module`` returns nothing but its result: one that is followed by something else, or is
    another, stays. Works on a copy of the modules on the way to it: the module given is not changed, parameters are shared.

    Args:
        module: returns the map, or a tuple that starts with it.
        activation: SMP's name.
        image: float32 ``(N, C, H, W)`` to compare on.
    """
    apply = APPLIED.get(ACTIVATIONS[activation])
    paths = [
        name
        for name, child in module.named_modules()
        if isinstance(child, Activation)
        and not isinstance(child.activation, nn.Identity)
        and "classification_head" not in name.split(".")
    ]
    if apply is None or not paths:
        return module, False
    bare = module
    for path in paths:
        bare = _replaced(bare, path.split("."), nn.Identity())
    with silenced(), torch.inference_mode():
        try:
            whole, logits = first_of(module(image)), first_of(bare(image))
        except Exception:  # a user's forward may raise anything: who runs it in earnest says what is wrong
            return module, False
        applied = apply(logits)
        alike = whole.shape == applied.shape and torch.allclose(whole, applied, rtol=1e-4, atol=1e-5)
    return (bare, True) if alike else (module, False)


APPLIED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(dim=1),
    "logsoftmax": lambda x: x.log_softmax(dim=1),
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(0.0, 1.0),
}


def _replaced(module: nn.Module, path: list[str], new: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    child = module._modules[path[0]]
    assert child is not None
    clone._modules[path[0]] = new if len(path) == 1 else _replaced(child, path[1:], new)
    return clone
