"""Fitting images to the engine and bringing masks and scores back, against scalar arithmetic and torch-free oracles."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeseg.errors import InputError
from edgeseg.images.placement import Placement, Tiling, fit, fit_windows, plan_fit
from edgeseg.images.resize import nearest_index, resize_image, resize_nearest, resize_scores
from edgeseg.runtime.scores import ScoreRule, argmax_planes, argmax_resized
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
RNG = np.random.default_rng(3)


def blend_at(values: list[float], position: float) -> float:
    """Linear interpolation at a position in pixels, clamped, by the textbook."""
    position = min(max(position, 0.0), len(values) - 1.0)
    before = math.floor(position)
    after = min(before + 1, len(values) - 1)
    return values[before] + (values[after] - values[before]) * (position - before)


def bilinear(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scalar bilinear resize with half-pixel centres: rows first, then columns."""
    height, width = plane.shape
    out = np.empty(size)
    for y in range(size[0]):
        at = (y + 0.5) * height / size[0] - 0.5
        row = [blend_at([float(v) for v in plane[:, x]], at) for x in range(width)]
        for x in range(size[1]):
            out[y, x] = blend_at(row, (x + 0.5) * width / size[1] - 0.5)
    return out


@settings(max_examples=40, deadline=None)
@given(source=SIZES, target=SIZES, channels=st.integers(1, 5), seed=st.integers(0, 99))
@example(source=(1, 1), target=(40, 1), channels=3, seed=0)
@example(source=(40, 40), target=(1, 1), channels=3, seed=0)
def test_images_are_resized_bilinearly(
    source: tuple[int, int], target: tuple[int, int], channels: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (*source, channels), dtype=np.uint8)
    resized = resize_image(image, target)
    assert resized.dtype == np.uint8
    assert resized.shape == (*target, channels)
    expected = np.stack([bilinear(image[..., c], target) for c in range(channels)], axis=-1)
    # Weights are held in 1/256: at most half a step off on each axis, plus rounding to whole levels.
    assert np.abs(resized - expected).max() <= 255 / 512 * 2 + 0.5


def test_images_are_rounded_not_cut() -> None:
    image = RNG.integers(0, 256, (60, 60, 1), dtype=np.uint8)
    off = resize_image(image, (47, 83))[..., 0] - bilinear(image[..., 0], (47, 83))
    assert abs(off.mean()) < 0.1


@settings(max_examples=50, deadline=None)
@given(value=st.integers(0, 255), source=SIZES, target=SIZES)
def test_a_plain_image_stays_plain(value: int, source: tuple[int, int], target: tuple[int, int]) -> None:
    resized = resize_image(np.full((*source, 3), value, np.uint8), target)
    assert (resized == value).all()


@settings(max_examples=40, deadline=None)
@given(source=SIZES, target=SIZES, seed=st.integers(0, 99))
def test_scores_are_resized_bilinearly(source: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(2, *source)).astype(np.float32)
    resized = resize_scores(scores, target)
    assert resized.dtype == np.float32
    expected = np.stack([bilinear(plane, target) for plane in scores])
    np.testing.assert_allclose(resized, expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 400), target=st.integers(1, 400))
def test_nearest_takes_the_pixel_that_holds_the_centre(length: int, target: int) -> None:
    index = nearest_index(length, target)
    for i, chosen in enumerate(index):
        # Pixel k spans [k, k + 1) in source pixels; fractions leave no rounding to argue about.
        assert chosen <= (i + Fraction(1, 2)) * length / target < chosen + 1


def test_nearest_enlarges_each_pixel_to_a_block() -> None:
    mask = RNG.integers(0, 9, (3, 5), dtype=np.uint8)
    np.testing.assert_array_equal(resize_nearest(mask, (6, 15)), mask.repeat(2, axis=0).repeat(3, axis=1))


# Fitting


@st.composite
def input_specs(draw: st.DrawFn) -> InputSpec:
    stride = draw(st.sampled_from([1, 4, 8]))
    height, width = draw(st.integers(1, 6)) * stride, draw(st.integers(1, 6)) * stride
    dynamic = draw(st.booleans())
    bounds = {}
    if dynamic and draw(st.booleans()):
        bounds = {"min_size": (stride, stride), "max_size": (height, width)}
    policy = draw(st.sampled_from(["resize", "letterbox", "tile"]))
    return InputSpec(height, width, stride=stride, dynamic_size=dynamic, fit=policy, **bounds)


