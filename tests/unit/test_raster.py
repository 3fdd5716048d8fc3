"""Rasters, window by window: the mask of fit policy ``tile``, in its place on Earth, whatever happens on the way."""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from memory_backend import LogitsFunction, MemorySession, write_memory_engine

from edgeseg.backends import BACKENDS
from edgeseg.cli.run import command
from edgeseg.errors import OutputExistsError, SpecError
from edgeseg.images.raster import is_georeferenced
from edgeseg.runtime import raster as raster_module
from edgeseg.runtime.raster import RasterOptions
from edgeseg.runtime.run import RunSettings, RunSummary, run_inputs
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.silence import without_warnings
from edgeseg.spec import InputSpec, ModelSpec, OutputKind, OutputSpec, PipelineSpec, Preprocess, Task

rasterio = pytest.importorskip("rasterio")
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.enums import ColorInterp, Resampling  # noqa: E402

RNG = np.random.default_rng(21)
SIZE = (90, 130)
PLACE = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)


def spec_of(
    kind: OutputKind = "logits", task: Task = "multiclass", classes: int = 4, channels: int = 3, **given: Any
) -> PipelineSpec:
    names = tuple(f"class-{index}" for index in range(classes))
    options = {"height": 32, "width": 32, "channels": channels, "stride": 1, **given}
    mean = (0.5,) * channels
    return PipelineSpec(
        ModelSpec("custom", classes=classes, class_names=names, task=task, in_channels=channels),
        InputSpec(**options),
        Preprocess(mean, mean),
        OutputSpec(kind),
    )


def by_place(classes: int) -> LogitsFunction:
    """Answers that depend on the whole window and on the place in it: what windows say of a pixel differs."""
    towards = np.random.default_rng(3).normal(size=(classes, 3)).astype(np.float32)

    def logits(images: np.ndarray) -> np.ndarray:
        pixels = images.astype(np.float32) / 255
        whole = pixels.mean(axis=(1, 2))[:, :1] * np.arange(classes)
        across = np.linspace(-1, 1, images.shape[2], dtype=np.float32)
        scores = np.einsum("nhwc,kc->nkhw", pixels[..., :3], towards[:, : pixels.shape[-1]])
        return np.asarray(scores + whole[:, :, None, None] + across * np.cos(np.arange(classes))[:, None, None])

    return logits


def segmenter_of(spec: PipelineSpec, logits: LogitsFunction | None = None, **options: Any) -> Segmenter:
    segmenter = Segmenter(MemorySession(spec, logits or by_place(spec.model.classes)), spec, **options)
    segmenter.identity = "of these tests"
    return segmenter


def write(path: Path, planes: np.ndarray, **profile: Any) -> Path:
    given: dict[str, Any] = {"driver": "GTiff", "crs": "EPSG:32633", "transform": PLACE, **profile}
    with without_warnings():
        with rasterio.open(
            path, "w", height=planes.shape[1], width=planes.shape[2], count=len(planes), dtype=planes.dtype, **given
        ) as file:
            file.write(planes)
    return path


