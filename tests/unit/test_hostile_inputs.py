"""Damaged and hostile files, by kind of file: each is refused in one line that names it and says what is wrong.

Every file is generated here and small. What a reader may claim for such a file is limited before memory is taken for it.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz_readers import encoded
from PIL import Image

from edgeseg.errors import EdgesegError
from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.evaluate.accuracy.labels import LabelReader
from edgeseg.evaluate.accuracy.layouts import open_layout
from edgeseg.images.decoding import list_images, read_image
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.runtime.sources import Video
from edgeseg.spec import ModelSpec

RNG = np.random.default_rng(15)
PHOTO = RNG.integers(0, 256, (19, 23, 3), dtype=np.uint8)
LABELS = (PHOTO[..., 0] % 5).astype(np.uint8)
MODEL = ModelSpec("fpn", classes=5)
MULTILABEL = ModelSpec("fpn", classes=3, task="multilabel")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, body: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def tiff(*entries: tuple[int, int, int, int], following: int = 0, body: bytes = b"") -> bytes:
    """Little-endian TIFF of one directory at byte 8: (tag, type, count, value or offset)."""
    rows = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", following) + body


def bands(count: int = 8, width: int = 6, height: int = 5, compression: int = 1, **tags: int) -> bytes:
    """A TIFF of ``count`` interleaved grey samples."""
    names = {"planar": 284, "tile_width": 322, "tile_length": 323, "sample_format": 339, "offset": 273, "rows": 278}
    fields = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 400, 277: count, 278: height}
    fields |= {279: min(count * width * height, 240)} | {names[name]: value for name, value in tags.items()}
    body = tiff(*((tag, 4, 1, value) for tag, value in fields.items()))
    return body.ljust(400, b"\0") + bytes(min(count * 30, 240))


def npy(text: str, body: bytes = b"\0" * 16, version: bytes = b"\x01\x00") -> bytes:
    header = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + body


def shaped(shape: str, descr: str = "'|u1'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}")


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def patched(archive: bytes, offset_in_local: int, offset_in_central: int, value: int) -> bytes:
    """Overwrite a 16-bit field of the first member in both of its headers."""
    content, central = bytearray(archive), archive.index(b"PK\x01\x02")
    struct.pack_into("<H", content, offset_in_local, value)
    struct.pack_into("<H", content, central + offset_in_central, value)
    return bytes(content)


GOOD = saved(PHOTO)
PNG, JPEG = encoded(PHOTO, "PNG"), encoded(PHOTO, "JPEG")
DAMAGED_ZIP = bytearray(zipped(("a.npy", GOOD), method=zipfile.ZIP_DEFLATED))
DAMAGED_ZIP[60:200] = bytes(140)
WRONG_CRC = bytearray(zipped(("a.npy", GOOD)))
WRONG_CRC[200] ^= 1

ARRAYS: dict[str, tuple[bytes, str]] = {
    "empty.npy": (b"", r"the file is empty \(0 bytes\)"),
    "text.npy": (b"not an array", "magic string"),
    "magic alone.npy": (b"\x93NUMPY\x01\x00", "EOF"),
    "version 9.npy": (npy("{}", version=b"\x09\x00"), "version|header|EOF|descr"),
    "unbalanced.npy": (npy("{'descr': '|u1', 'shape': ((((("), "header|EOF|closed|invalid"),
    "nested.npy": (npy("(" * 900 + ")" * 900), "header|parse|nested|closed|invalid|memory|Memory|too many"),
    "code.npy": (npy("__import__('os').system('true')"), "header|malformed"),
    "pickle.npy": (pickle.dumps([1]), "magic string"),
    "objects.npy": (saved(np.array([{"a": 1}], dtype=object)), "pickled objects, which could run code"),
    "objects inside.npy": (shaped("(2,)", "[('a', '|O')]"), "pickled objects, which could run code"),
    "negative.npy": (shaped("(-5, 4, 3)"), "more than the 1073741824 bytes allowed"),
    "huge.npy": (shaped("(1000000, 1000000, 3)"), "more than the 1073741824 bytes allowed"),
    "digits.npy": (shaped("(1" + "0" * 400 + ", 4, 3)"), "more than the 1073741824 bytes allowed"),
    "more digits.npy": (shaped("(1" + "0" * 5000 + ", 4, 3)"), "header|digits|shape"),
    "cut.npy": (GOOD[:-100], "EOF|reshape|Failed to read|greater than file size"),
    "long header.npy": (npy("{'descr': '|u1', " + " " * 60000), "header"),
    "float shape.npy": (shaped("(4.0, 4, 3)"), "shape"),
    "bad dtype.npy": (shaped("(4, 4, 3)", "'|z9'"), "dtype|descr"),
    "zeros.npz": (b"", r"the file is empty \(0 bytes\)"),
    "text.npz": (b"not an archive", "not a zip file"),
    "cut.npz": (zipped(("a.npy", GOOD))[:300], "not a zip file"),
    "encrypted.npz": (patched(zipped(("a.npy", GOOD)), 6, 8, 1), "encrypted"),
    "method 99.npz": (patched(zipped(("a.npy", GOOD)), 8, 10, 99), "compression"),
    "deflated.npz": (bytes(DAMAGED_ZIP), "decompressing|invalid|CRC|header|incorrect|magic"),
    "checksum.npz": (bytes(WRONG_CRC), "CRC"),
    "bomb.npz": (zipped(("a.npy", shaped("(1 << 40,)") and shaped("(2000000000,)"))), "more than the .* bytes allowed"),
    "no array.npz": (zipped(("a.txt", b"x" * 40)), "magic string"),
    "objects.npz": (zipped(("a.npy", saved(np.array([{}], dtype=object)))), "pickled objects"),
    "none.npz": (zipped(), "holds 0 arrays"),
}

IMAGES: dict[str, tuple[bytes, str]] = ARRAYS | {
    "two.npz": (zipped(("a.npy", GOOD), ("b.npy", GOOD)), "holds 2 arrays; 1 can be read"),
    "scalar.npy": (saved(np.array(3, np.uint8)), r"has shape \(\); an image has"),
    "nothing.npy": (saved(np.zeros((0, 4, 3), np.uint8)), r"has shape \(0, 4, 3\)"),
    "floats.npy": (saved(PHOTO / 255.0), "holds float64, the engine takes uint8: "),
    "complex.npy": (saved(PHOTO.astype(np.complex64)), "holds complex64"),
    "dates.npy": (saved(np.zeros((4, 4, 3), "M8[s]")), "holds datetime64"),
    "words.npy": (saved(np.zeros((4, 4, 3), "U3")), "holds <U3"),
    "records.npy": (saved(np.zeros((4, 4), "u1,u2")), r"holds \["),
    "channels.npy": (saved(np.zeros((4, 4, 7), np.uint8)), "has 7 channels"),
    "stack.npy": (saved(np.zeros((2, 4, 4, 3), np.uint8)), r"has shape \(2, 4, 4, 3\)"),
    "wide.npy": (saved(PHOTO.astype(np.int64)), "holds int64, the engine takes uint8"),
    "empty.png": (b"", r"the file is empty \(0 bytes\)"),
    "text.png": (b"this is no image", "not one of BMP, GIF, JPEG, .*, or damaged"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not one of BMP"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n/x (ls) run\n%%EOF\n", "not one of BMP"),
    "fits.tif": (b"SIMPLE  =                    T".ljust(2880), "not one of BMP"),
    "document.png": (b"%PDF-1.4\n%%EOF", "not one of BMP"),
    "icon.bmp": (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x18\0", "not one of BMP"),
    "cut.png": (PNG[: len(PNG) // 2], "truncated|unexpected end|broken"),
    "header.png": (PNG[:33], "truncated|not one of|broken"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "[Tt]runcated|broken"),
    "cut.tif": (encoded(PHOTO, "TIFF")[:600], "[Tt]runcated|broken|not one of|damaged"),
    "cut.gif": (encoded(PHOTO, "GIF")[:40], "truncated|not one of|broken|end of file"),
    "cut.webp": (encoded(PHOTO, "WEBP")[:60], "not one of|could not create|failed|decode|not enough"),
    "cut.bmp": (encoded(PHOTO, "BMP")[:200], "truncated"),
    "cut.ppm": (b"P6 20 20 255\n" + b"x" * 30, "truncated"),
    "letters.ppm": (b"P6 20 2x 255\n" + b"x" * 30, "not one of|Non-decimal|invalid literal"),
    "depth.pgm": (b"P5 20 20 99999999999\n" + b"x" * 400, "not one of|maxval|Token too long"),
    "nothing.png": (png(0, 0), "not one of|broken|tile|image size|0"),
    "bomb.png": (png(60_000, 60_000), "more than 178956970 pixels; cut it into parts"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "178956970",
    ),
    "bomb.gif": (
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08",
        "178956970|not one of",
    ),
    "text inside.png": (
        PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))) + PNG[33:],
        "too large|Decompressed",
    ),
    "floats.tif": (
        encoded((PHOTO[..., 0] / 9).astype(np.float32), "TIFF"),
        "holds float32, the engine takes uint8",
    ),
    "integers.tif": (encoded(PHOTO[..., 0].astype(np.int32), "TIFF"), "holds int32, the engine takes uint8"),
    "header.tif": (b"II*\0\x08\0\0\0", "not one of|truncated|broken|damaged|unpack"),
    "no tags.tif": (tiff((256, 4, 1, 8)), "not one of|damaged|broken|Missing|KeyError|257|truncated"),
    "bands.tif": (bands(8), r"holds 8 samples per pixel in one page, 8-bit unsigned; this model takes 3 channels"),
    "many bands.tif": (bands(60000), "holds 60000 samples per pixel"),
}

BANDS: dict[str, tuple[bytes, str]] = {
    "pages.tif": (
        encoded(PHOTO, "TIFF", save_all=True, append_images=[Image.fromarray(PHOTO)] * 2),
        r"mode RGB, 3 pages",
    ),
    "colours.png": (PNG, r"has 3 channels \(mode RGB, 1 pages\); this model takes 8: store"),
    "large.tif": (bands(8, 40_000, 40_000), "a page of 12800000000 bytes; 1073741824 are allowed"),
    "tiles.tif": (bands(8, tile_width=1 << 30, tile_length=1 << 30), "a tile of .* bytes; 1073741824 are allowed|tile"),
    "beyond.tif": (bands(8, offset=1 << 31), "cannot read image|its data have|EOF|read"),
    "method.tif": (
        bands(8, compression=34712),
        "compressed by method 34712; store it uncompressed or with deflate or LZW",
    ),
    "deflate.tif": (bands(8, compression=8), "cannot read image"),
    "lzw.tif": (bands(8, compression=5), "cannot read image"),
    "planar.tif": (bands(8, planar=9), "cannot read image"),
    "strips.tif": (bands(8, height=5000, rows=5), "holds 1 of its 1000 strips or tiles"),
    "signed.tif": (bands(8, sample_format=2), "holds int8, the engine takes uint8"),
    "few.tif": (bands(7), r"holds 7 samples per pixel in one page, .*; this model takes 8 channels"),
    "loop.tif": (
        tiff(*((tag, 4, 1, 1) for tag in (256, 257, 258, 262, 277, 278)), following=8),
        "cannot read|has 1 channels",
    ),
}

MASKS: dict[str, tuple[bytes, str]] = {name: case for name, case in ARRAYS.items() if name.endswith("npy")} | {
    "floats.npy": (saved(LABELS / 2), "holds float64 that are no whole numbers; a mask holds class indices"),
    "words.npy": (saved(np.zeros((4, 4), "U3")), "holds <U3; a mask holds integers"),
    "flat.npy": (saved(np.zeros(9, np.uint8)), r"has shape \(9,\); a mask has one class index per pixel"),
    "scalar.npy": (saved(np.array(1)), r"has shape \(\); a mask has one class index"),
    "deep.npy": (saved(np.zeros((2, 2, 2, 2), np.uint8)), "one class index per pixel"),
    "minus.npy": (saved(LABELS.astype(np.int16) - 1), "holds -1; this model's masks hold 0..4: correct"),
    "wide.npy": (saved(LABELS.astype(np.int64) + (1 << 40)), "holds 1099511627776, "),
    "unsigned.npy": (saved(LABELS.astype(np.uint64) + np.uint64(1 << 63)), "holds 9223372036854775808, "),
    "colour.png": (
        PNG,
        r"is a colour image \(mode RGB\); a mask holds one class index per pixel: make it a grey or palette",
    ),
    "photo.jpg": (JPEG, "is a colour image"),
    "cut.png": (encoded(LABELS, "PNG")[:60], "truncated|broken"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot read mask .*: not one of BMP"),
    "fits.png": (b"SIMPLE  =                    T".ljust(2880), "cannot read mask .*: not one of BMP"),
    "bomb.png": (png(60_000, 60_000, colour=0), "more than 178956970 pixels; cut it into parts"),
    "values.png": (
        encoded(LABELS * 40, "PNG"),
        "holds 40, 80, 120, 160; this model's masks hold 0..4: correct the masks",
    ),
    "from one.png": (
        encoded(LABELS + 1, "PNG"),
        "hold 1, 2, 3, 4, 5 and never 0, so their classes seem to count from 1",
    ),
    "empty.png": (b"", r"the file is empty \(0 bytes\)"),
}

CALIBRATION: dict[str, tuple[bytes, str]] = ARRAYS.copy()
for large in ("negative.npy", "huge.npy", "digits.npy", "objects.npy", "objects inside.npy"):
    CALIBRATION[large] = (ARRAYS[large][0], "cannot read calibration images")
CALIBRATION |= {
    "bomb.npz": (zipped(("a.npy", shaped("(3000000000,)"))), "more than the 2147483648 bytes allowed"),
    "none.npz": (zipped(), "holds 0 arrays; 1 to 100000 can be read"),
    "magic alone.npy": (b"\x93NUMPY\x01\x00", "cannot read calibration images"),
    "floats.npy": (saved(np.zeros((9, 20, 20, 3))), "is float64, the engine takes uint8"),
    "few.npy": (saved(RNG.integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)), "only 3 images .* at least 8"),
    "small.npy": (saved(RNG.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)), "8x8 pixels, at least 16x16 are needed"),
    "one colour.npy": (saved(np.arange(9, dtype=np.uint8).repeat(1200).reshape(9, 20, 20, 3)), "is of a single colour"),
    "one picture.npy": (saved(np.stack([PHOTO] * 9)), "the same picture as one picture.npy.0"),
    "names.txt": (b"a\0b.png\n", "line 1: a\0b.png does not exist"),
    "comments.txt": (b"# nothing\n\n", "names no images; write one path per line"),
    "bytes.txt": (b"\xff\xfe\xff\n", "can't decode"),
    "long.txt": (b"x" * 5000 + b".png\n", "line 1: .* does not exist"),
    "image.png": (PNG, "is one image; calibration takes"),
}

LISTS: dict[str, tuple[bytes, str]] = {
    "three.txt": (b"a.png m.png x\n", "line 1 has 3 names; give IMAGE or IMAGE MASK"),
    "gone.txt": (b"gone.png\tgone mask.png\n", "names .*gone.png, which is not there"),
    "nul.txt": (b"a\0.png\tm\0.png\n", "which is not there"),
    "long.txt": (b"x" * 5000 + b".png\n", "which is not there"),
    "bytes.txt": (b"\xff\xfe", "can't decode"),
    "empty.txt": (b"", r"the file is empty \(0 bytes\)"),
    "comments.txt": (b"#\n\n", "no images of split val"),
}

COLOURS: dict[str, tuple[bytes, str]] = {
    "columns.csv": (b"name,red,green,blue\nA,0,0,0\n", "columns name, r, g, b"),
    "beyond.csv": (b"name,r,g,b\nA,0,0,256\n", "a colour is beyond 0..255"),
    "minus.csv": (b"name,r,g,b\nA,0,-1,0\n", "a colour is beyond 0..255"),
    "words.csv": (b"name,r,g,b\nA,red,0,0\n", "columns name, r, g, b"),
    "short.csv": (b"name,r,g,b\nA,1\n", "columns name, r, g, b"),
    "digits.csv": (b"name,r,g,b\nA,1" + b"0" * 5000 + b",0,0\n", "columns name, r, g, b"),
    "field.csv": (b"name,r,g,b\n" + b"x" * 200_000 + b",1,1,1\n", "field larger than field limit"),
    "bytes.csv": (b"name,r,g,b\n\xff,1,1,1\n", "can't decode"),
    "empty.csv": (b"", r"the file is empty \(0 bytes\)"),
    "header.csv": (b"name,r,g,b\n", "is a colour image"),
    "others.csv": (b"name,r,g,b\nA,1,2,3\n", "has the colour .* at row 0, column 0, which is no class's colour"),
}

VIDEOS: dict[str, tuple[bytes, str]] = {
    "empty.mp4": (b"", r"the file is empty \(0 bytes\)"),
    "text.mp4": (b"no video", "not a video, damaged, or of an unknown codec"),
    "box.mp4": (struct.pack(">I", 24) + b"ftypisom\0\0\2\0isomiso2", "not a video, damaged"),
    "huge box.mp4": (struct.pack(">I", 0x7FFFFFFF) + b"moov" + b"\0" * 64, "not a video, damaged"),
    "riff.avi": (b"RIFF\xff\xff\xff\xffAVI LIST\xff\xff\xff\xffhdrl", "not a video, damaged"),
    "ebml.mkv": (b"\x1a\x45\xdf\xa3" + b"\xff" * 40, "not a video, damaged"),
}


def read_mask(path: Path) -> object:
    return LabelReader.of([path], MODEL).read(path)


def read_list(path: Path) -> object:
    return list(open_layout(path, "list", MODEL))


def read_colours(path: Path) -> object:
    """As CamVid's ``class_dict.csv``, beside one image and its coloured mask."""
    for folder, name in (("val", "a.png"), ("val_labels", "a_L.png")):
        (path.parent / folder).mkdir()
        (path.parent / folder / name).write_bytes(PNG)
    path.rename(path.parent / "class_dict.csv")
    return list(open_layout(path.parent, "camvid", MODEL))


