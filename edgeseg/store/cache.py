"""Results of stages, kept between builds and found again by the hash of everything they were made from.

A changed input has another hash, so a stale result is never found. The folder is ``$EDGESEG_CACHE`` or the user's
cache directory; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import platformdirs

from edgeseg.errors import ArtifactError, refused_file
from edgeseg.machine.cpu import this_cpu
from edgeseg.machine.packages import ALL_PACKAGES, package_versions
from edgeseg.store.atomic import PLACE_ERRORS, scratch_folder, sweep
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.engine import check_file
from edgeseg.store.hashing import FileRef, sha256_json

# A dozen fp32 graphs of large models; the least recently used go first.
MAX_SIZE_BYTES = 4 << 30
_CONTENTS = "contents.json"
_PACKAGE = Path(__file__).resolve().parents[1]


Stage = Literal["accuracy", "calibration", "export", "judged", "shipped", "tensorrt-log", "tensorrt-rtx-runtime"]
"""What is kept, each in a folder of its own. Whatever else lies in the cache's folder is somebody's, and never removed."""


@dataclass
class _Instead:
    """Within :func:`usable_cache`: what stands for the cache once that cannot be written."""

    note: Callable[[str], None]
    opened: contextlib.ExitStack
    folder: Path | None = None

    def take_over(self, why: str) -> None:
        """From here on all is kept in a folder for temporary files, which is removed at the end."""
        self.note(
            f"nothing is kept for the next time: cannot write the cache {user_cache_folder()}: {why}; EDGESEG_CACHE names "
            "another folder"
        )
        try:
            folder = tempfile.TemporaryDirectory(prefix="edgeseg-cache-")
        except OSError as exc:
            raise ArtifactError(f"no folder for temporary files: {exc.strerror}; set TMPDIR to one") from exc
        self.folder = Path(self.opened.enter_context(folder))


_instead: ContextVar[_Instead | None] = ContextVar("_instead", default=None)


def user_cache_folder() -> Path:
    """``$EDGESEG_CACHE`` or the user's cache directory; need not exist yet."""
    return Path(os.environ.get("EDGESEG_CACHE") or platformdirs.user_cache_dir("edgeseg"))


def cache_folder() -> Path:
    """The cache's folder, or what stands for it within :func:`usable_cache`; need not exist yet."""
    instead = _instead.get()
    return user_cache_folder() if instead is None or instead.folder is None else instead.folder


def stage_folder(stage: Stage) -> Path:
    """Where the results of one stage are kept; need not exist yet."""
    return cache_folder() / stage


@contextmanager
def usable_cache(note: Callable[[str], None]) -> Iterator[None]:
    """Work without a cache, in a folder that is removed at the end, where the cache cannot be written or the disk gets full.

    Raises:
        ArtifactError: there is no folder for temporary files either.
    """
    with contextlib.ExitStack() as opened:
        instead = _Instead(note, opened, None if (outer := _instead.get()) is None else outer.folder)
        opened.callback(_instead.reset, _instead.set(instead))
        home = cache_folder()
        try:
            for place in (home, *filter(os.path.lexists, map(stage_folder, get_args(Stage)))):
                with scratch_folder(place):
                    pass
        except OSError as exc:
            instead.take_over("not a folder" if isinstance(exc, FileExistsError) else str(exc.strerror))
        yield


@functools.cache
def software() -> dict[str, str]:
    """What computes: the hash of edgeseg's own sources, the kind of CPU, and versions of the packages that may take part.

    Part of every key: which of them a result really went through is not known before it was made, and a list by hand goes
    stale. A changed line costs a developer some recomputing and a user nothing.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    # An engine is chosen, tuned and timed on one kind of machine.
    return {
        "edgeseg": digest.hexdigest(),
        "cpu": this_cpu().isa,
        **package_versions(*ALL_PACKAGES),
    }


def cached_folder(stage: Stage, inputs: object, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """Return the folder that ``make`` filled for these ``inputs``, making it if need be.

    What is there and not as it was made (a disk that was full, a tool that clears old files) is made anew. Where the cache
    cannot be written, within :func:`usable_cache`, it is made in the folder that stands for it from then on.

    Args:
        stage: name of the stage.
        inputs: JSON-encodable; everything the result depends on, versions included.
        make: fills an empty folder with files; on any exception nothing is kept.

    Returns:
        the folder, and whether it was there already.

    Raises:
        ArtifactError: what is there is damaged, and cannot be removed.
    """
    key = sha256_json(inputs)
    try:
        return _found_or_made(stage_folder(stage), key, make)
    except (OSError, ArtifactError) as exc:
        instead, why = _instead.get(), _refused_by(cache_folder(), exc)
        if instead is None or instead.folder is not None or why is None:
            raise
    instead.take_over(why)
    return _found_or_made(stage_folder(stage), key, make)


def _refused_by(home: Path, error: BaseException) -> str | None:
    """Why the place of the cache is to blame for an error, as a full disk is; ``None`` where it is not."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno not in PLACE_ERRORS:
        return None
    # Of a write the system does not name the file.
    is_here = cause.filename is None or Path(refused_file(cause)).is_relative_to(home)
    return os.strerror(cause.errno) if is_here else None


