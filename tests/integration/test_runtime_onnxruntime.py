"""The runtime around a real engine: ONNX Runtime executing a small convolution made here."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from cpu_folders import folder_for
from engine_folders import write_manifest
from small_graphs import graph

import edgeseg
from edgeseg.backends import get_backend
from edgeseg.errors import InputError
from edgeseg.images.placement import fit
from edgeseg.images.resize import resize_scores
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec
from edgeseg.store.engine import open_engine
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

pytestmark = pytest.mark.integration

CLASSES, HEIGHT, WIDTH = 5, 64, 96
RNG = np.random.default_rng(2)
WEIGHT = RNG.normal(size=(CLASSES, 3, 3, 3)).astype(np.float32) / 64


def network(images: np.ndarray) -> np.ndarray:
    """The same convolution in numpy: uint8 ``(N, H, W, 3)`` -> logits ``(N, classes, H, W)``."""
    padded = np.pad(images.astype(np.float64).transpose(0, 3, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = images.shape[1:3]
    logits = np.zeros((len(images), CLASSES, height, width))
    for dy in range(3):
        for dx in range(3):
            part = padded[:, :, dy : dy + height, dx : dx + width]
            logits += np.einsum("oc,nchw->nohw", WEIGHT[:, :, dy, dx].astype(np.float64), part)
    return logits


def save_graph(path: Path, kind: str, batch: int | str, size: tuple[int | str, int | str]) -> None:
    height, width = size
    shape = f"uint8[{batch}, {height}, {width}] mask" if kind == "mask" else f"float[{batch}, {CLASSES}, h, w] logits"
    model = graph(
        f"(uint8[{batch}, {height}, {width}, 3] image) => ({shape})",
        "real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) "
        "logits = Conv <pads = [1, 1, 1, 1]> (planes, weight)"
        + " index = ArgMax <axis = 1, keepdims = 0> (logits) mask = Cast <to = 2> (index)"
        * (kind == "mask"),
        weight=WEIGHT,
    )
    onnx.save(model, path)


def build(folder: Path, kind: str = "mask", batch: BatchRange | None = None, **options: object) -> Path:
    """Make an engine folder with the onnxruntime backend, as ``edgeseg build`` does, without a torch model."""
    folder.mkdir()
    spec = PipelineSpec(
        ModelSpec("custom", classes=CLASSES),
        InputSpec(HEIGHT, WIDTH, batch=batch or BatchRange(), **options),
        output=OutputSpec(kind),
    )
    dynamic = spec.input.batch.is_dynamic
    size = ("H", "W") if spec.input.dynamic_size else (HEIGHT, WIDTH)
    save_graph(folder / "model.onnx", kind, "N" if dynamic else spec.input.batch.maximum, size)
    stored = OnnxGraph(folder / "model.onnx", sha256_file(folder / "model.onnx"), "fp32", spec, "0" * 64)
    built = get_backend("onnxruntime").build(stored, folder, {})
    write_manifest(folder, spec, target="onnxruntime", built=built, weights="a small convolution", inputs_sha256={})
    return folder


def photo(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", ["mask", "logits"])
def test_masks_are_those_of_the_network(tmp_path: Path, kind: str) -> None:
    with edgeseg.load(build(tmp_path / "engine", kind)) as segmenter:
        image = photo(HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(segmenter(image), network(image[None])[0].argmax(axis=0))
        larger = photo(150, 200, 3)
        fitted, _ = fit(larger, segmenter.spec.input)
        logits = network(fitted[None])[0]
        mask = segmenter(larger)
        if kind == "logits":
            whole = resize_scores(logits, (150, 200))
            ranked = np.sort(whole, axis=0)
            clear = ranked[-1] - ranked[-2] > 1e-4
            assert clear.mean() > 0.99
            np.testing.assert_array_equal(mask[clear], whole.argmax(axis=0)[clear])
        else:
            rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in ((150, HEIGHT), (200, WIDTH)))
            np.testing.assert_array_equal(mask, logits.argmax(axis=0)[np.ix_(rows, columns)])


@pytest.mark.parametrize("batch", [BatchRange(3, 3, 3), BatchRange(1, 2, 4)])
def test_batches(tmp_path: Path, batch: BatchRange) -> None:
    with edgeseg.load(build(tmp_path / "engine", batch=batch)) as segmenter:
        images = photo(7, HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(segmenter(images), network(images).argmax(axis=1))
        np.testing.assert_array_equal(segmenter(images[0]), network(images[:1])[0].argmax(axis=0))


def test_dynamic_size_is_padded_and_cropped(tmp_path: Path) -> None:
    with edgeseg.load(build(tmp_path / "engine", dynamic_size=True)) as segmenter:
        for size in ((64, 96), (33, 70), (1, 1), (130, 31)):
            image = photo(*size, 3)
            padded = np.pad(image, ((0, -size[0] % 32), (0, -size[1] % 32), (0, 0)), mode="edge")
            expected = network(padded[None])[0].argmax(axis=0)[: size[0], : size[1]]
            np.testing.assert_array_equal(segmenter(image), expected)


def test_sizes_the_model_refuses_are_refused_and_smaller_images_padded(tmp_path: Path) -> None:
    """The graph itself would run at any size."""
    folder = build(tmp_path / "engine", dynamic_size=True, min_size=(64, 64))
    image = photo(40, 70, 3)
    padded = np.pad(image, ((0, 24), (0, 26), (0, 0)), mode="edge")
    with edgeseg.load(folder) as segmenter:
        np.testing.assert_array_equal(segmenter(image), network(padded[None])[0].argmax(axis=0)[:40, :70])
    with get_backend("onnxruntime").load(open_engine(folder)) as session:
        session.run(padded[None])
        for size in ((32, 96), (80, 96)):
            with pytest.raises(InputError, match=f"images have {size[0]}x96 pixels, .* multiples of 32 from 64x64"):
                session.run(np.zeros((1, *size, 3), np.uint8))


def test_tiles_of_a_mask_engine_equal_the_whole_away_from_the_cuts(tmp_path: Path) -> None:
    """A 3x3 convolution needs one pixel of context, so only the padding at the image's own border can differ."""
    with edgeseg.load(build(tmp_path / "engine", fit="tile")) as segmenter:
        image = photo(200, 250, 3)
        np.testing.assert_array_equal(segmenter(image), network(image[None])[0].argmax(axis=0))


