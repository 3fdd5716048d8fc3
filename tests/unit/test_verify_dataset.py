"""Finding pairs of images and masks, and what mask files may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.dataset import ValidationSet, file_digest
from edgeseg.evaluate.accuracy.labels import IGNORED, LabelCoding, LabelReader
from edgeseg.images.decoding import pixel_digest, read_image
from edgeseg.pipeline.request import BuildRequest
from edgeseg.pipeline.verification_data import calibration_and_held_out
from edgeseg.spec import ModelSpec

MODEL = ModelSpec("fpn", "resnet18", classes=11)
BINARY = ModelSpec("fpn", "resnet18", classes=1, task="binary")
MULTILABEL = ModelSpec("fpn", "resnet18", classes=3, task="multilabel")


def write_image(path: Path, size: tuple[int, int] = (6, 8), value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, values: Any, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype)).save(path)


def mask_of(*values: int) -> NDArray[np.uint8]:
    """A 6x8 mask that holds these values and class 0."""
    mask = np.zeros((6, 8), np.uint8)
    mask.ravel()[: len(values)] = values
    return mask


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name, values in (("img10", (3,)), ("img2", (10, 11)), ("img1", (0, 1))):
        write_image(tmp_path / "images" / f"{name}.jpg", value=len(name))
        write_mask(tmp_path / "masks" / f"{name}.png", mask_of(*values))
    return tmp_path


def test_pairs_come_in_natural_order_with_their_masks(pairs: Path) -> None:
    data = ValidationSet.open(pairs, MODEL)
    listed = list(data)
    assert [p.name for p in listed] == ["img1.jpg", "img2.jpg", "img10.jpg"]
    assert len(data) == 3
    assert data.has_masks
    assert listed[0].image.shape == (6, 8, 3)
    assert listed[0].digest == file_digest(pairs / "images" / "img1.jpg")
    second = listed[1].mask
    assert second is not None
    assert second.dtype == np.int32
    assert second.ravel()[:3].tolist() == [10, IGNORED, 0]
    assert [p.ignore_index for p in listed] == [11, 11, 11]


@pytest.mark.parametrize("folder", ["masks", "labels", "annotations"])
@pytest.mark.parametrize("suffix", ["", "_mask", "_gt"])
def test_mask_folders_and_suffixes_people_use(tmp_path: Path, folder: str, suffix: str) -> None:
    write_image(tmp_path / "images" / "a.png")
    write_mask(tmp_path / folder / f"a{suffix}.png", mask_of(5))
    (pair,) = ValidationSet.open(tmp_path, MODEL)
    assert pair.mask is not None
    assert pair.mask[0, 0] == 5


def test_masks_named_after_the_whole_name_of_their_image(tmp_path: Path) -> None:
    for name, value in (("a.jpg", 5), ("a.png", 6)):
        write_image(tmp_path / "images" / name)
        write_mask(tmp_path / "masks" / f"{name}.png", mask_of(value))
    pairs = list(ValidationSet.open(tmp_path, MODEL))
    assert [(p.name, int(p.mask[0, 0])) for p in pairs if p.mask is not None] == [("a.jpg", 5), ("a.png", 6)]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a_mask.png"),
        ("a.jpg", "a.png"),
        ("a.jpg", "a_label.png"),
        ("a.tif", "a_mask.tif"),
        ("a.jpg", "a_mask.gif"),
        ("a.png", "a_gt.bmp"),
    ],
)
def test_one_folder_with_photos_and_masks(tmp_path: Path, image: str, mask: str) -> None:
    write_image(tmp_path / image)
    write_image(tmp_path / image.replace("a", "b", 1))
    write_mask(tmp_path / mask, mask_of(5))
    write_mask(tmp_path / mask.replace("a", "b", 1), mask_of(6))
    pairs = list(ValidationSet.open(tmp_path, MODEL))
    assert [p.name for p in pairs] == [image, image.replace("a", "b", 1)]
    assert [int(p.mask[0, 0]) for p in pairs if p.mask is not None] == [5, 6]


@pytest.mark.parametrize("folder", [".", "images"])
def test_images_alone_have_no_masks(tmp_path: Path, folder: str) -> None:
    write_image(tmp_path / folder / "a.png")
    data = ValidationSet.open(tmp_path, MODEL)
    assert not data.has_masks
    assert [p.mask for p in data] == [None]


def test_an_image_without_its_mask_is_left_out_and_named(pairs: Path) -> None:
    write_image(pairs / "images" / "extra.jpg")
    data = ValidationSet.open(pairs, MODEL)
    assert len(data) == 3
    assert data.unpaired == ("extra.jpg",)


def test_a_build_says_which_images_it_leaves_out(pairs: Path) -> None:
    write_image(pairs / "images" / "extra.jpg")
    request = BuildRequest("fpn", precision="fp32", validation=pairs)
    loaded: Any = SimpleNamespace(model=MODEL, is_demo=False, trained=None)
    _, data = calibration_and_held_out(request, loaded)
    assert data is not None
    said = "leaving out 1 image without a mask (masks hold 0, 1, 3, 10, 11, 11 read as unlabelled"
    assert (len(data.pairs), data.description) == (3, f"{pairs}, {said} (if 0 is that, their classes count from 1))")


def test_a_limit_spreads_over_the_set(tmp_path: Path) -> None:
    for k in range(10):
        write_image(tmp_path / f"{k}.png")
    assert [p.name for p in ValidationSet.open(tmp_path, MODEL).limited(3).images] == ["0.png", "3.png", "6.png"]
    assert len(ValidationSet.open(tmp_path, MODEL).limited(99)) == 10


def test_images_used_for_calibration_are_left_out_by_content(pairs: Path) -> None:
    write_image(pairs / "images" / "img3.jpg", value=77)
    write_mask(pairs / "masks" / "img3.png", mask_of(2))
    data = ValidationSet.open(pairs, MODEL)
    Image.open(pairs / "images" / "img3.jpg").save(pairs / "calibrated.bmp")
    calibrated = {pixel_digest(read_image(pairs / "calibrated.bmp"))}
    assert [p.name for p in data.without(calibrated).images] == ["img1.jpg", "img2.jpg", "img10.jpg"]
    assert len(list(data.without(calibrated))) == 3
    write_image(pairs / "images" / "img4.jpg", value=77)
    write_mask(pairs / "masks" / "img4.png", mask_of(2))
    # A copy is not judged twice.
    (held_out,) = ValidationSet.open(pairs, MODEL).only({file_digest(pairs / "images" / "img3.jpg")})
    assert held_out.name == "img3.jpg"
    assert held_out.mask is not None
    assert held_out.mask[0, 0] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "is not a folder"),
        (lambda p: p.mkdir(), "no images in"),
        (lambda p: (p / "images").mkdir(parents=True), "no images in"),
        (
            lambda p: (write_image(p / "images" / "a.png"), write_mask(p / "masks" / "b.png", mask_of(1))),
            "no file in .*masks belongs to an image",
        ),
    ],
)
def test_a_folder_that_holds_nothing_usable_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        ValidationSet.open(tmp_path / "data", MODEL)


def test_a_mask_of_another_size_is_refused_with_both_sizes(pairs: Path) -> None:
    write_mask(pairs / "masks" / "img2.png", np.zeros((8, 6)))
    with pytest.raises(
        InputError, match=r"img2.png is 6x8 and its image img2.jpg 8x6 pixels; .* \(an image is turned as"
    ):
        list(ValidationSet.open(pairs, MODEL))


def read(tmp_path: Path, *masks: NDArray[Any], model: ModelSpec = MODEL, ignore_index: int | None = None) -> list[Any]:
    paths = [tmp_path / f"{index}.png" for index in range(len(masks))]
    for path, values in zip(paths, masks, strict=True):
        write_mask(path, values, values.dtype.type)
    reader = LabelReader.of(paths, model, ignore_index)
    return [reader.read(path).ravel()[:4].tolist() for path in paths]


@pytest.mark.parametrize("value", [11, 255])
def test_one_unlabelled_value_is_recognized(tmp_path: Path, value: int) -> None:
    """The number of classes (CamVid's way) or 255 (everyone else's)."""
    assert read(tmp_path, mask_of(1, value, 10), mask_of(value)) == [[1, IGNORED, 10, 0], [IGNORED, 0, 0, 0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((12,), r"0.png holds 12; this model's masks hold 0..10: correct"),
        ((200, 201), r"0.png holds 200, 201;"),
        ((11, 255), r"0.png holds 11, 255;"),
        (tuple(range(11, 25)), r"0.png holds 11, 12, 13, 14, 15, 16, 17, 18, ...;"),
    ],
)
def test_other_values_are_an_error_that_names_file_and_values(
    tmp_path: Path, values: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, mask_of(*values))


def test_the_unlabelled_value_is_one_for_the_whole_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0.png holds 11 and \S*1.png holds 255; .* 0..10: correct"):
        read(tmp_path, mask_of(11), mask_of(255))


def test_a_given_ignore_index_is_the_only_one(tmp_path: Path) -> None:
    assert read(tmp_path, mask_of(200, 3), ignore_index=200) == [[IGNORED, 3, 0, 0]]
    with pytest.raises(InputError, match="holds 11"):
        read(tmp_path, mask_of(11), ignore_index=200)


def test_a_class_can_be_ignored_on_request(tmp_path: Path) -> None:
    assert read(tmp_path, mask_of(4, 0, 5, 0), ignore_index=0) == [[4, IGNORED, 5, IGNORED]]


def test_binary_masks_may_be_black_and_white(tmp_path: Path) -> None:
    assert read(tmp_path, mask_of(255, 0, 255), mask_of(), model=BINARY) == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert read(tmp_path, mask_of(1, 0, 1), model=BINARY) == [[1, 0, 1, 0]]


def test_binary_masks_that_use_both_1_and_255_are_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both 1 and 255"):
        read(tmp_path, mask_of(1, 255), model=BINARY)
    with pytest.raises(InputError, match="both 1 and 255"):
        read(tmp_path, mask_of(255), mask_of(1), model=BINARY)
    assert read(tmp_path, mask_of(1, 255), model=BINARY, ignore_index=255) == [[1, IGNORED, 0, 0]]


def test_two_classes_may_be_black_and_white(tmp_path: Path) -> None:
    two = ModelSpec("fpn", "resnet18", classes=2)
    assert read(tmp_path, mask_of(255, 0, 255), mask_of(), model=two) == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert read(tmp_path, mask_of(1, 255), model=two) == [[1, IGNORED, 0, 0]]
    assert read(tmp_path, mask_of(255), model=two, ignore_index=255) == [[IGNORED, 0, 0, 0]]


@pytest.mark.parametrize(("model", "value"), [(MODEL, 255), (MODEL, 11), (BINARY, 2), (MULTILABEL, 65535)])
def test_a_value_beside_a_single_class_is_not_taken_for_unlabelled(
    tmp_path: Path, model: ModelSpec, value: int
) -> None:
    """All of another class would count for nothing, and the one class left be judged by itself."""
    values = mask_of(1).astype(np.uint16) * value
    paths = [tmp_path / "a.npy"]
    np.save(paths[0], np.stack([values] * 3) if model is MULTILABEL else values)
    with pytest.raises(
        InputError, match=rf"hold 0, {value}, so {value} may be .*--ignore-index {value} .*{value}=CLASS"
    ):
        LabelReader.of(paths, model)
    assert LabelReader.of(paths, model, value).read(paths[0]).min() == IGNORED
    assert LabelReader.of(paths, model, coding=LabelCoding({value: 1})).read(paths[0]).max() == 1


def test_an_ignored_value_of_the_files_is_not_the_class_of_that_number(tmp_path: Path) -> None:
    """0 is unlabelled and classes count from 1: said with one option or with two, the same."""
    write_mask(tmp_path / "a.png", mask_of(1, 2, 3))
    shift: dict[int, int] = {value: value - 1 for value in range(1, 12)}
    expected = [0, 1, 2, IGNORED]
    for ignore_index, values in (
        (0, shift),
        (None, shift | {0: IGNORED}),
        (255, shift | {0: 255}),
        (None, shift | {0: 255}),
    ):
        reader = LabelReader.of([tmp_path / "a.png"], MODEL, ignore_index, LabelCoding(values))
        assert reader.read(tmp_path / "a.png")[0, :4].tolist() == expected
    assert (
        LabelReader.of([tmp_path / "a.png"], MODEL, 0, LabelCoding(shift)).meaning
        == "masks hold 0..3, 0 read as unlabelled"
    )


def test_no_mask_is_read_before_the_meaning_of_all_is_decided(tmp_path: Path) -> None:
    """Whoever starts in the middle (another process, a resumed run) reads as whoever starts at the front."""
    for name, values in (("a", (1, 0)), ("b", (255, 0)), ("c", (1, 0))):
        write_image(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "masks" / f"{name}.png", mask_of(*values))
    for position in range(3):
        with pytest.raises(InputError, match=r"a.png holds 1 and \S*b.png 255, so these masks use both 1 and 255"):
            ValidationSet.open(tmp_path, BINARY).read(position)
    explicit = ValidationSet.open(tmp_path, BINARY, ignore_index=255)
    assert [explicit.read(k).mask[0, 0] for k in range(3)] == [1, IGNORED, 1]  # type: ignore[index]
    # Decided once, and carried along: a copy in another process opens no mask but its own.
    white = ValidationSet.open(tmp_path, BINARY).limited(3)
    write_mask(tmp_path / "masks" / "a.png", mask_of(0))
    write_mask(tmp_path / "masks" / "c.png", mask_of(255))
    assert white.labels.meaning == "masks hold 0, 255, 255 read as 1"
    copied = pickle.loads(pickle.dumps(white))
    (tmp_path / "masks" / "a.png").unlink()
    assert [copied.read(k).mask[0, 0] for k in (1, 2)] == [1, 1]


def test_a_part_of_a_set_is_read_as_the_whole(tmp_path: Path) -> None:
    """255 is unlabelled beside 0 and 1; a part without class 1 would take it for that class."""
    for name, values in (("a", (1, 255)), ("b", (255, 0))):
        write_image(tmp_path / "images" / f"{name}.png", value=ord(name))
        write_mask(tmp_path / "masks" / f"{name}.png", mask_of(*values))
    two = ModelSpec("fpn", "resnet18", classes=2)
    whole = ValidationSet.open(tmp_path, two)
    assert whole.labels.meaning == "masks hold 0, 1, 255, 255 read as unlabelled"
    (rest,) = whole.without({pixel_digest(whole.image(0))})
    assert rest.mask is not None
    assert rest.mask[0, :2].tolist() == [IGNORED, 0]


def test_masks_that_count_from_one_are_refused(tmp_path: Path) -> None:
    ones = [np.full((6, 8), value, np.uint8) for value in (1, 5, 11)]
    with pytest.raises(
        InputError, match=r"hold 1, 5, 11 and never 0, .* from 1: .*1=0,2=1,\.\.\.\), or .*--ignore-index 11"
    ):
        read(tmp_path, *ones)
    assert read(tmp_path, *ones, ignore_index=11) == [[1] * 4, [5] * 4, [IGNORED] * 4]
    from_zero = LabelReader.of(
        [tmp_path / f"{k}.png" for k in range(3)],
        MODEL,
        coding=LabelCoding({value: value - 1 for value in range(1, 12)}),
    )
    assert from_zero.read(tmp_path / "2.png")[0, 0] == 10
    assert from_zero.meaning == ""


def test_what_the_values_were_read_as_is_said(tmp_path: Path) -> None:
    write_mask(tmp_path / "a.png", mask_of(*range(12)))
    doubt = " (if 0 is that, their classes count from 1)"
    assert LabelReader.of([tmp_path / "a.png"], MODEL).meaning == f"masks hold 0..11, 11 read as unlabelled{doubt}"
    write_mask(tmp_path / "b.png", mask_of(1, 255))
    assert LabelReader.of([tmp_path / "b.png"], MODEL).meaning == "masks hold 0, 1, 255, 255 read as unlabelled"
    np.save(tmp_path / "minus.npy", np.array([[-1, 0, 1]]))
    with pytest.raises(InputError, match="holds -1"):
        LabelReader.of([tmp_path / "minus.npy"], MODEL)
    assert LabelReader.of([tmp_path / "minus.npy"], MODEL, -1).read(tmp_path / "minus.npy").tolist() == [
        [IGNORED, 0, 1]
    ]


def test_16_bit_1_bit_and_palette_masks_are_read_as_indices(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(tmp_path / "wide.png")
    wide = LabelReader.of([tmp_path / "wide.png"], ModelSpec("fpn", classes=301)).read(tmp_path / "wide.png")
    assert wide.tolist() == [[0, 300, IGNORED]]

    Image.fromarray(np.array([[0, 1, 1]], np.uint8) > 0).save(tmp_path / "bits.png")
    assert LabelReader(BINARY).read(tmp_path / "bits.png").tolist() == [[0, 1, 1]]

    palette = Image.fromarray(np.array([[0, 2, 1]], np.uint8), mode=None).convert("P")
    palette.putdata([0, 2, 1])
    palette.putpalette([128, 0, 0, 0, 128, 0, 0, 0, 128])
    palette.save(tmp_path / "palette.png")
    assert LabelReader(MODEL).read(tmp_path / "palette.png").tolist() == [[0, 2, 1]]


def test_grey_in_equal_channels_is_grey(tmp_path: Path) -> None:
    grey = mask_of(5, 10, 3)
    opacity = np.arange(48, dtype=np.uint8).reshape(6, 8)
    for name, channels in (("rgb", [grey] * 3), ("rgba", [grey, grey, grey, opacity]), ("la", [grey, opacity])):
        Image.fromarray(np.dstack(channels)).save(tmp_path / f"{name}.png")
        assert LabelReader(MODEL).read(tmp_path / f"{name}.png").tolist() == grey.tolist()
    Image.fromarray(np.dstack([grey, grey, grey.T.reshape(6, 8)])).save(tmp_path / "colours.png")
    with pytest.raises(InputError, match=r"colour image \(mode RGB\)"):
        LabelReader(MODEL).read(tmp_path / "colours.png")


@pytest.mark.parametrize("name", ["floats.npy", "plane.npy", "last.npy", "archive.npz", "float32.tif"])
def test_masks_as_training_scripts_and_gis_write_them(tmp_path: Path, name: str) -> None:
    values, path = mask_of(5, 10, 3).astype(np.float32), tmp_path / name
    if path.suffix == ".tif":
        Image.fromarray(values).save(path)
    elif path.suffix == ".npz":
        np.savez(path, values)
    else:
        np.save(path, {"plane.npy": values[None], "last.npy": values[..., None]}.get(name, values))
    assert LabelReader(MODEL).read(path).tolist() == values.tolist()


def test_floats_between_classes_are_refused(tmp_path: Path) -> None:
    for name, value in (("half", 0.5), ("nan", np.nan), ("large", 1e20)):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(InputError, match="float32 that are no whole numbers"):
            LabelReader(MODEL).read(tmp_path / f"{name}.tif")


def test_jpeg_masks_are_found_and_their_values_are_not_trusted(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    disc = np.hypot(*np.mgrid[-8:8, -8:8]) < 6
    (tmp_path / "masks").mkdir()
    Image.fromarray(disc.astype(np.uint8) * 255).save(tmp_path / "masks" / "a.jpg", quality=60)
    with pytest.raises(InputError, match=r"a.jpg holds .*0..1: correct the masks \(JPEG does not keep values"):
        _ = ValidationSet.open(tmp_path, BINARY).labels
    write_mask(tmp_path / "masks" / "a.png", mask_of(1))
    (pair,) = ValidationSet.open(tmp_path, BINARY)
    assert pair.mask is not None
    assert pair.mask.sum() == 1


def test_multilabel_masks_are_planes_in_npy(tmp_path: Path) -> None:
    planes = np.zeros((3, 6, 8), np.uint8)
    planes[1, 0, 0], planes[:, 5, 7] = 255, 0
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks" / "a.npy", planes)
    (pair,) = ValidationSet.open(tmp_path, MULTILABEL)
    assert pair.mask is not None
    assert pair.mask.shape == (3, 6, 8)
    assert pair.mask[:, 0, 0].tolist() == [0, 1, 0]
    np.save(tmp_path / "masks" / "a.npy", planes[:2])
    with pytest.raises(InputError, match=r"shape \(2, 6, 8\); a multilabel mask"):
        list(ValidationSet.open(tmp_path, MULTILABEL))
