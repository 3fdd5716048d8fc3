"""The demo data is what its generator says, and the demo weights are complete."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "calibration" / "demo"
WEIGHTS = ROOT / "edgeseg" / "demo"
ARCHITECTURES = ("fpn", "unet", "deeplabv3plus", "pspnet")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_demo", ROOT / "calibration" / "generate_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path  # the generator adds its folder, which no other test should see
    return module


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


def test_same_seed_same_scene(generator: ModuleType) -> None:
    first, again, other = (generator.render_scene(seed) for seed in (7, 7, 8))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize(("height", "width"), [(256, 256), (96, 160), (160, 96)])
def test_shapes_and_classes(generator: ModuleType, height: int, width: int) -> None:
    for seed in range(3):
        image, mask = generator.render_scene(seed, height, width)
        assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((height, width), np.uint8)
        assert mask.max() < len(generator.CLASS_NAMES) == 8
        assert image.std() > 4, "a scene without contrast teaches nothing"


def test_thin_things_are_there_and_thin() -> None:
    """Poles and signs are what bad quantization loses first: they must be in most scenes, and narrow."""
    masks = [read(file) for file in sorted((DEMO / "val" / "masks").glob("*.png"))]
    for index in (5, 6, 7):  # person, pole, sign
        assert sum(bool((mask == index).any()) for mask in masks) > len(masks) * 0.7
    widths: list[int] = []
    for mask in masks:
        edges = np.diff(np.pad((mask == 6).astype(np.int8), ((0, 0), (1, 1))), axis=1)
        starts, ends = np.nonzero(edges == 1)[1], np.nonzero(edges == -1)[1]
        widths += (ends - starts).tolist()
    assert np.median(widths) <= 4


def test_seeds_are_disjoint(generator: ModuleType) -> None:
    training, calibration, validation = (
        set(seeds) for seeds in (generator.TRAINING_SEEDS, generator.CALIBRATION_SEEDS, generator.VALIDATION_SEEDS)
    )
    assert not training & calibration
    assert not training & validation
    assert not calibration & validation


def test_committed_files_are_complete_and_small(generator: ModuleType) -> None:
    calibration = sorted(file.name for file in (DEMO / "calib" / "images").iterdir())
    images = sorted(file.stem for file in (DEMO / "val" / "images").iterdir())
    masks = sorted(file.stem for file in (DEMO / "val" / "masks").iterdir())
    assert len(calibration) == len(generator.CALIBRATION_SEEDS) == 64
    assert images == masks
    assert len(images) == len(generator.VALIDATION_SEEDS) == 48
    assert (DEMO / "classes.txt").read_text().split() == list(generator.CLASS_NAMES)
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) < 4_000_000


def test_committed_masks_match_the_generator(generator: ModuleType) -> None:
    for index, seed in enumerate(generator.VALIDATION_SEEDS):
        committed = read(DEMO / "val" / "masks" / f"{index:03d}.png")
        assert np.array_equal(committed, generator.render_scene(seed)[1]), f"mask {index:03d}"


@pytest.mark.parametrize(("split", "seeds"), [("calib", "CALIBRATION_SEEDS"), ("val", "VALIDATION_SEEDS")])
def test_committed_images_match_the_generator(generator: ModuleType, split: str, seeds: str) -> None:
    for index in (0, 17, 40):
        committed = read(DEMO / split / "images" / f"{index:03d}.jpg").astype(int)
        rendered, _ = generator.render_scene(getattr(generator, seeds)[index])
        # Through the same JPEG, so that only another Pillow or numpy makes a difference, and a small one.
        with Image.open(io.BytesIO(generator.encode_image(rendered))) as picture:
            again = np.array(picture).astype(int)
        assert np.abs(committed - again).mean() < 2, f"{split} image {index:03d}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_small_and_described(generator: ModuleType, arch: str) -> None:
    file = WEIGHTS / f"{arch}.safetensors"
    assert file.stat().st_size < 3_000_000
    config = json.loads((WEIGHTS / f"{arch}.json").read_text())
    assert config["arch"] == arch
    assert config["encoder"]
    assert config["classes"] == len(config["class_names"]) == 8
    assert config["class_names"] == list(generator.CLASS_NAMES)
    assert config["task"] == "multiclass"
    assert isinstance(config["model_args"], dict)
    assert config["preprocess"].keys() == {"mean", "std", "channel_order"}
    assert len(config["preprocess"]["mean"]) == len(config["preprocess"]["std"]) == 3
    assert config["preprocess"]["channel_order"] == "rgb"
    assert config["size"] == [256, 256]
    assert config["trained_with"].keys() == {"torch", "segmentation_models_pytorch", "seconds", "steps", "seed"}
    validation = config["validation"]
    assert validation["per_class_iou"].keys() == set(generator.CLASS_NAMES)
    assert validation["miou"] == pytest.approx(np.mean(list(validation["per_class_iou"].values())), abs=1e-3)
    assert 0.6 < validation["miou"] < validation["pixel_accuracy"] <= 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_finite_halves(arch: str) -> None:
    """Read by hand: the format is a length, a JSON header and the tensors, and this needs no torch."""
    raw = (WEIGHTS / f"{arch}.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    assert kinds == {"F16", "I64"}  # I64: the batch counters of batch norm
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F16":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(raw[start + begin : start + end], "<f2")
            assert np.isfinite(values).all(), name
            if name.endswith("running_var"):
                assert (values >= 0).all(), name


def test_results_table_says_what_the_configs_say() -> None:
    table = (DEMO / "RESULTS.md").read_text()
    for arch in ARCHITECTURES:
        config = json.loads((WEIGHTS / f"{arch}.json").read_text())
        row = next(line for line in table.splitlines() if line.startswith(f"| {arch} |"))
        assert f"{config['validation']['miou']:.3f}" in row
