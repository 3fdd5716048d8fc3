"""What a Matroska file says of its frames, on files put together element by element."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseg.runtime import matroska
from edgeseg.runtime.matroska import Container, read_container

OPEN = b"\x01" + b"\xff" * 7
VIDEO, AUDIO = (1, 1), (2, 2)


def element(name: str, *content: bytes, length: bytes | None = None) -> bytes:
    body = b"".join(content)
    return bytes.fromhex(name) + (length or (len(body) | 1 << 56).to_bytes(8, "big")) + body


def tracks(*kinds: tuple[int, int], codec: bytes = b"V_MJPEG") -> bytes:
    entries = (
        element("ae", element("d7", bytes([number])), element("83", bytes([kind])), element("86", codec))
        for number, kind in kinds
    )
    return element("1654ae6b", *entries)


def block(track: int = 1, flags: int = 0, frame: bytes = b"\x10abc") -> bytes:
    return element("a3", bytes([0x80 | track, 0, 0, flags]), frame)


def file(*content: bytes, length: bytes | None = None) -> bytes:
    return element("1a45dfa3", element("4282", b"matroska")) + element("18538067", *content, length=length)


def read(content: bytes, tmp_path: Path) -> Container:
    path = tmp_path / "a.mkv"
    path.write_bytes(content)
    return read_container(path)


CLUSTER = element("1f43b675", element("e7", b"\0"), block(), block(2), block(), element("ec", b"\xa3" * 9), block(2))
GROUP = element("1f43b675", element("a0", element("9b", b"\x28"), element("a1", b"\x81\0\0\0abc")))


@pytest.mark.parametrize(
    ("content", "container"),
    [
        (file(tracks(VIDEO, AUDIO), CLUSTER, GROUP, element("1c53bb6b", b"cues")), Container(3)),
        (file(tracks(AUDIO), CLUSTER), Container(None)),
        (file(tracks((1, 1), (2, 1)), CLUSTER), Container(None)),
        (file(tracks(VIDEO), element("1f43b675", block(), block(flags=0x08)), GROUP), Container(2)),
        (file(tracks(VIDEO), element("1f43b675", block(), block(flags=0x02))), Container(None)),
        (file(tracks(VIDEO, codec=b"V_VP8"), element("1f43b675", block(), block(frame=b"\0abc"))), Container(1)),
        (file(tracks(VIDEO), element("1f43b675", block(), length=OPEN), GROUP, length=OPEN), Container(2)),
        (file(tracks(VIDEO), GROUP) + b"appended", Container(1)),
        (file(tracks(VIDEO), GROUP) * 2, Container(2)),
        (file(tracks(VIDEO), GROUP)[:-2], Container(1, missing_bytes=2)),
        (file(tracks(VIDEO), GROUP, length=OPEN)[:-2], Container(1, missing_bytes=2)),
    ],
)
def test_frames_are_counted_and_missing_bytes(content: bytes, container: Container, tmp_path: Path) -> None:
    assert read(content, tmp_path) == container


@pytest.mark.parametrize(
    "broken",
    [
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        element("42f7", b"\1"),  # of the head of a file
        element("a3", length=(1 << 56 | 10**6).to_bytes(8, "big")),  # longer than what it is in
        element("a3", length=OPEN),
    ],
)
def test_where_a_file_is_broken(broken: bytes, tmp_path: Path) -> None:
    content = file(tracks(VIDEO), GROUP, broken, GROUP)
    assert read(content, tmp_path) == Container(None, broken_at=content.index(GROUP) + len(GROUP))


def test_not_all_of_a_file_made_to_take_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matroska, "_MOST_ELEMENTS", 1000)
    assert read(file(tracks(VIDEO), GROUP, b"\xec\x80" * 2000), tmp_path) == Container(None)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_have_an_answer(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.mkv"
    for begun in (b"", file(tracks(VIDEO), GROUP), file(tracks(VIDEO), GROUP, length=OPEN)):
        path.write_bytes(begun + content)
        container = read_container(path)
        assert container.missing_bytes >= 0
        assert container.broken_at is None or 0 <= container.broken_at < len(begun + content)
