"""What a sweep has done: per cell the hash of everything its engine was made from, so that only what changed is redone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseg.errors import ArtifactError, InputError
from edgeseg.images.decoding import list_images
from edgeseg.store.cache import software
from edgeseg.store.documents import read_json, write_json
from edgeseg.store.engine import check_engine_folder, open_engine
from edgeseg.store.files import check_outputs
from edgeseg.store.hashing import sha256_file, sha256_json
from edgeseg.sweep.config import Cell

UNFINISHED = "its build was begun and did not end"
_REPORTS = ".reports.json"


@dataclass(frozen=True)
class CellState:
    """Outcome of one cell's build; ``reason`` why there is no engine, ``None`` when there is one."""

    name: str
    key: str
    seconds: float
    reason: str | None = None


def cell_key(cell: Cell) -> str:
    """SHA-256 over the request, the content of the weights and images it names, and the versions that take part."""
    request = cell.request
    return sha256_json(
        {
            "request": _plain(request),
            "weights": _content(request.model.weights),
            "calibration": _content(request.calibration),
            "validation": _content(request.validation),
            "latency_from": _content(request.latency_from),
            "software": software(),
        }
    )


def _plain(request: Any) -> str:
    # A dataclass's repr names every field; the folder is where the result goes, not what it is.
    return repr(request).replace(repr(request.folder), "")


def _content(place: str | Path | None) -> str | None:
    """SHA-256 of a file, over the names and content of a folder's files, or of all images that a list or a glob names.

    ``None`` for what is no path.
    """
    if place is None:
        return None
    path = Path(place)
    try:
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file() and path.suffix.lower() != ".txt":
            files = [path]
        else:
            files = [path] * path.is_file() + list_images(path)
    except InputError:
        return None  # a word, or images that are not there, which the build itself refuses
    digest = hashlib.sha256()
    for file in files:
        content = sha256_file(file) if file.is_file() else None
        digest.update(f"{os.path.relpath(file, path.parent)} {content}\n".encode())
    return digest.hexdigest()


def state_path(cell: Cell) -> Path:
    """Where the outcome of a cell is kept, beside the sweep's engines."""
    return cell.folder.parent.parent / "cells" / f"{cell.name}.json"


def is_done(cell: Cell, key: str) -> bool:
    """Whether the cell's engine was made from exactly these inputs and is still whole."""
    path = state_path(cell)
    if not path.is_file():
        return False
    try:
        state = read_json(path, CellState, "sweep state")
        open_engine(cell.folder)
    except ArtifactError:
        # Damaged or edited since: it is made again, which is what the user would have to ask for.
        return False
    return state.key == key and state.reason is None


def remember(cell: Cell, state: CellState) -> None:
    """Write down how the cell's build ended."""
    path = state_path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, state)


def check_ours(cells: Iterable[Cell], reports: Iterable[Path], *, force: bool) -> None:
    """Refuse, before the work, engine folders and reports in the way that no sweep of this folder wrote, or that were edited.

    Args:
        cells: of the sweep.
        reports: files to be written, all in the sweep's folder.
        force: they may be replaced.

    Raises:
        OutputExistsError: there is one and ``force`` is false.
        ArtifactError: a folder that is no engine's, or a file, is where an engine shall be.
        SpecError: a folder or a device is where a report shall be.
    """
    for cell in cells:
        check_engine_folder(cell.folder, force=force or state_path(cell).is_file())
    for path in reports:
        check_outputs([path], force=force or _is_ours(path))


def _is_ours(report: Path) -> bool:
    state = report.parent / _REPORTS
    if not state.is_file() or not report.is_file():
        return False
    try:
        written = read_json(state, dict[str, str], "sweep state")
    except ArtifactError:
        return False
    return written.get(report.name) == sha256_file(report)


def remember_reports(reports: Iterable[Path]) -> None:
    """Write down the content of the reports a sweep has written, so that the next run may replace them."""
    written = [path for path in reports if path.is_file()]
    for folder in {path.parent for path in written}:
        write_json(folder / _REPORTS, {path.name: sha256_file(path) for path in written if path.parent == folder})


def bench_key(cells: tuple[Cell, ...], options: tuple[str, ...], data: Path | None) -> str:
    """SHA-256 over the engines to be measured, how, on which images, and on what."""
    engines = [[cell.name, open_engine(cell.folder).manifest.engine_key] for cell in cells]
    return sha256_json([engines, options, _content(data), software()])
