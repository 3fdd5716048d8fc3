"""Models for the export tests: SMP architectures with norms that are not the identity, and what is known about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from numpy.typing import NDArray

from edgeseg.convert.loaded import LoadedModel
from edgeseg.spec import ARCHITECTURES, InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess

NORMS = (torch.nn.BatchNorm2d, torch.nn.GroupNorm, torch.nn.LayerNorm)


class SmallNet(torch.nn.Module):
    """Two convolutions and SMP's own head; ``labels`` adds an auxiliary head."""

    def __init__(self, channels: int, classes: int, activation: Any, labels: int = 0) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.segmentation_head = smp.base.SegmentationHead(8, classes, activation=activation, upsampling=2)
        self.label = torch.nn.Linear(8, labels) if labels else None

    def forward(self, x: Any) -> Any:
        features = torch.nn.functional.relu(self.body(x))
        mask = self.segmentation_head(features)
        return mask if self.label is None else (mask, self.label(features.mean((2, 3))))


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give norms statistics and every layer a bias, as training would: initial values hide mistakes in both."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, NORMS) and layer.weight is not None:
            layer.weight.data.uniform_(0.6, 1.4, generator=generator)
            layer.bias.data.normal_(0.0, 0.2, generator=generator)
        elif getattr(layer, "bias", None) is not None and isinstance(layer.bias, torch.nn.Parameter):
            layer.bias.data.normal_(0.0, 0.1, generator=generator)
        if isinstance(layer, torch.nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_(0.0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval().requires_grad_(False)


def spread_classes(module: torch.nn.Module, height: int, width: int, channels: int) -> None:
    """Shift the head's bias so that every class wins somewhere: a mask of one class proves nothing."""
    convolution = [m for m in module.segmentation_head.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    images = torch.from_numpy(smooth_images(2, height, width, channels)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        output = module((images / 255.0 - 0.45) / 0.25)
        logits = output[0] if isinstance(output, tuple) else output
        convolution.bias -= logits.mean((0, 2, 3))


def loaded(module: torch.nn.Module, model: ModelSpec, preprocess: Preprocess, stride: int = 32) -> LoadedModel:
    return LoadedModel(
        module=module,
        model=model,
        preprocess=preprocess,
        weights="random",
        weights_sha256="0" * 64,
        stride=stride,
        size=(64, 64),
    )


def smp_model(
    arch: str,
    encoder: str = "resnet18",
    *,
    size: tuple[int, int] = (64, 96),
    classes: int = 5,
    task: str = "multiclass",
    channels: int = 3,
    output: OutputSpec | None = None,
    preprocess: Preprocess | None = None,
    activation: str | None = None,
    stride: int = 32,
    image: dict[str, Any] | None = None,
    **model_args: Any,
) -> tuple[LoadedModel, PipelineSpec]:
    """A random SMP model and a spec for it; ``image`` are further fields of its InputSpec."""
    torch.manual_seed(0)
    module = smp.create_model(
        arch,
        encoder_name=encoder,
        encoder_weights=None,
        classes=classes,
        in_channels=channels,
        activation=activation,
        **model_args,
    )
    model = ModelSpec(
        arch if arch in ARCHITECTURES else "custom",
        encoder,
        classes=classes,
        task=task,  # type: ignore[arg-type]
        in_channels=channels,
        activation=activation,
    )
    preprocess = preprocess or Preprocess(mean=(0.4, 0.5, 0.6, 0.3)[:channels], std=(0.2, 0.25, 0.3, 0.35)[:channels])
    spec = PipelineSpec(
        model,
        InputSpec(*size, channels=channels, stride=stride, **(image or {})),
        preprocess,
        output or OutputSpec(),
    )
    randomize(module)
    spread_classes(module, *size, channels)
    return loaded(module, model, preprocess, stride), spec


def smooth_images(count: int, height: int, width: int, channels: int = 3, seed: int = 5) -> NDArray[np.uint8]:
    """Uint8 ``(count, H, W, C)`` of large soft blobs: another kind of image than the exporter's own probes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, channels, 5, 6), generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return np.ascontiguousarray(fine.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def by_hand(loaded: LoadedModel, images: NDArray[np.uint8]) -> Any:
    """The network's raw output on images normalized by numpy in float64: no code shared with the exporter."""
    preprocess = loaded.preprocess
    if preprocess.channel_order == "bgr":
        images = images[..., ::-1]
    x = (images.astype(np.float64) * preprocess.scale - preprocess.mean) / preprocess.std
    with torch.inference_mode():
        return loaded.module(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).float())
