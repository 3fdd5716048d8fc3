"""Bias correction: what rounding a weight adds to a layer's mean output is taken off its bias.

Rounded weights are wrong by up to half a step each; over inputs that are not centred on zero (everything behind a ReLU) the
errors do not average out but shift each output channel. The shift is known: ``(W_rounded - W) . mean(x)``, with the mean
of each input channel from calibration (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeseg.quantize.parameters import QuantizedWeight


def bias_correction(
    weight: NDArray[np.float32], quantized: QuantizedWeight, channel_mean: NDArray[np.float64], *, groups: int = 1
) -> NDArray[np.float64]:
    """What to add to the bias, per output channel.

    Args:
        weight: of a convolution ``(O, I / groups, kH, kW)``, a transposed one ``(I, O, kH, kW)`` or a matrix; the
            output channels are along ``quantized.axis``.
        quantized: the same weight, rounded.
        channel_mean: mean of each input channel, shape ``(I,)``. Padding is taken to have it too: the border is thin.
        groups: of a convolution.
    """
    error = weight.astype(np.float64) - quantized.dequantized().astype(np.float64)
    if error.ndim == 2:
        return np.asarray(channel_mean @ error if quantized.axis == 1 else error @ channel_mean, np.float64)
    per_tap = error.reshape(*error.shape[:2], -1).sum(axis=2)
    if quantized.axis == 1:
        return np.asarray(channel_mean @ per_tap, np.float64)
    means = channel_mean.reshape(groups, -1)
    blocks = per_tap.reshape(groups, -1, per_tap.shape[1])
    return np.asarray(np.einsum("goi,gi->go", blocks, means).reshape(-1), np.float64)
