"""Is the graph the PyTorch model? Compared on images, with a rule that tells ties from errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg.convert.heads import LOGITS, Pipeline
from edgeseg.errors import ExportError
from edgeseg.images.dtypes import usual_pixels
from edgeseg.silence import silenced
from edgeseg.spec import InputDtype, Preprocess

RELATIVE_TOLERANCE = 1e-3
"""Largest error of a logit, relative to the largest logit (at least 1). Deep float32 networks summed in another order
stay one to three orders of magnitude below it; a wrong graph is far above."""

Arrays = Mapping[str, NDArray[Any]]

MARGIN = "margin"
"""Key of the reference under which each pixel's decision margin is kept."""


@dataclass(frozen=True)
class Parity:
    """Graph against PyTorch on the same images.

    Attributes:
        max_abs_error: largest difference of a logit.
        mask_agreement: share of mask pixels that are equal or a tie. A pixel is a tie when PyTorch's own decision there
            is closer than twice ``max_abs_error``: two float32 sums of the same terms may then fall either way.
    """

    max_abs_error: float
    mask_agreement: float


def make_probe_images(
    height: int,
    width: int,
    channels: int,
    count: int = 2,
    seed: int = 0,
    *,
    preprocess: Preprocess | None = None,
    dtype: InputDtype = "uint8",
) -> NDArray[Any]:
    """Deterministic ``dtype`` ``(count, H, W, C)``: smooth colour waves, discs and noise, so that classes vary.

    Args:
        height: pixels.
        width: pixels.
        channels: of a pixel.
        count: of images.
        seed: of the choice.
        preprocess: tells which values are usual; may be ``None`` of uint8, which has all of them.
        dtype: the engine's.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    images = np.empty((count, height, width, channels), np.float32)
    for image in images:
        for channel in range(channels):
            down, right, phase = rng.uniform(0.5, 6.0), rng.uniform(0.5, 6.0), rng.uniform(0.0, 2 * np.pi)
            image[..., channel] = 127.5 + 90.0 * np.sin(2 * np.pi * (down * y / height + right * x / width) + phase)
        for _ in range(6):
            cy, cx = rng.uniform(0, height), rng.uniform(0, width)
            radius = rng.uniform(0.05, 0.25) * min(height, width)
            image[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.uniform(0, 255, channels)
    images += rng.normal(0.0, 12.0, images.shape)
    return usual_pixels(np.clip(images, 0, 255), preprocess or Preprocess(), dtype)


def torch_outputs(pipeline: Pipeline, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run the torch pipeline on ``(N, H, W, C)`` of its dtype; outputs by name, and the decision margin."""
    with silenced(), torch.inference_mode():
        outputs = pipeline(torch.from_numpy(np.ascontiguousarray(images)))
        outputs[MARGIN] = pipeline.postprocess.margin(outputs[LOGITS])
        return {name: value.numpy() for name, value in outputs.items()}


def compare(reference: Sequence[Arrays], actual: Sequence[Arrays], name: str) -> Parity:
    """Compare the outputs of the same images, logits among them; ``name``: what ``reference`` is of, in words.

    Raises:
        ExportError: NaN or infinite logits, values further apart than :data:`RELATIVE_TOLERANCE`, or mask pixels that
            differ without being ties.
    """
    error = 0.0
    for expected, got in zip(reference, actual, strict=True):
        if not np.isfinite(expected[LOGITS]).all():
            raise ExportError(f"{name} returns NaN or infinite logits on the probe images; check the weights")
        for output in (LOGITS, "aux_logits", "probabilities", "confidence"):
            if output in expected:
                worst = _difference(f"the graph's {output}", name, expected[output], got[output])
                error = max(error, worst if output == LOGITS else 0.0)
    wrong, pixels = 0, 0
    for expected, got in zip(reference, actual, strict=True):
        if "mask" not in expected:
            continue
        same = expected["mask"] == got["mask"]
        tied = expected[MARGIN] <= 2.0 * error
        wrong, pixels = wrong + int((~same & ~tied).sum()), pixels + same.size
    if wrong:
        raise ExportError(f"{wrong} of {pixels} mask pixels differ from {name}'s, no ties; please report the model")
    return Parity(error, 1.0 - wrong / max(pixels, 1))


def _difference(what: str, name: str, expected: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    if expected.shape != got.shape:
        raise ExportError(f"{what} are {got.shape}, {name}'s {expected.shape}; please report the model")
    worst = float(np.abs(expected - got).max())
    allowed = RELATIVE_TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not worst <= allowed:  # so that NaN fails too
        raise ExportError(
            f"{what} differ from {name}'s by {worst:.3g} (allowed {allowed:.3g}); please report the model"
        )
    return worst
