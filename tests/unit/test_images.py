"""Reading unusual image files, and finding files in a fixed order. Every file is made here."""

from __future__ import annotations

import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from edgeseg.errors import InputError, MissingDependencyError
from edgeseg.images import decoding as images
from edgeseg.images.decoding import is_picture, list_images, natural_key, read_image

RNG = np.random.default_rng(7)
PHOTO = RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, *args: object, **options: object) -> Path:
    image.save(path, *args, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_rgb_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(PHOTO), **({"lossless": True} if suffix == "webp" else {}))
    array = read_image(path)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.flags.writeable
    np.testing.assert_array_equal(array, PHOTO)


def test_grey_becomes_three_equal_channels_or_stays_one(tmp_path: Path) -> None:
    path = saved(tmp_path / "grey.png", Image.fromarray(PHOTO[..., 0]))
    np.testing.assert_array_equal(read_image(path), np.repeat(PHOTO[..., :1], 3, axis=2))
    np.testing.assert_array_equal(read_image(path, channels=1), PHOTO[..., :1])


def test_colour_becomes_grey_by_luma(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(PHOTO))
    luma = PHOTO.astype(float) @ (0.299, 0.587, 0.114)
    assert np.abs(read_image(path, channels=1)[..., 0] - luma).max() <= 1


def test_alpha_is_dropped_and_the_colours_below_it_stay(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (5, 8, 1), dtype=np.uint8)
    rgba = saved(tmp_path / "rgba.png", Image.fromarray(np.concatenate((PHOTO, alpha), axis=2)))
    np.testing.assert_array_equal(read_image(rgba), PHOTO)
    grey = np.concatenate((PHOTO[..., :1], alpha), axis=2)
    la = saved(tmp_path / "la.png", Image.fromarray(grey))
    np.testing.assert_array_equal(read_image(la), np.repeat(PHOTO[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255, 3])])
