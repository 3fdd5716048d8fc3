"""The preprocessing saved beside a model becomes the engine's. Oracle: albumentations, applied to the same images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseg.convert.albumentations_file import saved_beside
from edgeseg.convert.saved_preprocessing import CONFIG_NAME, SavedPreprocessing
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.images.placement import fit
from edgeseg.spec import InputSpec, ModelRequest, Padding, Preprocess

# It asks a server for its newest version otherwise.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
A = pytest.importorskip("albumentations")
cv2 = pytest.importorskip("cv2")
pytestmark = pytest.mark.integration

RNG = np.random.default_rng(11)
SHAPES = ((300, 200), (200, 300), (97, 333), (64, 64))


def saved(folder: Path, *transforms: Any) -> SavedPreprocessing:
    A.Compose(list(transforms)).save_pretrained(folder)
    result = saved_beside(folder / "model.safetensors")
    assert result is not None
    return result


def written(folder: Path, *transforms: dict[str, Any]) -> SavedPreprocessing:
    """As versions of albumentations that are not installed here wrote it."""
    content = {"__version__": "1.4", "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": transforms}}
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    result = saved_beside(folder / "model.safetensors")
    assert result is not None
    return result


def assert_equal_to_albumentations(
    folder: Path, transforms: list[Any], shapes: tuple[tuple[int, int], ...], levels: float, *, seen: bool = False
) -> None:
    """The network's input equals albumentations' within so many grey levels, on images of these shapes.

    ``seen``: the shapes are those of the images given to the build.
    """
    preprocessing = saved(folder, *transforms)
    preprocessing.require_fit(())
    fitting = preprocessing.fitting(None, None, shapes if seen else (), 3)
    preprocess = preprocessing.for_channels(3) or Preprocess((0.0,) * 3, (1.0,) * 3, 1.0)
    size = fitting.size or shapes[0]
    spec = InputSpec(
        *size, stride=1, fit=fitting.fit or "resize", interpolation=fitting.interpolation, padding=fitting.padding
    )
    for shape in shapes:
        image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
        placed, _ = fit(image, spec)
        ours = (placed.astype(np.float32) * preprocess.scale - np.float32(preprocess.mean)) / np.float32(preprocess.std)
        theirs = A.Compose(transforms)(image=image)["image"]
        assert ours.shape == theirs.shape
        level = preprocess.scale / np.float32(preprocess.std)
        assert (np.abs(ours - theirs) / level).max() <= levels + 1e-3


# Each family of SMP's conversion scripts, with the transform its script saves.
ADE = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "max_pixel_value": 1.0}


def segformer() -> list[Any]:
    return [A.Resize(512, 512, p=1), A.Normalize(**ADE, p=1)]


def upernet() -> list[Any]:
    return [A.Resize(512, 512), A.Normalize(**ADE)]


def dpt() -> list[Any]:
    return [
        A.LongestMaxSize(max_size=480, interpolation=cv2.INTER_CUBIC),
        A.Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), max_pixel_value=255.0),
        A.PadIfNeeded(None, None, 32, 32, border_mode=cv2.BORDER_CONSTANT, fill=0, p=1),
    ]


@pytest.mark.parametrize("family", [segformer, upernet])
def test_the_input_is_what_albumentations_makes(family: Callable[[], list[Any]], tmp_path: Path) -> None:
    # At the size itself nothing but float arithmetic differs; OpenCV's fixed-point bilinear is one grey level off at most.
    assert_equal_to_albumentations(tmp_path, family(), ((512, 512),), 0)
    assert_equal_to_albumentations(tmp_path, family(), SHAPES, 1)


@pytest.mark.parametrize("shapes", [((480, 480),), ((360, 480),), ((720, 960), (300, 400)), ((512, 683),)])
def test_dpt_gets_the_size_of_images_of_one_shape(shapes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    assert_equal_to_albumentations(tmp_path, dpt(), shapes, 1, seen=True)


def test_dpt_without_images_is_square_and_says_so(tmp_path: Path) -> None:
    assert_equal_to_albumentations(tmp_path, dpt(), ((480, 480),), 0)
    fitting = saved(tmp_path, *dpt()).fitting(None, None, (), 3)
    assert (fitting.size, fitting.fit, fitting.interpolation) == ((480, 480), "letterbox", "cubic")
    # After Normalize 0 is the mean's colour, between two levels.
    assert fitting.padding == Padding("center", "constant", (128,))
    assert any("127.5 of 255, is 128 here" in note for note in fitting.notes)
    assert any("a size of its own" in note and "480x480" in note for note in fitting.notes)


@pytest.mark.parametrize("interpolation", range(5), ids=["nearest", "linear", "cubic", "area", "lanczos"])
def test_every_filter_is_opencvs(interpolation: int, tmp_path: Path) -> None:
    shapes = ((100, 150), (30, 40), (64, 90), (48, 48), (200, 37))
    levels = 0 if interpolation == 0 else 1
    assert_equal_to_albumentations(tmp_path, [A.Resize(48, 64, interpolation=interpolation)], shapes, levels)


@pytest.mark.parametrize(
    ("border", "fill", "position"),
    [
        (0, 0, "center"),
        (0, [7, 80, 255], "top_left"),
        (1, 0, "center"),
        (2, 0, "center"),
        (4, 0, "top_left"),
        (3, 0, "center"),
    ],
)
def test_padding_is_opencvs(border: int, fill: Any, position: str, tmp_path: Path) -> None:
    pad = A.PadIfNeeded(90, 121, border_mode=border, fill=fill, position=position)
    assert_equal_to_albumentations(tmp_path, [pad, A.Normalize()], ((60, 81), (90, 100), (61, 120)), 0)
    letterbox = [A.LongestMaxSize(96), A.PadIfNeeded(96, 96, border_mode=border, fill=fill, position=position)]
    assert_equal_to_albumentations(tmp_path, letterbox, SHAPES, 1)


@pytest.mark.filterwarnings("ignore:The image is already an RGB")
@pytest.mark.parametrize(
    "transforms",
    [
        lambda: [A.ToFloat(), A.Normalize(max_pixel_value=1.0)],
        lambda: [A.ToFloat(max_value=100.0)],
        lambda: [A.Normalize(mean=0.5, std=0.25, max_pixel_value=127.0)],
        lambda: [A.Compose([A.ToRGB(), A.Compose([A.NoOp(), A.Normalize()])])],
    ],
)
def test_pixel_values(transforms: Callable[[], list[Any]], tmp_path: Path) -> None:
    assert_equal_to_albumentations(tmp_path, transforms(), ((40, 40),), 0)


def test_a_smallest_side_needs_images_or_a_size(tmp_path: Path) -> None:
    transforms = [A.SmallestMaxSize(256), A.Normalize()]
    assert_equal_to_albumentations(tmp_path, transforms, ((360, 540), (90, 135)), 1, seen=True)
    preprocessing = saved(tmp_path, *transforms)
    for images in ((), ((360, 540), (540, 360))):
        with pytest.raises(SpecError, match=r"SmallestMaxSize\(256\) gives images of each shape.*--size HxW"):
            preprocessing.fitting(None, None, images, 3)
    assert preprocessing.fitting((256, 384), None, (), 3).fit == "resize"


def test_a_crop_is_a_window(tmp_path: Path) -> None:
    crop = [A.CenterCrop(48, 64, pad_if_needed=True, fill=9), A.Normalize()]
    assert_equal_to_albumentations(tmp_path, crop, ((48, 64), (30, 64), (20, 21)), 0)
    fitting = saved(tmp_path, *crop).fitting(None, None, (), 3)
    assert (fitting.size, fitting.fit) == ((48, 64), "tile")
    # Where nothing is cut off, a crop changes nothing.
    whole = [A.LongestMaxSize(64), A.PadIfNeeded(64, 64), A.CenterCrop(64, 64), A.Resize(64, 64)][:3]
    assert_equal_to_albumentations(tmp_path, whole, SHAPES, 1)


@pytest.mark.parametrize(
    ("transforms", "named", "instead"),
    [
        (lambda: [A.CLAHE(p=1)], "CLAHE", ("mean", "std", "size", "fit")),
        (lambda: [A.OneOf([A.Resize(64, 64)])], "OneOf", ("mean", "std", "size", "fit")),
        (lambda: [A.Normalize(p=0.5)], "Normalize is applied to some images only", ("mean", "std", "size", "fit")),
        (lambda: [A.Normalize(normalization="image")], "takes mean and std from each image", ("mean", "std")),
        (lambda: [A.Normalize(normalization="min_max_per_channel")], "min_max_per_channel", ("mean", "std")),
        (lambda: [A.Normalize(), A.Normalize()], "Normalize is there twice", ("mean", "std")),
        (lambda: [A.SmallestMaxSize(64), A.CenterCrop(64, 64)], "what it cuts off", ("size", "fit")),
        (lambda: [A.Resize(60, 60), A.PadIfNeeded(64, 64)], "a frame around every image", ("size", "fit")),
        (lambda: [A.LongestMaxSize(60), A.PadIfNeeded(64, 64)], "a frame around every image", ("size", "fit")),
        (lambda: [A.PadIfNeeded(64, 64), A.Resize(64, 64)], "Resize after another", ("size", "fit")),
        (lambda: [A.PadIfNeeded(64, 64, position="random")], "position random", ("size", "fit")),
        (lambda: [A.Resize(64, 64, area_for_downscale="image")], "area_for_downscale", ("size", "fit")),
        (lambda: [A.LongestMaxSize(max_size=[64, 96])], "chooses among 2 sizes", ("size", "fit")),
        (lambda: [A.Normalize(), A.PadIfNeeded(64, 64, fill=9)], "a colour that no image has", ("size", "fit")),
    ],
)
def test_what_no_engine_can_hold_is_refused_by_name(
    transforms: Callable[[], list[Any]], named: str, instead: tuple[str, ...], tmp_path: Path
) -> None:
    preprocessing = saved(tmp_path, *transforms())
    with pytest.raises(SpecError) as refusal:
        preprocessing.require_fit(())
    assert named in str(refusal.value)
    *first, last = (f"--{name}" for name in instead)
    assert f"give {', '.join(first)} and {last} to build without it" in str(refusal.value)
    with pytest.raises(SpecError):
        preprocessing.require_fit(instead[1:])
    preprocessing.require_fit(instead)


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    preprocessing = written(
        tmp_path,
        {
            "__class_fullname__": "albumentations.augmentations.geometric.resize.LongestMaxSize",
            "always_apply": True,
            "p": 0.5,
            "max_size": 64,
            "interpolation": 1,
        },
        {
            "__class_fullname__": "PadIfNeeded",
            "p": 1.0,
            "min_height": 64,
            "min_width": 64,
            "pad_height_divisor": None,
            "pad_width_divisor": None,
            "position": "PositionType.TOP_LEFT",
            "border_mode": 4,
            "value": None,
        },
        {
            "__class_fullname__": "albumentations.augmentations.transforms.Normalize",
            "p": 1,
            "mean": [0.5],
            "std": [0.2],
        },
        {"__class_fullname__": "albumentations.pytorch.transforms.ToTensorV2", "p": 1, "transpose_mask": False},
    )
    preprocessing.require_fit(())
    fitting = preprocessing.fitting(None, None, (), 3)
    assert (fitting.size, fitting.fit) == ((64, 64), "letterbox")
    assert fitting.padding == Padding("top_left", "reflect_101")
    assert preprocessing.for_channels(3) == Preprocess((0.5,) * 3, (0.2,) * 3, 1 / 255, "rgb", CONFIG_NAME)


def test_nothing_a_file_names_is_imported(tmp_path: Path) -> None:
    (tmp_path / "hostile_transforms.py").write_text("raise SystemExit('imported')")
    preprocessing = written(tmp_path, {"__class_fullname__": "hostile_transforms.Normalize", "p": 1.0})
    with pytest.raises(SpecError, match=r"hostile_transforms\.Normalize cannot be part of an engine"):
        preprocessing.require_fit(())


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"transform": []}',
        '{"transform": {"transforms": []}}',
        '{"transform": {"__class_fullname__": "Compose", "transforms": [7]}}',
        "[" * 100_000,
        '{"transform": ' + '{"__class_fullname__": "Compose", "transforms": [' * 200 + "]}" * 200 + "}",
        '{"transform": {"__class_fullname__": "Resize", "height": "64", "width": 64}}',
        '{"transform": {"__class_fullname__": "Resize", "height": 1e12, "width": 64}}',
        '{"transform": {"__class_fullname__": "Resize", "width": 64}}',
        '{"transform": {"__class_fullname__": "Normalize", "mean": [0.5], "std": [0]}}',
        '{"transform": {"__class_fullname__": "Normalize", "mean": [0.5, NaN], "std": [1, 1]}}',
        '{"transform": {"__class_fullname__": "Normalize", "mean": 0.5, "std": 1, "max_pixel_value": 0}}',
        '{"transform": {"__class_fullname__": "Normalize", "mean": "0.5", "std": 1}}',
        '{"transform": {"__class_fullname__": "LongestMaxSize", "max_size": null}}',
    ],
)
def test_damaged_files_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(CheckpointError) as refusal:
        saved_beside(tmp_path / "model.safetensors")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segformer as SMP's script saves it, small."""
    torch = pytest.importorskip("torch")
    from edgeseg.convert.architectures import import_smp

    path = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(5)
    import_smp().Segformer(
        "mit_b0", encoder_weights=None, classes=4, decoder_segmentation_channels=32
    ).eval().save_pretrained(path)
    A.Compose([A.Resize(64, 96), A.Normalize(**ADE)]).save_pretrained(path)
    return path