@settings(max_examples=120, deadline=None)
@given(spec=input_specs(), size=SIZES)
def test_every_input_has_a_size_the_engine_takes(spec: InputSpec, size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    windows = fit_windows(image, spec)
    assert len(windows) > 0
    for window in windows:
        assert window.dtype == np.uint8
        assert window.flags.c_contiguous
        height, width, channels = window.shape
        assert channels == 3
        if spec.dynamic_size:
            assert height % spec.stride == 0
            assert width % spec.stride == 0
            assert spec.max_size is None or (height <= spec.max_size[0] and width <= spec.max_size[1])
        else:
            assert (height, width) == (spec.height, spec.width)


@settings(max_examples=120, deadline=None)
@given(spec=input_specs(), size=SIZES)
def test_placed_masks_and_scores_have_the_size_of_the_image(spec: InputSpec, size: tuple[int, int]) -> None:
    plan = plan_fit(*size, spec)
    if isinstance(plan, Tiling):
        return
    mask = plan.restore(RNG.integers(0, 9, plan.canvas, dtype=np.uint8))
    assert mask.shape == size
    assert mask.dtype == np.uint8
    assert plan.restore(np.zeros((4, *plan.canvas), np.float32)).shape == (4, *size)


def test_exact_size_is_the_image_itself() -> None:
    image = RNG.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    for policy in ("resize", "letterbox", "tile"):
        fitted, placement = fit(image, InputSpec(32, 64, fit=policy))
        assert fitted is image
        assert placement.is_identity


def test_resize_stretches() -> None:
    placement = plan_fit(100, 10, InputSpec(32, 64, fit="resize"))
    # There is no padding to speak of.
    assert placement == Placement((100, 10), (32, 64), (32, 64), repeat_border=True)


def test_letterbox_keeps_the_aspect_ratio_and_pads_with_black() -> None:
    image = RNG.integers(0, 256, (10, 40, 3), dtype=np.uint8)
    fitted, placement = fit(image, InputSpec(32, 64, stride=16, fit="letterbox"))
    assert placement == Placement((10, 40), (32, 64), (16, 64))
    np.testing.assert_array_equal(fitted[:16], resize_image(image, (16, 64)))
    assert not fitted[16:].any()


@pytest.mark.parametrize("policy", ["letterbox", "tile"])
def test_narrow_padding_repeats_the_border(policy: str) -> None:
    image = RNG.integers(0, 256, (20, 64, 3), dtype=np.uint8)
    fitted, placement = fit(image, InputSpec(32, 64, stride=16, fit=policy))
    assert placement == Placement((20, 64), (32, 64), (20, 64), repeat_border=True)
    np.testing.assert_array_equal(fitted, np.pad(image, ((0, 12), (0, 0), (0, 0)), mode="edge"))


def test_dynamic_size_is_padded_to_the_stride_never_scaled() -> None:
    image = RNG.integers(0, 256, (33, 20, 3), dtype=np.uint8)
    fitted, placement = fit(image, InputSpec(64, 64, stride=32, dynamic_size=True))
    assert placement == Placement((33, 20), (64, 32), (33, 20), repeat_border=True)
    np.testing.assert_array_equal(fitted[:33, :20], image)
    np.testing.assert_array_equal(fitted, np.pad(image, ((0, 31), (0, 12), (0, 0)), mode="edge"))


def test_dynamic_size_respects_its_bounds() -> None:
    spec = InputSpec(64, 64, stride=32, dynamic_size=True, min_size=(64, 64), max_size=(96, 128))
    assert plan_fit(10, 10, spec) == Placement((10, 10), (64, 64), (10, 10))
    assert plan_fit(200, 100, spec) == Placement((200, 100), (96, 128), (96, 100), repeat_border=True)
    letterbox = InputSpec(64, 64, stride=32, dynamic_size=True, max_size=(96, 128), fit="letterbox")
    assert plan_fit(192, 100, letterbox) == Placement((192, 100), (96, 64), (96, 50), repeat_border=True)
    between_multiples = InputSpec(64, 64, stride=32, dynamic_size=True, max_size=(100, 130))
    assert plan_fit(200, 200, between_multiples).canvas == (96, 128)
    tile = InputSpec(64, 64, stride=32, dynamic_size=True, max_size=(96, 128), fit="tile")
    plan = plan_fit(192, 100, tile)
    assert isinstance(plan, Tiling)
    assert plan.window == (96, 128)


def test_a_tiled_image_is_not_one_input() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    spec = InputSpec(32, 32, fit="tile")
    with pytest.raises(InputError, match="4 tiles of 32x32"):
        fit(image, spec)
    assert len(fit_windows(image, spec)) == 4


def test_cropped_results_can_be_handed_on() -> None:
    placement = Placement((3, 5), (8, 8), (3, 5))
    mask = placement.restore(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, np.arange(64).reshape(8, 8)[:3, :5])


# Deciding


@settings(max_examples=60, deadline=None)
@given(source=SIZES, target=SIZES, classes=st.integers(1, 6), seed=st.integers(0, 99), smooth=st.booleans())
def test_argmax_of_resized_scores(
    source: tuple[int, int], target: tuple[int, int], classes: int, seed: int, smooth: bool
) -> None:
    scores = np.random.default_rng(seed).normal(size=(classes, *source)).astype(np.float32)
    if smooth:  # large areas of one class: the shortcut decides most pixels
        scores = resize_scores(scores[:, : 1 + source[0] // 4, : 1 + source[1] // 4], source)
    whole = np.stack([bilinear(plane, target) for plane in scores])
    ranked = np.sort(whole, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5 if classes > 1 else np.ones(target, bool)
    np.testing.assert_array_equal(argmax_resized(scores, target)[clear], whole.argmax(axis=0)[clear])


def test_argmax_takes_the_first_of_equals_and_counts_beyond_256() -> None:
    scores = np.zeros((300, 3, 4), np.float32)
    assert argmax_planes(scores).max() == 0
    scores[299, 1, 2] = scores[280, 1, 2] = 1
    winner = argmax_planes(scores)
    assert winner.dtype == np.uint16
    assert winner[1, 2] == 280


@pytest.mark.parametrize("activation", [None, "sigmoid", "tanh", "clamp", "softmax2d", "identity"])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9])
def test_threshold_on_logits_is_the_threshold_on_probabilities(
    task: str, activation: str | None, threshold: float
) -> None:
    classes = 1 if task == "binary" else 3
    model = ModelSpec("custom", classes=classes, task=task, activation=activation)
    logits = RNG.normal(size=(classes, 20, 20)).astype(np.float32)
    rule = ScoreRule.of(PipelineSpec(model, output=OutputSpec("logits", threshold=threshold)))
    wide = logits.astype(np.float64)
    expected = {
        "tanh": (np.tanh(wide) + 1) / 2,
        "clamp": np.clip(wide, 0, 1),
        "softmax2d": np.exp(wide) / np.exp(wide).sum(axis=0),
    }.get(str(activation), 1 / (1 + np.exp(-wide)))
    mask = rule.mask(logits)
    above = expected > threshold
    np.testing.assert_array_equal(mask, above[0] if task == "binary" else above)
    np.testing.assert_allclose(rule.probabilities(logits), expected, atol=1e-6)
    chosen = np.where(above, expected, 1 - expected)
    np.testing.assert_allclose(rule.confidence(logits, mask), chosen[0] if task == "binary" else chosen, atol=1e-6)


def test_probabilities_of_extreme_logits_do_not_overflow() -> None:
    logits = np.array([-1e30, -200, 0, 200, 1e30], np.float32).reshape(1, 1, 5)
    rule = ScoreRule("binary", "sigmoid", 0.5, "uint8")
    np.testing.assert_allclose(rule.probabilities(logits)[0, 0], [0, 0, 0.5, 1, 1], atol=1e-30)
    both = np.concatenate((logits, -logits))
    softmax = ScoreRule("multiclass", "softmax", 0.5, "uint8").probabilities(both)
    np.testing.assert_allclose(softmax.sum(axis=0), 1, atol=1e-6)


def test_confidence_is_the_probability_of_the_chosen_class() -> None:
    model = ModelSpec("custom", classes=4)
    rule = ScoreRule.of(PipelineSpec(model, output=OutputSpec("logits", confidence=True)))
    logits = RNG.normal(size=(4, 6, 7)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=0)
    np.testing.assert_allclose(rule.confidence(logits, rule.mask(logits)), probabilities.max(axis=0), rtol=1e-6)
