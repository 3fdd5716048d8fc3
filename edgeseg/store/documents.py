"""Documents, JSON most of them: read with suspicion, every field checked, and written atomically."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from edgeseg.errors import ArtifactError
from edgeseg.machine.record import Count
from edgeseg.store.atomic import write_bytes

MAX_JSON_BYTES = 64 << 20
"""Of a manifest, table or report; the largest, a bench of hundreds of engines, has a few."""
T = TypeVar("T")


def write_json(path: Path, value: object) -> None:
    """Write a dataclass as indented JSON, atomically."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; ``-`` is standard output.

    Raises:
        ArtifactError: the place cannot be written.
    """
    try:
        write_bytes(path, text.encode())
    except OSError as exc:
        raise ArtifactError(f"cannot write {path}: {exc.strerror}; give another file") from exc


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read JSON into a dataclass, every field type-checked.

    Raises:
        ArtifactError: missing, unreadable, above 64 MiB, not JSON, or of another shape; says which field.
    """
    return _decoded(_regular(path, what), path, kind, what)


def read_versioned(path: Path, kind: type[T], what: str, *, version: int, again: str) -> T:
    """:func:`read_json` of a file that states its ``schema_version``; ``again`` says how to make one anew.

    Raises:
        ArtifactError: see :func:`read_json`; or another version.
    """
    return decode_versioned(_regular(path, what), path, kind, what, version, again)


def _regular(path: Path, what: str) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ArtifactError(f"{what} {path} is no regular file; save it as one first")  # reading it may never end
    try:
        return read_bounded_json(path, what)
    except OSError as exc:
        raise ArtifactError(f"cannot read {what} {path}: {exc.strerror}") from exc


@dataclass(frozen=True)
class _Versioned:
    schema_version: Count


def decode_versioned(data: bytes, path: Path, kind: type[T], what: str, version: int, again: str) -> T:
    """What :func:`read_versioned` does with the bytes of ``path``."""
    stated = _decoded(data, path, _Versioned, what).schema_version
    if stated != version:
        raise ArtifactError(
            f"{what} {path} has schema version {stated}, this edgeseg reads {version}; "
            + ("upgrade edgeseg" if stated > version else again)
        )
    return _decoded(data, path, kind, what)


def read_bounded_json(path: Path, what: str) -> bytes:
    """The bytes of ``path``; ``ArtifactError`` above :data:`MAX_JSON_BYTES`, ``OSError`` where it cannot be read."""
    with path.open("rb") as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactError(f"{what} {path} is larger than {MAX_JSON_BYTES >> 20} MiB, which none of edgeseg's is")
    return data


def _decoded(data: bytes, path: Path, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as exc:
        raise ArtifactError(f"{what} {path} is damaged or not one: it is nested too deeply") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        raise ArtifactError(f"{what} {path} is damaged or not one: {exc}") from exc
