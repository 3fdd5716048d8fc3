"""The ledger of an output folder: what was begun and what is done, so that a second run does only what is missing.

Lines of JSON that are only ever appended, ``ledger.jsonl``; in a bucket, where nothing can be appended to, objects
``ledger/*.jsonl`` that together are the same. A run writes, in this order:

- ``{"run": KEY, "about": {...}}``: everything the masks depend on but the images, as a hash and in words.
- ``{"begun": [IMAGE, ...]}`` before any output of these images is written: what then lies under their names is the run's.
- ``{"done": [[IMAGE, STAMP, NAME], ...], "failed": [[IMAGE, REASON], ...]}`` when their outputs are whole.

A line that is torn or damaged is passed over: its images are done again, which changes nothing about their masks. Lines of a
run with another key say that the outputs are not of this one.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from edgeseg.closing import Closing
from edgeseg.cluster.places import Bucket
from edgeseg.cluster.plan import Image, Plan
from edgeseg.cluster.worker import Outcome
from edgeseg.errors import ArtifactError, refusals_as

LEDGER = "ledger"
# A line of ours has a thousand images; longer ones are none of ours.
MAX_LINE_BYTES = 16 << 20
# Every object of a bucket costs a request to write and one to read.
_SECONDS_AN_OBJECT = 10.0


class _Line(msgspec.Struct):
    run: str | None = None
    begun: tuple[str, ...] = ()
    done: tuple[tuple[str, str, str], ...] = ()


class Ledger(Closing):
    """The ledger of one output place, open for one run.

    Args:
        output: folder or bucket.
        key: SHA-256 of all that the masks depend on but the images.
        about: the same in words, for people.

    Raises:
        ArtifactError: it cannot be read or written.
        InputError: a bucket refuses.
    """

    def __init__(self, output: Path | Bucket, key: str, about: dict[str, Any]) -> None:
        self._key, self._about = key, about
        self._log = _Objects(output) if isinstance(output, Bucket) else _File(output / f"{LEDGER}.jsonl")

    def read_into(self, plan: Plan) -> None:
        """Note in ``plan`` what runs with the same key have begun and done."""
        ours = False
        for line in self._log.lines():
            try:
                entry = msgspec.json.decode(line, type=_Line)
            except (msgspec.DecodeError, ValueError, RecursionError):
                continue
            if entry.run is not None:
                ours = entry.run == self._key
            # What another run has begun since is not ours any more, whatever an older line says.
            plan.begun([_bare(text) for text in entry.begun], ours=ours)
            if ours:
                plan.done([(_bare(image), stamp, _bare(name)) for image, stamp, name in entry.done])

    def start(self) -> None:
        """Say which run the lines that follow are of."""
        self._write({"run": self._key, "about": self._about}, now=True)

    def begin(self, images: Sequence[Image]) -> None:
        """Say that the outputs of these images may be there from now on."""
        self._write({"begun": [_quoted(image.identity) for image in images]}, now=True)

    def finish(self, results: Sequence[tuple[Image, Outcome]]) -> None:
        """Say what became of images."""
        done = [[_quoted(i.identity), i.stamp, _quoted(i.name)] for i, outcome in results if outcome.reason is None]
        failed = [[_quoted(i.identity), _quoted(o.reason)] for i, o in results if o.reason is not None]
        self._write({name: rows for name, rows in (("done", done), ("failed", failed)) if rows}, now=False)

    def close(self) -> None:
        """Write what is not written yet."""
        self._log.close()

    def _write(self, entry: dict[str, Any], *, now: bool) -> None:
        self._log.append(json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode() + b"\n", now=now)


class _File:
    @refusals_as(ArtifactError)
    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._mend()

    def _mend(self) -> None:
        """End a line that a killed writer left without its end, so that the next one is whole."""
        size = os.fstat(self._handle).st_size
        if size and os.pread(self._handle, 1, size - 1) != b"\n":
            os.write(self._handle, b"\n")

    def lines(self) -> Iterator[bytes]:
        with refusals_as(ArtifactError), self._path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                yield line

    @refusals_as(ArtifactError)
    def append(self, line: bytes, *, now: bool) -> None:
        while line:
            line = line[os.write(self._handle, line) :]
        # A mask that is there and is not known of costs a second look; one that is known of and is not there is lost.
        os.fsync(self._handle)

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class _Objects:
    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._waiting: list[bytes] = []
        self._written = time.monotonic()
        # Sorts behind those of every earlier run, as far as clocks agree, and is no other run's.
        self._run = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._number = 0

    def lines(self) -> Iterator[bytes]:
        run = ""
        for name in sorted(name for name in self._bucket.names(LEDGER) if name.endswith(".jsonl")):
            before, (run, _, _) = run, name.rpartition("-")
            if run != before:  # whose first object somebody may have removed
                yield b'{"run":""}'
            yield from self._bucket.read(f"{LEDGER}/{name}").splitlines(keepends=True)

    def append(self, line: bytes, *, now: bool) -> None:
        self._waiting.append(line)
        if now or time.monotonic() - self._written > _SECONDS_AN_OBJECT:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._bucket.write(f"{LEDGER}/{self._run}-{self._number:06d}.jsonl", b"".join(self._waiting))
            self._number += 1
            self._waiting = []
        self._written = time.monotonic()


def _quoted(text: str) -> str:
    """Text as JSON can hold it: a file name that is no UTF-8 as its bytes, percent-encoded behind what no name begins with."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "\0" + quote_from_bytes(os.fsencode(text))
    return text


def _bare(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text[1:])) if text.startswith("\0") else text
