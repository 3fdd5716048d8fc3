"""Arrays from ``.npy`` and ``.npz`` files of unknown origin: measured before they are read, never unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError, one_line
from edgeseg.store.files import require_file

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
# An archive member may say it is larger than it is by its headers; more of them than this is no set of images.
MAX_MEMBERS = 100_000


def read_array(path: Path, what: str, largest_bytes: int) -> NDArray[Any]:
    """Read the one array of a ``.npy`` or ``.npz`` file.

    Raises:
        InputError: not a readable file, damaged, pickled, encrypted, too large, or an archive of several arrays.
    """
    if path.suffix.lower() == ".npz":
        arrays = _read_archive(path, what, largest_bytes, most=1)
        return next(iter(arrays.values()))
    with _reading(path, what), path.open("rb") as stream:
        return _read_member(stream, largest_bytes)


def open_arrays(path: Path, what: str, largest_bytes: int) -> dict[str, NDArray[Any]]:
    """Return the arrays of a ``.npy`` (left on disk, of any size) or ``.npz`` file (read), by name.

    Raises:
        InputError: as :func:`read_array`.
    """
    if path.suffix.lower() == ".npz":
        arrays = _read_archive(path, what, largest_bytes, most=MAX_MEMBERS)
        return {f"{path.name}:{name}": array for name, array in sorted(arrays.items())}
    with _reading(path, what):
        return {path.name: np.lib.format.open_memmap(path, mode="r")}


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    require_file(path, what)
    try:
        yield
    except Exception as exc:
        # BadZipFile, zlib.error, NotImplementedError (compression), RuntimeError (encryption), and whatever numpy's parsing
        # of a damaged header trips over: ValueError, tokenize.TokenError, ...
        why = str(exc) if isinstance(exc, InputError) else one_line(exc)
        raise InputError(f"cannot read {what} {path}: {why}") from exc


def _read_archive(path: Path, what: str, largest_bytes: int, most: int) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    with _reading(path, what), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if not members or len(members) > most:
            allowed = "1" if most == 1 else f"1 to {most}"
            raise InputError(f"it holds {len(members)} arrays; {allowed} can be read")
        left = largest_bytes
        for member in members:
            with archive.open(member) as stream:
                array = _read_member(stream, left)
            arrays[member.filename.removesuffix(".npy")] = array
            left -= array.nbytes
    return arrays


def _read_member(stream: IO[bytes], largest_bytes: int) -> NDArray[Any]:
    # The header alone decides how much numpy allocates.
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if dtype.hasobject:
        raise InputError("it holds pickled objects, which could run code; save arrays of numbers")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > largest_bytes:
        raise InputError(f"its arrays would take more than the {largest_bytes} bytes allowed")
    stream.seek(0)
    array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    # Either byte order is fine in a file, and a nuisance in memory.
    return np.asarray(array, array.dtype.newbyteorder("="))
