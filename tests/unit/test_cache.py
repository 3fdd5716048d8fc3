"""The stage cache reuses what is unchanged, never what is stale, and keeps nothing half-made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import edgeseg
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


def test_source_hash_covers_all_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.source_sha256()
    copied = tmp_path / "edgeseg"
    shutil.copytree(Path(edgeseg.__file__).parent, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(edgeseg, "__file__", str(copied / "__init__.py"))
    cache.source_sha256.cache_clear()
    assert cache.source_sha256() == before
    with (copied / "spec.py").open("a") as stream:
        stream.write("# changed")
    cache.source_sha256.cache_clear()
    assert cache.source_sha256() != before
    monkeypatch.undo()
    cache.source_sha256.cache_clear()
    assert cache.package_versions("numpy", "no-such-package").keys() == {"numpy"}