def planes_of(bands: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    return RNG.integers(1, 256, (bands, *size), dtype=np.uint8)


def run(segmenter: Segmenter, path: Path, output: Path, *, overwrite: bool = False, **options: Any) -> RunSummary:
    return run_inputs(
        segmenter, [path], output, RunSettings(rasters=RasterOptions(**options)), progress=False, overwrite=overwrite
    )


def read(path: Path) -> np.ndarray:
    with without_warnings(), rasterio.open(path) as file:
        return np.asarray(file.read())


@pytest.fixture
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of two or three windows."""
    monkeypatch.setattr(raster_module, "PANEL_BYTES", 32 * 60 * (8 * 4 + 9))


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("size", [SIZE, (20, 25), (200, 20), (20, 200), (32, 32)])
@pytest.mark.parametrize(
    ("kind", "task", "classes"),
    [
        ("logits", "multiclass", 4),
        ("mask", "multiclass", 4),
        ("probabilities", "multiclass", 4),
        ("logits", "binary", 1),
        ("mask", "multilabel", 3),
        ("probabilities", "multilabel", 3),
    ],
)
def test_the_mask_is_that_of_fit_policy_tile(
    tmp_path: Path, kind: OutputKind, task: Task, classes: int, size: tuple[int, int]
) -> None:
    spec = spec_of(kind, task, classes)
    planes = planes_of(size=size)
    path = write(tmp_path / "big.tif", planes)
    probabilities = None if kind == "mask" else "float32"
    summary = run(segmenter_of(spec), path, tmp_path / "out", probabilities=probabilities)
    assert (summary.images, summary.failed) == (1, ())
    expected = segmenter_of(spec, fit="tile").predict(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    mask = read(tmp_path / "out/masks/big.tif")
    np.testing.assert_array_equal(mask, expected.mask.reshape(mask.shape))
    assert mask.dtype == expected.mask.dtype
    if probabilities is not None:
        scores = expected.probabilities if kind == "probabilities" else expected.logits
        assert scores is not None
        if kind == "logits" and task == "multiclass":
            scores = np.exp(scores) / np.exp(scores).sum(axis=0)
        elif kind == "logits":
            scores = 1 / (1 + np.exp(-scores))
        np.testing.assert_allclose(read(tmp_path / "out/probabilities/big.tif"), scores, atol=1e-6)
    assert [p.name for p in (tmp_path / "out/masks").iterdir()] == ["big.tif"]


def test_more_than_255_classes_need_uint16(tmp_path: Path) -> None:
    planes = planes_of(size=(32, 40))
    planes[:, :, :5] = 0
    spec = spec_of("mask", classes=256, height=16, width=16)
    run(segmenter_of(spec), write(tmp_path / "big.tif", planes, nodata=0), tmp_path / "out")
    expected = segmenter_of(spec, fit="tile")(np.ascontiguousarray(planes.transpose(1, 2, 0))).astype(np.uint16)
    expected[:, :5] = 65535
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        assert (mask.dtypes, mask.nodata) == (("uint16",), 65535)
        np.testing.assert_array_equal(mask.read(1), expected)
        assert mask.colormap(1)[200][:3] == tuple(segmenter_of(spec).palette[200])


def test_place_colours_and_names_are_kept(tmp_path: Path) -> None:
    segmenter = segmenter_of(spec_of())
    run(segmenter, write(tmp_path / "big.tif", planes_of()), tmp_path / "out", probabilities="uint8")
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        assert (mask.crs, mask.transform, mask.shape) == (rasterio.CRS.from_epsg(32633), PLACE, SIZE)
        assert (mask.nodata, mask.dtypes, mask.profile["compress"]) == (255, ("uint8",), "deflate")
        assert mask.profile["tiled"]
        for value, colour in enumerate(segmenter.palette):
            assert mask.colormap(1)[value][:3] == tuple(colour)
        assert json.loads(mask.tags()["CLASS_NAMES"]) == list(segmenter.class_names)
        assert json.loads(mask.tags()["VALUES"]) == {str(i): n for i, n in enumerate(segmenter.class_names)}
    with rasterio.open(tmp_path / "out/probabilities/big.tif") as shares:
        assert (shares.crs, shares.transform, shares.shape) == (rasterio.CRS.from_epsg(32633), PLACE, SIZE)
        assert shares.descriptions == segmenter.class_names
        total = (shares.read() * np.array(shares.scales)[:, None, None]).sum(axis=0)
        np.testing.assert_allclose(total, 1, atol=4 * 0.5 / 254 + 1e-6)


def test_ground_control_points_are_kept(tmp_path: Path) -> None:
    points = [GroundControlPoint(r, c, x=c / 2, y=-r / 2, z=0.0) for r, c in ((0, 0), (0, 130), (90, 0), (90, 130))]
    path = write(tmp_path / "big.tif", planes_of(), transform=None, crs="EPSG:4326", gcps=points)
    run(segmenter_of(spec_of()), path, tmp_path / "out", use=True)
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        kept, system = mask.gcps
    assert [(p.row, p.col, p.x, p.y) for p in kept] == [(p.row, p.col, p.x, p.y) for p in points]
    assert system == rasterio.CRS.from_epsg(4326)


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("kind", ["logits", "mask"])
def test_pixels_without_data_get_a_value_of_their_own(tmp_path: Path, kind: OutputKind) -> None:
    planes = planes_of()
    planes[:, :, 100:] = 0
    planes[:, 40:50, 20:30] = 0
    planes[0, 5, 5] = 0  # in one band only: that is black, not nothing
    spec = spec_of(kind)
    run(segmenter_of(spec), write(tmp_path / "big.tif", planes, nodata=0), tmp_path / "out")
    expected = segmenter_of(spec, fit="tile")(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    nowhere = (planes == 0).all(axis=0)
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], np.where(nowhere, 255, expected))
    assert 0 < expected.max() < 255


def test_windows_without_data_are_not_run(tmp_path: Path) -> None:
    planes = planes_of(size=(32, 320))
    planes[:, :, 60:250] = 0
    spec = spec_of()
    session = MemorySession(spec, by_place(4))
    run(Segmenter(session, spec), write(tmp_path / "big.tif", planes, nodata=0), tmp_path / "out")
    lefts = Segmenter(session, spec).as_tiles().plan(32, 320).lefts  # type: ignore[union-attr]
    assert sum(shape[0] for shape in session.calls) == sum(left < 60 or left + 32 > 250 for left in lefts)
    mask = read(tmp_path / "out/masks/big.tif")[0]
    assert (mask[:, 60:250] == 255).all()
    assert (mask[:, :60] < 4).all()


def test_a_raster_of_nothing_is_a_mask_of_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "big.tif", np.zeros((3, *SIZE), np.uint8), nodata=0)
    run(segmenter_of(spec_of()), path, tmp_path / "out", probabilities="float32")
    assert (read(tmp_path / "out/masks/big.tif") == 255).all()
    assert np.isnan(read(tmp_path / "out/probabilities/big.tif")).all()


def test_an_alpha_band_is_no_channel_and_says_where_data_is(tmp_path: Path) -> None:
    planes = planes_of(4)
    planes[3] = 255
    planes[3, :, :40] = 0
    path = write(tmp_path / "big.tif", planes)
    run(segmenter_of(spec_of()), path, tmp_path / "out")
    expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(planes[:3].transpose(1, 2, 0)))
    expected[:, :40] = 255
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], expected)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_pixels_of_the_engines_dtype(tmp_path: Path, dtype: Any) -> None:
    planes = (RNG.random((3, *SIZE)) * 1000).astype(dtype)
    spec = spec_of(dtype=dtype)
    run(segmenter_of(spec), write(tmp_path / "big.tif", planes), tmp_path / "out")
    expected = segmenter_of(spec, fit="tile")(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], expected)


@pytest.mark.parametrize("nothing", [float("nan"), -3e38])
def test_floats_without_data_spoil_nothing_beside_them(tmp_path: Path, nothing: float) -> None:
    planes = (RNG.random((3, *SIZE)) * 255).astype(np.float32)
    planes[:, :, 50:60] = nothing
    planes[1, 3, 3] = nothing  # in one band only
    spec = spec_of(dtype="float32")  # mean 0.5 of a scale of 1/255
    run(segmenter_of(spec), write(tmp_path / "big.tif", planes, nodata=nothing), tmp_path / "out")
    filled = np.where(np.isnan(planes) | (planes == nothing), np.float32(127.5), planes)
    expected = segmenter_of(spec, fit="tile")(np.ascontiguousarray(filled.transpose(1, 2, 0)))
    expected[:, 50:60] = 255
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], expected)
    unsaid = write(tmp_path / "unsaid.tif", np.where(np.isnan(filled), 0, filled) * np.float32("nan"))
    (failure,) = run(segmenter_of(spec), unsaid, tmp_path / "out").failed
    assert "rows 0 to 32: NaN or infinite values that its nodata value does not cover" in failure.reason


def test_bands_are_chosen_by_number(tmp_path: Path) -> None:
    planes = planes_of(6)
    path = write(tmp_path / "big.tif", planes, photometric="minisblack")
    run(segmenter_of(spec_of()), path, tmp_path / "out", bands=(4, 3, 2))
    chosen = np.ascontiguousarray(planes[[3, 2, 1]].transpose(1, 2, 0))
    expected = segmenter_of(spec_of(), fit="tile")(chosen)
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], expected)


def test_colours_are_found_among_other_bands_and_grey_is_repeated(tmp_path: Path) -> None:
    planes = planes_of(5)
    path = write(tmp_path / "five.tif", planes, photometric="minisblack")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp[name] for name in ("undefined", "blue", "green", "red", "undefined")]
    run(segmenter_of(spec_of()), path, tmp_path / "out")
    expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(planes[[3, 2, 1]].transpose(1, 2, 0)))
    np.testing.assert_array_equal(read(tmp_path / "out/masks/five.tif")[0], expected)
    run(segmenter_of(spec_of()), write(tmp_path / "grey.tif", planes[:1]), tmp_path / "out")
    expected = segmenter_of(spec_of(), fit="tile")(np.repeat(planes[0][..., None], 3, axis=2))
    np.testing.assert_array_equal(read(tmp_path / "out/masks/grey.tif")[0], expected)


def test_an_overview_has_its_own_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of(size=(180, 264)))
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
    with rasterio.open(path, overview_level=1) as file:
        pixels, place = file.read(), file.transform
    run(segmenter_of(spec_of()), path, tmp_path / "out", overview=4)
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        assert mask.shape == (45, 66)
        assert mask.transform == place == rasterio.Affine(2, 0, 500_000, 0, -2, 4_600_000)
        expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        np.testing.assert_array_equal(mask.read(1), expected)
    summary = run(segmenter_of(spec_of()), path, tmp_path / "again", overview=8)
    assert "has overviews 2, 4, none that is 8 times smaller" in summary.failed[0].reason


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("crs", ["EPSG:32633", None])
def test_a_coarser_resolution_is_the_mean_of_the_pixels(tmp_path: Path, crs: str | None) -> None:
    coarse = planes_of(size=(66, 90)).clip(2, 254)
    fine = coarse.repeat(2, axis=1).repeat(2, axis=2)
    fine[:, ::2, ::2] += 1
    fine[:, 1::2, ::2] -= 1  # the mean of four stays
    run(segmenter_of(spec_of()), write(tmp_path / "big.tif", fine, crs=crs), tmp_path / "out", resolution=1)
    with without_warnings(), rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        assert mask.transform == rasterio.Affine(1, 0, 500_000, 0, -1, 4_600_000)
        assert mask.crs == (None if crs is None else rasterio.CRS.from_epsg(32633))
        expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(coarse.transpose(1, 2, 0)))
        np.testing.assert_array_equal(mask.read(1), expected)


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize(("levels", "resolution"), [((), 0.7), ((2,), 1.0), ((2,), 1.6), ((2, 4), 1.6)])
def test_a_resolution_is_read_of_the_next_finer_overview(
    tmp_path: Path, levels: tuple[int, ...], resolution: float
) -> None:
    """Overviews are of nearest pixels here, so that they tell what was read. GDAL's other way to a mean is the oracle."""
    path = write(tmp_path / "big.tif", planes_of(size=(180, 264)))
    with rasterio.open(path, "r+") as file:
        file.build_overviews(levels)
        bounds = file.bounds
    with rasterio.open(path, **({"overview_level": 0} if levels else {})) as file:
        shape = (3, round(180 * 0.5 / resolution), round(264 * 0.5 / resolution))
        pixels = file.read(out_shape=shape, resampling=Resampling.average)
    run(segmenter_of(spec_of()), path, tmp_path / "out", resolution=resolution)
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        np.testing.assert_allclose(mask.bounds, bounds, rtol=0, atol=1e-6)
        assert mask.shape == shape[1:]
        assert abs(mask.res[0] / resolution - 1) < 0.01
        expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        np.testing.assert_array_equal(mask.read(1), expected)


def recorded_nowhere(path: Path, planes: np.ndarray, nothing: np.ndarray) -> None:
    write(path, planes)


def recorded_wrongly(path: Path, planes: np.ndarray, nothing: np.ndarray) -> None:
    write(path, planes, nodata=200)


def with_alpha(path: Path, planes: np.ndarray, nothing: np.ndarray, **profile: Any) -> None:
    opaque = {"uint8": 255, "uint16": 65535}.get(planes.dtype.name, 1)
    alpha = np.where(nothing, 0, opaque).astype(planes.dtype)
    write(path, np.concatenate([planes, alpha[None]]), photometric="rgb", alpha="yes", **profile)


def with_alpha_beside_a_value(path: Path, planes: np.ndarray, nothing: np.ndarray) -> None:
    with_alpha(path, planes, nothing, nodata=200)


def with_mask(path: Path, planes: np.ndarray, nothing: np.ndarray) -> None:
    write(path, planes)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(~nothing)


@pytest.mark.parametrize("resolution", [None, 1.0])
@pytest.mark.parametrize("value", [7, None, "none"])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (recorded_nowhere, "uint8"),
        (recorded_wrongly, "uint8"),
        (with_alpha, "uint8"),
        (with_alpha_beside_a_value, "uint8"),
        (with_mask, "uint8"),
        (recorded_wrongly, "uint16"),
        (with_alpha, "uint16"),
        (with_alpha_beside_a_value, "uint16"),
        (with_mask, "uint16"),
        (recorded_wrongly, "float32"),
        (with_alpha, "float32"),
        (with_alpha_beside_a_value, "float32"),
        (with_mask, "float32"),
    ],
)
def test_a_nodata_value_in_place_of_the_recorded_one(
    tmp_path: Path, dtype: Any, make: Callable[..., None], value: Any, resolution: float | None
) -> None:
    """Half of the blocks of four pixels is what a coarser pixel is the mean of, where the rest holds no data."""
    planes = RNG.integers(8, 256, (3, 30, 40), dtype=np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    planes[:, :10, :41] = 7
    planes[:, 40:50, :30] = 200
    planes[1, 30, 30] = 7  # in one band only
    nothing = np.zeros(planes.shape[1:], np.bool_)
    nothing[:, 61:] = True
    path = tmp_path / "big.tif"
    make(path, planes.astype(dtype), nothing)
    told = make in (with_alpha, with_alpha_beside_a_value, with_mask)
    without = np.broadcast_to(nothing if told else False, planes.shape)
    by_value = make in (recorded_wrongly, with_alpha_beside_a_value)
    recorded = 200 if by_value and value is None else value
    if isinstance(recorded, int):
        without = without | (planes == recorded)
    pixels, lost = planes.astype(np.float64), without.all(axis=0)
    if resolution is not None:
        blocks = (3, 30, 2, 40, 2)
        weights = (~without).reshape(blocks).astype(np.float64)
        counted = weights.sum(axis=(2, 4))
        total = (pixels.reshape(blocks) * weights).sum(axis=(2, 4))
        without, lost = counted == 0, (counted == 0).all(axis=0)
        nowhere = recorded if isinstance(recorded, int) else 0
        pixels = np.where(without, nowhere, total / np.maximum(counted, 1))
    pixels = np.floor(pixels + 0.5) if dtype != "float32" else np.where(without, 127.5, pixels)
    spec = spec_of(dtype=dtype)
    run(segmenter_of(spec), path, tmp_path / "out", use=True, nodata=value, resolution=resolution)
    expected = segmenter_of(spec, fit="tile")(np.ascontiguousarray(pixels.transpose(1, 2, 0)).astype(dtype))
    mask = read(tmp_path / "out/masks/big.tif")[0]
    np.testing.assert_array_equal(mask == 255, lost)
    np.testing.assert_array_equal(mask[~lost], expected[~lost])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_half_transparent_pixels_are_data(tmp_path: Path, dtype: Any) -> None:
    """What rasterio says of the whole file; of float32 it knows nothing."""
    planes = planes_of(2).astype(dtype)
    planes[1] = 1 if dtype == "float32" else np.iinfo(dtype).max
    planes[1, :, :40] = 0
    planes[1, :, 40:60] = planes[1, 0, 60] / 3
    path = write(tmp_path / "grey.tif", planes, photometric="minisblack", alpha="yes")
    run(segmenter_of(spec_of(dtype=dtype)), path, tmp_path / "out")
    with rasterio.open(path) as file:
        valid = file.dataset_mask() != 0 if dtype != "float32" else planes[1] > 0
    np.testing.assert_array_equal(read(tmp_path / "out/masks/grey.tif")[0] != 255, valid)
    assert 0 < valid.mean() < 1


def test_an_alpha_band_and_a_mask_both_hold_but_at_no_other_resolution(tmp_path: Path) -> None:
    path = tmp_path / "big.tif"
    with_alpha(path, planes_of(), np.broadcast_to(np.arange(SIZE[1]) < 40, SIZE))
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(np.broadcast_to(np.arange(SIZE[1]) < 100, SIZE))
    run(segmenter_of(spec_of()), path, tmp_path / "out")
    assert (
        (read(tmp_path / "out/masks/big.tif") == 255).all(axis=(0, 1)) == np.r_[[True] * 40, [False] * 60, [True] * 30]
    ).all()
    (failure,) = run(segmenter_of(spec_of()), path, tmp_path, resolution=1).failed
    assert "has an alpha band and a mask, and --resolution goes by one of them" in failure.reason


def test_nan_is_no_data_where_it_is_said(tmp_path: Path) -> None:
    planes = (RNG.random((3, *SIZE)) * 255).astype(np.float32)
    planes[:, :, 50:60] = np.nan
    spec, path = spec_of(dtype="float32"), write(tmp_path / "big.tif", planes)
    run(segmenter_of(spec), path, tmp_path / "out", nodata=float("nan"))
    assert ((read(tmp_path / "out/masks/big.tif")[0] == 255) == np.isnan(planes[0])).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"resolution": 0.4}, "has pixels of 0.5, larger than --resolution 0.4; give 0.5 or more, or resample it"),
        ({"nodata": -9999}, "holds uint8, none of whose values is -9999; give --nodata 0 to 255, or none"),
        ({"nodata": float("nan")}, "none of whose values is nan; give --nodata 0 to 255, or none"),
    ],
)
def test_what_a_raster_cannot_be_read_as(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    (failure,) = run(segmenter_of(spec_of()), write(tmp_path / "a.tif", planes_of()), tmp_path, **options).failed
    assert reason in failure.reason
    unplaced = write(tmp_path / "b.tif", planes_of(), crs=None, transform=None)
    (failure,) = run(segmenter_of(spec_of()), unplaced, tmp_path, resolution=2).failed
    assert "b.tif does not say how large its pixels are on the ground; leave out --resolution" in failure.reason


def test_jpeg2000(tmp_path: Path) -> None:
    planes = planes_of()
    path = write(tmp_path / "big.jp2", planes, driver="JP2OpenJPEG", reversible="YES", quality="100")
    assert is_georeferenced(path)
    run(segmenter_of(spec_of()), path, tmp_path / "out")
    expected = segmenter_of(spec_of(), fit="tile")(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    with rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        np.testing.assert_array_equal(mask.read(1), expected)
        assert (mask.crs, mask.transform) == (rasterio.CRS.from_epsg(32633), PLACE)


def test_an_engine_of_any_size_gets_windows_all_the_same(tmp_path: Path) -> None:
    spec = spec_of(dynamic_size=True)
    session = MemorySession(spec, by_place(4))
    planes = planes_of()
    run(Segmenter(session, spec), write(tmp_path / "big.tif", planes), tmp_path / "out")
    assert {shape[1:] for shape in session.calls} == {(32, 32, 3)}
    bounded = spec_of(dynamic_size=True, max_size=(32, 32), fit="tile")
    expected = segmenter_of(bounded)(np.ascontiguousarray(planes.transpose(1, 2, 0)))
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif")[0], expected)


class Killed(BaseException):
    """What no handler catches."""


def dying(logits: LogitsFunction, after: int) -> LogitsFunction:
    calls = iter(range(after))

    def called(images: np.ndarray) -> np.ndarray:
        if next(calls, None) is None:
            raise Killed
        return logits(images)

    return called


@pytest.mark.usefixtures("narrow_panels")
@pytest.mark.parametrize("after", [0, 4, 11, 17])
def test_an_interrupted_run_goes_on(tmp_path: Path, after: int) -> None:
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    run(segmenter_of(spec), path, tmp_path / "whole", probabilities="uint8")
    output = tmp_path / "out"
    with pytest.raises(Killed):
        run(segmenter_of(spec, dying(by_place(4), after)), path, output, probabilities="uint8")
    assert not list(output.rglob("big.tif"))
    (kept,) = (output / "masks").glob(".*.unfinished")
    strips = len(list(kept.glob("*.zip")))
    session = MemorySession(spec, by_place(4))
    again = Segmenter(session, spec)
    again.identity = "of these tests"
    run(again, path, output, probabilities="uint8")
    assert sorted(p.name for p in output.rglob("*")) == ["big.tif", "big.tif", "masks", "probabilities"]
    for kind in ("masks", "probabilities"):
        assert (output / kind / "big.tif").read_bytes() == (tmp_path / "whole" / kind / "big.tif").read_bytes()
    plan = again.as_tiles().plan(*SIZE)
    rows, columns = len(plan.tops), len(plan.lefts)  # type: ignore[union-attr]
    # Rows of two panels, one window of the other side in the second; of the row before the first that is missing the
    # scores are needed once more.
    assert (rows, columns) == (4, 6)
    first, second = [3] * rows, [4] * rows
    expected = (first + second)[strips:]
    if strips % rows:
        expected = [(first + second)[strips - 1], *expected]
    assert sum(shape[0] for shape in session.calls) == sum(expected)


def test_a_person_who_interrupts_is_told_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(images: np.ndarray) -> np.ndarray:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return by_place(4)(images)

    calls = iter(range(14))
    path = write(tmp_path / "big.tif", planes_of())
    with pytest.raises(KeyboardInterrupt):
        run_inputs(segmenter_of(spec_of(fit="tile"), interrupted), [path], tmp_path / "out")
    assert capsys.readouterr().err == f"{path}: what is finished is kept; the same command goes on from there\n"
    run_inputs(segmenter_of(spec_of(fit="tile")), [path], tmp_path / "out")
    assert capsys.readouterr().err == f"{path}: goes on, 12 of 24 windows are done\n"


def test_a_changed_request_begins_anew(tmp_path: Path) -> None:
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    with pytest.raises(Killed):
        run(segmenter_of(spec, dying(by_place(4), 20)), path, tmp_path / "out")
    other = write(path, planes_of())
    run(segmenter_of(spec), other, tmp_path / "out")
    run(segmenter_of(spec), other, tmp_path / "anew")
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif"), read(tmp_path / "anew/masks/big.tif"))


def test_a_finished_raster_is_not_made_again(tmp_path: Path) -> None:
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    run(segmenter_of(spec), path, tmp_path / "out")
    session = MemorySession(spec, by_place(4))
    again = Segmenter(session, spec)
    again.identity = "of these tests"
    summary = run(again, path, tmp_path / "out")
    assert (session.calls, summary.images, summary.failed) == ([], 1, ())
    with pytest.raises(OutputExistsError, match="big.tif exists"):
        run(again, path, tmp_path / "out", bands=(3, 2, 1))
    again.identity = "another engine"
    with pytest.raises(OutputExistsError, match="big.tif exists"):
        run(again, path, tmp_path / "out")
    run(again, path, tmp_path / "out", overwrite=True)
    assert session.calls


def test_what_was_killed_between_two_outputs_is_gone_on_with(tmp_path: Path) -> None:
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    run(segmenter_of(spec), path, tmp_path / "out", probabilities="uint8")
    (tmp_path / "out/masks/big.tif").unlink()
    run(segmenter_of(spec), path, tmp_path / "out", probabilities="uint8")
    assert (tmp_path / "out/masks/big.tif").is_file()
    (tmp_path / "out/masks/big.tif").unlink()
    with pytest.raises(OutputExistsError, match="probabilities/big.tif exists"):
        run(segmenter_of(spec), path, tmp_path / "out", probabilities="float32")


def test_a_damaged_strip_is_made_anew(tmp_path: Path) -> None:
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    with pytest.raises(Killed):
        run(segmenter_of(spec, dying(by_place(4), 20)), path, tmp_path / "out")
    (kept,) = (tmp_path / "out/masks").glob(".*.unfinished")
    strip = kept / "0-0.zip"
    strip.write_bytes(strip.read_bytes()[:50])
    summary = run(segmenter_of(spec), path, tmp_path / "out")
    assert "damaged and is gone now; the same command makes it anew" in summary.failed[0].reason
    assert run(segmenter_of(spec), path, tmp_path / "out").failed == ()
    run(segmenter_of(spec), path, tmp_path / "whole")
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif"), read(tmp_path / "whole/masks/big.tif"))


def test_a_full_disk_leaves_no_output(tmp_path: Path) -> None:
    """GDAL tells nobody when it cannot write the end of a file."""
    spec, path = spec_of(), write(tmp_path / "big.tif", planes_of())
    run(segmenter_of(spec), path, tmp_path / "whole")
    size_bytes = (tmp_path / "whole/masks/big.tif").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for missing in (1, 100, size_bytes // 3):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes - missing, hard))
        try:
            (failure,) = run(segmenter_of(spec), path, tmp_path / "out").failed
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot write" in failure.reason
        assert not list((tmp_path / "out").rglob("*.tif"))
    run(segmenter_of(spec), path, tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out/masks/big.tif"), read(tmp_path / "whole/masks/big.tif"))


def test_which_files_are_rasters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = planes_of()
    placed = write(tmp_path / "placed.tif", planes)
    plain = write(tmp_path / "plain.tif", planes, crs=None, transform=None)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    assert RasterOptions().applies_to(placed)
    assert not RasterOptions().applies_to(plain)
    assert not RasterOptions().applies_to(picture)
    assert not RasterOptions(use=False).applies_to(placed)
    assert RasterOptions(use=True).applies_to(plain)
    assert RasterOptions(bands=(3, 2, 1)).applies_to(plain)
    with pytest.raises(SpecError, match=r"a\.png is no raster"):
        RasterOptions(overview=2).applies_to(picture)
    with pytest.raises(SpecError, match="give one of them"):
        RasterOptions(overview=2, resolution=0.5)
    with pytest.raises(SpecError, match="give the size of a pixel on the ground"):
        RasterOptions(resolution=0)
    with pytest.raises(SpecError, match="nodata is 'black'; give a pixel's value, nan, or none"):
        RasterOptions(nodata="black")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="leave them out, or --no-raster"):
        RasterOptions(use=False, bands=(1,))
    # As it is without the extra.
    monkeypatch.setattr(raster_module, "is_installed", lambda: False)
    assert not RasterOptions().applies_to(placed)
    assert RasterOptions().is_missed(placed)
    assert not RasterOptions().is_missed(plain)


def test_a_file_too_large_to_be_read_whole_is_a_raster(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    with without_warnings():
        with rasterio.open(
            path, "w", driver="GTiff", height=20_000, width=20_000, count=3, dtype="uint8", tiled=True, SPARSE_OK=True
        ):
            pass
    assert RasterOptions().applies_to(path)


def test_probabilities_of_a_mask_engine_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of())
    with pytest.raises(SpecError, match="build it with --output-kind probabilities"):
        run(segmenter_of(spec_of("mask")), path, tmp_path / "out", probabilities="uint8")
    assert not (tmp_path / "out").exists()


def test_no_overlay_over_a_raster(tmp_path: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of())
    with pytest.raises(SpecError, match="leave out --overlay, or give --no-raster"):
        run_inputs(segmenter_of(spec_of()), [path], tmp_path / "out", RunSettings(overlay=True), progress=False)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    write_memory_engine(tmp_path / "engine", spec_of(fit="letterbox"))
    return tmp_path / "engine"


def test_the_command(tmp_path: Path, engine: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of(4))
    output = tmp_path / "out"
    words = [str(engine), str(path), "--output", str(output), "--bands", "3,2,1", "--probabilities", "uint8"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(output / "masks/big.tif"), str(output / "probabilities/big.tif")]
    assert CliRunner().invoke(command, words).stdout == done.stdout
    # Before the engine is looked at, which may be compiled again.
    (tmp_path / "no engine").mkdir()
    refused = CliRunner().invoke(command, [str(tmp_path / "no engine"), *words[1:], "--fit", "letterbox"])
    assert str(refused.exception) == "rasters are cut into tiles; leave out --fit letterbox, or give --no-raster"
    refused = CliRunner().invoke(command, [*words[:4], "--bands", "0,1"])
    assert "bands is '0,1'; give band numbers from 1" in refused.output


def test_a_picture_that_is_cut_into_tiles_unasked_is_noted(tmp_path: Path, engine: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of())
    done = CliRunner().invoke(command, [str(engine), str(path), "--output", str(tmp_path / "out")])
    assert "big.tif is cut into tiles at its own scale; --no-raster brings it to the engine's size" in done.stderr
    done = CliRunner().invoke(command, [str(engine), str(path), "--output", str(tmp_path / "b"), "--no-raster"])
    assert (done.stderr, done.stdout.split()) == ("", [str(tmp_path / "b/masks/big.png")])


def test_without_the_extra_a_placed_picture_is_a_picture(
    tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "big.tif", planes_of())
    monkeypatch.setitem(sys.modules, "rasterio", None)
    words = [str(engine), str(path), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(command, words)
    assert done.stdout.split() == [str(tmp_path / "out/masks/big.png")]
    assert f"note: {path} is georeferenced; its mask will be, too, with pip install 'edgeseg[raster]'" in done.stderr
    done = CliRunner().invoke(command, [*words[:3], str(tmp_path / "b"), "--raster"])
    assert done.exit_code == 1
    assert "rasterio is needed to segment big.tif by windows: pip install 'edgeseg[raster]'" in done.stderr


def truncated(path: Path) -> None:
    write(path, planes_of(size=(300, 300)), tiled=True, blockxsize=64, blockysize=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def virtual(path: Path) -> None:
    path.write_text(
        '<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        "<SourceFilename>/etc/passwd</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )


def of_16_bits(path: Path) -> None:
    write(path, RNG.integers(0, 65536, (3, *SIZE), dtype=np.uint16))


def of_indices(path: Path) -> None:
    write(path, planes_of(1), photometric="palette")
    with rasterio.open(path, "r+") as file:
        file.write_colormap(1, {1: (9, 9, 9, 255)})


def of_six_bands(path: Path) -> None:
    write(path, planes_of(6), photometric="minisblack")


def too_wide(path: Path) -> None:
    with without_warnings():
        with rasterio.open(
            path, "w", driver="GTiff", height=9, width=1 << 21, count=1, dtype="uint8", tiled=True, SPARSE_OK=True
        ):
            pass


def of_one_piece(path: Path) -> None:
    block = {"tiled": True, "blockxsize": 20_000, "blockysize": 20_000, "SPARSE_OK": True}
    with without_warnings():
        with rasterio.open(path, "w", driver="GTiff", height=20_000, width=20_000, count=1, dtype="uint8", **block):
            pass


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_noise(path: Path) -> None:
    path.write_bytes(b"II*\0" + bytes(RNG.integers(0, 256, 400, dtype=np.uint8)))


def jpeg2000_of_noise(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(RNG.integers(0, 256, 400, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (truncated, "rows "),
        (virtual, "neither TIFF nor JPEG 2000"),
        (of_16_bits, "holds uint16, the engine takes uint8: build with input dtype uint16, or scale it"),
        (of_indices, "holds a palette's indices"),
        (of_six_bands, "has 6 bands (1 gray, 2 undefined"),
        (too_wide, "9x2097152 pixels; at most 1048576 along a side"),
        (of_one_piece, "it is stored in pieces of 400000000 bytes, at most 268435456"),
        (empty, "the file is empty"),
        (of_noise, "cannot read"),
        (jpeg2000_of_noise, "cannot read"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "bad.tif"
    make(path)
    (failure,) = run(segmenter_of(spec_of()), path, tmp_path / "out", use=True).failed
    assert str(path) in failure.reason
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert not list(tmp_path.rglob("masks/bad.tif"))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        yield server


@pytest.mark.parametrize("to_network", [True, False])
def test_overviews_elsewhere_are_not_looked_at(tmp_path: Path, listener: socket.socket, to_network: bool) -> None:
    """A file may say that its overviews are at an address, which GDAL would open: an image that reports who reads it."""
    other = write(tmp_path / "other.tif", planes_of(size=(45, 65)))
    address = f"/vsicurl/http://127.0.0.1:{listener.getsockname()[1]}/x.ovr" if to_network else str(other)
    path = write(tmp_path / "evil.tif", planes_of())
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=address)
    for options in ({}, {"overview": 2}):
        (failure,) = run(segmenter_of(spec_of()), path, tmp_path / "out", **options).failed
        assert failure.reason == f"cannot read {path}: it says that its overviews are in another file"
    with pytest.raises(TimeoutError):
        listener.accept()


def test_files_beside_a_raster_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "big.tif", planes_of(), crs=None, transform=None)
    path.with_suffix(".tfw").write_text("2\n0\n0\n-2\n100\n100\n")
    Path(f"{path}.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>"
    )
    run(segmenter_of(spec_of()), path, tmp_path / "out", use=True)
    with without_warnings(), rasterio.open(tmp_path / "out/masks/big.tif") as mask:
        assert mask.transform.is_identity
        assert (mask.read() < 4).all()


def test_a_tag_is_enough_to_be_georeferenced(tmp_path: Path) -> None:
    """Without rasterio: the tags of the GeoTIFF specification."""
    entries = [(256, 3, 1, 9), (257, 3, 1, 9), (258, 3, 1, 8), (33550, 12, 3, 0)]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    for count, expected in ((3, False), (4, True)):
        path = tmp_path / f"{count}.tif"
        rows = body[: count * 12]
        path.write_bytes(b"II*\0" + struct.pack("<IH", 8, count) + rows + bytes(4) + bytes(200))
        assert is_georeferenced(path) is expected