def read_video(path: Path) -> object:
    pytest.importorskip("cv2")
    return list(Video(path))


def calibrate(path: Path) -> object:
    return list(CalibrationSet.open(path).named_images(3))


READERS: dict[str, tuple[dict[str, tuple[bytes, str]], Callable[[Path], object]]] = {
    "image": (IMAGES, read_image),
    "bands": (BANDS, lambda path: read_image(path, channels=8)),
    "mask": (MASKS, read_mask),
    "calibration": (CALIBRATION, calibrate),
    "list": (LISTS, read_list),
    "colours": (COLOURS, read_colours),
    "video": (VIDEOS, read_video),
}


def refused(read: Callable[[Path], object], path: Path, words: str) -> str:
    with pytest.raises(EdgesegError, match=words) as caught:
        read(path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700 + len(str(path)) + 5000 * ("long" in path.name)
    return line


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (cases, _) in READERS.items() for name in cases])
def test_each_is_refused_in_one_line_that_says_why(tmp_path: Path, kind: str, name: str) -> None:
    cases, read = READERS[kind]
    if kind == "bands":
        pytest.importorskip("tifffile")
        pytest.importorskip("imagecodecs")
    (tmp_path / name).write_bytes(cases[name][0])
    line = refused(read, tmp_path / name, cases[name][1])
    assert kind != "image" or str(tmp_path / name) in line


