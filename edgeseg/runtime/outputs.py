"""Writing masks, pictures and videos: each file appears complete or not at all, and never replaces another unasked."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.runtime.sources import import_cv2
from edgeseg.store.atomic import replacing, write_bytes
from edgeseg.store.files import refuse_existing, require_utf8

if TYPE_CHECKING:
    from PIL import Image

# A file name holds 255 bytes: what is added are a number, a class, suffixes, and the mark of an unfinished file.
MAX_NAME_BYTES = 170


def write_mask(path: Path, mask: NDArray[Any], palette: NDArray[np.uint8], *, overwrite: bool = False) -> None:
    """Write class indices ``(H, W)`` as PNG, its pixel values being the indices.

    Uint8 is written with a palette, so that viewers show colours; uint16 as 16-bit grey.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        InputError: it cannot be written.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(mask))
    if mask.dtype == np.uint8:
        picture.putpalette(palette.tobytes())
    # Areas of one value are runs: looking for nothing else takes half the time and makes smaller files.
    _write_png(path, picture, overwrite, compress_type=zlib.Z_RLE)


def write_picture(path: Path, picture: NDArray[np.uint8], *, overwrite: bool = False) -> None:
    """Write uint8 RGB ``(H, W, 3)`` as PNG.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        InputError: it cannot be written.
    """
    from PIL import Image

    # A photograph gains a few percent from more effort, at several times the time.
    image = Image.fromarray(np.ascontiguousarray(picture))
    _write_png(path, image, overwrite, compress_level=1)


class VideoFile:
    """An mp4 being written; it appears under its name when closed, and not at all after an exception.

    Raises:
        MissingDependencyError: OpenCV is not installed.
        OutputExistsError: the file exists and ``overwrite`` is false.
        InputError: it cannot be written.
    """

    def __init__(self, path: Path, fps: float, *, overwrite: bool = False) -> None:
        self._cv2 = import_cv2()
        self._path, self._overwrite = path, overwrite
        self._fps = fps
        self._replacing = ExitStack()
        self._part = path
        self._writer: Any = None
        self._size = (0, 0)
        self.frames = 0
        refuse_existing(path, overwrite)
        require_utf8(path, "OpenCV", InputError)

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
        with _clear_errors(self._path):
            # OpenCV chooses the container by the suffix.
            part = replacing(self._path, overwrite=self._overwrite, suffix=".mp4")
            self._part = self._replacing.enter_context(part)
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
        with _clear_errors(self._path):
            # OpenCV does not report a full disk; a file without a body is what is left of it.
            if kind is None and self._part.stat().st_size < 256:
                kind, error = InputError, InputError(f"cannot write {self._path}: no space left on device?")
                self._replacing.__exit__(kind, error, None)
                raise error
            self._replacing.__exit__(kind, error, trace)


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
    for group in by_name.values():
        for index, name in zip(group, told_apart([paths[index] for index in group]), strict=True):
            names[index] = name
    taken: set[str] = set()

    def take(name: str) -> bool:
        before = len(taken)
        taken.add(name)
        return len(taken) > before

    numbers: dict[str, int] = {}
    return [first_free(name, take, numbers) for name in names]


def told_apart(paths: Sequence[Path]) -> list[str]:
    """Names for inputs whose stems are the same but for case, by the first way that tells all of them apart; see above."""
    if len(paths) == 1:
        return [paths[0].stem]
    ways: tuple[Callable[[Path], str], ...] = (
        lambda p: f"{p.stem}_{p.suffix[1:]}",
        lambda p: f"{p.absolute().parent.name}_{p.stem}",
        lambda p: f"{p.absolute().parent.name}_{p.stem}_{p.suffix[1:]}",
    )
    for way in ways:
        names = [way(path) for path in paths]
        if len({name.casefold() for name in names}) == len(names):
            break
    return names


def first_free(name: str, take: Callable[[str], bool], numbers: dict[str, int]) -> str:
    """``name``, cut to :data:`MAX_NAME_BYTES`, with a number where it is taken.

    Args:
        name: wanted.
        take: takes a name in small letters; false when it is taken already.
        numbers: by name, the first that was not tried yet; the same dictionary from call to call.
    """
    name = free = cut_to_bytes(name, MAX_NAME_BYTES)
    folded = name.casefold()
    while not take(free.casefold()):
        number = numbers.get(folded, 2)
        free = f"{name}-{number}"
        numbers[folded] = number + 1
    return free


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InputError(f"cannot write {path}: {exc.strerror or exc}; free space or give another --output") from exc


def _write_png(
    path: Path,
    picture: Image.Image,
    overwrite: bool,
    compress_level: int = 6,
    compress_type: int = zlib.Z_DEFAULT_STRATEGY,
) -> None:
    png = io.BytesIO()
    picture.save(png, "PNG", compress_level=compress_level, compress_type=compress_type)
    with _clear_errors(path):
        write_bytes(path, png.getvalue(), overwrite=overwrite)
