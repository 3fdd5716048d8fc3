"""Data sets in the layouts people have, as :class:`~edgeseg.evaluate.accuracy.dataset.ValidationSet`."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeseg.arguments import Kind
from edgeseg.errors import InputError, one_line
from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.evaluate.accuracy.labels import IGNORED, LabelCoding
from edgeseg.spec import InputDtype, ModelSpec
from edgeseg.store.files import read_lines

# Cityscapes' 19 training classes, by label id (cityscapesscripts/helpers/labels.py); every other id is not judged.
_CITYSCAPES_TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

Pairs = list[tuple[Path, Path | None]]


def open_layout(
    source: Path,
    layout: str,
    model: ModelSpec,
    *,
    split: str = "val",
    ignore_index: int | None = None,
    label_map: dict[int, int] | None = None,
    limit: int | None = None,
    dtype: InputDtype = "uint8",
) -> ValidationSet:
    """Find the images and masks of a data set; nothing is decoded yet.

    Args:
        source: its folder; for ``list`` a text file with an image and, for accuracy, a mask on each line, relative to it.
        layout: ``images-masks`` (see :meth:`ValidationSet.open`), ``list``, ``voc``, ``cityscapes``, ``camvid``,
            ``coco-stuff`` or ``ade20k``.
        model: classes, task and channels.
        split: ``train``, ``val``, ... where the layout has splits.
        ignore_index: value of unlabelled pixels; ``None``: the layout's own, or recognized.
        label_map: file value -> class index or :data:`~edgeseg.evaluate.accuracy.labels.IGNORED`, over the layout's own.
        limit: keep this many, evenly spread.
        dtype: of the engine's input.

    Raises:
        InputError: the layout is not there, or has no images in this split.
    """
    extra = label_map or {}
    if layout == "images-masks":
        paired = ValidationSet.open(source, model, ignore_index=ignore_index, split=split, dtype=dtype)
        return replace(paired, coding=LabelCoding(extra)).limited(limit)
    pairs, own_ignore, coding = _READERS[layout](source, split)
    with_masks = [(image, mask) for image, mask in pairs if mask is not None]
    chosen = with_masks or pairs
    if not chosen:
        raise InputError(f"no images of split {split} in {source} as layout {layout}; {_EXPECTED[layout]}")
    missing = next((path for pair in chosen for path in pair if path is not None and not os.path.isfile(path)), None)
    if missing is not None:
        raise InputError(f"{source} names {missing}, which is not there; {_EXPECTED[layout]}")
    unpaired = tuple(image.name for image, mask in pairs if mask is None) if with_masks else ()
    return ValidationSet(
        source=source,
        images=tuple(image for image, _ in chosen),
        masks=tuple(mask for _, mask in with_masks if mask is not None),
        model=model,
        ignore_index=own_ignore if ignore_index is None else ignore_index,
        unpaired=unpaired,
        coding=LabelCoding({**coding.values, **extra}, coding.colours),
        dtype=dtype,
    ).limited(limit)


def _read_label_map(value: Any) -> dict[int, int]:
    """``7=0,8=1,255=ignore``, or a mapping."""
    pairs = value.items() if isinstance(value, Mapping) else (part.split("=") for part in str.split(value, ","))
    result = {int(key): IGNORED if str(to).strip() == "ignore" else int(to) for key, to in pairs}
    # Masks are int32 once they are read.
    if any(abs(number) >= 2**31 for pair in result.items() for number in pair):
        raise ValueError
    return result


def _write_label_map(label_map: Mapping[int, int]) -> list[str]:
    return [",".join(f"{value}={'ignore' if to == IGNORED else to}" for value, to in label_map.items())]


LABEL_MAP = Kind(
    "FILE_VALUE=CLASS pairs, such as 7=0,8=1,255=ignore", _read_label_map, _write_label_map, metavar="V=C,..."
)


def _read_list(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    pairs: Pairs = []
    for number, line in enumerate(read_lines(source, "list file"), start=1):
        # Names may hold blanks when a tab or a comma parts them.
        separator = next((s for s in ("\t", ",") if s in line), None)
        words = [word.strip() for word in line.split(separator)]
        if not any(words) or line.lstrip().startswith("#"):
            continue
        if len(words) > 2:
            raise InputError(f"{source} line {number} has {len(words)} names; give IMAGE or IMAGE MASK")
        paths = [source.parent / word for word in words]
        pairs.append((paths[0], paths[1] if len(paths) > 1 else None))
    return pairs, None, LabelCoding()


def _read_voc(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    names = source / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not os.path.isfile(names):
        raise InputError(f"{names} is not there; {_EXPECTED['voc']}")
    stems = [stem for line in read_lines(names, "the split") for stem in line.split()]
    images, masks = source / "JPEGImages", source / "SegmentationClass"
    return [(images / f"{stem}.jpg", masks / f"{stem}.png") for stem in stems], 255, LabelCoding()


def _read_cityscapes(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    images = sorted((source / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    stems = [(image, image.name.removesuffix("_leftImg8bit.png")) for image in images]
    truth = source / "gtFine" / split
    train_ids = [truth / i.parent.name / f"{stem}_gtFine_labelTrainIds.png" for i, stem in stems]
    if train_ids and os.path.isfile(train_ids[0]):
        return list(zip(images, train_ids, strict=True)), 255, LabelCoding()
    ids = [truth / i.parent.name / f"{stem}_gtFine_labelIds.png" for i, stem in stems]
    values = dict.fromkeys(range(-1, 256), IGNORED) | {v: k for k, v in enumerate(_CITYSCAPES_TRAIN_IDS)}
    pairs: Pairs = [(image, mask if os.path.isfile(mask) else None) for image, mask in zip(images, ids, strict=True)]
    return pairs, None, LabelCoding(values)


def _read_camvid(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    """SegNet's version (``val/``, ``valannot/``, 11 is void) or the colour-coded one (``val_labels/NAME_L.png``)."""
    images = sorted(p for p in (source / split).glob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
    indexed, coloured = source / f"{split}annot", source / f"{split}_labels"
    if os.path.isdir(indexed):
        return [(image, indexed / f"{image.stem}.png") for image in images], 11, LabelCoding()
    if not os.path.isdir(coloured):
        raise InputError(f"{source} has neither {indexed.name}/ nor {coloured.name}/; {_EXPECTED['camvid']}")
    colours = _class_colours(source / "class_dict.csv")
    pairs: Pairs = [(image, coloured / f"{image.stem}_L.png") for image in images]
    return pairs, None, LabelCoding(colours=colours)


def _class_colours(path: Path) -> dict[tuple[int, int, int], int]:
    lines = read_lines(path, "class colours")
    try:
        rows = [(int(row["r"]), int(row["g"]), int(row["b"])) for row in csv.DictReader(lines, skipinitialspace=True)]
    except (KeyError, TypeError, ValueError, csv.Error) as exc:
        raise InputError(f"cannot read class colours {path} (columns name, r, g, b): {one_line(exc)}") from exc
    if any(not 0 <= value <= 255 for row in rows for value in row):
        raise InputError(f"cannot read class colours {path}: a colour is beyond 0..255")
    return {colour: index for index, colour in enumerate(rows)}


def _read_coco_stuff(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    folder = next((f for f in (source / "images" / f"{split}2017", source / f"{split}2017") if os.path.isdir(f)), None)
    images = sorted(folder.glob("*.jpg")) if folder is not None else []
    places = (source / n / f"{split}2017" for n in ("annotations", "stuffthingmaps", "pixelmaps"))
    masks = next((f for f in places if os.path.isdir(f)), None)
    return [(i, None if masks is None else masks / f"{i.stem}.png") for i in images], 255, LabelCoding()


def _read_ade20k(source: Path, split: str) -> tuple[Pairs, int | None, LabelCoding]:
    """The scene parsing challenge's: 0 is unlabelled, classes count from 1."""
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images = sorted((source / "images" / folder).glob("*.jpg"))
    values = {0: IGNORED} | {value: value - 1 for value in range(1, 256)}
    return [(i, source / "annotations" / folder / f"{i.stem}.png") for i in images], None, LabelCoding(values)


_READERS: dict[str, Callable[[Path, str], tuple[Pairs, int | None, LabelCoding]]] = {
    "list": _read_list,
    "voc": _read_voc,
    "cityscapes": _read_cityscapes,
    "camvid": _read_camvid,
    "coco-stuff": _read_coco_stuff,
    "ade20k": _read_ade20k,
}
_EXPECTED = {
    "list": "each line holds IMAGE or IMAGE MASK, relative to the file",
    "voc": "expected JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/SPLIT.txt",
    "cityscapes": "expected leftImg8bit/SPLIT/CITY/ and gtFine/SPLIT/CITY/",
    "camvid": "expected SPLIT/ with SPLITannot/, or SPLIT/ with SPLIT_labels/ and class_dict.csv",
    "coco-stuff": "expected images/SPLIT2017/ and annotations/ (or stuffthingmaps/) SPLIT2017/",
    "ade20k": "expected images/validation/ and annotations/validation/ (or training/)",
}