def test_palettes_are_looked_up_transparent_entries_too(tmp_path: Path, transparency: int | bytes | None) -> None:
    colours = np.array([(10, 20, 30), (200, 0, 7), (0, 255, 0), (90, 91, 92)], np.uint8)
    indices = RNG.integers(0, 4, (5, 8), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    path = saved(tmp_path / "p.png", image, **({} if transparency is None else {"transparency": transparency}))
    np.testing.assert_array_equal(read_image(path), colours[indices])


def test_one_bit_becomes_0_and_255(tmp_path: Path) -> None:
    bits = PHOTO[..., 0] > 127
    path = saved(tmp_path / "bits.png", Image.fromarray(bits))
    np.testing.assert_array_equal(read_image(path, channels=1)[..., 0], np.where(bits, 255, 0))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    # Full cyan without black ink is (0, 255, 255); JPEG loses a little.
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255
    path = saved(tmp_path / "ink.jpg", Image.frombytes("CMYK", (16, 16), ink.tobytes()), quality=95)
    assert np.abs(read_image(path).astype(int) - (0, 255, 255)).max() <= 3


def oriented(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation by the standard's table: where row 0 and column 0 of the stored picture belong."""
    return {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: array.transpose(1, 0, 2)[:, ::-1],
        7: array.transpose(1, 0, 2)[::-1, ::-1],
        8: array.transpose(1, 0, 2)[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"turned.{suffix}", Image.fromarray(PHOTO), exif=exif, **options)
    np.testing.assert_array_equal(read_image(path), oriented(PHOTO, orientation))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_16_bit_grey(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide = RNG.integers(0, 65536, (3, 4), dtype=np.uint16)
    path = saved(tmp_path / f"turned.{suffix}", Image.fromarray(wide), exif=exif)
    np.testing.assert_array_equal(read_image(path, 1, "uint16"), oriented(wide[..., None], orientation))


@pytest.mark.parametrize("tag", [0x011A, 0x0100])
def test_another_tag_of_a_wrong_type_does_not_matter(tmp_path: Path, tag: int) -> None:
    """A resolution or a width written as text, as some editors do: Pillow's ``exif_transpose`` cannot write it back."""
    entries = sorted([struct.pack("<HHI4s", 0x0112, 3, 1, b"\6"), struct.pack("<HHI4s", tag, 2, 3, b"72\0")])
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entries) + bytes(4)
    path = saved(tmp_path / "edited.png", Image.fromarray(PHOTO), exif=exif)
    with pytest.raises(Exception, match="abs|integer"):
        ImageOps.exif_transpose(Image.open(path))
    np.testing.assert_array_equal(read_image(path), oriented(PHOTO, 6))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_turned_tiffs_of_every_mode_that_pillow_maps_into_memory(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(PHOTO).convert(mode)
    path = saved(tmp_path / "turned.tif", stored, exif=exif)
    np.testing.assert_array_equal(read_image(path), oriented(np.asarray(stored.convert("RGB")), 6))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.unique(read_image(path)).tolist() == [10]


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays_of_any_channel_count(tmp_path: Path, suffix: str, channels: int) -> None:
    array = RNG.integers(0, 256, (4, 6, channels), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez_compressed(path, array)
    np.testing.assert_array_equal(read_image(path, channels), array)
    np.save(tmp_path / "wide.npy", array.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "wide.npy", channels, "uint16") >> 8, array)


def test_four_channels_from_rgba_and_from_a_stack_of_pages(tmp_path: Path) -> None:
    four = RNG.integers(0, 256, (5, 8, 4), dtype=np.uint8)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", Image.fromarray(four)), 4), four)
    pages = [Image.fromarray(four[..., band]) for band in range(4)]
    path = saved(tmp_path / "b.tif", pages[0], save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(read_image(path, 4), four)


def test_large_pictures_are_read_a_band_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = RNG.integers(0, 256, (23, 8, 3), dtype=np.uint8)
    path, grey = tmp_path / "a.png", tmp_path / "grey.png"
    saved(path, Image.fromarray(picture))
    saved(grey, Image.fromarray(picture[..., 0]))
    for pixels in (1, 8, 40, 8 * 22, 8 * 23):
        monkeypatch.setattr(images, "BAND_PIXELS", pixels)
        np.testing.assert_array_equal(read_image(path), picture)
        np.testing.assert_array_equal(read_image(grey, channels=1), picture[..., :1])


def test_the_number_of_pixels_is_limited_and_nothing_is_warned_of_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"

    def claim(width: int, height: int) -> None:
        size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        header = struct.pack(">I", 13) + b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IDAT")

    claim(20_000, 10_000)
    with pytest.raises(InputError, match="a.png: more than 178956970 pixels; cut it into parts"):
        read_image(path)
    claim(9_500, 10_000)
    with warnings.catch_warnings(record=True) as said, pytest.raises(InputError, match="cannot read image"):
        warnings.simplefilter("always")
        read_image(path)
    assert said == []
    monkeypatch.setattr(images, "MAX_PIXELS", 39)
    with pytest.raises(InputError, match="more than 39 pixels"):
        read_image(saved(path, Image.fromarray(PHOTO)))


def multiband(path: Path, bands: np.ndarray, **options: object) -> Path:
    tifffile = pytest.importorskip("tifffile")
    data = np.moveaxis(bands, -1, 0) if options.get("planarconfig") == "separate" else bands
    tifffile.imwrite(path, data, **{"planarconfig": "contig", **options})
    return path


@pytest.mark.parametrize(
    ("count", "dtype", "options"),
    [
        (2, "u1", {"photometric": "minisblack", "extrasamples": [0]}),
        (3, "u1", {"photometric": "minisblack"}),
        (4, "u1", {"photometric": "rgb", "extrasamples": [0]}),
        (4, "u1", {"photometric": "rgb", "extrasamples": [1]}),
        (4, ">u2", {"photometric": "rgb", "extrasamples": [0], "byteorder": ">"}),
        (5, "u1", {"photometric": "minisblack", "planarconfig": "separate"}),
        (5, "u2", {"photometric": "minisblack", "compression": "lzw", "predictor": True}),
        (8, "u1", {"photometric": "rgb", "compression": "deflate", "tile": (16, 16)}),
        (12, "u2", {"photometric": "minisblack", "bigtiff": True, "compression": "zstd"}),
        (13, "u1", {"photometric": "minisblack", "compression": "packbits", "rowsperstrip": 7}),
    ],
)
def test_bands_of_one_page_are_read_as_they_are_stored(
    tmp_path: Path, count: int, dtype: str, options: dict[str, object]
) -> None:
    stored = RNG.integers(0, 256 ** np.dtype(dtype).itemsize, (40, 50, count)).astype(dtype)
    path = multiband(tmp_path / "a.tif", stored, **options)
    kept = "uint8" if stored.dtype == np.uint8 else "uint16"
    read = read_image(path, count, kept)
    assert read.dtype == kept
    np.testing.assert_array_equal(read, stored)
    with pytest.raises(InputError, match=rf"holds {count} samples per pixel in one page, .*; this model takes 6 chann"):
        read_image(path, channels=6)


def test_colours_beside_unnamed_bands_are_still_colours(tmp_path: Path) -> None:
    stored = RNG.integers(0, 256, (9, 11, 5), dtype=np.uint8)
    path = multiband(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=[0, 0])
    np.testing.assert_array_equal(read_image(path), stored[..., :3])


@pytest.mark.parametrize("missing", ["tifffile", "imagecodecs"])
def test_what_a_multiband_file_needs_is_said(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"photometric": "minisblack", "compression": "deflate"}
    path = multiband(tmp_path / "a.tif", np.zeros((9, 11, 8), np.uint8), **options)
    plain = multiband(tmp_path / "b.tif", np.zeros((9, 11, 8), np.uint8), photometric="minisblack")
    monkeypatch.setitem(sys.modules, missing, None)
    words = rf"{missing} is needed to read a.tif, a TIFF of 8 samples per pixel in one page, 8-bit unsigned: .*edgeseg\[tiff\]"
    with pytest.raises(MissingDependencyError, match=words):
        read_image(path, channels=8)
    if missing == "imagecodecs":
        assert read_image(plain, channels=8).shape == (9, 11, 8)


def test_multiband_files_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = np.zeros((40, 50, 8), np.uint8)
    odd = {
        "float.tif": (bands.astype("f4"), {}, "holds float32, the engine takes uint8"),
        "turned.tif": (bands, {"extratags": [(274, 3, 1, 6, True)]}, "orientation 6"),
        "lerc.tif": (bands, {"compression": "lerc"}, "compressed by method 34887; store it uncompressed"),
    }
    for name, (data, options, words) in odd.items():
        path = multiband(tmp_path / name, data, photometric="minisblack", **options)
        with pytest.raises(InputError, match=words) as caught:
            read_image(path, channels=8)
        assert "\n" not in str(caught.value)
    colours = multiband(tmp_path / "colours.tif", bands[..., :3].astype("f4"), photometric="rgb")
    with pytest.raises(
        InputError, match=r"a TIFF with 3 samples per pixel in one page, 32-bit floating-point, or damaged"
    ):
        read_image(colours)
    monkeypatch.setattr(images, "MAX_ARRAY_BYTES", 40 * 50 * 8 - 1)
    large = multiband(tmp_path / "large.tif", bands, photometric="minisblack")
    with pytest.raises(InputError, match="a page of 16000 bytes; 15999 are allowed"):
        read_image(large, channels=8)


def test_folder_is_listed_in_natural_order_without_folders_and_others(tmp_path: Path) -> None:
    for name in ("img10.png", "img2.png", "IMG1.PNG", "a.npy", "notes.txt", ".hidden.png", "video.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "within").mkdir()
    (tmp_path / "within" / "deep.png").write_bytes(b"x")
    assert [p.name for p in list_images(tmp_path)] == ["a.npy", "IMG1.PNG", "img2.png", "img10.png"]
    assert [p.name for p in list_images(str(tmp_path / "**" / "*.png"))] == ["img2.png", "img10.png", "deep.png"]
    assert [p.name for p in list_images(tmp_path / "img2.png")] == ["img2.png"]


def test_other_names_of_formats_are_listed_and_read(tmp_path: Path) -> None:
    """As browsers save JPEG (.jfif), cameras two pictures in one (.mpo), and tools animations (.apng)."""
    for suffix, kind in ((".apng", "PNG"), (".jfif", "JPEG"), (".mpo", "MPO")):
        Image.fromarray(PHOTO).save(tmp_path / f"a{suffix}", kind)
    found = list_images(tmp_path)
    assert [path.suffix for path in found] == [".apng", ".jfif", ".mpo"]
    for path in found:
        assert np.abs(read_image(path).astype(int) - np.asarray(Image.open(path).convert("RGB"))).max() == 0


def test_list_file_keeps_its_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(b"x")
    listing = tmp_path / "list.txt"
    listing.write_text(f"# chosen\nb.png\n\n{tmp_path / 'a.png'}\n")
    assert list_images(listing) == [tmp_path / "b.png", tmp_path / "a.png"]
    listing.write_text("b.png\nmissing.png\n")
    with pytest.raises(InputError, match=r"line 2: missing\.png"):
        list_images(listing)
    listing.write_text("# nothing\n")
    with pytest.raises(InputError, match="names no images"):
        list_images(listing)


def test_a_file_with_glob_characters_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].png").write_bytes(b"x")
    assert list_images(str(tmp_path / "a[1].png")) == [tmp_path / "a[1].png"]


@pytest.mark.parametrize("pattern", ["*.png", "im[0-9].png", "**/*.png", "[[]x]/*.png"])
def test_brackets_in_a_folder_that_exists_are_no_pattern(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run [1]" / "a*b?"
    inner = folder / "[x]" if "x" in pattern else folder
    inner.mkdir(parents=True)
    for name in ("im2.png", "im10.png", "im1.png"):
        (inner / name).write_bytes(b"x")
    expected = [inner / name for name in ("im1.png", "im2.png", "im10.png") if "[0-9]" not in pattern or len(name) == 7]
    assert list_images(folder / pattern) == expected
    monkeypatch.chdir(folder.parent)
    assert list_images(f"a*b?/{pattern}") == [path.relative_to(folder.parent) for path in expected]
    with pytest.raises(InputError, match="no file matches"):
        list_images(folder / "none[1].png")


def test_links_to_nothing_are_listed_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    for source in (tmp_path, tmp_path / "a.png", f"{tmp_path}/*.png"):
        assert list_images(source) == [tmp_path / "a.png"]
    with pytest.raises(InputError, match=r"a.png: it is a link to .*gone.png, which cannot be reached"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_of_an_array_is_read(tmp_path: Path, order: str) -> None:
    stored = RNG.integers(0, 65536, (5, 8, 3)).astype(f"{order}u2")
    for name in ("a.npy", "a.npz"):
        np.save(tmp_path / name, stored) if name == "a.npy" else np.savez(tmp_path / name, stored)
        np.testing.assert_array_equal(read_image(tmp_path / name, 3, "uint16"), stored)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("aB019", max_size=4), max_size=12, unique=True), st.randoms(use_true_random=False))
def test_order_does_not_depend_on_the_order_found(names: list[str], random: object) -> None:
    paths = [Path(f"x{name}.png") for name in names]
    shuffled = list(paths)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sorted(shuffled, key=natural_key) == sorted(paths, key=natural_key)


def test_pillow_half_imported_by_another_thread_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video's reader has images checked while the writer of masks imports Pillow for the first time."""
    monkeypatch.setitem(sys.modules, "PIL.Image", ModuleType("PIL.Image"))
    assert not is_picture(np.zeros((4, 4, 3), np.uint8))
