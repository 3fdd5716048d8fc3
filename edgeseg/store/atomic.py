"""Files and folders that appear complete or not at all: the one place where edgeseg locks, renames and removes.

What is half done lies beside its target under a name that begins with a dot, and goes with the next write there when its
writer was killed. A file or folder is replaced in one step, so that whoever reads meanwhile gets the old or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from edgeseg.errors import ArtifactError, refused_file
from edgeseg.store.files import is_stream, open_descriptor, refuse_existing, why_not_made

T = TypeVar("T")
Ours = Callable[[Path], "Collection[str] | None"]
"""The files in a folder that edgeseg wrote, as paths with ``/`` from there; ``None`` for a folder that is none of edgeseg's."""

PLACE_ERRORS = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EBUSY,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""What the place is to blame for, whoever met it."""


class HeldError(Exception):
    """Another process, or another thread of this one, holds the lock."""


@contextmanager
def lock(path: Path, *, timeout_s: float | None = None) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; it is gone afterwards.

    Raises:
        HeldError: someone else held it all the time.
        OSError: the file cannot be made.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for(handle, timeout_s)
            held = _is_at(handle, path)
        except BaseException:
            os.close(handle)
            raise
        if held:
            break
        # Its last holder removed the file while we waited for it: another one may have the name by now.
        os.close(handle)
    try:
        yield
    finally:
        # Removed while it is held, never after: who waits for it notices, see above.
        if _is_at(handle, path):
            os.unlink(path)
        os.close(handle)


def _wait_for(handle: int, timeout_s: float | None) -> None:
    if timeout_s is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + timeout_s
    while not _try_lock(handle):
        if time.monotonic() >= deadline:
            raise HeldError
        time.sleep(0.02)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def write_bytes(path: Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file: whoever reads it meanwhile gets the old content or the new. Streams are written to.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        OSError: the place cannot be written.
    """
    if not is_stream(path):
        with replacing(path, overwrite=overwrite) as part:
            part.write_bytes(data)
        return
    if str(path) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    number = open_descriptor(path)
    with path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as stream:
        stream.write(data)


@contextmanager
def replacing(path: Path, *, overwrite: bool = True, suffix: str = "") -> Iterator[Path]:
    """Yield an empty file beside ``path`` that becomes ``path`` when the block succeeds, and is gone otherwise.

    Its folder is made if need be. Where ``path`` is a symbolic link, the file it leads to is replaced.

    Raises:
        OutputExistsError: the file exists and ``overwrite`` is false.
        OSError: the place cannot be written, or there is something else than a file.
    """
    path = Path(os.path.realpath(path))
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    part, handle = _own_partial(path.parent, suffix)
    try:
        yield part
        if overwrite:
            os.replace(part, path)
        else:
            _publish_new(part, path)
    finally:
        part.unlink(missing_ok=True)
        os.close(handle)


def _own_partial(folder: Path, suffix: str) -> tuple[Path, int]:
    """A new file that is locked for as long as it is written: a lock outlives no process, whatever ends it."""
    while True:
        part = _partial(folder, suffix)
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        if _is_own(handle, part):
            return part, handle
        os.close(handle)


def _partial(folder: Path, suffix: str = "") -> Path:
    """A name in ``folder`` for what is half done; what has such a name and is not locked is rubbish."""
    return folder / f".edgeseg-partial-{secrets.token_hex(8)}{suffix}"


_PARTIAL = re.compile(r"\.edgeseg-partial-[0-9a-f]{16}(\.\w+)?")


def _is_own(handle: int, path: Path) -> bool:
    """Lock what was just made; false when somebody who sweeps was faster."""
    try:
        locked = _try_lock(handle)
    except OSError:
        locked = True  # a file system without locks: nobody sweeps there either
    return locked and _is_at(handle, path)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            is_folder = entry.is_dir(follow_symlinks=False)
            if _PARTIAL.fullmatch(entry.name) and (is_folder or entry.is_file(follow_symlinks=False)):
                _remove_unlocked(entry.path, is_folder)


_sweep_once = functools.cache(sweep)
"""Of a folder that many files are written to."""


def _remove_unlocked(path: str, is_folder: bool) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR)
        try:
            if not _try_lock(handle):
                return
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        finally:
            os.close(handle)


