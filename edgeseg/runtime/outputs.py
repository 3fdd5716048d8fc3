"""Writing masks, pictures and videos: each file appears complete or not at all, and never replaces another unasked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.runtime.sources import import_cv2, require_utf8

# A file's name holds 255 bytes: what is added are a number, a class, suffixes, and the mark of an unfinished file.
MAX_NAME_BYTES = 170


def write_mask(path: Path, mask: NDArray[Any], palette: NDArray[np.uint8], *, overwrite: bool = False) -> None:
    """Write class indices ``(H, W)`` as PNG, its pixel values being the indices.

    Uint8 is written with a palette, so that viewers show colours; uint16 as 16-bit grey.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(mask))
    if mask.dtype == np.uint8:
        picture.putpalette(palette.tobytes())
    _write_whole(path, lambda part: picture.save(part, "PNG"), overwrite)


def write_picture(path: Path, picture: NDArray[np.uint8], *, overwrite: bool = False) -> None:
    """Write uint8 RGB ``(H, W, 3)`` as PNG. Raises ``InputError`` when the file exists, or cannot be written."""
    from PIL import Image

    # A photograph gains a few percent from more effort, at several times the time.
    image = Image.fromarray(np.ascontiguousarray(picture))
    _write_whole(path, lambda part: image.save(part, "PNG", compress_level=1), overwrite)


class VideoFile:
    """An mp4 being written; it appears under its name when closed, and not at all after an exception.

    Args:
        path: ends in ``.mp4``.
        fps: frames per second.
        overwrite: replace a file of that name.

    Raises:
        MissingDependencyError: OpenCV is not installed.
        InputError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path, fps: float, *, overwrite: bool = False) -> None:
        self._cv2 = import_cv2()
        self._path, self._overwrite = path, overwrite
        self._fps = fps
        # OpenCV chooses the container by the suffix.
        self._part = path.with_name(f".{path.stem}.partial-{os.getpid()}.mp4")
        self._writer: Any = None
        self._size = (0, 0)
        self.frames = 0
        _refuse_existing(path, overwrite)
        require_utf8(path)

    def write(self, picture: NDArray[np.uint8]) -> None:
        """Append a frame, uint8 RGB ``(H, W, 3)``; all frames have the size of the first."""
        if self._writer is None:
            self._open(picture.shape[0], picture.shape[1])
        height, width = self._size
        if picture.shape[:2] != self._size:
            # The codec stores colours for 2x2 pixels: an odd picture gets one more row or column of itself.
            rows, columns = height - picture.shape[0], width - picture.shape[1]
            picture = np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")
        self._writer.write(self._cv2.cvtColor(picture, self._cv2.COLOR_RGB2BGR))
        self.frames += 1

    def _open(self, height: int, width: int) -> None:
        self._size = (height + height % 2, width + width % 2)
        _make_folder(self._path.parent)
        code = self._cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = self._cv2.VideoWriter(str(self._part), code, self._fps, self._size[::-1])
        if not self._writer.isOpened():
            raise InputError(f"cannot write {self._path}: no space, no permission, or OpenCV without an mp4 encoder")

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        try:
            if kind is None:
                # OpenCV does not report a full disk; a file without a body is what is left of it.
                if self._part.stat().st_size < 256:
                    raise InputError(f"cannot write {self._path}: no space left on device?")
                _publish(self._part, self._path, self._overwrite)
        finally:
            self._part.unlink(missing_ok=True)


def cut_to_bytes(name: str, most: int) -> str:
    """The start of ``name`` that has at most so many bytes as a file's name, whole characters."""
    while len(os.fsencode(name)) > most:
        name = name[:-1]
    return name


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return an output name (without suffix) for each input path, no two alike even where case is ignored.

    A stem that is alone keeps its name. Inputs that share one get their suffix (``a_jpg``, ``a_png``), their folder
    (``left_a``, ``right_a``) or both, whichever tells them apart first, else a number. Names are cut to
    :data:`MAX_NAME_BYTES`.
    """
    names = [path.stem for path in paths]
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_name.setdefault(name.casefold(), []).append(index)
    ways: tuple[Callable[[Path], str], ...] = (
        lambda p: f"{p.stem}_{p.suffix[1:]}",
        lambda p: f"{p.absolute().parent.name}_{p.stem}",
        lambda p: f"{p.absolute().parent.name}_{p.stem}_{p.suffix[1:]}",
    )
    for group in [g for g in by_name.values() if len(g) > 1]:
        for way in ways:
            proposed = [way(paths[index]) for index in group]
            if len({name.casefold() for name in proposed}) == len(group):
                break
        for index, name in zip(group, proposed, strict=True):
            names[index] = name
    taken: set[str] = set()
    names = [cut_to_bytes(name, MAX_NAME_BYTES) for name in names]
    for index, name in enumerate(names):
        number = 2
        while names[index].casefold() in taken:
            names[index] = f"{name}-{number}"
            number += 1
        taken.add(names[index].casefold())
    return names


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Raise :class:`InputError` for the first of ``paths`` that exists, unless it may be replaced."""
    for path in paths:
        _refuse_existing(path, overwrite)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise InputError(f"{path} exists; give --force to replace it, or another --output")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"cannot make the folder {folder}: {exc.strerror}; give another --output") from exc


def _write_whole(path: Path, write: Callable[[Path], None], overwrite: bool) -> None:
    _refuse_existing(path, overwrite)
    _make_folder(path.parent)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        write(part)
        _publish(part, path, overwrite)
    except OSError as exc:
        raise InputError(f"cannot write {path}: {exc.strerror or exc}; free space or give another --output") from exc
    finally:
        part.unlink(missing_ok=True)


def _publish(part: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, path)
        return
    try:
        # Unlike a rename, a link fails if someone else made the file meanwhile.
        os.link(part, path)
    except FileExistsError as exc:
        raise InputError(f"{path} exists; give --force to replace it, or another --output") from exc
    except OSError:
        # File systems without hard links (FAT on an SD card).
        _refuse_existing(path, overwrite)
        os.replace(part, path)
