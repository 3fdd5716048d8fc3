"""Where frames come from: video files, cameras, image files, arrays. Frames are RGB whatever their source."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import shortened
from edgeseg.errors import InputError, imported
from edgeseg.images.decoding import list_images, read_image
from edgeseg.runtime.matroska import read_container
from edgeseg.runtime.overlap import in_parallel
from edgeseg.spec import ChannelOrder, InputSpec
from edgeseg.store.files import require_file, require_utf8

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"})
# Their headers count the frames; elsewhere the count is estimated from duration and rate.
COUNTED_SUFFIXES = frozenset({".avi", ".m4v", ".mov", ".mp4"})
_USUAL = InputSpec()
CAMERAS = 10_000
MATROSKA_SUFFIXES = frozenset({".mkv", ".webm"})


@dataclass(frozen=True, eq=False)
class Picture:
    """One frame before segmentation.

    Attributes:
        index: position in the source, from 0, dropped frames counted.
        timestamp_s: seconds since the start of a video, or since the first frame of a camera; else ``None``.
        image: ``(H, W, C)`` of the engine's dtype.
        path: the image file it was read from, if any.
        channel_order: of ``image``; ``None``: as the segmenter expects.
    """

    index: int
    timestamp_s: float | None
    image: NDArray[Any]
    path: Path | None = None
    channel_order: ChannelOrder | None = None


def camera_index(source: object) -> int | None:
    """Return the camera number that ``source`` means (``0``, ``"0"``, ``"/dev/video0"``), unless it is something else.

    Raises:
        InputError: a number that no camera has.
    """
    if isinstance(source, int) and not isinstance(source, bool):
        if not 0 <= source < CAMERAS:
            raise InputError(
                f"there is no camera {shortened(source)}; give 0 to {CAMERAS - 1}, N being /dev/videoN on Linux"
            )
        return source
    if isinstance(source, (str, Path)) and str(source).startswith("/dev/"):
        # Links too: /dev/v4l/by-id/ has a camera's own name.
        device = re.fullmatch(r"/dev/video([0-9]{1,4})", os.path.realpath(source))
        return None if device is None else int(device[1])
    if isinstance(source, str) and re.fullmatch("[0-9]{1,4}", source) and not Path(source).exists():
        return int(source)
    return None


class Video:
    """Frames of a video file or a camera, decoded by OpenCV, as :class:`Picture` in RGB.

    Args:
        source: path of a video file, or a camera's index.
        spec: the engine's input, of 3 channels, or 1 for grey, and uint8.

    Attributes:
        fps: frames per second the source says it has; ``None`` when it does not.
        frames: how many frames a file says it has, which need not be true; ``None`` for a camera.
        live: whether frames are lost unless taken in time.
        damage: at the end of a file: what of it could not be decoded, in words, where its container tells; else empty.

    Raises:
        MissingDependencyError: OpenCV is not installed.
        InputError: no such file or camera, not a video, or an engine of other than 1 or 3 channels or uint8.
    """

    def __init__(self, source: Path | int, spec: InputSpec = _USUAL) -> None:
        channels = spec.channels
        if channels not in (1, 3) or spec.dtype != "uint8":
            raise InputError(
                f"videos and cameras have 3 channels of uint8, this engine takes {channels} of {spec.dtype}; give images "
                "or arrays"
            )
        self.source = source
        self.live = isinstance(source, int)
        self._name = f"camera {source}" if isinstance(source, int) else str(source)
        if isinstance(source, Path):
            require_file(source, "video")
            require_utf8(source, "OpenCV", InputError)
        self._cv2 = import_cv2()
        with _quiet(self._cv2):
            self._capture = self._cv2.VideoCapture(source) if isinstance(source, int) else _open_file(self._cv2, source)
        if not self._capture.isOpened():
            what = "no such camera, or it is in use" if self.live else "not a video, damaged, or of an unknown codec"
            raise InputError(f"cannot open {self._name}: {what}")
        fps = float(self._capture.get(self._cv2.CAP_PROP_FPS))
        count = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        self.fps = fps if 0.0 < fps < 1000.0 else None
        self.frames = count if count > 0 and not self.live else None
        self.damage = ""
        self._code = self._cv2.COLOR_BGR2RGB if channels == 3 else self._cv2.COLOR_BGR2GRAY

    def __iter__(self) -> Iterator[Picture]:
        """Decode frame after frame. Raises ``InputError`` when not even one can be decoded."""
        index, begin = 0, 0.0
        while True:
            is_read, frame = self._capture.read()
            if not is_read:
                break
            now = time.monotonic()
            begin = begin or now
            milliseconds = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC))
            seconds = now - begin if self.live else milliseconds / 1000.0
            image = self._cv2.cvtColor(frame, self._code)
            yield Picture(index, seconds, image if image.ndim == 3 else image[..., None], channel_order="rgb")
            index += 1
        if isinstance(self.source, Path):
            self.damage = self._lost(self.source, index)
        if index == 0:
            raise InputError(f"cannot read {self._name}: no frame could be decoded")

    def _lost(self, path: Path, decoded: int) -> str:
        if path.suffix.lower() in COUNTED_SUFFIXES and self.frames and decoded < self.frames:
            return f"{decoded} of {self.frames} frames could be decoded"
        if path.suffix.lower() not in MATROSKA_SUFFIXES:
            return ""
        told = read_container(path)
        if told.broken_at is not None:
            return f"{decoded} frames could be decoded, the file is damaged at byte {told.broken_at}"
        if told.missing_bytes:
            return f"{decoded} frames could be decoded, {told.missing_bytes} bytes are missing at the end of the file"
        if told.frames is not None and decoded < told.frames:
            return f"{decoded} of {told.frames} frames could be decoded"
        return ""

    def close(self) -> None:
        """Give the file or camera back."""
        self._capture.release()


def _open_file(cv2: Any, path: Path) -> Any:
    # OpenCV's own reader of AVI files prints bytes of a damaged one, which a terminal may obey; FFmpeg reads those files too.
    backends = [backend for backend in cv2.videoio_registry.getStreamBackends() if backend != cv2.CAP_OPENCV_MJPEG]
    opened = (cv2.VideoCapture(str(path), backend) for backend in backends or [cv2.CAP_ANY])
    return next((capture for capture in opened if capture.isOpened()), cv2.VideoCapture())


def open_source(source: object, spec: InputSpec) -> Video | Iterable[Picture]:
    """Open what :func:`edgeseg.stream` takes. Raises ``InputError`` for what is not there."""
    index = camera_index(source)
    if index is not None:
        return Video(index, spec)
    if isinstance(source, str) and "://" in source:
        raise InputError(
            f"{source} is a URL; open it with OpenCV, and give stream an iterable of its frames and load channel_order='bgr'"
        )
    if isinstance(source, (str, Path)):
        if Path(source).suffix.lower() in VIDEO_SUFFIXES:
            return Video(Path(source), spec)
        return _read_files(list_images(source), spec)
    if isinstance(source, np.ndarray) and source.ndim == 3:
        raise InputError(f"one array of shape {source.shape} is no stream; give an iterable of images, such as [image]")
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return _read_files([Path(item) for item in source], spec)
    if isinstance(source, Iterable):
        return _number_arrays(source)
    raise InputError(
        f"cannot stream from a {type(source).__name__}; give a video file, camera index, image folder, glob or arrays"
    )


def import_cv2() -> Any:
    """Import OpenCV. Raises ``MissingDependencyError``."""
    return imported("cv2", "video", "read and write videos and cameras")


def _read_files(paths: list[Path], spec: InputSpec) -> Iterator[Picture]:
    def read(item: tuple[int, Path]) -> Picture:
        index, path = item
        image = read_image(path, spec.channels, spec.dtype)
        return Picture(index, None, image, path, "rgb" if spec.channels == 3 else None)

    return in_parallel(enumerate(paths), read)


def _number_arrays(arrays: Iterable[Any]) -> Iterator[Picture]:
    try:
        for index, image in enumerate(arrays):
            # It waits while the source goes on, and many a camera's driver fills the same buffer again.
            yield Picture(index, None, np.array(image) if isinstance(image, np.ndarray) else image)
    finally:
        close = getattr(arrays, "close", None)
        if close is not None:
            close()


@contextmanager
def _quiet(cv2: Any) -> Iterator[None]:
    """Keep OpenCV and FFmpeg from printing several lines where one error of ours follows."""
    # FFmpeg's level is read from here when OpenCV first uses it; whoever set it before knows better.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)
