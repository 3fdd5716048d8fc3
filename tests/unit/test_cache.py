"""The stage cache reuses what is unchanged, never what is stale, and keeps nothing half-made."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from edgeseg.machine.packages import package_versions
from edgeseg.store import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path))


def writer(text: str) -> object:
    return lambda folder: (folder / "result").write_text(text)


def test_same_inputs_are_made_once() -> None:
    first, reused_first = cache.cached_folder("stage", {"weights": "a"}, writer("1"))  # type: ignore[arg-type]
    second, reused_second = cache.cached_folder("stage", {"weights": "a"}, writer("2"))  # type: ignore[arg-type]
    assert (reused_first, reused_second) == (False, True)
    assert first == second
    assert (second / "result").read_text() == "1"


@pytest.mark.parametrize("changed", [{"weights": "b"}, {"weights": "a", "size": 1}])
def test_changed_inputs_are_made_again(changed: dict[str, object]) -> None:
    cache.cached_folder("stage", {"weights": "a"}, writer("1"))  # type: ignore[arg-type]
    folder, reused = cache.cached_folder("stage", changed, writer("2"))  # type: ignore[arg-type]
    assert not reused
    assert (folder / "result").read_text() == "2"


def test_failure_keeps_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.cached_folder("stage", 1, fail)
    assert os.listdir(tmp_path / "stage") == []


def test_prune_drops_the_least_recently_used() -> None:
    folders = [cache.cached_folder("stage", n, writer("x" * 100))[0] for n in range(4)]  # type: ignore[arg-type]
    for age, folder in enumerate(folders):
        os.utime(folder, (1_000_000 + age, 1_000_000 + age))
    cache.prune(max_size_bytes=250)
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
