"""Files a user gives or asks for: what can be opened, and what may be written where, is said before the work.

To a decoder a pipe would be waited for, a device may never end, and a file system answers a bad name with an error of its own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from edgeseg.errors import ArtifactError, EdgesegError, InputError, OutputExistsError, SpecError, one_line

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


def require_utf8(path: str | Path, reader: str, error: type[EdgesegError]) -> None:
    """Raise ``error`` for a name that is not UTF-8: native libraries take no other, and OpenCV crashes on one."""
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise error(f"cannot use {shown}: {reader} needs a name in UTF-8; give it another") from exc


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


def _why_not(path: str | Path, exc: OSError | ValueError) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which cannot be reached"
    return "it does not exist" if isinstance(exc, FileNotFoundError) else one_line(exc)


def check_outputs(outputs: Sequence[Path], *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse, before the work, files that must not or cannot be written. What :func:`is_stream` is written to, not replaced.

    Raises:
        OutputExistsError: one exists and ``force`` is false.
        SpecError: one is an input, a folder, a device, or named twice.
        ArtifactError: its folder can be neither written nor made.
    """
    read = {_identity(path): path for path in inputs if not is_stream(path)}
    written: dict[object, Path] = {}
    for path in outputs:
        if is_stream(path):
            continue
        if (known := read.get(_identity(path))) is not None:
            raise SpecError(f"{path} would replace the input {known}; give another file")
        if (known := written.setdefault(_identity(path), path)) is not path:
            raise SpecError(f"{path} would replace {known}, which is written as well; give two files")
        if os.path.isdir(path):
            raise SpecError(f"{path} is a folder; give a file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise SpecError(f"{path} is no regular file; give another file")
        refuse_existing(path, force)
    for path in written.values():
        if (why := why_not_made(Path(os.path.realpath(path)))) is not None:
            raise ArtifactError(f"cannot write {path}: {why}; give another file")


def why_not_made(path: Path) -> str | None:
    """Why the system would not let a file or folder be made at ``path``, or the folders above it; ``None`` if it would."""
    above = next(parent for parent in path.parents if os.path.exists(parent))
    if not os.path.isdir(above):
        return f"{above} is a file"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"no permission to write in {above}"
    for part in path.relative_to(above).parts:
        try:
            os.lstat(above / part)  # whether the name can be: below what is not there, every name is missing
        except FileNotFoundError:
            continue
        except OSError as exc:
            return exc.strerror
    return None


def refuse_existing(path: Path, force: bool) -> None:
    """Raise :class:`OutputExistsError` if there is something at ``path`` that may not be replaced."""
    if not force and os.path.exists(path):
        raise OutputExistsError(f"{path} exists; give --force to replace it, or another output")


def _identity(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def open_descriptor(path: Path) -> int | None:
    """The number of the open file that ``/dev/stdout``, ``/dev/fd/3`` and the like stand for, else ``None``."""
    text = os.path.abspath(path)
    match = _DESCRIPTOR.fullmatch(text)
    return int(match[1]) if match else _STANDARD.get(text)


def is_stdout(path: Path) -> bool:
    """Whether what is written to ``path`` is what the command prints."""
    return str(path) == "-" or open_descriptor(path) == 1


def is_stream(path: Path) -> bool:
    """Whether ``path`` is written to rather than replaced: ``-`` (standard output), a device such as a terminal, a pipe."""
    if str(path) == "-" or open_descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
