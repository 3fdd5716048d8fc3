"""Colours, overlays and legends: distances measured, pixels checked against arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseg.errors import InputError
from edgeseg.runtime.overlay import (
    LegendEntry,
    add_legend,
    class_palette,
    colorize,
    legend_entries,
    legend_panel,
    overlay,
    spec_palette,
)
from edgeseg.spec import ModelSpec, PipelineSpec

RNG = np.random.default_rng(5)

# Severity 1.0 matrices of Machado, Oliveira and Fernandes (2009), on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def smallest_distance(colours: np.ndarray, vision: np.ndarray) -> float:
    """Least CIELAB distance (CIE76) between any two colours as seen with a kind of vision."""
    share = colours / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ vision.T, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = seen @ to_xyz.T / (0.95047, 1.0, 1.08883)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack((116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])), axis=1)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    return float(distance[~np.eye(len(colours), dtype=bool)].min())


@pytest.mark.parametrize(("count", "least"), [(12, 25.0), (64, 20.0), (256, 10.0)])
def test_colours_can_be_told_apart(count: int, least: float) -> None:
    assert smallest_distance(class_palette(count), VISION["normal"]) >= least


@pytest.mark.parametrize("vision", VISION)
def test_the_first_twelve_colours_can_be_told_apart_with_any_vision(vision: str) -> None:
    # 2.3 is the least difference people notice.
    assert smallest_distance(class_palette(12), VISION[vision]) >= 14.0


def test_a_class_keeps_its_colour() -> None:
    assert [tuple(c) for c in class_palette(3).tolist()] == [(230, 159, 0), (86, 180, 233), (0, 158, 115)]
    np.testing.assert_array_equal(class_palette(20)[:7], class_palette(7))
    np.testing.assert_array_equal(class_palette(300)[256:], class_palette(44))


def test_palettes_by_task() -> None:
    binary = spec_palette(PipelineSpec(ModelSpec("custom", classes=1, task="binary")))
    np.testing.assert_array_equal(binary, [[0, 0, 0], class_palette(1)[0]])
    named = spec_palette(PipelineSpec(ModelSpec("custom", classes=3, class_names=("road", "Background", "sky"))))
    np.testing.assert_array_equal(named[[0, 2]], class_palette(3)[[0, 2]])
    assert not named[1].any()
    assert class_palette(3)[1].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_colorize_looks_colours_up(dtype: type) -> None:
    mask = RNG.integers(0, 6, (7, 9)).astype(dtype)
    palette = RNG.integers(0, 256, (6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(colorize(mask, palette), palette[mask])
    np.testing.assert_array_equal(colorize(mask), class_palette(6)[mask])


def test_values_without_a_colour_are_grey() -> None:
    mask = np.array([[0, 255]], np.uint8)
    assert colorize(mask, np.array([[1, 2, 3]], np.uint8)).tolist() == [[[1, 2, 3], [128, 128, 128]]]
    assert colorize(np.array([[0, 999]], np.uint16))[0, 1].tolist() == [128, 128, 128]


def test_planes_are_mixed() -> None:
    planes = np.array([[[1, 1, 0, 0]], [[0, 1, 1, 0]]], np.uint8)
    palette = np.array([[200, 0, 10], [100, 50, 10]], np.uint8)
    assert colorize(planes, palette)[0].tolist() == [[200, 0, 10], [150, 25, 10], [100, 50, 10], [0, 0, 0]]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_overlay_blends_but_leaves_black_classes_alone(alpha: float) -> None:
    image = RNG.integers(0, 256, (11, 13, 3), dtype=np.uint8)
    mask = RNG.integers(0, 3, (11, 13), dtype=np.uint8)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 40, 250]], np.uint8)
    expected = np.where(mask[..., None] == 0, image, image * (1 - alpha) + palette[mask] * alpha)
    result = overlay(image, mask, alpha=alpha, palette=palette)
    assert np.abs(result - expected).max() <= 1
    np.testing.assert_array_equal(result[mask == 0], image[mask == 0])


def test_overlay_of_other_channel_counts() -> None:
    mask = np.zeros((4, 5), np.uint8)
    for channels, shown in ((1, [0, 0, 0]), (2, [0, 0, 0]), (4, [0, 1, 2]), (7, [0, 1, 2])):
        image = RNG.integers(0, 256, (4, 5, channels), dtype=np.uint8)
        np.testing.assert_array_equal(overlay(image, mask, alpha=0.0), image[..., shown])


def test_what_cannot_be_drawn() -> None:
    image, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
    for arguments, alpha in (
        ((image, mask[1:]), 0.5),
        ((image, mask), 1.5),
        ((image[0], mask), 0.5),
        ((image.astype(bool), mask), 0.5),
        ((image, mask.astype(float)), 0.5),
        ((image, mask.astype(int) - 1), 0.5),
    ):
        with pytest.raises(InputError):
            overlay(*arguments, alpha=alpha)


def test_legend_lists_the_classes_present_by_share() -> None:
    mask = np.array([[2, 2, 2, 0]], np.uint8)
    palette = class_palette(3)
    entries = legend_entries(mask, ("a", "b", "c"), palette)
    assert [(e.name, e.share) for e in entries] == [("c", 0.75), ("a", 0.25)]
    assert [e.colour for e in entries] == [tuple(palette[2].tolist()), tuple(palette[0].tolist())]
    assert [e.name for e in legend_entries(None, ("a", "b", "c"), palette)] == ["a", "b", "c"]
    planes = np.array([[[1, 1]], [[0, 1]]], np.uint8)
    assert [(e.name, e.share) for e in legend_entries(planes, ("a", "b"), palette)] == [("a", 1.0), ("b", 0.5)]
    two = legend_entries(mask // 2, ("crack",), class_palette(2), binary=True)
    assert [(e.name, e.share) for e in two] == [("crack", 0.75), ("background", 0.25)]


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (352, 480)])
@pytest.mark.parametrize("count", [0, 1, 11, 150])
def test_legend_stands_beside_the_picture(size: tuple[int, int], count: int) -> None:
    colours = class_palette(count)
    entries = [LegendEntry(f"class {i}", tuple(c), 0.01) for i, c in enumerate(colours.tolist())]  # type: ignore[arg-type]
    picture = RNG.integers(0, 200, (*size, 3), dtype=np.uint8)
    result = add_legend(picture, entries)
    np.testing.assert_array_equal(result[: size[0], : size[1]], picture)
    panel = result[:, size[1] :]
    assert panel.shape[1] > 0
    as_number = np.array([65536, 256, 1])
    assert np.isin(colours @ as_number, panel @ as_number).all()


def test_names_in_any_script_are_drawn() -> None:
    entry = LegendEntry("Straße 道路 дорога", (1, 2, 3), None)
    assert (legend_panel(64, (entry,)) == 0).any()


def test_a_large_picture_is_laid_over_a_band_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (37, 20, 3), dtype=np.uint8)
    for mask in (rng.integers(0, 5, (37, 20), dtype=np.uint8), rng.integers(0, 2, (4, 37, 20), dtype=np.uint8)):
        whole, names = overlay(image, mask), [f"{k}" for k in range(5 if mask.ndim == 2 else 4)]
        shares = legend_entries(mask, names, class_palette(5))
        monkeypatch.setattr("edgeseg.runtime.overlay.BAND_PIXELS", 50)
        np.testing.assert_array_equal(overlay(image, mask), whole)
        assert legend_entries(mask, names, class_palette(5)) == shares
        monkeypatch.undo()
