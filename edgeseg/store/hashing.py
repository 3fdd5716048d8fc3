"""What vouches for a file or a value: its SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeseg.machine.record import Count


@dataclass(frozen=True)
class FileRef:
    """A file of an engine folder: a plain name (no directories), its SHA-256 and size."""

    name: str
    sha256: str
    size_bytes: Count

    @classmethod
    def of(cls, path: Path) -> FileRef:
        return cls(path.name, sha256_file(path), path.stat().st_size)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest is of Python 3.11
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (dataclasses allowed, keys sorted)."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()