def special_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and words for each thing that is no regular file; made in ``folder``."""
    os.mkfifo(folder / "pipe.png")
    yield "pipe.png", "no regular file"
    os.mkfifo(folder / "pipe.npy")
    yield "pipe.npy", "no regular file"
    (folder / "zero.png").symlink_to("/dev/zero")
    yield "zero.png", "no regular file"
    (folder / "loop.png").symlink_to(folder / "loop.png")
    yield "loop.png", "a link to .*loop.png, which cannot be reached"
    (folder / "gone.npy").symlink_to(folder / "nothing.npy")
    yield "gone.npy", "a link to .*nothing.npy, which cannot be reached"
    (folder / "folder.png").mkdir()
    yield "folder.png", "it is a folder"
    yield "missing.png", "it does not exist"
    yield "n" * 300 + ".png", "File name too long"
    yield "nul\0.png", "NUL character|null byte|does not exist"
    yield "a.png/b.png", "Not a directory|does not exist"


@pytest.mark.parametrize("kind", ["image", "mask", "video"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    read = READERS[kind][1]
    (tmp_path / "a.png").write_bytes(PNG)
    for name, words in special_files(tmp_path):
        refused(read, tmp_path / name, words)
    # A socket's name has 100 bytes at most.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/s.png")
        refused(read, Path(short) / "s.png", "no regular file")


def test_a_folder_of_such_things_is_listed_and_each_named(tmp_path: Path) -> None:
    for _ in special_files(tmp_path):
        pass
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["gone.npy", "loop.png", "pipe.npy", "pipe.png", "zero.png"]
    with pytest.raises(EdgesegError, match=r"only 0 of 5 .*5 skipped: gone.npy: .*cannot be reached"):
        CalibrationSet.open(tmp_path)
    with pytest.raises(EdgesegError, match="cannot be reached|no regular file"):
        list(ValidationSet.open(tmp_path, MODEL))
