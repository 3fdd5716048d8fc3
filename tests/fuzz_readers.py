"""Every reader of files from outside, put through damaged files: no exception but edgeseg's own, said in one line.

A few seconds of it run with the tests. By hand: ``python tests/fuzz_readers.py --minutes 10``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import logging
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from bench_rows import report, row
from PIL import Image
from rich.console import Console

import edgeseg
from edgeseg.cli.inspect import inspect_engine, read_layers, render
from edgeseg.convert.albumentations_file import saved_beside
from edgeseg.convert.model_card import CARD_NAME, read_card
from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.decide.entries import merge, read_runs
from edgeseg.decide.verdict import decide
from edgeseg.errors import EdgesegError
from edgeseg.evaluate.accuracy.counts import AgreementCounts
from edgeseg.evaluate.accuracy.judge import ImageRecord, Ledger
from edgeseg.evaluate.accuracy.labels import LabelReader
from edgeseg.evaluate.accuracy.layouts import open_layout
from edgeseg.evaluate.results import ModuleTime, Profile, write_report
from edgeseg.images.decoding import read_image
from edgeseg.images.raster import Reading, is_georeferenced, is_too_large, open_raster
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import load_table
from edgeseg.report import plain
from edgeseg.report.decision import decision_of
from edgeseg.report.html import html
from edgeseg.runtime.sources import Video
from edgeseg.spec import ModelRequest, ModelSpec, PipelineSpec
from edgeseg.store.atomic import atomic_folder
from edgeseg.store.cache import cached_folder
from edgeseg.store.documents import read_json
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import MANIFEST_NAME
from edgeseg.sweep.config import expand, read_config
from edgeseg.sweep.state import CellState

RNG = np.random.default_rng(15)
PHOTO = RNG.integers(0, 256, (19, 23, 3), dtype=np.uint8)
LABELS = (PHOTO[..., 0] % 5).astype(np.uint8)
STACK = RNG.integers(0, 256, (9, 17, 18, 3), dtype=np.uint8)
MODEL = ModelSpec("fpn", classes=5)

SWEEP = b"""archs = ["fpn", "unet"]
encoders = ["resnet18"]
sizes = ["64x64"]
precisions = ["fp32", "int8"]
targets = ["onnxruntime", "openvino"]
output = "engines"
require = "p99_ms<=33"
[weights]
default = "random"
[bench]
duration_s = 2.5
threads = "1,2"
batch = "1"
data = "demo"
"""

HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**62, 10**400, -0.5, 1e308, float("nan"), float("inf"), "", "x" * 1000, "\x1b[2J\n\0", "../../etc",
    "\ud800", [], {}, [[]] * 3, {"a": {"b": []}}, [1] * 300, "9" * 400,
)  # fmt: skip
HOSTILE_WORDS = (
    *(b"\0", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"999999999999"),
    *(b"-1", b"inf", b"nan", b"\x1b[2J", b"\n", b"(", b"[[", b"="),
)


TRANSFORM = json.dumps({"__version__": "2.0.8", "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": [
    {"__class_fullname__": "LongestMaxSize", "p": 1, "max_size": 96, "max_size_hw": None, "interpolation": 2},
    {"__class_fullname__": "PadIfNeeded", "p": 1.0, "min_height": 96, "min_width": 96, "pad_height_divisor": None,
     "pad_width_divisor": None, "border_mode": 0, "fill": [1, 2, 3], "position": "center"},
    {"__class_fullname__": "CenterCrop", "p": 1.0, "height": 96, "width": 96, "pad_if_needed": False},
    {"__class_fullname__": "Normalize", "p": 1, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "max_pixel_value": 255.0,
     "normalization": "standard"},
]}}).encode()  # fmt: skip
QDQ = (
    "q = QuantizeLinear(image, s, z) x = DequantizeLinear(q, s, z) k = QuantizeLinear(w, t, u) v = DequantizeLinear(k, t, u) "
    "y = Conv(x, v)"
)
CARD = b"---\nlicense: mit\ntags: [a, b]\ndatasets:\n- x\nbase_model: &a some/model\n---\n# A model\n"


def read_transform(path: Path) -> object:
    saved = saved_beside(path.with_name("model.safetensors"))
    assert saved is not None
    saved.require_fit(())
    return saved.fitting(None, None, ((30, 40),), 3), saved.for_channels(3)


@dataclass(frozen=True)
class Subject:
    """One file to damage, and what reads it."""

    path: Path
    read: Callable[[Path], object]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of a file changed, put in, repeated, taken out, or its end cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3, 5])):
        # Headers decide more than pixels do.
        at = rng.randrange(min(len(changed), rng.choice([120, len(changed)])) or 1)
        how = rng.randrange(7)
        if how == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 2:
            word = rng.choice(HOSTILE_WORDS)
            changed[at : at + len(word)] = word
        elif how == 3:
            changed[at:at] = rng.choice(HOSTILE_WORDS)
        elif how == 4:
            del changed[at : at + rng.choice([1, 4, 40])]
        elif how == 5:
            changed[at:at] = changed[at : at + rng.choice([1, 4, 40])]
        else:
            changed = changed[: at + 1]
    return bytes(changed)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """Still JSON, with some values of other types and sizes, fields gone or twice."""
    document = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        pending = [document]
        while pending:
            container = pending.pop()
            keys = list(container) if isinstance(container, dict) else range(len(container))
            places += [(container, key) for key in keys]
            pending += [container[key] for key in keys if isinstance(container[key], dict | list)]
        if not places:
            break
        container, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del container[key]
        elif how == 1:
            other, there = rng.choice(places)
            container[key] = copy.deepcopy(other[there])
        elif how == 2 and isinstance(container[key], int | float):
            container[key] = rng.choice([-container[key], container[key] * 1000, container[key] + 1])
        elif how == 3 and isinstance(container, dict):
            container[rng.choice(["unknown", "", "\x1b[2J", str(key) + "s"])] = copy.deepcopy(container[key])
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    return json.dumps(document).encode("utf-8", "surrogatepass")


def encoded(array: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def arrays(*members: np.ndarray, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, *members)
    return stream.getvalue()


def saved(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def deep_png(colours: np.ndarray) -> bytes:
    """16 bits a sample, which Pillow does not write."""
    height, width = colours.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read_16_bits(path: Path) -> object:
    return read_image(path, 1, "uint16")


def read_values(path: Path) -> object:
    return read_image(path, 1, "float32")


def read_bands(path: Path) -> object:
    return read_image(path, channels=8)


def read_raster(path: Path) -> object:
    """Some of the pixels: a damaged header may speak of many more than there are."""
    with open_raster(path, PipelineSpec(MODEL), Reading()) as raster:
        rows, columns = (slice(0, min(side, 64)) for side in raster.size)
        return raster.read(rows, columns), raster.valid(rows, columns), is_georeferenced(path), is_too_large(path)


def read_mask(path: Path) -> object:
    return LabelReader.of([path], MODEL).read(path)


def calibrate(path: Path) -> object:
    return list(CalibrationSet.open(path).named_images(3))


def read_list(path: Path) -> object:
    return list(open_layout(path, "list", MODEL))


def read_colours(path: Path) -> object:
    return list(open_layout(path.parent, "camvid", MODEL))


def read_folder(path: Path) -> object:
    """As an attacker's folder: what the manifest says of its files is true of them again."""
    folder = path.parent
    if path.name != MANIFEST_NAME:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        for place in ("engine", "graph"):
            if manifest[place] is not None and manifest[place]["name"] == path.name:
                manifest[place] |= {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    said: object = None
    try:
        said = shown(render(inspect_engine(folder), layers=True))
    finally:
        with edgeseg.load(folder) as segmenter:
            segmenter(PHOTO[:16, :16])
    return said


def shown(renderable: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(renderable)
    return stream.getvalue()


def read_graph(path: Path) -> object:
    from edgeseg.store.onnx_file import read_onnx

    try:
        return read_layers(path)
    finally:
        read_onnx(path)


def read_reports(path: Path) -> object:
    merged = merge(read_runs([path]))
    verdicts = decide(merged, None)
    decision_of(merged, verdicts)
    pages = html(merged, verdicts, title="t"), plain.markdown(merged, verdicts), plain.csv_text(merged, verdicts)
    return *pages, shown(plain.terminal(verdicts, width=80))


def read_sweep(path: Path) -> object:
    return expand(read_config(path))


def read_names(path: Path) -> object:
    return ModelRequest(class_names=f"@{path}")  # type: ignore[arg-type]


def read_state(path: Path) -> object:
    return read_json(path, CellState, "sweep state")


def read_ledger(path: Path) -> object:
    return list(Ledger(path).records())


def read_frames(path: Path) -> object:
    video = Video(path)
    try:
        return sum(1 for _ in video), video.damage
    finally:
        video.close()


def read_cached(path: Path) -> object:
    """Made again when it is damaged: what is returned is whole."""

    def make(folder: Path) -> None:
        (folder / "result").write_bytes(b"whole")

    os.environ["EDGESEG_CACHE"] = str(path.parents[2])
    folder, _ = cached_folder("judged", 15, make)
    assert (folder / "result").read_bytes() == b"whole"
    return folder


def subjects(place: Path) -> dict[str, Subject]:
    """Whole files of every kind that needs no torch, below ``place``; of others what can be read with what is installed."""
    by_name: dict[str, Subject] = {}

    def add(kind: str, name: str, content: bytes, read: Callable[[Path], object]) -> Path:
        path = place / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        by_name[f"{kind}/{name}"] = Subject(path, read)
        return path

    for kind, options in {
        "png": {}, "jpeg": {}, "webp": {}, "gif": {}, "bmp": {}, "ppm": {}, "jpeg2000": {}, "tiff": {"compression": "tiff_lzw"},
    }.items():  # fmt: skip
        add("image", f"a.{'jp2' if kind == 'jpeg2000' else kind}", encoded(PHOTO, kind, **options), read_image)
    add("image", "a.npy", saved(PHOTO), read_image)
    add("image", "a.npz", arrays(PHOTO, compressed=True), read_image)
    deep = PHOTO.astype(np.uint16) * 251
    for kind in ("png", "ppm", "jpeg2000", "tiff"):
        add("wide", f"g.{'jp2' if kind == 'jpeg2000' else kind}", encoded(deep[..., 0], kind), read_16_bits)
    add("wide", "c.png", deep_png(deep), lambda path: read_image(path, 3, "uint16"))
    add("wide", "f.tiff", encoded(deep[..., 0].astype(np.float32), "TIFF"), read_values)
    add("wide", "f.npy", saved(deep.astype(np.float64)), lambda path: read_image(path, 3, "float32"))
    add("mask", "m.png", encoded(LABELS, "PNG"), read_mask)
    add("mask", "m.tif", encoded(LABELS, "TIFF"), read_mask)
    add("mask", "m.npy", saved(LABELS.astype(np.int64)), read_mask)
    add("transform", CONFIG_NAME, TRANSFORM, read_transform)
    add("card", CARD_NAME, CARD, lambda path: read_card(path.parent))
    add("calibration", "c.npy", saved(STACK), calibrate)
    add("calibration", "c.npz", arrays(STACK, STACK[::-1], compressed=True), calibrate)
    add("calibration", "c.txt", b"# those\n" + b"".join(b"c%d.png\n" % i for i in range(9)), calibrate)
    for index, picture in enumerate(STACK):
        (place / "calibration" / f"c{index}.png").write_bytes(encoded(picture, "PNG"))
    lists = add("list", "pairs.txt", b"a.png\tm.png\nb.png,m.png\n# x\n\na.png m.png\n", read_list).parent
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)
    classes = b"name,r,g,b\nA,0,0,0\nB, 255,0,0\nC,0,255,0\nD,0,0,255\nE,9,9,9\n"
    camvid = add("camvid", "class_dict.csv", classes, read_colours).parent
    for path, picture in {
        lists / "a.png": PHOTO, lists / "b.png": PHOTO, lists / "m.png": LABELS,
        camvid / "val" / "a.png": PHOTO, camvid / "val_labels" / "a_L.png": colours[LABELS],
    }.items():  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture, "PNG"))
    try:
        import imagecodecs  # noqa: F401  what compressed bands need
        import tifffile
    except ImportError:
        pass
    else:
        stream = io.BytesIO()
        bands = RNG.integers(0, 256, (19, 23, 8), dtype=np.uint8)
        tifffile.imwrite(stream, bands, photometric="minisblack", planarconfig="contig", compression="lzw")
        add("bands", "a.tif", stream.getvalue(), read_bands)
    with contextlib.suppress(ImportError):
        from rasterio import Affine
        from rasterio.io import MemoryFile

        planes = np.ascontiguousarray(PHOTO.transpose(2, 0, 1))
        place_on_earth = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 5e5, 0, -0.5, 4.6e6), "dtype": "uint8"}
        for name, driver, more in (
            ("r.tif", "GTiff", {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16, "nodata": 0}),
            ("r.jp2", "JP2OpenJPEG", {"reversible": "YES", "quality": "100"}),
        ):
            with MemoryFile() as file:
                with file.open(driver=driver, count=3, height=19, width=23, **place_on_earth, **more) as raster:
                    raster.write(planes)
                add("raster", name, bytes(file.getbuffer()), read_raster)
    add("sweep", "sweep.toml", SWEEP, read_sweep)
    add("names", "names.txt", b"road\nsky\n\n a tree \n", read_names)
    add("state", "fpn-int8.json", msgspec.json.encode(CellState("fpn-int8", "0" * 64, 2.5, "no disk")), read_state)
    records = (ImageRecord(n, f"{n}.png", agreement=AgreementCounts(8, 9, 3, 4, ((1, 8, 9),))) for n in range(3))
    add("state", "images.jsonl", b"".join(msgspec.json.encode(record) + b"\n" for record in records), read_ledger)
    kept = Path(cast("Path", read_cached(place / "cache" / "judged" / "0")))
    by_name["cache/contents.json"] = Subject(kept / "contents.json", lambda path: read_cached(path.parent))
    by_name["cache/result"] = Subject(kept / "result", lambda path: read_cached(path.parent))
    (place / "report").mkdir()
    write_report(
        place / "report" / "bench.json",
        report(
            row("pytorch", 30.0, miou=0.7, is_baseline=True, samples_ms=(30.0, 31.0, 29.5) * 5),
            row("fp32", 12.0, miou=0.7, drop=0.0, agreement=0.99, samples_ms=(12.0, 12.5, 11.5) * 5),
            row("int8", 6.0, miou=0.69, drop=0.01, agreement=0.98, precision="int8", samples_ms=(6.0, 6.5, 5.5) * 5),
        ),
    )
    by_name["report/bench.json"] = Subject(place / "report" / "bench.json", read_reports)
    with contextlib.suppress(ImportError):
        by_name |= videos(place)
    with contextlib.suppress(ImportError):
        by_name |= engines(place)
    return by_name


