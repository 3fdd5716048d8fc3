"""Engine folders: plain files that their own tools open (Netron, onnxruntime, trtexec) and ``manifest.json`` beside them.

Folders appear by rename (:mod:`edgeseg.store.atomic`), so a folder that exists is complete; its hashes say whether it still is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeseg.console import printable
from edgeseg.errors import ArtifactError, StaleEngineError, refusals_as, typed
from edgeseg.store.atomic import atomic_folder, check_folder, listed_names, recover_folder
from edgeseg.store.documents import decode_versioned, read_bounded_json
from edgeseg.store.files import require_utf8
from edgeseg.store.hashing import FileRef, sha256_file
from edgeseg.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest


@dataclass(frozen=True)
class Engine:
    """An engine folder whose manifest and hashes were checked."""

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        # The manifest alone would fill a page.
        about = self.manifest
        return f"<Engine {self.folder}: {about.spec.in_words}, {about.precision.requested} for {about.target}>"

    def with_options(self, **options: Any) -> Engine:
        """The same engine, to be loaded with other settings of its backend than it was built with."""
        return replace(self, manifest=replace(self.manifest, options={**self.manifest.options, **options}))

    @property
    def engine_path(self) -> Path:
        if self.manifest.engine is None:
            # A graph for one kind of CPU is compiled there; TensorRT's is for whatever GPU is at hand.
            scheme = self.manifest.scheme or ""
            where = f" ({scheme}); run on its device" if scheme.startswith(("onnxruntime", "openvino")) else "; run"
            raise StaleEngineError(f"{self.folder} holds a portable graph only{where}: {typed('compile', self.folder)}")
        return self.folder / self.manifest.engine.name

    @property
    def graph_path(self) -> Path:
        return self.folder / self.manifest.graph.name


def folder_of(path: Path) -> Path:
    """The engine folder given, or that of the file given: people give ``engine.onnx`` or ``manifest.json``."""
    return path.parent if os.path.isfile(path) and os.path.isfile(path.parent / MANIFEST_NAME) else path


def engine_folder(target: Path, *, force: bool) -> AbstractContextManager[Path]:
    """Yield a scratch folder that becomes the engine folder ``target``; see :func:`edgeseg.store.atomic.atomic_folder`."""
    return atomic_folder(target, force=force, ours=engine_files)


def check_engine_folder(target: Path, *, force: bool) -> None:
    """Refuse, before the work, what :func:`engine_folder` would refuse after it."""
    require_utf8(os.path.abspath(target), "ONNX", ArtifactError)
    check_folder(target, force=force, ours=engine_files)


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _AnyCandidate:
    graph: _Named | None = None


@dataclass(frozen=True)
class _AnySearch:
    candidates: tuple[_AnyCandidate, ...] = ()


@dataclass(frozen=True)
class _AnyManifest:
    """What manifests of all versions have, and others' do not."""

    edgeseg_version: str
    graph: _Named
    engine: _Named | None = None
    calibration: _Named | None = None
    extra_files: tuple[_Named, ...] = ()
    search: _AnySearch | None = None


def engine_files(folder: Path) -> frozenset[str] | None:
    """The names that edgeseg wrote in ``folder``; ``None`` when it is not empty and none of edgeseg's engine folders."""
    return listed_names(folder, MANIFEST_NAME, _AnyManifest, _names_in)


def engine_paths(folder: Path) -> list[Path]:
    """Where the files of :func:`engine_files` are; none in what is no engine folder."""
    return [folder / name for name in sorted(engine_files(folder) or ())]


def _names_in(manifest: _AnyManifest) -> Iterator[str]:
    searched = (candidate.graph for candidate in manifest.search.candidates) if manifest.search is not None else ()
    files = (manifest.graph, manifest.engine, manifest.calibration, *manifest.extra_files, *searched)
    return (file.name for file in files if file is not None)


@refusals_as(ArtifactError)
def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of an engine folder without checking the files beside it.

    Raises:
        ArtifactError: no folder, no manifest, a damaged one, or one of a newer schema.
    """
    path = folder / MANIFEST_NAME
    data = _manifest_bytes(path)
    if data is None:
        what = "no such folder" if not folder.exists() else f"no {MANIFEST_NAME} in it"
        raise ArtifactError(
            f"{folder} is not an engine folder ({what}); make one with: {typed('build', '--output', folder)}"
        )
    return decode_versioned(data, path, Manifest, "manifest", SCHEMA_VERSION, "build the engine again")


def _manifest_bytes(path: Path) -> bytes | None:
    for _ in range(3):  # a folder that is replaced again and again can be missed more than once
        if path.is_file():
            try:
                return read_bounded_json(path, "manifest")
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise ArtifactError(f"cannot read manifest {path}: {exc.strerror}") from exc
        recover_folder(path.parent, engine_files)
    return None


def open_engine(folder: Path) -> Engine:
    """Read an engine folder and check every file's hash against the manifest.

    Raises:
        ArtifactError: see :func:`read_manifest`; or a file is missing, edited or truncated.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            for ref in manifest.files:
                check_file(folder, ref)
        except ArtifactError:
            # The folder may have been replaced since its manifest was read.
            before, manifest = manifest, read_manifest(folder)
            if manifest == before:
                raise
        else:
            return Engine(folder, manifest)


@refusals_as(ArtifactError)
def check_file(folder: Path, ref: FileRef) -> None:
    """Raise :class:`ArtifactError` unless the file is in the folder with the size and hash of ``ref``."""
    if printable(ref.name) != ref.name:
        raise ArtifactError(
            f"manifest of {folder} names a file {ref.name!r}, which none of edgeseg's is; build it again"
        )
    # A manifest is untrusted input: a name with a directory in it would reach outside the folder.
    if ref.name != Path(ref.name).name or ref.name in {"", ".", ".."}:
        raise ArtifactError(
            f"manifest of {folder} names a file outside the folder: {ref.name!r}; do not use this folder"
        )
    path = folder / ref.name
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{folder} lacks {ref.name}, which its manifest lists; build it again")
    try:
        size, sha256 = path.stat().st_size, None
        if size == ref.size_bytes:
            sha256 = sha256_file(path)
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}") from exc
    if sha256 is None:
        raise ArtifactError(
            f"{path} has {size} bytes, its manifest says {ref.size_bytes}: truncated or edited; build it again"
        )
    if sha256 != ref.sha256:
        raise ArtifactError(
            f"{path} does not have the hash its manifest vouches for: edited or damaged; build it again"
        )