def _found_or_made(home: Path, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    folder = home / key
    if folder.is_dir():
        with contextlib.suppress(OSError):  # somebody else's, or gone this moment
            os.utime(folder)
        if _is_whole(folder):
            return folder, True
        shutil.rmtree(folder, ignore_errors=True)
    with scratch_folder(home) as scratch:
        make(scratch)
        write_json(scratch / _CONTENTS, [FileRef.of(path) for path in sorted(scratch.iterdir())])
        try:
            os.rename(scratch, folder)
        except OSError:
            # Another build finished the same stage first; its result is the same by construction.
            if not folder.is_dir():
                raise
            if not _is_whole(folder):
                raise ArtifactError(
                    f"{folder} is damaged and cannot be removed; set EDGESEG_CACHE to another folder"
                ) from None
    prune(keep=folder)
    return folder, False


def is_kept(stage: Stage, inputs: object) -> bool:
    """Whether :func:`cached_folder` would find what was made of these ``inputs``."""
    return _is_whole(stage_folder(stage) / sha256_json(inputs))


def _is_whole(folder: Path) -> bool:
    try:
        for file in read_json(folder / _CONTENTS, list[FileRef], "cache"):
            check_file(folder, file)
    except ArtifactError:
        return False
    return True


@dataclass(frozen=True)
class CacheContent:
    """What the cache holds.

    Attributes:
        folder: where; need not exist.
        size_bytes: of all files in it that are edgeseg's.
        max_size_bytes: least recently used results go when there is more.
        writable: whether results can be kept there; a folder that does not exist is made when it is needed.
    """

    folder: str
    size_bytes: int
    max_size_bytes: int
    writable: bool


def cache_content() -> CacheContent:
    """Look at the cache; nothing is made or changed."""
    home = cache_folder()
    there = next(path for path in (home, *home.absolute().parents) if os.path.lexists(path))
    writable = os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)
    size = sum(_size_bytes(stage_folder(stage)) for stage in get_args(Stage))
    return CacheContent(str(home), size, MAX_SIZE_BYTES, writable)


def clear() -> int:
    """Remove all that edgeseg keeps in the cache's folder, and the folder if it is empty then. Returns the bytes freed.

    What another process is making at this moment stays.

    Raises:
        ArtifactError: something cannot be removed.
    """
    home = cache_folder()
    stages = [folder for folder in map(stage_folder, get_args(Stage)) if folder.is_dir() and not folder.is_symlink()]
    before = sum(map(_size_bytes, stages))
    try:
        for folder in stages:
            sweep(folder)
            for path in folder.iterdir():
                if not path.name.startswith("."):
                    _remove(path)
        left = sum(map(_size_bytes, stages))
        for folder in (*stages, home):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as exc:
        raise ArtifactError(f"cannot clear the cache {home}: {exc.strerror}: {exc.filename}") from exc
    return before - left


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size_bytes(path: Path) -> int:
    """Of a file, or all files in a folder; what goes in this moment counts as nothing."""
    files = [Path(place, name) for place, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    size = 0
    for file in files:
        with contextlib.suppress(OSError):
            size += file.lstat().st_size
    return size


def prune(*, keep: Path | None = None, max_size_bytes: int = MAX_SIZE_BYTES) -> None:
    """Delete the least recently used results until the cache is no larger than ``max_size_bytes``."""
    used: list[tuple[float, Path]] = []
    for stage in get_args(Stage):
        with contextlib.suppress(OSError), os.scandir(stage_folder(stage)) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    with contextlib.suppress(OSError):
                        used.append((entry.stat(follow_symlinks=False).st_mtime, Path(entry.path)))
    total = 0
    for _, path in sorted(used, reverse=True):
        total += _size_bytes(path)
        if total > max_size_bytes and path != keep:
            # What another process removes or holds stays or goes without us.
            with contextlib.suppress(OSError):
                _remove(path)
