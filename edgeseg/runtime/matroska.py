"""What a Matroska file (MKV, WebM) says of itself that its decoder keeps back: frames that were there, and where it is broken.

The container is read element by element (RFC 8794 for the elements, RFC 9559 for their meaning), without their content.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

_SEGMENT, _CLUSTER, _GROUP, _TRACKS, _TRACK = 0x18538067, 0x1F43B675, 0xA0, 0x1654AE6B, 0xAE
_ENTERED = {_SEGMENT, _CLUSTER, _GROUP, _TRACKS, _TRACK}
_FILE = 0x1A45DFA3
_NUMBER, _KIND, _CODEC = 0xD7, 0x83, 0x86
_BLOCKS = {0xA3, 0xA1}  # by themselves, and in a group
# What else may stand where an element of the file, a cluster or a group begins.
_PASSED_OVER = {
    *(_FILE, 0x114D9B74, 0x1549A966, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367),
    *(0xEC, 0xBF, 0xE7, 0x5854, 0xA7, 0xAB, 0xAF),
    *(0x9B, 0xFB, 0xFA, 0xFD, 0xA2, 0xA4, 0x75A1, 0x75A2, 0x8E),
}  # fmt: skip
_VIDEO, _INVISIBLE, _LACED, _VP8_SHOWN = 1, 0x08, 0x06, 0x10

_MOST_ELEMENTS = 4_000_000
"""A day of video has as many; to read more of a file made to take time is not worth it."""


@dataclass(frozen=True)
class Container:
    """What the elements of a file say.

    Attributes:
        frames: to be shown, of its one video track; ``None`` where they cannot be counted.
        broken_at: first byte where no element begins; ``None`` in a whole file.
        missing_bytes: at the end of the file.
    """

    frames: int | None
    broken_at: int | None = None
    missing_bytes: int = 0


def read_container(path: Path) -> Container:
    """Walk through the elements of a file that is not empty. Raises ``OSError`` when it cannot be read."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _walk(data)


def _walk(data: mmap.mmap) -> Container:
    place, size = 0, len(data)
    whole, end = size, None  # of the last element; of the segment, where it says so
    tracks_end, number, is_vp8, is_countable = 0, 0, False, True
    videos: set[int] = set()
    frames: dict[int, int] = {}
    for _ in range(_MOST_ELEMENTS):
        if place >= size:
            break
        name, after = _number(data, place, keeps_marker=True)
        length, begin = _number(data, after)
        is_open = length == (1 << 7 * (begin - after)) - 1  # left so in a live recording
        if end is not None and place >= end:
            if name != _FILE:
                break  # what was appended is none of the file
            end = None
        in_tracks = place < tracks_end
        is_known = in_tracks or name in _ENTERED or name in _BLOCKS or name in _PASSED_OVER
        fits = name in (_SEGMENT, _CLUSTER) if is_open else end is None or begin + length <= end
        if not (is_known and fits):
            return Container(None, place)
        content = slice(begin, begin + length)
        if name == _SEGMENT and not is_open:
            end = begin + length
        elif name == _TRACKS:
            tracks_end = begin + length
        elif in_tracks and name == _NUMBER:
            number = int.from_bytes(data[content][:8], "big")
        elif in_tracks and name == _KIND and data[content] == bytes([_VIDEO]):
            videos.add(number)
        elif in_tracks and name == _CODEC:
            is_vp8 |= data[content].rstrip(b"\0") == b"V_VP8"
        elif name in _BLOCKS and not in_tracks:
            track, after = _number(data, begin)
            flags, first = data[after + 2 : after + 4] if after + 4 <= size else (0, 0)
            is_countable &= not flags & _LACED
            # VP8's frames tell themselves whether they are shown.
            frames[track] = frames.get(track, 0) + (not flags & _INVISIBLE and (not is_vp8 or bool(first & _VP8_SHOWN)))
        if not is_open:
            whole = max(whole, begin + length)
        place = begin if name in _ENTERED else begin + length
    is_countable &= place >= size or place == end
    shown = sum(frames.get(track, 0) for track in videos)
    return Container(shown if is_countable and len(videos) == 1 else None, missing_bytes=whole - size)


def _number(data: mmap.mmap, place: int, *, keeps_marker: bool = False) -> tuple[int, int]:
    """A number, and where what follows it begins: it has as many zero bits in front as bytes behind the first."""
    first = data[place] if place < len(data) else 0
    count = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + count], "big")
    return value if keeps_marker else value & ~(1 << 7 * count), place + count
