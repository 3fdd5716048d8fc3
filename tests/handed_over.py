"""What tests of exported folders share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeseg.handover.folder import LISTING_NAME, Listing
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.engine import read_manifest
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import MANIFEST_NAME


def changed(folder: Path, **fields: Any) -> Path:
    write_json(folder / MANIFEST_NAME, replace(read_manifest(folder), **fields))
    return folder


def assert_whole(output: Path) -> Listing:
    """Every file is listed with its hash, and no other is there."""
    listing = read_json(output / LISTING_NAME, Listing, "listing")
    there = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()} - {LISTING_NAME}
    assert there == set(listing.files)
    for name, ref in listing.files.items():
        assert ref.sha256 == sha256_file(output / name)
        assert ref.size_bytes == (output / name).stat().st_size
    assert "README.md" in there
    return listing
