"""Which files of a data set's folder are images, and which are their masks. Nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgeseg.errors import InputError
from edgeseg.images.decoding import IMAGE_SUFFIXES, JPEG_SUFFIXES, list_images

IMAGE_FOLDERS = ("images", "image", "img", "img_dir")
MASK_FOLDERS = ("masks", "mask", "labels", "annotations", "ann_dir")
MASK_SUFFIXES = ("_mask", "_label", "_labels", "_gt")
# Of two files for one image these are the mask; the other is a picture of it.
USUAL_MASKS = frozenset({".png", ".npy", ".tif", ".tiff", ".bmp", ".gif"})


def find_images(folder: Path) -> list[Path]:
    """The images of a folder as :func:`find_pairs` finds them, without the masks beside them.

    Two files of one name, neither of them JPEG, may as well be one picture twice: both are images.

    Raises:
        InputError: see :func:`~edgeseg.images.decoding.list_images`.
    """
    inner = _image_folder(folder)
    if inner is not None:
        return list_images(inner)
    images = list_images(folder)
    pairs = _flat_pairs(images, folder).items()
    masks = {mask for photo, mask in pairs if mask.stem != photo.stem or photo.suffix.lower() in JPEG_SUFFIXES}
    return [path for path in images if path not in masks]


def find_pairs(folder: Path, split: str | None = None) -> tuple[list[Path], dict[Path, Path]]:
    """The images of a folder, in natural order, and the mask file of each that has one.

    Understood: ``images/`` beside ``masks/`` (or one of :data:`MASK_FOLDERS`) with equal stems; one folder with ``NAME.jpg``
    and ``NAME_mask.png`` (or another of :data:`MASK_SUFFIXES`, any format) or ``NAME.jpg`` and ``NAME.png``; images alone.

    Args:
        folder: which exists.
        split: folder to take in both, where there is one (``images/val`` beside ``masks/val``).

    Raises:
        InputError: no images, or a mask folder in which no mask belongs to an image.
    """
    image_folder = _image_folder(folder)
    if image_folder is None:
        images = _images(folder)
        pairs = _flat_pairs(images, folder)
        masks = set(pairs.values())
        return [path for path in images if path not in masks], pairs
    mask_folder = next((folder / n for n in MASK_FOLDERS if os.path.isdir(folder / n)), None)
    if split and os.path.isdir(image_folder / split):
        image_folder = image_folder / split
        if mask_folder is not None and os.path.isdir(mask_folder / split):
            mask_folder = mask_folder / split
    images = _images(image_folder)
    if mask_folder is None:
        return images, {}
    by_stem: dict[str, Path] = {}
    for path in _mask_files(mask_folder):
        stem = next((path.stem.removesuffix(s) for s in MASK_SUFFIXES if path.stem.endswith(s)), path.stem)
        by_stem.setdefault(path.stem, path)
        by_stem.setdefault(stem, path)
    # Of a.jpg, annotation tools call the mask a.png or a.jpg.png.
    pairs = {i: by_stem[name] for i in images for name in (i.stem, i.name) if name in by_stem}
    if not pairs:
        raise InputError(
            f"no file in {mask_folder} belongs to an image in {image_folder}; the names must be equal up to the suffix"
        )
    return images, pairs


def _image_folder(folder: Path) -> Path | None:
    return next((folder / n for n in IMAGE_FOLDERS if os.path.isdir(folder / n)), None)


def _flat_pairs(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Photos and their masks, all in one folder."""
    files = {p.name: p for p in (*images, *_mask_files(folder))}
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(files.values()):
        by_stem.setdefault(path.stem, []).append(path)
    pairs: dict[Path, Path] = {}
    for stem, paths in by_stem.items():
        photo = next((p for p in paths if p.suffix.lower() in JPEG_SUFFIXES), None) or paths[0]
        rest = [p for p in paths if p != photo and p.suffix.lower() in {".png", ".npy"}]
        named = [p for s in MASK_SUFFIXES for p in sorted(by_stem.get(stem + s, []), key=_mask_order)]
        for mask in (named or rest)[:1]:
            pairs[photo] = mask
    return pairs


def _images(folder: Path) -> list[Path]:
    try:
        return list_images(folder)
    except InputError as exc:
        raise InputError(f"no images in {folder}; give a folder with images/ and masks/, or with image files") from exc


def _mask_files(folder: Path) -> list[Path]:
    try:
        files = list(folder.iterdir())
    except OSError as exc:
        raise InputError(f"cannot list {folder}: {exc.strerror}") from exc
    return sorted((p for p in files if p.suffix.lower() in IMAGE_SUFFIXES), key=_mask_order)


def _mask_order(path: Path) -> tuple[bool, Path]:
    return path.suffix.lower() not in USUAL_MASKS, path
