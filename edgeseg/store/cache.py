"""Results of stages, kept between builds and found again by the hash of everything they were made from.

A changed input has another hash, so a stale result is never found. The folder is ``$EDGESEG_CACHE`` or the user's
cache directory; it may be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import platformdirs

import edgeseg
from edgeseg.store.artifacts import sha256_json

# A dozen fp32 graphs of large models; the least recently used go first.
MAX_SIZE_BYTES = 4 << 30


def cache_folder() -> Path:
    """The cache's folder; need not exist yet."""
    return Path(os.environ.get("EDGESEG_CACHE") or platformdirs.user_cache_dir("edgeseg"))


@functools.cache
def source_sha256() -> str:
    """SHA-256 over all of edgeseg's Python sources: what a stage makes depends on more code than its own subpackage's."""
    root = Path(edgeseg.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of the given distributions; absent ones are left out."""
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in names}
    return {name: found.version for name, found in installed.items() if found is not None}


def cached_folder(stage: str, inputs: object, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return the folder that ``make`` filled for these ``inputs``, making it if need be.

    Args:
        stage: name of the stage, such as ``"export"``.
        inputs: JSON-encodable; everything the result depends on, versions included.
        make: fills an empty folder; on any exception nothing is kept.

    Returns:
        the folder, and whether it was there already.
    """
    home = cache_folder() / stage
    folder = home / sha256_json(inputs)
    if folder.is_dir():
        os.utime(folder)
        return folder, True
    home.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=home, prefix=".partial-"))
    try:
        make(scratch)
        try:
            os.rename(scratch, folder)
        except OSError:
            # Another build finished the same stage first; its result is the same by construction.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prune(keep=folder)
    return folder, False


def prune(*, keep: Path | None = None, max_size_bytes: int = MAX_SIZE_BYTES) -> None:
    """Delete the least recently used results until the cache is no larger than ``max_size_bytes``."""
    folders = [f for f in cache_folder().glob("*/*") if f.is_dir() and not f.name.startswith(".")]
    newest_first = sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True)
    total = 0
    for folder in newest_first:
        total += sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        if total > max_size_bytes and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
