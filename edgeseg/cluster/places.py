"""Folders and buckets: what is read and written by fsspec, and what is a path that every node sees."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeseg.errors import EdgesegError, InputError, SpecError, imported, one_line

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_LOCAL = ("file://", "local://")
# An object of these appears when all of it is there; of others a file could be seen half written.
_WHOLE_OR_NOT_AT_ALL = frozenset({"abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oss", "r2", "s3", "s3a"})
# What tells one content of an object from another, by the names different stores give it; the first that is there.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5"),
    *("LastModified", "last_modified", "updated", "mtime", "modified", "created"),
)


def is_url(text: str) -> bool:
    """Whether ``text`` names a place by protocol, such as ``s3://bucket/photos``; ``file://`` is a path like any other."""
    return _URL.match(text) is not None and not text.startswith(_LOCAL)


def without_protocol(text: str) -> str:
    """A path given as ``file:///data`` as ``/data``; others as they are."""
    return next((text.removeprefix(word) for word in _LOCAL if text.startswith(word)), text)


@dataclass(frozen=True)
class Object:
    """A file in a bucket: its URL, and what changes with its content."""

    url: str
    stamp: str


class Bucket:
    """A place that fsspec reaches.

    Args:
        url: ``PROTOCOL://...``; credentials come from the environment, as the protocol's package takes them.

    Raises:
        MissingDependencyError: fsspec is not installed.
        InputError: the protocol's package is not, or refuses.
        SpecError: no such protocol.
    """

    def __init__(self, url: str) -> None:
        fsspec = imported("fsspec", "cluster", f"reach {url}")
        self.url = url.rstrip("/")
        try:
            # A listing that is kept would hold every name a second time.
            self.files, self.path = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as exc:
            raise InputError(f"cannot reach {url}: {one_line(exc)}") from exc
        except ValueError as exc:
            raise SpecError(f"cannot reach {url}: {one_line(exc)}; give a path, or a protocol fsspec knows") from exc
        except Exception as exc:
            raise _unreachable(url, exc) from exc

    @cached_property
    def _is_whole_or_not_at_all(self) -> bool:
        protocol = self.files.protocol
        return not _WHOLE_OR_NOT_AT_ALL.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)

    def listed(self) -> Iterator[Object]:
        """The files of this folder (not of those within), the matches of this glob, or this one file; in no order.

        Raises:
            InputError: nothing there, or the store refuses.
        """
        try:
            if glob.has_magic(self.path):
                infos = self.files.glob(self.path, detail=True).values()
            else:
                info = self.files.info(self.path)
                infos = [info] if info["type"] == "file" else self.files.ls(self.path, detail=True)
        except FileNotFoundError as exc:
            raise InputError(f"{self.url} does not exist; give an image, a folder or a glob") from exc
        except EdgesegError:
            raise
        except Exception as exc:
            raise _unreachable(self.url, exc) from exc
        for info in infos:
            if info["type"] == "file":
                yield Object(str(self.files.unstrip_protocol(info["name"])), _stamp(info))

    def names(self, folder: str) -> Iterator[str]:
        """Names of the files in ``folder`` below this place; none where there is no such folder."""
        try:
            infos = self.files.ls(f"{self.path}/{folder}", detail=True)
        except FileNotFoundError:
            return
        except Exception as exc:
            raise _unreachable(f"{self.url}/{folder}", exc) from exc
        for info in infos:
            if info["type"] == "file":
                yield info["name"].rsplit("/", 1)[-1]

    def read(self, name: str) -> bytes:
        """The content of a file below this place."""
        try:
            data: bytes = self.files.cat_file(f"{self.path}/{name}")
        except Exception as exc:
            raise _unreachable(f"{self.url}/{name}", exc) from exc
        return data

    def write(self, name: str, data: bytes) -> None:
        """Write a file below this place; it appears whole or not at all."""
        with self._appearing(name) as path:
            self.files.pipe_file(path, data)

    def upload(self, name: str, file: Path) -> None:
        """Copy a file of this machine to ``name`` below this place; it appears whole or not at all."""
        with self._appearing(name) as path:
            self.files.put_file(str(file), path)

    @contextlib.contextmanager
    def _appearing(self, name: str) -> Iterator[str]:
        path = f"{self.path}/{name}"
        folder, _, last = path.rpartition("/")
        part = path if self._is_whole_or_not_at_all else f"{folder}/.edgeseg-partial-{secrets.token_hex(8)}-{last}"
        try:
            if part != path:  # a store of objects has no folders
                self.files.makedirs(folder, exist_ok=True)
            yield part
            if part != path:
                self.files.mv(part, path)
        except Exception as exc:
            if part != path:
                with contextlib.suppress(Exception):
                    self.files.rm_file(part)
            raise InputError(f"cannot write {self.url}/{name}: {one_line(exc)}; see to it and run again") from exc


def download(url: str, file: Path) -> None:
    """Copy an image of a bucket to a file of this machine.

    Raises:
        InputError: it is not there any more, or the store refuses.
    """
    bucket = Bucket(url)
    try:
        bucket.files.get_file(bucket.path, str(file))
    except FileNotFoundError as exc:
        raise InputError(f"cannot read image {url}: it does not exist") from exc
    except Exception as exc:
        raise InputError(f"cannot read image {url}: {one_line(exc)}") from exc


def file_stamp(path: str | os.DirEntry[str]) -> str:
    """What changes with the content of a file of this machine: size and time of the last change; empty where it is gone."""
    try:
        status = path.stat() if isinstance(path, os.DirEntry) else os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _stamp(info: dict[str, Any]) -> str:
    version = next((info[name] for name in _VERSIONS if info.get(name)), "")
    return f"{info.get('size')}-{version}"


def _unreachable(url: str, error: Exception) -> InputError:
    # Stores and their clients raise whatever they like.
    return InputError(
        f"cannot reach {url}: {type(error).__name__}: {one_line(error)}; check the name and the credentials"
    )
