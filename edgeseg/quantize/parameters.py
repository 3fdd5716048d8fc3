"""Scales and zero points from ranges, and quantized weights. Plain numpy; ``real = scale * (quantized - zero_point)``.

Rounded weights are wrong by up to half a step each; over inputs that are not centred on zero (everything behind a ReLU) the
errors do not average out but shift each output channel. The shift is known: ``(W_rounded - W) . mean(x)``, with the mean
of each input channel from calibration. :func:`bias_correction` takes it off the bias (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import QuantizationError
from edgeseg.graph.grid import Grid
from edgeseg.quantize.schemes import QuantScheme

SMALLEST_SCALE = 1e-8
"""Of an activation that is zero on every calibration image."""

SMALLEST_WEIGHT_SCALE = 1e-20
"""Of a filter that weight decay drove to zero. Its product with any activation's scale is still a normal float32, and a bias
divided by that product a finite one; a smaller weight is rounded to 0, which nothing behind it can tell from what it is."""


WEIGHT_LIMIT = 127
"""Largest quantized weight; the smallest is its negative."""


def along(values: NDArray[Any], axis: int, rank: int) -> NDArray[Any]:
    """``values``, one a channel, so that they broadcast along ``axis`` of an array of ``rank`` axes."""
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight per output channel.

    Attributes:
        values: int8, shaped like the float weight.
        scale: float32, one per channel.
        axis: of the channels.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    axis: int

    def dequantized(self) -> NDArray[np.float32]:
        """The float weight the integers stand for."""
        return np.asarray(self.values.astype(np.float32) * along(self.scale, self.axis, self.values.ndim))


def activation_parameters(name: str, low: float, high: float, scheme: QuantScheme, *, symmetric: bool = False) -> Grid:
    """Scale and zero point for values in ``[low, high]``, 0 exactly representable.

    Args:
        name: of the value, for messages.
        low: smallest value.
        high: largest value.
        scheme: says type and symmetry.
        symmetric: signed and symmetric whatever the scheme says, if there are negative values.

    Raises:
        QuantizationError: the range is not finite.
    """
    if not np.isfinite([low, high]).all():
        raise QuantizationError(f"the range of {name} is [{low}, {high}]; calibrate on images on which it stays finite")
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme.symmetric or (symmetric and low < 0):
        scale = max(-low, high) / 127
        return Grid(float(np.float32(max(scale, SMALLEST_SCALE))), 0, -127, 127)
    smallest, largest = (0, 255) if scheme.activations == "u8" else (-128, 127)
    scale = float(np.float32(max((high - low) / 255, SMALLEST_SCALE)))
    zero_point = int(np.clip(np.rint(smallest - low / scale), smallest, largest))
    return Grid(scale, zero_point, smallest, largest)


def trained_parameters(
    grid: Grid, scheme: QuantScheme, *, symmetric: bool = False, clamp: tuple[float, float] = (-math.inf, math.inf)
) -> Grid | None:
    """The integers of training in those of the scheme: the same steps, 0 at another integer; ``None``: it has none.

    Where training used fewer integers than the scheme has (7 bits, or a signed scale for values that are never negative), the
    steps are the same, but values above the largest are not cut off.

    Args:
        grid: what the tensor was rounded to.
        scheme: says type and symmetry.
        symmetric: signed and symmetric whatever the scheme says, if there are negative values.
        clamp: what the integers have to clip at, in place of a Relu or Clip that is left out; no value beyond half a step.
    """
    if scheme.symmetric or (symmetric and grid.limits[0] < 0):
        limits, zero_point = (-128, 127), 0
    else:
        limits = (0, 255) if scheme.activations == "u8" else (-128, 127)
        zero_point = limits[0] + grid.zero_point - grid.low
    low, high = (integer + zero_point - grid.zero_point for integer in (grid.low, grid.high))
    if low < limits[0] or high > limits[1]:
        return None
    lowest, highest = ((end - zero_point) * grid.scale for end in limits)
    if lowest < clamp[0] - grid.scale / 2 or highest > clamp[1] + grid.scale / 2:
        return None
    return Grid(grid.scale, zero_point, *limits)


def trained_weight(weight: NDArray[np.float32], axis: int, scheme: QuantScheme, *, groups: int = 1) -> QuantizedWeight:
    """Quantize a weight that training rounded already by the scales it was rounded with, per channel.

    They are found from the values: every one of a channel is a whole multiple of its scale, at most 128 times it. Whatever
    scaled the channels since (a folded normalization) changes nothing. A channel that is no such multiple, or whose integers
    the scheme cannot hold, is quantized as :func:`quantize_weight` does.
    """
    plain = quantize_weight(weight, axis, scheme, groups=groups)
    channels = np.moveaxis(weight.astype(np.float64), axis, 0).reshape(weight.shape[axis], -1)
    largest = np.abs(channels).max(axis=1)
    # A few values of each rule nearly all multiples out.
    some = np.take_along_axis(channels, np.argsort(-np.abs(channels), axis=1)[:, :_FEW], axis=1)
    scale = np.zeros_like(largest)
    integers = np.zeros_like(channels)
    pending = np.flatnonzero(largest > SMALLEST_WEIGHT_SCALE)
    for steps in range(1, WEIGHT_LIMIT + 2):
        step = largest[pending] / steps
        fitting = pending[_are_whole(some[pending] / step[:, None])]
        fitting = fitting[_are_whole(channels[fitting] / (largest[fitting] / steps)[:, None])]
        scale[fitting] = largest[fitting] / steps
        # Where a negative factor turned -128 round, the one value is a step off.
        integers[fitting] = np.minimum(np.rint(channels[fitting] / scale[fitting][:, None]), WEIGHT_LIMIT)
        pending = np.setdiff1d(pending, fitting)
    rest = [size for index, size in enumerate(weight.shape) if index != axis]
    values = np.moveaxis(integers.reshape(weight.shape[axis], *rest), 0, axis)
    is_held = scale > 0
    if scheme.adds_pairs:
        # What is a step off in places is nearer to training than what is rounded anew.
        overflows = along(pair_sums(values, axis, scheme, groups=groups) > scheme.pair_limit, axis, weight.ndim)
        values = np.where(overflows, np.maximum(values, -WEIGHT_LIMIT), values)
        is_held &= pair_sums(values, axis, scheme, groups=groups) <= scheme.pair_limit
    return QuantizedWeight(
        np.where(along(is_held, axis, weight.ndim), values, plain.values).astype(np.int8),
        np.where(is_held, scale, plain.scale).astype(np.float32),
        axis,
    )


def _are_whole(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.asarray(np.abs(values - np.rint(values)).max(axis=1, initial=0.0) < _WHOLE, np.bool_)


_FEW, _WHOLE = 64, 2e-3
"""Values of a channel looked at first; how far a value may be from a whole number of steps: what float32 rounds off in 128."""


def quantize_weight(weight: NDArray[np.float32], axis: int, scheme: QuantScheme, *, groups: int = 1) -> QuantizedWeight:
    """Quantize symmetrically per channel along ``axis``, rounding to nearest even.

    Args:
        weight: of a convolution ``(O, I / groups, kH, kW)``, a transposed one ``(I, O, kH, kW)`` or a matrix.
        axis: of the output channels.
        scheme: of its kernels.
        groups: of a convolution.
    """
    rest = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=rest) if weight.size else np.zeros(weight.shape[axis], np.float32)
    if scheme.pair_limit < 2 * WEIGHT_LIMIT and weight.size:
        # Rounding adds at most half a step to each of the two.
        sums = pair_sums(weight, axis, scheme, groups=groups)
        largest = np.maximum(largest, sums * (WEIGHT_LIMIT / (scheme.pair_limit - 1)))
    # A channel of zeros gets scale 1: its integers are zero whatever the scale, and a tiny one would overflow the bias.
    scale = np.where(largest > 0, largest / WEIGHT_LIMIT, 1.0).astype(np.float32)
    scale = np.maximum(scale, np.float32(SMALLEST_WEIGHT_SCALE))
    values = np.clip(np.rint(weight / along(scale, axis, weight.ndim)), -WEIGHT_LIMIT, WEIGHT_LIMIT).astype(np.int8)
    return QuantizedWeight(values, scale, axis)


def pair_sums(weight: NDArray[Any], axis: int, scheme: QuantScheme, *, groups: int = 1) -> NDArray[Any]:
    """Largest absolute sum of two neighbouring weights, per output channel: those whose products a kernel adds in 16 bits.

    Neighbours in the order (row, column, channel): ONNX Runtime's kernels pair all inputs of an output so, oneDNN's the channels
    of a place, or the inputs of a row, or as the former, by shape. Where there is one channel, any two may be neighbours, but
    depthwise convolutions add in 32 bits on x86. So only neighbours overflow, not any weight of 8 bits, which is what the usual
    7 bits for all (ONNX Runtime's ``reduce_range``) guard against. Measured on such kernels: ``tests/emulated``,
    ``tests/integration/test_openvino.py``.

    Args:
        weight: float or integers, as for :func:`quantize_weight`.
        axis: of the output channels.
        scheme: of the kernels.
        groups: of a convolution.
    """
    channels = np.moveaxis(np.moveaxis(weight, axis, 0), 1, -1)  # (O, kH, kW, I), a matrix (O, I)
    outputs, inputs = channels.shape[0], channels.shape[-1]
    if inputs == 1 and groups == outputs and scheme.activations == "u8":
        return np.zeros(outputs, weight.dtype)
    # Sums of int8 leave int8.
    values = channels.astype(np.result_type(weight.dtype, np.int32))
    if inputs == 1:
        return np.asarray(2 * np.abs(values).reshape(outputs, -1).max(axis=1))
    sums = np.zeros(outputs, values.dtype)
    for outer in range(1, values.ndim):
        # All inputs, those of a row, those of a place: the last of an odd number is alone.
        runs = values.reshape(*values.shape[:outer], -1)
        even, odd = runs[..., 0::2].copy(), runs[..., 1::2]
        even[..., : odd.shape[-1]] += odd
        sums = np.maximum(sums, np.abs(even).reshape(outputs, -1).max(axis=1))
    return sums


def weight_axis(op_type: str, *, groups: int = 1, transposed: bool = False) -> int:
    """The output-channel axis of a weight: Conv 0, ConvTranspose 1, Gemm 0 or 1 by ``transB``, MatMul 1."""
    if op_type == "ConvTranspose":
        if groups != 1:
            raise QuantizationError(
                f"ConvTranspose with {groups} groups has no per-channel weight axis; leave it float"
            )
        return 1
    return {"Conv": 0, "MatMul": 1, "Gemm": 0 if transposed else 1}[op_type]


def quantize_bias(bias: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """Quantize a bias to int32 with the accumulator's scale (input scale times weight scale, per channel)."""
    info = np.iinfo(np.int32)
    return np.clip(np.rint(bias.astype(np.float64) / scale.astype(np.float64)), info.min, info.max).astype(np.int32)


def widen_for_bias(weight: QuantizedWeight, input_scale: float, bias: NDArray[Any]) -> QuantizedWeight:
    """Raise the weight scale of channels whose bias would leave int32 (weights a billion times smaller than the bias)."""
    needed = np.abs(bias.astype(np.float64)) / (input_scale * 2.0**30)
    if not np.any(needed > weight.scale):
        return weight
    # At least a hundredth wider: rounded anew, integers that are hardly smaller could add to more than before.
    scale = np.where(needed > weight.scale, np.maximum(needed, weight.scale * 1.01), weight.scale).astype(np.float32)
    values = np.rint(weight.dequantized() / along(scale, weight.axis, weight.values.ndim)).astype(np.int8)
    return QuantizedWeight(values, scale, weight.axis)


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