def _publish_new(part: Path, path: Path) -> None:
    try:
        # Unlike a rename, a link fails if someone else made the file meanwhile.
        os.link(part, path)
    except FileExistsError:
        refuse_existing(path, False)
        raise
    except OSError:
        # File systems without hard links (FAT on an SD card).
        refuse_existing(path, False)
        os.replace(part, path)


def listed_names(
    folder: Path, listing: str, kind: type[T], names: Callable[[T], Iterable[str]]
) -> frozenset[str] | None:
    """What edgeseg wrote in ``folder`` by its file ``listing``, of type ``kind``; that file is one of them.

    Returns:
        the files, see :data:`Ours`; none for an empty folder; ``None`` for one that is not empty and has no such file.
    """
    try:
        listed = msgspec.json.decode((folder / listing).read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        try:
            return None if any(folder.iterdir()) else frozenset()
        except OSError:
            return None  # who cannot look into it cannot know
    return frozenset({listing, *names(listed)})


def check_folder(target: Path, *, force: bool, ours: Ours) -> None:
    """Refuse, before the work, a folder that :func:`atomic_folder` would not replace.

    Raises:
        OutputExistsError: ``target`` exists and ``force`` is false.
        ArtifactError: it is a file, or holds something that is none of edgeseg's; no folder can be made there.
    """
    if not os.path.exists(target):
        _check_place(target)
        return
    refuse_existing(target, force)
    if not os.path.isdir(target):
        raise ArtifactError(f"{target} is a file; edgeseg replaces engine folders only: give another --output")
    if ours(target) is None:
        raise ArtifactError(
            f"{target} is not empty, and not what edgeseg would write there; it is left as it is: give another --output"
        )


def _check_place(target: Path) -> None:
    """Refuse a new folder where the system would not make one, or not what it replaces beside it."""
    if (why := why_not_made(target) or why_not_made(_sibling(target))) is not None:
        raise ArtifactError(f"cannot write {target}: {why}; give another --output")


@contextmanager
def atomic_folder(target: Path, *, force: bool, ours: Ours) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``target`` that becomes ``target`` when the block succeeds.

    Files of a replaced folder that are not ``ours`` stay in it. On any exception, Ctrl-C included, the scratch folder is
    removed, and so are the folders made to hold it. What a killed process left behind is put right by the next call. A lock
    keeps two writers of one folder apart. Where ``target`` is a symbolic link, the folder it leads to is replaced.

    Raises:
        OutputExistsError: ``target`` exists and ``force`` is false.
        ArtifactError: see :func:`check_folder`; another build holds it; the disk is full or read-only; a file that is not
            ours has the name of a new one.
    """
    asked, target = target, Path(os.path.realpath(target))
    check_folder(target, force=force, ours=ours)
    made = [parent for parent in (target.parent, *target.parent.parents) if not os.path.exists(parent)]
    try:
        with contextlib.ExitStack() as held:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                # Not at once: a reader may hold it for the blink of an eye, see recover_folder.
                held.enter_context(lock(_lock_path(target), timeout_s=0.2))
            except FileNotFoundError as exc:
                # What /proc and some network file systems answer.
                raise ArtifactError(f"cannot make folder {target.parent}; give another --output") from exc
            except HeldError as exc:
                raise ArtifactError(f"another build is writing {asked}; wait for it, or give another --output") from exc
            _put_right(target, ours)
            check_folder(target, force=force, ours=ours)
            try:
                with scratch_folder(target.parent) as scratch:
                    yield scratch
                    _publish(scratch, target, ours)
            finally:
                _put_right(target, ours)
    except OSError as exc:
        if exc.errno in PLACE_ERRORS:
            place = asked if exc.filename is None or _is_of(refused_file(exc), target) else refused_file(exc)
            raise ArtifactError(
                f"cannot write {place}: {os.strerror(exc.errno)}; free space or give another --output"
            ) from exc
        raise
    finally:
        if not os.path.exists(target):
            _remove_empty(made)


def _is_of(name: str, target: Path) -> bool:
    """Whether a file name is of what is made on the way to ``target``, or of a folder above it."""
    path = Path(os.path.abspath(name))
    if target.is_relative_to(path) or not path.is_relative_to(target.parent):
        return target.is_relative_to(path)
    beside = path.relative_to(target.parent).parts[0]
    return beside.startswith(f".{target.name}.") or _PARTIAL.fullmatch(beside) is not None


def recover_folder(target: Path, ours: Ours) -> None:
    """Give a folder its name back that lost it between two renames, or wait while another process does so.

    Only where :func:`_exchange` cannot be had is there such a moment.
    """
    target = Path(os.path.realpath(target))
    patience = time.monotonic() + 2.0
    while not os.path.exists(target) and _replaced(target) and time.monotonic() < patience:
        try:
            with lock(_lock_path(target), timeout_s=0):
                _put_right(target, ours)
        except HeldError:
            time.sleep(0.01)
        except OSError:
            return  # a place that cannot be written: the caller says that the folder is missing


def _lock_path(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


def _replaced(target: Path) -> list[Path]:
    """The folders beside ``target`` whose place it took, or is to take."""
    name = re.compile(rf"\.{re.escape(target.name)}\.replaced-[0-9a-f]{{16}}")
    try:
        with os.scandir(target.parent) as entries:
            return [Path(e.path) for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _publish(scratch: Path, target: Path, ours: Ours) -> None:
    """Let ``scratch`` take the name ``target``. What was there is left as ``.NAME.replaced-...`` for :func:`_put_right`."""
    if not os.path.exists(target) or not os.listdir(target):
        os.rename(scratch, target)
        return
    known = ours(target)
    if known is not None and (path := _in_the_way(scratch, target, known)) is not None:
        raise ArtifactError(f"{path} is not edgeseg's and would be replaced; move it away and try again")
    replaced = _sibling(target)
    # From here on both folders are whole, and whichever is called "replaced" when this process is killed, nothing is lost.
    os.rename(scratch, replaced)
    if not _exchange(replaced, target):
        os.rename(target, _sibling(target))
        os.rename(replaced, target)


def _in_the_way(scratch: Path, target: Path, known: Collection[str]) -> Path | None:
    """What lies in ``target`` where a file or folder of ``scratch`` is to be, and is none of ``known``."""
    for folder, _, names in os.walk(scratch):
        inside = target / Path(folder).relative_to(scratch)
        is_folder = inside.is_dir() and (inside == target or not inside.is_symlink())
        for path in (inside / name for name in sorted(names)) if is_folder else (inside,):
            if os.path.lexists(path) and path.relative_to(target).as_posix() not in known:
                return path
    return None


def _sibling(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced-{secrets.token_hex(8)}"


def _put_right(target: Path, ours: Ours) -> None:
    """Tidy up after a replacement, or after one that was killed on the way. The lock must be held."""
    for replaced in _replaced(target):
        if not os.path.exists(target):
            os.rename(replaced, target)
            continue
        known = ours(replaced)
        if known is None:
            continue  # not to be told apart from what somebody wants to keep
        _keep_others(replaced, target, known)
        # Under its new name it is rubbish, half removed or not.
        rubbish = _partial(target.parent)
        os.rename(replaced, rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)


def _keep_others(replaced: Path, target: Path, known: Collection[str], within: str = "") -> None:
    """Move what is none of ``known`` to the folder that took the place, into the same folders."""
    for name in os.listdir(replaced / within):
        path = f"{within}{name}"
        source = replaced / path
        if path in known:
            continue
        if any(other.startswith(f"{path}/") for other in known) and source.is_dir() and not source.is_symlink():
            _keep_others(replaced, target, known, f"{path}/")
            continue
        (target / within).mkdir(parents=True, exist_ok=True)
        # A name that was given again after a kill: both are kept.
        again = f".{secrets.token_hex(4)}" if os.path.lexists(target / path) else ""
        os.rename(source, target / f"{path}{again}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the C library, the kernel or the file system cannot (NFS, FAT)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and (
        renameat2(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(exchange)) == 0
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, up to one that something else is in by now."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new empty folder in ``parent``, made if need be, that is removed at the end unless it has another name by then.

    Those of killed processes are removed first. Raises ``OSError`` when the place cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    scratch, handle = _own_folder(parent)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(handle)


def _own_folder(parent: Path) -> tuple[Path, int]:
    while True:
        scratch = _partial(parent)
        scratch.mkdir()
        try:
            handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        if _is_own(handle, scratch):
            return scratch, handle
        os.close(handle)
