"""Which images a run has, under which names their masks are written, and what became of each: on disk, not in memory.

A list of millions of files would fill gigabytes as Python objects; SQLite sorts it, tells names apart and keeps it in a
scratch file of some hundred bytes an image.
"""

from __future__ import annotations

import glob
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeseg.closing import Closing
from edgeseg.cluster.places import Bucket, file_stamp, is_url, without_protocol
from edgeseg.cluster.worker import Outcome
from edgeseg.errors import ArtifactError, InputError, SpecError
from edgeseg.images.decoding import IMAGE_SUFFIXES, glob_matches, list_images
from edgeseg.runtime.outputs import first_free, told_apart
from edgeseg.runtime.sources import VIDEO_SUFFIXES, camera_index

_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
# The transaction that begins here never ends: nobody else reads the file, and nothing of it outlives the run.
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE listed (input INTEGER, key BLOB, identity BLOB, source BLOB, stem BLOB, stamp TEXT);
CREATE TABLE image (
    position INTEGER PRIMARY KEY, identity BLOB UNIQUE, source BLOB, stem BLOB, stamp TEXT,
    name BLOB, state INTEGER DEFAULT 0, reason TEXT
);
CREATE TABLE taken (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE there (name BLOB PRIMARY KEY) WITHOUT ROWID;
BEGIN;
"""
_NEW, _BEGUN, _DONE_BEFORE, _DONE, _DONE_RASTER, _FAILED = range(6)


@dataclass(frozen=True)
class Image:
    """One input of a run.

    Attributes:
        position: in the order of the run, from 1.
        source: path or URL as given.
        identity: what the ledger knows it by: the real path, or the URL.
        stamp: what changes with its content.
        name: of its mask, without suffix.
        state: what was known of it when it was looked up.
    """

    position: int
    source: str
    identity: str
    stamp: str
    name: str
    state: int

    @property
    def begun(self) -> bool:
        """Whether an earlier run has begun it, so that what is there under its name is ours."""
        return self.state == _BEGUN

    @property
    def is_raster(self) -> bool:
        """Whether this run has segmented it as a raster."""
        return self.state == _DONE_RASTER

    @property
    def place(self) -> str:
        """The URL, or the path from wherever one looks."""
        return self.source if is_url(self.source) else os.path.abspath(self.source)


class Plan(Closing):
    """The images of ``inputs``, each once, in the order and with the names of a run on one machine.

    Args:
        inputs: files, folders, globs, ``.txt`` lists, and URLs of files, folders and globs that fsspec reaches.

    Raises:
        InputError: nothing there, or it cannot be listed.
        SpecError: a video or a camera.
        ArtifactError: no space for the list.
    """

    def __init__(self, inputs: Iterable[str | Path | int]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="edgeseg-plan-")
        try:
            with _clear_errors():
                self._db = sqlite3.connect(Path(self._folder.name) / "plan.db", isolation_level=None)
                self._db.executescript(_TABLES)
                for number, item in enumerate(inputs):
                    rows = (self._row(number, *row) for row in _listed(item))
                    self._db.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._db.execute(
                    "INSERT OR IGNORE INTO image (identity, source, stem, stamp) "
                    "SELECT identity, source, stem, stamp FROM listed ORDER BY input, key, source"
                )
                self._db.execute("DROP TABLE listed")
                self._name()
            self.images = self._count(_NEW)
            if not self.images:
                raise InputError("no input; give images, folders, globs, or URLs of them")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the scratch file."""
        if hasattr(self, "_db"):
            self._db.close()
        self._folder.cleanup()

    @staticmethod
    def _row(
        number: int, key: bytes, identity: str, source: str, stamp: str
    ) -> tuple[int, bytes, bytes, bytes, bytes, str]:
        if Path(source).suffix.lower() in VIDEO_SUFFIXES:
            raise SpecError(f"{source} is a video, and a cluster takes images; segment it without --executor ray")
        stem = os.fsencode(Path(source).stem.casefold())
        return number, key, os.fsencode(identity), os.fsencode(source), stem, stamp

    def _name(self) -> None:
        """Give every image its name, as :func:`edgeseg.runtime.outputs.unique_names` does; its stem needs no noting."""
        db = self._db
        db.execute("CREATE INDEX by_stem ON image (stem)")
        shared = [stem for (stem,) in db.execute("SELECT stem FROM image GROUP BY stem HAVING COUNT(*) > 1")]
        for stem in shared:
            rows = db.execute("SELECT position, source FROM image WHERE stem = ? ORDER BY position", (stem,)).fetchall()
            names = told_apart([Path(os.fsdecode(source)) for _, source in rows])
            db.executemany(
                "UPDATE image SET name = ? WHERE position = ?",
                [(os.fsencode(name), position) for (position, _), name in zip(rows, names, strict=True)],
            )
        db.execute("DROP INDEX by_stem")

        def take(name: str) -> bool:
            return db.execute("INSERT OR IGNORE INTO taken VALUES (?)", (os.fsencode(name),)).rowcount == 1

        numbers: dict[str, int] = {}
        for rows in self._pages("position, source, name", f"state = {_NEW}"):
            changed = []
            for position, source, name in rows:
                wanted = Path(os.fsdecode(source)).stem if name is None else os.fsdecode(name)
                if (free := first_free(wanted, take, numbers)) != wanted:
                    changed.append((os.fsencode(free), position))
            db.executemany("UPDATE image SET name = ? WHERE position = ?", changed)
        db.execute("DELETE FROM taken")

    def _pages(self, columns: str, where: str) -> Iterator[list[tuple[Any, ...]]]:
        """Rows in order, some at a time, so that what is read may be changed meanwhile; the first column is the position."""
        last = 0
        while True:
            query = f"SELECT {columns} FROM image WHERE {where} AND position > ? ORDER BY position LIMIT 1024"
            rows = self._db.execute(query, (last,)).fetchall()
            if not rows:
                return
            yield rows
            last = rows[-1][0]

    def _count(self, state: int) -> int:
        (count,) = self._db.execute("SELECT COUNT(*) FROM image WHERE state = ?", (state,)).fetchone()
        return int(count)

    def _all(self, where: str) -> Iterator[Image]:
        for rows in self._pages("position, source, identity, stamp, name, state", where):
            yield from (_image(*row) for row in rows)

    # What an earlier run did, by its ledger.

    def begun(self, identities: Sequence[str], *, ours: bool) -> None:
        """Note images of the ledger: what is there under their names was written by this run, or by one that is another."""
        state = _BEGUN if ours else _NEW
        self._db.executemany(
            "UPDATE image SET state = ? WHERE identity = ?", [(state, os.fsencode(text)) for text in identities]
        )

    def done(self, records: Sequence[tuple[str, str, str]]) -> None:
        """Note images of the ledger as (identity, stamp, name) that need not be done again."""
        for identity, stamp, name in records:
            row = self._db.execute(
                "SELECT position, source, name FROM image WHERE identity = ? AND stamp = ? AND state = ?",
                (os.fsencode(identity), stamp, _BEGUN),
            ).fetchone()
            if row is not None and _name_of(row[1], row[2]) == name:
                self._db.execute("UPDATE image SET state = ? WHERE position = ?", (_DONE_BEFORE, row[0]))

    def check_outputs(
        self,
        there: Iterable[str],
        outputs: Callable[[Image], Sequence[Sequence[str]]],
        refuse: Callable[[Image, str], None],
    ) -> int:
        """Compare with the outputs that are there, before the work.

        Args:
            there: names of the files below the place of the outputs.
            outputs: of an image: as many sets as there are ways to segment it, each of which is a whole answer.
            refuse: called for every output that is there and is to be written (again).

        Returns:
            how many images were done before: by the ledger, and all their outputs are there.
        """
        with _clear_errors():
            self._db.executemany("INSERT OR IGNORE INTO there VALUES (?)", ((os.fsencode(name),) for name in there))
            (some,) = self._db.execute("SELECT EXISTS (SELECT 1 FROM there)").fetchone()
            if not some:
                self._db.execute("UPDATE image SET state = ? WHERE state = ?", (_BEGUN, _DONE_BEFORE))
                return 0
            for image in self._all("1"):
                sets = outputs(image)
                present = {output for wanted in sets for output in wanted if self._is_there(output)}
                if image.state != _DONE_BEFORE:
                    for output in sorted(present):
                        refuse(image, output)
                elif not any(present.issuperset(wanted) for wanted in sets):
                    self._db.execute("UPDATE image SET state = ? WHERE position = ?", (_BEGUN, image.position))
            self._db.execute("DROP TABLE there")
            return self._count(_DONE_BEFORE)

    def holds(self, identity: str) -> bool:
        """Whether a file is one of the images."""
        row = self._db.execute("SELECT 1 FROM image WHERE identity = ?", (os.fsencode(identity),)).fetchone()
        return row is not None

    def _is_there(self, output: str) -> bool:
        return self._db.execute("SELECT 1 FROM there WHERE name = ?", (os.fsencode(output),)).fetchone() is not None

    # This run.

    def todo(self) -> Iterator[Image]:
        """The images that are not done, in order. What becomes of them may be noted meanwhile."""
        return self._all(f"state IN ({_NEW}, {_BEGUN})")

    def finish(self, results: Sequence[tuple[Image, Outcome]]) -> None:
        """Note what became of images."""
        with _clear_errors():
            self._db.executemany(
                "UPDATE image SET state = ?, reason = ? WHERE position = ?",
                [(*_state_and_reason(outcome), image.position) for image, outcome in results],
            )

    def finished(self) -> Iterator[Image]:
        """The images this run has segmented, in order."""
        return self._all(f"state IN ({_DONE}, {_DONE_RASTER})")

    def failed(self) -> Iterator[tuple[str, str]]:
        """The images this run could not use, in order, and why."""
        for rows in self._pages("position, source, reason", f"state = {_FAILED}"):
            for _, source, reason in rows:
                yield os.fsdecode(source), os.fsdecode(reason)


def _state_and_reason(outcome: Outcome) -> tuple[int, bytes | None]:
    if outcome.reason is not None:
        return _FAILED, os.fsencode(outcome.reason)
    return (_DONE_RASTER if outcome.is_raster else _DONE), None


def _name_of(source: bytes, name: bytes | None) -> str:
    return Path(os.fsdecode(source)).stem if name is None else os.fsdecode(name)


def _image(position: int, source: bytes, identity: bytes, stamp: str, name: bytes | None, state: int) -> Image:
    return Image(position, os.fsdecode(source), os.fsdecode(identity), stamp, _name_of(source, name), state)


@contextmanager
def _clear_errors() -> Generator[None, None, None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise ArtifactError(
            f"cannot keep the list of images in {tempfile.gettempdir()}: {exc}; free space, or set TMPDIR to another folder"
        ) from exc


def _listed(item: str | Path | int) -> Iterator[tuple[bytes, str, str, str]]:
    """The files of one input: (key to sort by, identity, source, stamp), in no order."""
    text = without_protocol(str(item))
    if camera_index(item) is not None:
        raise SpecError(f"{item} is a camera, and a cluster takes images; segment it without --executor ray")
    if is_url(text):
        count = 0
        for entry in Bucket(text).listed():
            path = Path(entry.url)
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."):
                count += 1
                yield sort_key(entry.url), entry.url, entry.url, entry.stamp
        if not count:
            raise InputError(f"no images in {text}; for folders within it give a glob such as '{text}/**/*.png'")
    elif os.path.isdir(text):
        yield from _in_folder(text)
    elif glob.has_magic(text) and not os.path.lexists(text):
        count = 0
        for match in glob_matches(Path(text)):
            if not os.path.isdir(match):
                count += 1
                yield sort_key(match.as_posix()), os.path.realpath(match), str(match), file_stamp(str(match))
        if not count:
            list_images(text)  # which says what to do
    else:
        for number, path in enumerate(list_images(text, suffixes=_SUFFIXES)):
            yield number.to_bytes(8, "big"), os.path.realpath(path), str(path), file_stamp(str(path))


def _in_folder(folder: str) -> Iterator[tuple[bytes, str, str, str]]:
    real, count = os.path.realpath(folder), 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                suffix = Path(entry.name).suffix.lower()
                if suffix not in _SUFFIXES or entry.name.startswith("."):
                    continue
                # Of a link that leads to itself the entry would raise; it is listed, and whoever reads it says so.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    continue
                count += 1
                identity = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                yield sort_key(entry.name), identity, str(Path(folder, entry.name)), file_stamp(entry)
    except OSError as exc:
        raise InputError(f"cannot list {folder}: {exc.strerror}") from exc
    if not count:
        list_images(folder, suffixes=_SUFFIXES)  # which says what it looked for


_DIGITS = re.compile(r"([0-9]+)")


def sort_key(path: str) -> bytes:
    """Bytes that sort as :func:`edgeseg.images.decoding.natural_key` does, but for what differs in case alone."""
    parts = []
    for index, part in enumerate(_DIGITS.split(path.casefold())):
        # A number sorts by its length, then by its digits; text ends with what no path holds.
        digits = part.lstrip("0")
        parts.append(f"{len(digits):05d}{digits}" if index % 2 else f"{part}\0")
    return os.fsencode("".join(parts))
