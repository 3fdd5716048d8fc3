"""What images say about a network: which normalization its first batch norm was trained behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeseg.convert.heads import Normalize
from edgeseg.images.resize import resize_image
from edgeseg.silence import without_warnings
from edgeseg.spec import Preprocess

# In nats, the median over channels. Images of one domain stay below 1. A wrong scale (0..1 for 0..255) is off by 11,
# a left-out ImageNet normalization by 3: between the best and the next there is room for photos of another day.
_FITS = 1.2
_AHEAD = 1.2


def best_fit(
    module: torch.nn.Module,
    images: Sequence[NDArray[Any]],
    size: tuple[int, int],
    candidates: Sequence[Preprocess],
) -> Preprocess | None:
    """Return the candidate under which ``images`` look to the first batch norm as its training images did.

    A batch norm keeps mean and variance of what training fed it; behind nothing but convolutions these tell the scale
    of the images.

    Args:
        module: in evaluation mode.
        images: of the kind the network was trained on, ``(H, W, C)``.
        size: height and width it takes, pixels.
        candidates: at least two.

    Returns:
        ``None`` when nothing can be told: no images, no trained batch norm, none that fits, or two that fit alike.
    """
    if not images:
        return None
    fitted = np.stack([resize_image(image, size) for image in images])
    misfits = [_misfit(module, normalized(fitted, candidate)) for candidate in candidates]
    known = sorted((value, index) for index, value in enumerate(misfits) if value is not None)
    if len(known) < len(candidates) or known[0][0] > _FITS or known[1][0] < known[0][0] + _AHEAD:
        return None
    return candidates[known[0][1]]


def normalized(images: NDArray[Any], preprocess: Preprocess) -> torch.Tensor:
    """``(N, H, W, C)`` RGB -> float32 ``(N, C, H, W)`` as the network gets them."""
    with torch.no_grad():
        result: torch.Tensor = Normalize(preprocess)(torch.from_numpy(np.ascontiguousarray(images)))
    return result.contiguous()


class ReachedError(Exception):
    """Raised by a hook to stop a forward pass there."""


def _misfit(module: torch.nn.Module, inputs: torch.Tensor) -> float | None:
    """How far what reaches the first batch norm is from its running statistics; ``None`` without trained ones."""
    reached: list[tuple[Any, torch.Tensor]] = []

    def stop(norm: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        reached.append((norm, arguments[0]))
        raise ReachedError

    norms = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(stop) for norm in norms]
    try:
        with torch.no_grad(), without_warnings():
            module(inputs)
    except ReachedError:
        pass
    except Exception:  # a user's forward may raise anything; then its images tell nothing
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if not reached:
        return None
    norm, values = reached[0]
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or bool((mean == 0).all() and (variance == 1).all()):
        return None
    floor = 1e-3 * variance.median()
    alive = variance > floor
    here_mean, here_variance = values.mean((0, 2, 3))[alive], values.var((0, 2, 3))[alive].clamp(min=1e-12)
    variance, mean = variance[alive], mean[alive]
    spread = (here_variance / variance).log().abs()
    shift = (here_mean - mean) ** 2 / (here_variance + variance)
    return float((spread + shift).median())
