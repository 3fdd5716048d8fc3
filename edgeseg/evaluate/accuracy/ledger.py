"""What is known of the images judged so far, on disk: memory holds where each line begins, not what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from edgeseg.errors import ArtifactError, one_line
from edgeseg.evaluate.accuracy.judge import ImageRecord


class Ledger:
    """The lines of one contender: an append-only JSONL file.

    Attributes:
        ignore_values: values of the mask files that were read as unlabelled.

    Raises:
        ArtifactError: a line that is none of an evaluation.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignore_values: set[int] = set()
        self._places: dict[int, int] = {}
        if not path.is_file():
            return
        place = 0
        with path.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    # A process that was killed while it wrote left half a line.
                    file.truncate(place)
                    break
                self._keep(self._decoded(line), place)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def append(self, record: ImageRecord) -> None:
        """Keep one image's counts, on disk at once. Raises ``ArtifactError`` when it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = msgspec.json.encode(record) + b"\n"
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                # Only now: another evaluation of the same images may have written in between.
                place = file.tell() - len(line)
        except OSError as exc:
            raise ArtifactError(
                f"cannot write {self.path}: {exc.strerror}; set EDGESEG_CACHE to another folder"
            ) from exc
        self._keep(record, place)

    def records(self) -> Iterator[ImageRecord]:
        """All records, by index of the image, one at a time."""
        if not self._places:
            return
        with self.path.open("rb") as file:
            for _, place in sorted(self._places.items()):
                file.seek(place)
                yield self._decoded(file.readline())

    def _keep(self, record: ImageRecord, place: int) -> None:
        self._places[record.index] = place
        if record.ignore_index is not None:
            self.ignore_values.add(record.ignore_index)

    def _decoded(self, line: bytes) -> ImageRecord:
        try:
            return msgspec.json.decode(line, type=ImageRecord)
        except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
            raise ArtifactError(
                f"{self.path} is damaged ({one_line(exc)}); remove it: its images will be judged again"
            ) from exc
