"""Images of uint16 and float32: read with every bit, resized as OpenCV does, refused where nobody said how to scale them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeseg.errors import InputError, SpecError
from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.evaluate.accuracy.worst import side_by_side
from edgeseg.images.decoding import picture_pixels, read_image
from edgeseg.images.dtypes import in_dtype, usual_pixels
from edgeseg.images.placement import Placement, plan_fit
from edgeseg.images.resize import resize_image
from edgeseg.quantize.samples import CalibrationSet, check_source
from edgeseg.runtime.overlay import overlay, shown_levels
from edgeseg.spec import InputSpec, ModelRequest, ModelSpec, Padding, Preprocess

cv2 = pytest.importorskip("cv2")
tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(11)
THERMAL = RNG.integers(20000, 32001, (37, 53), dtype=np.uint16)
DEEP = RNG.integers(0, 65536, (37, 53, 4), dtype=np.uint16)
HOUNSFIELD = RNG.normal(0, 900, (37, 53)).astype(np.float32)


def written(path: Path, array: np.ndarray[Any, Any], **options: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **options)
    elif path.suffix == ".jp2" and array.ndim == 2:
        Image.fromarray(array).save(path)  # without loss
    else:  # OpenCV's order
        order = array if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]
        assert cv2.imwrite(str(path), order)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "npy", "jp2", "pgm"])
def test_16_bit_grey_is_read_as_opencv_reads_it(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a.{suffix}", THERMAL)
    read = read_image(path, 1, "uint16")
    assert (read.dtype, read.shape, read.flags.writeable, read.flags.c_contiguous) == (
        "uint16",
        (37, 53, 1),
        True,
        True,
    )
    np.testing.assert_array_equal(read[..., 0], THERMAL)
    np.testing.assert_array_equal(read_image(path, 3, "uint16"), np.repeat(THERMAL[..., None], 3, axis=2))
    if suffix != "npy":
        np.testing.assert_array_equal(read[..., 0], cv2.imread(str(path), cv2.IMREAD_UNCHANGED))


@pytest.mark.parametrize("suffix", ["png", "tif", "npy"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colours_keep_both_bytes(tmp_path: Path, suffix: str, channels: int) -> None:
    colours = DEEP[..., :channels]
    path = written(
        tmp_path / f"a.{suffix}", colours, photometric="rgb", **({"extrasamples": [2]} if channels == 4 else {})
    )
    np.testing.assert_array_equal(read_image(path, channels, "uint16"), colours)
    if channels == 4 and suffix != "npy":  # alpha beside three colours
        np.testing.assert_array_equal(read_image(path, 3, "uint16"), colours[..., :3])
    with pytest.raises(InputError, match=f"has {channels} channels"):
        read_image(path, 1, "uint16")


def test_an_interlaced_and_turned_png_keeps_both_bytes(tmp_path: Path) -> None:
    """Written by hand: neither OpenCV nor Pillow interlaces."""
    import struct
    import zlib

    wide = DEEP[:8, :8, :3]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes() for top, left, down, right in passes for row in wide[top::down, left::right]
    )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    turned = Image.Exif()
    turned[0x0112] = 3
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 1)
    parts = chunk(b"IHDR", header) + chunk(b"eXIf", turned.tobytes()[6:]) + chunk(b"IDAT", zlib.compress(rows))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read_image(path, 3, "uint16"), wide[::-1, ::-1])


@pytest.mark.parametrize("dtype", ["i2", "i4", "f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_float_engines_take_values(tmp_path: Path, dtype: str, suffix: str) -> None:
    stored = HOUNSFIELD.astype(dtype)
    read = read_image(written(tmp_path / f"a.{suffix}", stored), 1, "float32")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[..., 0], torch.from_numpy(stored.astype(stored.dtype.newbyteorder("="))).float())


def test_float_bands_and_pages(tmp_path: Path) -> None:
    bands = RNG.random((37, 53, 5), np.float32)
    path = written(tmp_path / "a.tif", bands, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(read_image(path, 5, "float32"), bands)
    stack = written(tmp_path / "b.tif", np.moveaxis(bands, -1, 0), photometric="minisblack")
    np.testing.assert_array_equal(read_image(stack, 5, "float32"), bands)
    rgb = written(tmp_path / "c.tif", bands[..., :3], photometric="rgb")
    np.testing.assert_array_equal(read_image(rgb, 3, "float32"), bands[..., :3])


@pytest.mark.parametrize(
    ("array", "suffix", "dtype", "words"),
    [
        (THERMAL, "png", "uint8", r"holds uint16, the engine takes uint8: .*or build with input dtype uint16"),
        (DEEP[..., :3], "tif", "uint8", "holds uint16, the engine takes uint8"),
        (DEEP[..., :3], "jp2", "uint8", "holds uint16, the engine takes uint8"),
        (DEEP[..., :3], "ppm", "uint8", "holds uint16, the engine takes uint8"),
        (DEEP[..., :3], "ppm", "uint16", "16 bits of RGB in this format; store it as TIFF or .npy"),
        (
            DEEP[..., :3].astype(np.uint8),
            "png",
            "uint16",
            r"holds uint8, the engine takes uint16: x \* np.uint16\(257\)",
        ),
        (THERMAL.astype(np.int16), "tif", "uint16", "holds int32, the engine takes uint16: np.rint"),
        (HOUNSFIELD, "tif", "uint16", "holds float32, the engine takes uint16"),
        (THERMAL, "png", "float32", r"holds uint16, the engine takes float32: x.astype\(np.float32\) keeps the values"),
        (THERMAL.astype(np.uint32), "tif", "float32", "holds uint32, the engine takes float32"),
        (HOUNSFIELD.astype(np.float64) * 1e300, "npy", "float32", "float64 with .* NaN or infinite values of 1961"),
        (np.where(HOUNSFIELD > 2000, np.nan, HOUNSFIELD), "tif", "float32", "NaN or infinite values .*nan_to_num"),
    ],
)
def test_other_samples_are_refused_in_one_line(
    tmp_path: Path, array: np.ndarray, suffix: str, dtype: Any, words: str
) -> None:
    path = written(tmp_path / f"a.{suffix}", array)
    with pytest.raises(InputError, match=words) as caught:
        read_image(path, 3 if array.ndim == 3 else 1, dtype)
    assert "\n" not in str(caught.value)


def test_12_bits_are_not_stretched_to_16(tmp_path: Path) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n53 37\n4095\n" + (THERMAL % 4096).astype(">u2").tobytes())
    with pytest.raises(InputError, match="12 bits of I in this format"):
        read_image(path, 1, "uint16")


def test_pictures_of_pillow(tmp_path: Path) -> None:
    np.testing.assert_array_equal(picture_pixels(Image.fromarray(THERMAL), 1, "uint16")[..., 0], THERMAL)
    np.testing.assert_array_equal(picture_pixels(Image.fromarray(HOUNSFIELD), 1, "float32")[..., 0], HOUNSFIELD)
    with pytest.raises(InputError, match="holds uint16, the engine takes uint8"):
        picture_pixels(Image.fromarray(THERMAL), 1)
    path = written(tmp_path / "a.png", DEEP[..., :3])
    with Image.open(path) as colours, pytest.raises(InputError, match="holds uint16, the engine takes uint8"):
        picture_pixels(colours, 3)


def test_arrays_keep_their_values_or_are_refused() -> None:
    for array in (THERMAL, THERMAL.astype(">u2")):
        kept = in_dtype(array, "uint16", "it is")
        assert kept.dtype == np.dtype("uint16")
        np.testing.assert_array_equal(kept, THERMAL)
    assert in_dtype(HOUNSFIELD, "float32", "it is") is HOUNSFIELD
    with pytest.raises(InputError, match="it is bool"):
        in_dtype(THERMAL > 25000, "float32", "it is")
    with pytest.raises(InputError, match="1 NaN or infinite values of 3"):
        in_dtype(np.array([1.0, np.inf, 2.0], np.float32), "float32", "it is")


@pytest.mark.parametrize("size", [(20, 30), (74, 106), (50, 60), (37, 20)])
@pytest.mark.parametrize(
    ("interpolation", "code"),
    [("linear", "LINEAR"), ("cubic", "CUBIC"), ("area", "AREA"), ("nearest", "NEAREST"), ("lanczos", "LANCZOS4")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_opencvs(size: tuple[int, int], interpolation: Any, code: str, channels: int) -> None:
    flag = getattr(cv2, f"INTER_{code}")
    for image, allowed in ((DEEP[..., :channels], 1.0), (np.stack([HOUNSFIELD] * channels, axis=-1), 0.02)):
        resized = resize_image(image, size, interpolation)
        expected = cv2.resize(image, size[::-1], interpolation=flag).reshape(*size, channels)
        assert resized.dtype == image.dtype
        assert np.abs(resized.astype(float) - expected).max() <= allowed


def test_padding_repeats_the_border_unless_told() -> None:
    """Zero is no temperature: it would be 8 standard deviations off, and int8 would have to hold it."""
    image = THERMAL[..., None]
    spec = InputSpec(128, 128, 1, fit="letterbox", dtype="uint16")
    plan = plan_fit(37, 53, spec)
    assert isinstance(plan, Placement)
    placed = plan.apply(image)
    assert placed.dtype == np.uint16
    assert placed.min() >= 20000
    told = plan_fit(37, 53, InputSpec(128, 128, 1, fit="letterbox", dtype="uint16", padding=Padding(value=(26000,))))
    assert isinstance(told, Placement)
    assert (told.apply(image)[0] == 26000).all()
    with pytest.raises(SpecError, match="of uint8 give levels 0 to 255"):
        InputSpec(128, 128, 1, padding=Padding(value=(26000,)))
    below_zero = InputSpec(128, 128, 1, fit="letterbox", dtype="float32", padding=Padding(value=(-1000.5,)))
    air = plan_fit(37, 53, below_zero)
    assert isinstance(air, Placement)
    assert (air.apply(HOUNSFIELD[..., None])[0] == -1000.5).all()


def test_made_up_images_have_the_values_of_training() -> None:
    levels = np.linspace(0, 255, 100)[:, None] * np.ones(3)
    uint8 = usual_pixels(levels, Preprocess(), "uint8")
    assert (uint8.dtype, uint8.min(), uint8.max()) == ("uint8", 0, 255)
    thermal = usual_pixels(levels, Preprocess((0.4,) * 3, (0.05,) * 3, 1 / 65535), "uint16")
    assert (thermal.dtype, thermal.min(), thermal.max()) == ("uint16", round(0.3 * 65535), round(0.5 * 65535))
    bgr = Preprocess((1.0, 2.0, 3.0), (0.5,) * 3, 1.0, "bgr")  # mean and std are of blue, green, red
    np.testing.assert_allclose(usual_pixels(levels, bgr, "float32")[[0, -1]], [[2, 1, 0], [4, 3, 2]])


def test_calibration_and_validation_sets_keep_16_bits(tmp_path: Path) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    arrays = [THERMAL + np.uint16(k) for k in range(9)]
    for k, array in enumerate(arrays):
        written(images / f"{k}.png", array)
        Image.fromarray((array > 26000).astype(np.uint8)).save(masks / f"{k}.png")
    written(images / "9.png", THERMAL.astype(np.uint8))
    samples = CalibrationSet.open(tmp_path, channels=1, dtype="uint16")
    assert [name for name, _ in samples.skipped] == ["9.png"]
    assert len(set(samples.pixels)) == 9  # one level apart: the high bytes are the same
    for (_, image), array in zip(samples.named_images(1), arrays, strict=True):
        np.testing.assert_array_equal(image[..., 0], array)
    spec = InputSpec(64, 64, 1, dtype="uint16")
    expected = cv2.resize(arrays[0], (64, 64)).astype(float)
    assert np.abs(next(samples.images(spec))[0, ..., 0] - expected).max() <= 1
    with pytest.raises(InputError, match=r"only 1 of 10 .* holds uint16, the engine takes uint8"):
        CalibrationSet.open(tmp_path, channels=1)
    (images / "9.png").unlink()
    data = ValidationSet.open(tmp_path, ModelSpec("custom", classes=2, in_channels=1), dtype="uint16")
    np.testing.assert_array_equal(data.read(3).image[..., 0], arrays[3])
    assert len(data.without({samples.pixels[3]})) == 8
    with pytest.raises(InputError, match="array 0 is uint8, the engine takes uint16"):
        check_source([array.astype(np.uint8) for array in arrays], None, "uint16")


def test_pictures_for_people_are_scaled_by_percentile() -> None:
    mask = np.zeros(THERMAL.shape, np.uint8)
    for image in (THERMAL[..., None], HOUNSFIELD[..., None]):
        low, high = np.percentile(image, (1, 99))
        expected = np.clip((image.astype(float) - low) / (high - low) * 255, 0, 255)
        assert np.abs(shown_levels(image) - expected).max() <= 1
        drawn = overlay(image, mask, palette=np.zeros((1, 3), np.uint8))
        np.testing.assert_array_equal(drawn, shown_levels(image))
        assert side_by_side(image, mask, mask, np.zeros((1, 3), np.uint8)).dtype == np.uint8
    flat = np.full((4, 5, 1), 7.0, np.float32)
    assert (shown_levels(flat) == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_pictures_for_people_show_the_first_three_channels_or_grey(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, channels), np.uint8)
    expected = np.stack([image[..., k if channels >= 3 else 0] for k in range(3)], axis=2)
    mask, black = np.zeros((6, 5), np.uint8), np.zeros((1, 3), np.uint8)
    np.testing.assert_array_equal(overlay(image, mask, palette=black), expected)
    np.testing.assert_array_equal(side_by_side(image, mask, mask, black)[:, :5], expected)


def test_what_a_request_may_say() -> None:
    assert ModelRequest().input_dtype == "uint8"
    assert ModelRequest(input_dtype="UINT16").input_dtype == "uint16"  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"unknown input dtype 'int16'; .*\(allowed: uint8, uint16, float32\)"):
        ModelRequest(input_dtype="int16")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="at most 2 in a batch"):
        InputSpec(16384, 16384, 3, dtype="float32")
