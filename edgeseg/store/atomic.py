"""Folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from edgeseg.errors import ArtifactError
from edgeseg.store.artifacts import MANIFEST_NAME


def refuse_existing_folder(target: Path, *, force: bool) -> None:
    """Raise :class:`ArtifactError` if an engine folder may not be written to ``target``."""
    if target.exists() and not force:
        raise ArtifactError(f"{target} exists; give --force to replace it, or another --output")
    if target.exists() and not (target.is_dir() and ((target / MANIFEST_NAME).is_file() or not any(target.iterdir()))):
        raise ArtifactError(f"{target} is not an engine folder and is not empty; edgeseg will not replace it")


@contextmanager
def atomic_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``target`` that becomes ``target`` when the block succeeds.

    On any exception, Ctrl-C included, the scratch folder is removed, and so are the folders made to hold it. What a
    killed process left behind is removed by the next build of the same folder. A lock keeps two builds of one folder
    apart.

    Raises:
        ArtifactError: ``target`` exists and ``force`` is false; another build holds it; the disk is full or read-only.
    """
    target = Path(os.path.abspath(target))
    refuse_existing_folder(target, force=force)
    made = [parent for parent in (target.parent, *target.parent.parents) if not parent.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as exc:
            # What /proc and some network file systems answer.
            raise ArtifactError(f"cannot make folder {target.parent}; give another --output") from exc
        lock = filelock.FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ArtifactError(f"another build is writing {target}; wait for it, or give another --output") from None
        try:
            for stale in target.parent.glob(f".{target.name}.partial-*"):
                shutil.rmtree(stale)
            scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
            try:
                yield scratch
                os.chmod(scratch, 0o755)
                _replace_folder(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
            if not target.exists():
                _remove_empty(made)
    except OSError as exc:
        if exc.errno in {
            errno.ENOSPC,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EDQUOT,
            errno.EFBIG,
            errno.ENOTDIR,
            errno.EEXIST,
        }:
            raise ArtifactError(
                f"cannot write {target}: {os.strerror(exc.errno)}; free space or give another --output"
            ) from exc
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to one that something else is in by now."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _replace_folder(scratch: Path, target: Path) -> None:
    if target.exists():
        # rename cannot replace a non-empty directory: the old one moves aside, and back if the second step fails.
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-old-"))
        os.rename(target, aside / "old")
        try:
            os.rename(scratch, target)
        except BaseException:
            os.rename(aside / "old", target)
            raise
        shutil.rmtree(aside)
    else:
        os.rename(scratch, target)
