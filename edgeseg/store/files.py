"""Files a user gives: that they can be opened at all is checked before a decoder sees them.

A pipe would be waited for, a device may never end, and a file system answers a bad name with an error of its own.
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeseg.errors import EdgesegError, InputError, one_line

_filters_changing = threading.Lock()
# Lists of images, splits, colour tables: some hundred thousand lines.
MAX_TEXT_BYTES = 16 << 20


def require_file(path: str | Path, what: str) -> int:
    """Return the size in bytes of a regular file that is not empty.

    Raises:
        InputError: it does not exist, may not be looked at, is something else, or is empty.
    """
    size_bytes = require_regular(path, what, InputError)
    if size_bytes == 0:
        raise InputError(f"cannot read {what} {path}: the file is empty (0 bytes)")
    return size_bytes


def require_regular(path: str | Path, what: str, error: type[EdgesegError]) -> int:
    """Return the size in bytes of a regular file; raise ``error`` for anything else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as exc:
        raise error(f"cannot read {what} {path}: {_why_not(path, exc)}") from exc
    if stat.S_ISDIR(status.st_mode):
        raise error(f"cannot read {what} {path}: it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"cannot read {what} {path}: it is no regular file (a pipe, socket or device)")
    return status.st_size


def read_lines(path: Path, what: str) -> list[str]:
    """Return the lines of a UTF-8 text file of at most :data:`MAX_TEXT_BYTES`.

    Raises:
        InputError: not a readable file, too large, or not UTF-8.
    """
    require_file(path, what)
    try:
        return read_bounded(path, what, InputError).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise InputError(f"cannot read {what} {path}: {one_line(exc)}") from exc


def read_bounded(path: Path, what: str, error: type[EdgesegError]) -> bytes:
    """Return the bytes of a text file a person wrote; raise ``error`` above :data:`MAX_TEXT_BYTES`, or for no regular file."""
    if require_regular(path, what, error) > MAX_TEXT_BYTES:
        raise error(f"cannot read {what} {path}: more than {MAX_TEXT_BYTES} bytes; split it")
    try:
        return path.read_bytes()
    except OSError as exc:
        raise error(f"cannot read {what} {path}: {one_line(exc)}") from exc


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back what Pillow warns of while it parses headers: what matters of it becomes an error of ours."""
    # The list of warning filters is one for the whole process.
    with _filters_changing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _why_not(path: str | Path, exc: OSError | ValueError) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which cannot be reached"
    return "it does not exist" if isinstance(exc, FileNotFoundError) else one_line(exc)