def videos(place: Path) -> dict[str, Subject]:
    """Of every container whose damage is told."""
    os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"
    import cv2

    (place / "video").mkdir()
    by_name = {}
    for name, codec in {"a.mp4": "mp4v", "a.mkv": "mp4v", "a.webm": "VP80", "a.avi": "MJPG"}.items():
        path = place / "video" / name
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10.0, (32, 24))
        for _ in range(6):
            writer.write(RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        writer.release()
        by_name[f"video/{name}"] = Subject(path, read_frames)
    return by_name


def engines(place: Path) -> dict[str, Subject]:
    """A graph, a table, and the files of an engine folder."""
    import onnxruntime  # noqa: F401  before anything is written
    from cpu_folders import IMAGES, folder_for, model, own_scheme
    from small_graphs import table_for

    from edgeseg.backends.tensorrt.calibration import cache_text, check_cache
    from edgeseg.handover.folder import LISTING_NAME, export_engine, exported_files
    from edgeseg.mixed.costs import times_from_file
    from edgeseg.quantize.modules import Modules
    from edgeseg.store.onnx_file import write_onnx

    graph, table = place / "onnx" / "a.onnx", place / "table" / "table.json"
    for path in (graph, table):
        path.parent.mkdir()
    write_onnx(model(), graph)
    table_for(model(), image=IMAGES).save(table)
    folder = folder_for(place / "engine", "onnxruntime", own_scheme())
    files = {f"engine/{path.name}": Subject(path, read_folder) for path in sorted(folder.iterdir())}
    scales, tensors = table.with_name("scales.cache"), load_table(table).ranges
    scales.write_text(cache_text(load_table(table), "10.3.0"))
    profiled = (
        replace(row(kind, precision=kind), profile=Profile("IProfiler", 20, 3.0, (ModuleTime("decoder", 2, 3.0, 1.0),)))
        for kind in ("int8", "fp16")
    )
    costs = table.with_name("costs.json")
    write_report(costs, report(*profiled))
    export_engine(folder, "triton", place / "handed over")
    listing = place / "handed over" / LISTING_NAME

    def read_costs(path: Path) -> object:
        spec = ModelSpec(row("a").engine.arch, row("a").engine.encoder, classes=2)
        return times_from_file(path, spec, Modules(("decoder",), {"decoder": "decoder"})).estimate_ms(["decoder"])

    def read_handed_over(path: Path) -> object:
        """Whatever the listing says, nothing of a user's is lost and nothing outside is touched."""
        mine = [path.with_name("mine.txt"), path.parent / "model_repository" / "mine" / "a", place / "outside" / "a"]
        for file in mine:
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        try:
            with atomic_folder(path.parent, force=True, ours=exported_files) as scratch:
                shutil.copy(path, scratch)
                (scratch / "model_repository").mkdir()
                (scratch / "model_repository" / "new").write_text("new")
        finally:
            assert [file.read_text() for file in mine] == ["mine"] * 3
        return mine

    return {
        "onnx/a.onnx": Subject(graph, read_graph),
        "table/table.json": Subject(table, load_table),
        "table/scales.cache": Subject(scales, lambda path: check_cache(path, "10.3.0", tensors, None)),
        "table/costs.json": Subject(costs, read_costs),
        "handover/handover.json": Subject(listing, read_handed_over),
    } | files


def checkpoints(place: Path) -> dict[str, Subject]:
    """What training leaves behind, and a save_pretrained folder. Needs torch and SMP."""
    import torch
    from safetensors.torch import save_file
    from small_graphs import graph

    from edgeseg.convert.architectures import import_smp
    from edgeseg.convert.load import load_model

    by_name: dict[str, Subject] = {}

    def load(path: Path) -> object:
        return load_model(ModelRequest(weights=str(path)))

    def load_folder(path: Path) -> object:
        return load_model(ModelRequest(weights=str(path.parent)))

    settings = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    network = import_smp().Unet("mobilenet_v2", encoder_weights=None, classes=5, **settings)
    tensors = network.state_dict()
    parameters = {"arch": "unet", "encoder_name": "mobilenet_v2", "classes": 5, **settings}
    (place / "checkpoint").mkdir()
    content = {
        "state_dict": {f"model.{name}": value for name, value in tensors.items()},
        "hyper_parameters": parameters,
    }
    torch.save(content, place / "checkpoint" / "a.ckpt")
    torch.save(tensors, place / "checkpoint" / "old.pt", _use_new_zipfile_serialization=False)
    save_file(dict(tensors), place / "checkpoint" / "a.safetensors")
    for name in ("a.ckpt", "old.pt", "a.safetensors"):
        by_name[f"checkpoint/{name}"] = Subject(place / "checkpoint" / name, load)
    network.save_pretrained(place / "hub")
    for name in ("config.json", "model.safetensors"):
        by_name[f"hub/{name}"] = Subject(place / "hub" / name, load_folder)
    (place / "network").mkdir()
    for name, body in {"plain": "y = Conv(image, w)", "pairs": QDQ}.items():
        path = place / "network" / f"{name}.onnx"
        numbers = {"s": np.float32(0.02), "z": np.uint8(3), "t": np.float32(0.01), "u": np.int8(0)}
        weights = {key: value for key, value in numbers.items() if name == "pairs"}
        model = graph(
            "(float[1,3,H,W] image) => (float[1,2,H,W] y)", body, w=RNG.random((2, 3, 1, 1), np.float32), **weights
        )
        path.write_bytes(model.SerializeToString())
        by_name[f"network/{path.name}"] = Subject(path, load)
    return by_name


def fault_of(subject: Subject, content: bytes) -> str | None:
    """What is wrong with how ``content`` is read; ``None`` when it is accepted, or refused as it should be."""
    subject.path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            subject.read(subject.path)
    except EdgesegError as exc:
        said = str(exc)
        return f"more than one line: {said!r}" if "\n" in said else None
    except Exception as exc:
        where = [frame for frame in traceback.extract_tb(exc.__traceback__) if "edgeseg/" in frame.filename]
        place = f"{where[-1].filename.split('edgeseg/')[-1]}:{where[-1].lineno}" if where else "?"
        return f"{type(exc).__name__}: {str(exc)[:150]!r} at {place}"
    return None


def fuzz(subject: Subject, rng: random.Random, count: int) -> list[str]:
    """Damage one file ``count`` times; every fault met. What lies beside it is as before afterwards."""
    whole = subject.path.read_bytes()
    manifest = subject.path.with_name(MANIFEST_NAME)
    told = manifest.read_bytes() if manifest.exists() else None
    faults = []
    for _ in range(count):
        is_json = subject.path.suffix == ".json" and rng.random() < 0.7
        fault = fault_of(subject, (mutated_json if is_json else mutated)(whole, rng))
        if fault is not None:
            faults.append(fault)
    subject.path.write_bytes(whole)
    if told is not None:
        manifest.write_bytes(told)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a subject's name")
    arguments = parser.parse_args()
    logging.disable()
    place = Path(tempfile.mkdtemp(prefix="edgeseg-fuzz-"))
    counts: collections.Counter[str] = collections.Counter()
    faults: collections.Counter[str] = collections.Counter()
    every = subjects(place) | checkpoints(place)
    chosen = {name: subject for name, subject in every.items() if arguments.only in name}
    for subject in chosen.values():
        subject.read(subject.path)  # whole files are read
    start, turn = time.monotonic(), arguments.seed * 1_000_000
    while time.monotonic() - start < arguments.minutes * 60:
        turn += 1
        for name, subject in chosen.items():
            # What a crash of the process was about is the last line written.
            (place / "last").write_text(f"{name} {turn}")
            count = 2 if name.split("/")[0] in {"checkpoint", "hub"} else 20
            counts[name] += count
            for fault in fuzz(subject, random.Random(f"{name} {turn}"), count):
                if not faults[f"{name}: {fault}"]:
                    print(f"{name} {turn}: {fault}", flush=True)
                faults[f"{name}: {fault}"] += 1
    for name, count in counts.items():
        print(f"{count:8} {name}")
    print(
        f"{counts.total()} damaged files in {time.monotonic() - start:.0f} s, {faults.total()} faults ({len(faults)} kinds)"
    )
    shutil.rmtree(place)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
