"""Scales, zero points and integer weights against a quantizer written out in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeseg.errors import QuantizationError
from edgeseg.quantize.parameters import (
    QuantizedWeight,
    activation_parameters,
    bias_correction,
    quantize_bias,
    quantize_weight,
    weight_axis,
    widen_for_bias,
)
from edgeseg.quantize.schemes import SCHEMES

finite = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize("name", SCHEMES)
@given(a=finite, b=finite)
def test_every_value_of_a_range_is_within_half_a_step(name: str, a: float, b: float) -> None:
    scheme = SCHEMES[name]
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    parameters = activation_parameters("x", low, high, scheme)
    expected = (0, 255) if scheme.activations == "u8" else (-127, 127) if scheme.symmetric else (-128, 127)
    assert (parameters.low, parameters.high) == expected
    assert parameters.dtype == (np.uint8 if scheme.activations == "u8" else np.int8)
    assert parameters.scale > 0
    assert expected[0] <= parameters.zero_point <= expected[1]
    assert parameters.zero_point == 0 or not scheme.symmetric
    values = np.linspace(low, high, 41)
    integers = parameters.quantize(values).astype(int)
    # The zero point is rounded as well, so the far end of the range may lose half a step more.
    assert np.abs(parameters.scale * (integers - parameters.zero_point) - values).max() <= parameters.scale * (1 + 1e-3)


def test_zero_is_exact_and_relu_needs_no_zero_point() -> None:
    assert activation_parameters("x", 0.0, 5.1, SCHEMES["onnxruntime-vnni"]).zero_point == 0
    assert activation_parameters("x", 0.0, 5.1, SCHEMES["onnxruntime-arm"]).zero_point == -128
    parameters = activation_parameters("x", -1.0, 3.0, SCHEMES["onnxruntime-vnni"])
    assert parameters.scale == pytest.approx(4 / 255)
    assert parameters.zero_point == 64


def test_symmetric_on_request_where_there_are_negative_values() -> None:
    scheme = SCHEMES["openvino"]
    signed = activation_parameters("x", -1.0, 3.0, scheme, symmetric=True)
    assert (signed.zero_point, signed.low, signed.high, signed.dtype) == (0, -127, 127, np.int8)
    assert signed.scale == pytest.approx(3 / 127)
    assert activation_parameters("x", 0.0, 3.0, scheme, symmetric=True).low == 0


def test_a_range_that_is_not_finite_names_the_value() -> None:
    with pytest.raises(QuantizationError, match=r"range of layer/x is \[0\.0, inf\]"):
        activation_parameters("layer/x", 0.0, float("inf"), SCHEMES["tensorrt"])


WEIGHTS = hnp.arrays(np.float32, (3, 3, 3, 3), elements=st.floats(-100, 100, width=32))


@given(WEIGHTS, st.sampled_from(["onnxruntime-vnni", "onnxruntime-avx2"]))
def test_weights_are_within_half_a_step_per_channel(weight: np.ndarray, scheme: str) -> None:
    quantized = quantize_weight(weight, 0, SCHEMES[scheme])
    assert quantized.values.dtype == np.int8
    for channel, scale in zip(range(3), quantized.scale, strict=True):
        error = np.abs(quantized.dequantized()[channel] - weight[channel]).max()
        assert error <= 0.5001 * scale
        largest = np.abs(weight[channel]).max()
        if largest > 1e-15:
            coarsest = 63 if scheme == "onnxruntime-avx2" else 127
            assert largest / 127.001 <= scale <= largest / (coarsest - 0.001)


@given(WEIGHTS)
def test_no_neighbours_overflow_16_bits(weight: np.ndarray) -> None:
    integers = quantize_weight(weight, 0, SCHEMES["onnxruntime-avx2"]).values.astype(int).transpose(0, 2, 3, 1)
    for output in integers:
        for run in (output.ravel(), *output.reshape(3, -1), *output.reshape(9, -1)):
            assert all(-(2**15) <= 255 * run[k : k + 2].sum() < 2**15 for k in range(0, len(run), 2))


@pytest.mark.parametrize(("groups", "limit"), [(4, 127), (2, 64)])
def test_weights_of_one_channel(groups: int, limit: int) -> None:
    """A depthwise convolution adds in 32 bits; otherwise any two weights may be neighbours."""
    weight = np.ones((4, 1, 3, 3), np.float32)
    assert quantize_weight(weight, 0, SCHEMES["onnxruntime-avx2"], groups=groups).values.max() == limit


def test_a_channel_of_zeros_stays_zero() -> None:
    quantized = quantize_weight(np.zeros((2, 1, 1, 1), np.float32), 0, SCHEMES["tensorrt"])
    assert not quantized.values.any()
    assert (quantized.scale > 0).all()


def test_the_channel_axis_of_each_operator() -> None:
    assert weight_axis("Conv", groups=8) == 0
    assert weight_axis("ConvTranspose") == 1
    assert weight_axis("MatMul") == 1
    assert weight_axis("Gemm") == 1
    assert weight_axis("Gemm", transposed=True) == 0
    with pytest.raises(QuantizationError, match="2 groups"):
        weight_axis("ConvTranspose", groups=2)


def test_a_bias_far_above_its_weights_still_fits_int32() -> None:
    weight = quantize_weight(np.array([[1e-9], [0.5]], np.float32), 0, SCHEMES["onnxruntime-vnni"])
    bias = np.array([10.0, 1.0], np.float32)
    widened = widen_for_bias(weight, 0.01, bias)
    integers = quantize_bias(bias, (widened.scale * 0.01).astype(np.float32))
    np.testing.assert_allclose(integers * widened.scale * 0.01, bias, rtol=1e-5)
    assert widened.scale[1] == weight.scale[1]


@pytest.mark.parametrize(("groups", "channels"), [(1, 4), (2, 4), (4, 4)])
def test_bias_correction_restores_the_mean_output(groups: int, channels: int) -> None:
    """By hand: inputs constant per channel, no padding; every output moves by the same amount."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, channels // groups, 3, 3)).astype(np.float32)
    coarse = QuantizedWeight(np.rint(weight).astype(np.int8), np.ones(8, np.float32), 0)
    mean = rng.uniform(0, 3, channels)
    expected = np.zeros(8)
    for out in range(8):
        group = out // (8 // groups)
        for i in range(channels // groups):
            error = weight[out, i] - coarse.values[out, i]
            expected[out] += error.sum() * mean[group * (channels // groups) + i]
    np.testing.assert_allclose(bias_correction(weight, coarse, mean, groups=groups), expected, rtol=1e-5, atol=1e-5)


def test_bias_correction_of_matrices_and_transposed_convolutions() -> None:
    rng = np.random.default_rng(1)
    mean = rng.uniform(0, 3, 5)
    matrix = rng.normal(size=(5, 3)).astype(np.float32)
    by_column = QuantizedWeight(np.rint(matrix).astype(np.int8), np.ones(3, np.float32), 1)
    np.testing.assert_allclose(bias_correction(matrix, by_column, mean), mean @ (matrix - np.rint(matrix)), rtol=1e-5)
    by_row = QuantizedWeight(np.rint(matrix.T).astype(np.int8), np.ones(3, np.float32), 0)
    np.testing.assert_allclose(
        bias_correction(np.ascontiguousarray(matrix.T), by_row, mean), mean @ (matrix - np.rint(matrix)), rtol=1e-5
    )
    kernel = rng.normal(size=(5, 3, 2, 2)).astype(np.float32)
    transposed = QuantizedWeight(np.rint(kernel).astype(np.int8), np.ones(3, np.float32), 1)
    expected = np.einsum("iohw,i->o", kernel - np.rint(kernel), mean)
    np.testing.assert_allclose(bias_correction(kernel, transposed, mean), expected, rtol=1e-5)
