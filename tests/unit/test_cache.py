"""The stage cache reuses what is unchanged, never what is stale, and keeps nothing half-made."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from edgeseg.errors import ArtifactError
from edgeseg.machine.packages import package_versions
from edgeseg.store import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path))


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "result").write_text(text)

    return write


def test_same_inputs_are_made_once() -> None:
    assert not cache.is_kept("export", {"weights": "a"})
    first, reused_first = cache.cached_folder("export", {"weights": "a"}, writer("1"))
    assert cache.is_kept("export", {"weights": "a"})
    second, reused_second = cache.cached_folder("export", {"weights": "a"}, writer("2"))
    assert (reused_first, reused_second) == (False, True)
    assert first == second
    assert (second / "result").read_text() == "1"


@pytest.mark.parametrize("changed", [{"weights": "b"}, {"weights": "a", "size": 1}])
def test_changed_inputs_are_made_again(changed: dict[str, object]) -> None:
    cache.cached_folder("export", {"weights": "a"}, writer("1"))
    folder, reused = cache.cached_folder("export", changed, writer("2"))
    assert not reused
    assert (folder / "result").read_text() == "2"


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.write_text("2"),
        lambda file: file.with_name("contents.json").unlink(),
        lambda file: file.with_name("contents.json").write_text("[{"),
    ],
)
def test_what_was_damaged_is_made_again(damage: Callable[[Path], object]) -> None:
    folder, _ = cache.cached_folder("export", 1, writer("1"))
    (file,) = (path for path in folder.iterdir() if path.name != "contents.json")
    damage(file)
    assert cache.cached_folder("export", 1, writer("1")) == (folder, False)
    assert file.read_text() == "1"
    assert cache.cached_folder("export", 1, writer("2")) == (folder, True)
    assert file.read_text() == "1"


def test_failure_keeps_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.cached_folder("export", 1, fail)
    assert os.listdir(tmp_path / "export") == []


def test_prune_drops_the_least_recently_used() -> None:
    folders = [cache.cached_folder("export", n, writer("x" * 100_000))[0] for n in range(4)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1_000_000 + age, 1_000_000 + age))
    cache.prune(max_size_bytes=250_000)
    assert [f.exists() for f in folders] == [False, False, True, True]


def test_the_key_of_the_software_follows_every_line_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "code.py").write_text("a = 1\n")
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path)
    keys = [cache.software.__wrapped__()["edgeseg"]]
    (tmp_path / "room" / "code.py").write_text("a = 2\n")
    keys.append(cache.software.__wrapped__()["edgeseg"])
    (tmp_path / "room" / "code.py").rename(tmp_path / "room" / "other.py")
    keys.append(cache.software.__wrapped__()["edgeseg"])
    assert len(set(keys)) == 3


def test_the_key_of_the_software_names_what_is_installed() -> None:
    here = cache.software()
    assert here["numpy"] == metadata.version("numpy")
    assert "no-such-package" not in package_versions("numpy", "no-such-package")


def test_prune_and_clear_leave_what_is_not_edgesegs(tmp_path: Path) -> None:
    """EDGESEG_CACHE may name a folder that holds other things: somebody's home."""
    mine = tmp_path / "photos" / "2024" / "a.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"x" * 1000)
    (tmp_path / "tensorrt-log").mkdir()
    (tmp_path / "tensorrt-log" / "a.log").write_text("x" * 100)
    folder, _ = cache.cached_folder("export", 1, writer("x" * 100))
    made = sum(path.stat().st_size for path in folder.iterdir())
    assert cache.cache_content() == cache.CacheContent(str(tmp_path), 100 + made, cache.MAX_SIZE_BYTES, True)
    cache.prune(max_size_bytes=0)
    assert cache.cache_content().size_bytes == 0
    cache.cached_folder("export", 1, writer("x" * 100))
    assert cache.clear() == made
    assert os.listdir(tmp_path) == ["photos"]
    assert mine.read_bytes() == b"x" * 1000


def test_what_another_build_is_making_survives_a_clear(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "result").write_text("1")
        cache.clear()

    folder, _ = cache.cached_folder("export", 1, make)
    assert (folder / "result").read_text() == "1"
    (tmp_path / "export" / ".edgeseg-partial-0123456789abcdef").mkdir()
    cache.clear()
    assert not tmp_path.exists()


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "new" / "cache"))
    assert cache.cache_content() == cache.CacheContent(str(tmp_path / "new" / "cache"), 0, cache.MAX_SIZE_BYTES, True)
    assert cache.clear() == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["file", "stage"])
def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """As root, permissions do not stop anybody: a file where a folder should be stands for a read-only home."""
    if damage == "file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "file"))
    else:
        (tmp_path / "export").write_text("")
    notes: list[str] = []
    with cache.usable_cache(notes.append):
        folder, reused = cache.cached_folder("export", 1, writer("1"))
        assert not reused
        assert cache.cached_folder("export", 1, writer("2")) == (folder, True)
        assert (folder / "result").read_text() == "1"
    assert not folder.exists()
    (note,) = notes
    assert note.startswith(f"nothing is kept for the next time: cannot write the cache {os.environ['EDGESEG_CACHE']}")
    assert "EDGESEG_CACHE" in note


def full(folder: Path, wraps: bool) -> None:
    """As ``write`` fails on a full disk: the system names no file. What writes graphs and tables says so in an error of ours."""
    (folder / "half").write_text("x")
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if wraps:
        raise ArtifactError(f"cannot write {folder}") from refused
    raise refused


@pytest.mark.parametrize("wraps", [False, True])
def test_a_disk_that_gets_full_ends_no_build(tmp_path: Path, wraps: bool) -> None:
    def make(folder: Path) -> None:
        if folder.is_relative_to(tmp_path):
            full(folder, wraps)
        writer("1")(folder)

    notes: list[str] = []
    with cache.usable_cache(notes.append):
        kept, _ = cache.cached_folder("export", 1, writer("0"))
        folder, _ = cache.cached_folder("calibration", 1, make)
        assert (folder / "result").read_text() == "1"
        assert cache.cached_folder("calibration", 1, make) == (folder, True)
        cache.cached_folder("judged", 1, make)
    assert not folder.exists()
    assert kept.exists()
    assert os.listdir(tmp_path / "calibration") == []
    (note,) = notes
    assert note == (
        f"nothing is kept for the next time: cannot write the cache {tmp_path}: No space left on device; EDGESEG_CACHE "
        "names another folder"
    )


def test_what_the_cache_is_not_to_blame_for_is_tried_once(tmp_path: Path) -> None:
    tried: list[Path] = []

    def make(folder: Path) -> None:
        tried.append(folder)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/photos/1.png")

    notes: list[str] = []
    with cache.usable_cache(notes.append), pytest.raises(PermissionError):
        cache.cached_folder("export", 1, make)
    assert (len(tried), notes) == (1, [])
    with pytest.raises(OSError, match="No space left"):
        cache.cached_folder("export", 1, partial(full, wraps=False))
    with cache.usable_cache(notes.append), pytest.raises(OSError, match="No space left"):
        cache.cached_folder("export", 1, partial(full, wraps=False))


def test_a_usable_cache_is_used_without_a_word(tmp_path: Path) -> None:
    notes: list[str] = []
    with cache.usable_cache(notes.append):
        folder, _ = cache.cached_folder("export", 1, writer("1"))
    assert folder.is_relative_to(tmp_path)
    assert folder.exists()
    assert notes == []
