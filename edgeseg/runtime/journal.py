"""What is finished of work that lasts, on disk: it outlives the process, and the same work goes on from there."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.store.atomic import write_bytes

_STAMP = "request"
_OWN = re.compile(rf"{_STAMP}|\d+-\d+\.zip|\.edgeseg-partial-[0-9a-f]+")


class Journal:
    """Strips of an image, a file each, whose planes are read one by one.

    Args:
        folder: made anew when it is of another request.
        request: what the work is; ``None``: it cannot be told from other work, and never goes on.

    Raises:
        InputError: see :meth:`remove`.
    """

    def __init__(self, folder: Path, request: str | None) -> None:
        self._folder = folder
        stamp = folder / _STAMP
        if request is None or not stamp.is_file() or stamp.read_bytes() != request.encode():
            self.remove()
            folder.mkdir()
            write_bytes(stamp, (request or "").encode())

    def has(self, panel: int, row: int) -> bool:
        """Whether a strip is finished."""
        return self._path(panel, row).is_file()

    def keep(self, panel: int, row: int, planes: Mapping[str, NDArray[Any]]) -> None:
        """Write a finished strip: arrays by name."""
        packed = io.BytesIO()
        # Masks are areas of one value: the quickest compression takes most of them away.
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            for name, plane in planes.items():
                with file.open(name, "w") as stream:
                    np.lib.format.write_array(stream, plane, allow_pickle=False)
        write_bytes(self._path(panel, row), packed.getvalue())

    def plane(self, panel: int, row: int, name: str) -> NDArray[Any]:
        """One array of a finished strip.

        Raises:
            InputError: it cannot be read any more; it will be made anew.
        """
        path = self._path(panel, row)
        try:
            with zipfile.ZipFile(path) as file, file.open(name) as stream:
                return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
        except Exception as exc:  # of zipfile, zlib and numpy, for whatever happened to the file
            path.unlink(missing_ok=True)
            raise InputError(f"{path} was damaged and is gone now; the same command makes it anew") from exc

    def remove(self) -> None:
        """Throw everything away.

        Raises:
            InputError: the folder holds what is not of a journal; nothing was removed.
        """
        if not self._folder.exists():
            return
        files = list(self._folder.iterdir())
        for path in files:
            if _OWN.fullmatch(path.name) is None:
                raise InputError(f"{path} is not edgeseg's and in the way of unfinished work; move it away")
        for path in files:
            path.unlink()
        self._folder.rmdir()

    def _path(self, panel: int, row: int) -> Path:
        return self._folder / f"{panel}-{row}.zip"
