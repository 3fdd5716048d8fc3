"""Is the graph the PyTorch model? Compared on images, with a rule that tells ties from errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from edgeseg.convert.silence import silenced
from edgeseg.errors import ExportError
from edgeseg.onnx_file import first_line
from edgeseg.spec import InputSpec, PipelineSpec

RELATIVE_TOLERANCE = 1e-3
"""Largest error of a logit, relative to the largest logit (at least 1). Deep float32 networks summed in another order
stay two orders below it; a wrong graph is far above."""


@dataclass(frozen=True)
class Parity:
    """Graph against PyTorch on the same images.

    Attributes:
        max_abs_error: largest difference of a logit.
        mask_agreement: share of mask pixels that are equal or a tie. A pixel is a tie when PyTorch's own decision there
            is closer than twice ``max_abs_error``: two float32 sums of the same terms may then fall either way.
        ties: share of pixels that differ and are ties.
    """

    max_abs_error: float
    mask_agreement: float
    ties: float


def make_probe_images(spec: InputSpec, count: int = 2, seed: int = 0) -> NDArray[np.uint8]:
    """Deterministic uint8 ``(count, H, W, C)``: smooth colour gradients, discs and noise, so that classes vary."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : spec.height, 0 : spec.width].astype(np.float64)
    images = np.empty((count, spec.height, spec.width, spec.channels))
    for image in images:
        for channel in range(spec.channels):
            fy, fx, phase = rng.uniform(0.5, 6.0), rng.uniform(0.5, 6.0), rng.uniform(0, 2 * np.pi)
            wave = np.sin(2 * np.pi * (fy * y / spec.height + fx * x / spec.width) + phase)
            image[..., channel] = 127.5 + 90.0 * wave
        for _ in range(6):
            cy, cx = rng.uniform(0, spec.height), rng.uniform(0, spec.width)
            radius = rng.uniform(0.05, 0.25) * min(spec.height, spec.width)
            image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.uniform(0, 255, spec.channels)
    images += rng.normal(0, 12.0, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8)


def torch_outputs(pipeline: nn.Module, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Run the torch pipeline on uint8 ``(N, H, W, C)``."""
    with silenced(), torch.inference_mode():
        return {name: value.numpy() for name, value in pipeline(torch.from_numpy(images)).items()}


def ort_session(model: onnx.ModelProto) -> Any:
    """An ONNX Runtime CPU session over a model in memory. Raises :class:`ExportError`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise ExportError(f"ONNX Runtime does not load the exported graph: {first_line(exc)}") from exc


def run_session(session: Any, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Run uint8 ``(N, H, W, C)`` through a session; outputs by name. Raises :class:`ExportError`."""
    names = [o.name for o in session.get_outputs()]
    try:
        return dict(zip(names, session.run(None, {"image": images}), strict=True))
    except Exception as exc:
        raise ExportError(f"ONNX Runtime does not run the exported graph: {first_line(exc)}") from exc


def compare(
    spec: PipelineSpec,
    reference: Sequence[Mapping[str, NDArray[Any]]],
    actual: Sequence[Mapping[str, NDArray[Any]]],
) -> Parity:
    """Compare outputs of the same images, ``logits`` among them.

    Raises:
        ExportError: NaN or infinite logits, logits further apart than :data:`RELATIVE_TOLERANCE`, or mask pixels that
            differ without being ties.
    """
    error, peak = 0.0, 1.0
    for expected, got in zip(reference, actual, strict=True):
        if not np.isfinite(expected["logits"]).all():
            raise ExportError("the PyTorch model returns NaN or infinite logits on the probe images; check its weights")
        for name in ("logits", "aux_logits"):
            if name in expected:
                error = max(error, float(np.abs(expected[name] - got[name]).max()))
                peak = max(peak, float(np.abs(expected[name]).max()))
    if not error <= RELATIVE_TOLERANCE * peak:
        raise ExportError(
            f"the graph differs from PyTorch by {error:.3g} in logits of up to {peak:.3g} "
            f"(allowed {RELATIVE_TOLERANCE * peak:.3g}); please report the model"
        )
    equal, wrong, pixels = 0, 0, 0
    for expected, got in zip(reference, actual, strict=True):
        if "mask" not in expected:
            continue
        same = expected["mask"] == got["mask"]
        tied = decision_margin(spec, expected["logits"]) <= 2.0 * error
        equal, wrong, pixels = equal + int(same.sum()), wrong + int((~same & ~tied).sum()), pixels + same.size
    if wrong:
        raise ExportError(f"{wrong} of {pixels} mask pixels differ from PyTorch's and are no ties; please report the model")
    return Parity(error, 1.0 - wrong / max(pixels, 1), (pixels - equal) / max(pixels, 1))


def decision_margin(spec: PipelineSpec, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each mask pixel is from another value, in logits: top-1 minus top-2, or distance to the threshold."""
    if spec.model.task == "multiclass":
        top = np.partition(logits, -2, axis=1)
        margin: NDArray[np.float32] = top[:, -1] - top[:, -2]
        return margin
    margin = np.abs(logits - np.log(spec.output.threshold / (1 - spec.output.threshold)))
    return margin[:, 0] if spec.model.task == "binary" else margin
