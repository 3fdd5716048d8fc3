"""Data sets in the layouts people have, in miniature."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from edgeseg.errors import InputError, SpecError
from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.accuracy.layouts import LABEL_MAP, open_layout
from edgeseg.evaluate.results import Layout
from edgeseg.spec import ModelSpec

ELEVEN = ModelSpec("fpn", "resnet18", classes=11)
NINETEEN = ModelSpec("fpn", "resnet18", classes=19)
MANY = ModelSpec("fpn", "resnet18", classes=182)
VOC = ModelSpec("fpn", "resnet18", classes=21)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(path)


def mask(path: Path, *row: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([row, row], np.uint8)).save(path)


def rows(data: ValidationSet) -> list[Any]:
    return [(pair.name, None if pair.mask is None else pair.mask[0].tolist()) for pair in data]


def test_voc(tmp_path: Path) -> None:
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_000033\n2007_000042\n")
    for stem in ("2007_000033", "2007_000042", "2007_000061"):
        image(tmp_path / f"JPEGImages/{stem}.jpg")
        mask(tmp_path / f"SegmentationClass/{stem}.png", 0, 20, 255, 1)
    dataset = open_layout(tmp_path, "voc", VOC)
    assert rows(dataset) == [(f"{stem}.jpg", [0, 20, IGNORED, 1]) for stem in ("2007_000033", "2007_000042")]
    with pytest.raises(InputError, match=r"test.txt is not there; expected JPEGImages/"):
        open_layout(tmp_path, "voc", VOC, split="test")


def test_cityscapes_label_ids_become_training_classes(tmp_path: Path) -> None:
    name = "frankfurt_000000_000294"
    image(tmp_path / f"leftImg8bit/val/frankfurt/{name}_leftImg8bit.png")
    mask(tmp_path / f"gtFine/val/frankfurt/{name}_gtFine_labelIds.png", 7, 33, 3, 11)
    # road is 0, bicycle 18, building 2; id 3 (out of roi) is not judged
    assert rows(open_layout(tmp_path, "cityscapes", NINETEEN))[0][1] == [0, 18, IGNORED, 2]
    mask(tmp_path / f"gtFine/val/frankfurt/{name}_gtFine_labelTrainIds.png", 0, 18, 255, 2)
    assert rows(open_layout(tmp_path, "cityscapes", NINETEEN))[0][1] == [0, 18, IGNORED, 2]


def test_camvid_of_segnet_and_in_colours(tmp_path: Path) -> None:
    image(tmp_path / "a/val/0016E5_07959.png")
    mask(tmp_path / "a/valannot/0016E5_07959.png", 0, 10, 11, 3)
    assert rows(open_layout(tmp_path / "a", "camvid", ELEVEN)) == [("0016E5_07959.png", [0, 10, IGNORED, 3])]
    image(tmp_path / "b/val/0016E5_07959.png")
    colours = np.array([[[64, 128, 64], [128, 0, 0], [0, 0, 0], [128, 0, 0]]] * 2, np.uint8)
    (tmp_path / "b/val_labels").mkdir()
    Image.fromarray(colours).save(tmp_path / "b/val_labels/0016E5_07959_L.png")
    (tmp_path / "b/class_dict.csv").write_text("name,r,g,b\nAnimal, 64, 128, 64\nBuilding, 128, 0, 0\nVoid, 0, 0, 0\n")
    dataset = open_layout(tmp_path / "b", "camvid", ELEVEN, label_map={2: IGNORED})
    assert rows(dataset)[0][1] == [0, 1, IGNORED, 1]
    colours[1, 3] = (1, 2, 3)
    Image.fromarray(colours).save(tmp_path / "b/val_labels/0016E5_07959_L.png")
    with pytest.raises(InputError, match=r"colour \(1, 2, 3\) at row 1, column 3"):
        rows(open_layout(tmp_path / "b", "camvid", ELEVEN))


def test_coco_stuff(tmp_path: Path) -> None:
    image(tmp_path / "images/val2017/000000000139.jpg")
    mask(tmp_path / "annotations/val2017/000000000139.png", 0, 181, 255, 91)
    assert rows(open_layout(tmp_path, "coco-stuff", MANY)) == [("000000000139.jpg", [0, 181, IGNORED, 91])]


def test_list_files(tmp_path: Path) -> None:
    for stem in ("a b", "c"):
        image(tmp_path / f"photos/{stem}.png")
        mask(tmp_path / f"truth/{stem}.png", 1, 2, 3, 4)
    (tmp_path / "val.txt").write_text("# image, mask\nphotos/a b.png,truth/a b.png\n\nphotos/c.png\ttruth/c.png\n")
    assert [name for name, _ in rows(open_layout(tmp_path / "val.txt", "list", ELEVEN))] == ["a b.png", "c.png"]
    (tmp_path / "plain.txt").write_text("photos/c.png\n")
    assert rows(open_layout(tmp_path / "plain.txt", "list", ELEVEN)) == [("c.png", None)]
    (tmp_path / "bad.txt").write_text("photos/c.png truth/missing.png\n")
    with pytest.raises(InputError, match=r"missing\.png, which is not there"):
        open_layout(tmp_path / "bad.txt", "list", ELEVEN)


def test_a_label_map_goes_over_any_layout(tmp_path: Path) -> None:
    image(tmp_path / "images/1.png")
    mask(tmp_path / "masks/1.png", 100, 101, 102, 0)
    read = LABEL_MAP.accept("label_map", "100=5,101=0, 102=ignore")
    assert read == {100: 5, 101: 0, 102: IGNORED} == LABEL_MAP.read(*LABEL_MAP.write(read))
    dataset = open_layout(tmp_path, "images-masks", ELEVEN, label_map=read)
    assert rows(dataset) == [("1.png", [5, 0, IGNORED, 0])]
    for text in ("road=1", "1=2=3", "1", "1=99999999999999999999", "1=" + "9" * 5000, f"{2**31}=0"):
        with pytest.raises(SpecError, match="FILE_VALUE=CLASS") as caught:
            LABEL_MAP.accept("label_map", text)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("img_dir", "ann_dir")])
def test_images_and_masks_with_a_folder_for_each_split(tmp_path: Path, images: str, masks: str) -> None:
    for split, value in (("train", 1), ("val", 2)):
        image(tmp_path / images / split / f"{split}.png")
        mask(tmp_path / masks / split / f"{split}.png", value, value, value, value)
    assert rows(open_layout(tmp_path, "images-masks", ELEVEN)) == [("val.png", [2, 2, 2, 2])]
    assert rows(open_layout(tmp_path, "images-masks", ELEVEN, split="train")) == [("train.png", [1, 1, 1, 1])]


def test_masks_of_every_split_in_one_folder(tmp_path: Path) -> None:
    image(tmp_path / "images/train/a.png")
    image(tmp_path / "images/val/b.png")
    for stem, value in (("a", 1), ("b", 2)):
        mask(tmp_path / f"masks/{stem}.png", value, value, value, value)
    assert rows(open_layout(tmp_path, "images-masks", ELEVEN)) == [("b.png", [2, 2, 2, 2])]


def test_ade20k(tmp_path: Path) -> None:
    image(tmp_path / "images/validation/ADE_val_00000001.jpg")
    mask(tmp_path / "annotations/validation/ADE_val_00000001.png", 0, 1, 150, 13)
    scenes = ModelSpec("segformer", "mit_b0", classes=150)
    assert rows(open_layout(tmp_path, "ade20k", scenes)) == [("ADE_val_00000001.jpg", [IGNORED, 0, 149, 12])]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected leftImg8bit"):
        open_layout(tmp_path, "cityscapes", NINETEEN)
    with pytest.raises(SpecError, match="did you mean 'cityscapes'"):
        AccuracyRequest(tmp_path, layout="cityscape")


@pytest.mark.parametrize("layout", get_args(Layout))
def test_every_layout_the_command_line_offers_has_a_reader(tmp_path: Path, layout: str) -> None:
    with pytest.raises(InputError):
        open_layout(tmp_path, layout, ELEVEN)