def test_eight_threads_get_what_one_gets(tmp_path: Path) -> None:
    with edgeseg.load(build(tmp_path / "engine", "logits", BatchRange(1, 2, 2), fit="tile")) as segmenter:
        sizes = [(HEIGHT, WIDTH), (100, 130), (20, 200), (7, 9)]
        images = [photo(*sizes[i % 4], 3) for i in range(64)]
        serial = [segmenter(image) for image in images]
        with ThreadPoolExecutor(8) as pool:
            for mask, expected in zip(pool.map(segmenter, images), serial, strict=True):
                np.testing.assert_array_equal(mask, expected)


BARE_MACHINE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "onnx", "segmentation_models_pytorch", "cv2", "timm"}:
            raise ImportError(name + " is not on this machine")

sys.meta_path.insert(0, Absent())
import numpy as np
import edgeseg
with edgeseg.load(sys.argv[1]) as segmenter:
    for size in ((64, 96), (100, 100), (5, 7)):
        print(segmenter(np.full((*size, 3), 130, np.uint8)).shape)
"""


def test_torch_onnx_smp_and_opencv_are_not_needed(tmp_path: Path) -> None:
    folder = build(tmp_path / "engine", "logits")
    command = [sys.executable, "-c", BARE_MACHINE, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(64, 96)", "(100, 100)", "(5, 7)"]


FORKS = """
import os, signal, sys
import numpy as np
import edgeseg

segmenter = edgeseg.load(sys.argv[1], threads=2)
height, width = segmenter.spec.input.height, segmenter.spec.input.width
image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
mask = segmenter(image)
child = os.fork()
if child == 0:
    signal.alarm(30)
    assert np.array_equal(segmenter(image), mask)
    if sys.argv[2] == "close":
        segmenter.close()
    elif sys.argv[2] == "replace":
        segmenter = edgeseg.load(sys.argv[1])
        assert np.array_equal(segmenter(image), mask)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(segmenter(image), mask)
"""


@pytest.mark.parametrize("end", ["close", "replace", "exit"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_forked_process_frees_what_it_inherited_without_waiting_for_threads(
    tmp_path: Path, target: str, end: str
) -> None:
    folder = folder_for(tmp_path / "engine", target, get_backend(target).scheme)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, str(folder), end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