def test_the_model_computes_what_it_does_after_albumentations(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgeseg.convert.architectures import import_smp
    from edgeseg.convert.evidence import normalized
    from edgeseg.convert.load import load_model

    loaded = load_model(ModelRequest(weights=str(folder)))
    assert loaded.preprocess.source == CONFIG_NAME
    assert any(CONFIG_NAME in note and "Resize(64, 96)" in note for note in loaded.notes)
    model = import_smp().from_pretrained(folder).eval()
    image = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tensor = A.Compose([A.Resize(64, 96), A.Normalize(**ADE)])(image=image)["image"]
    with torch.no_grad():
        expected = model(torch.from_numpy(tensor).permute(2, 0, 1)[None])
        actual = loaded.module(normalized(image[None], loaded.preprocess))
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


def test_the_users_words_win_and_say_over_what(folder: Path) -> None:
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.pipeline.stages import load_stage, pipeline_spec
    from edgeseg.progress import reporter_of

    request = BuildRequest(
        weights=str(folder), precision="fp32", size=(32, 64), fit="letterbox", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    loaded = load_stage(request, None, reporter_of(None))
    spec = pipeline_spec(request, loaded, reporter_of(None))
    assert (spec.input.height, spec.input.width, spec.input.fit) == (32, 64, "letterbox")
    assert spec.preprocess.mean == (0.5,) * 3
    notes = "\n".join(loaded.notes)
    assert "--size 32x64 overrides the saved Resize(64, 96)" in notes
    assert "--fit letterbox overrides the saved Resize(64, 96)" in notes
    assert "--mean and --std override the saved normalization" in notes


def test_it_counts_beside_any_weights_file(folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgeseg.convert.architectures import import_smp
    from edgeseg.convert.load import load_model

    torch.save(import_smp().from_pretrained(folder).state_dict(), tmp_path / "best.pt")
    (tmp_path / CONFIG_NAME).write_bytes((folder / CONFIG_NAME).read_bytes())
    loaded = load_model(ModelRequest(arch="segformer", encoder="mit_b0", weights=str(tmp_path / "best.pt")))
    assert loaded.preprocess.mean == pytest.approx(ADE["mean"])
    assert loaded.preprocess.scale == 1.0
