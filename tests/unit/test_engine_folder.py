"""Engine folders: manifests round-trip, hashes are checked, folders appear whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

import pytest
from engine_folders import manifest_of

from edgeseg.errors import ArtifactError, InputError, OutputExistsError, refusals_as
from edgeseg.spec import ModelSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.engine import engine_folder, open_engine
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import MANIFEST_NAME, Manifest, PrecisionReport


def make_engine(folder: Path, **changes: object) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "engine.onnx").write_bytes(b"engine")
    manifest = manifest_of(
        folder,
        PipelineSpec(ModelSpec("fpn", classes=3, model_args={"decoder_merge_policy": "add"})),
        PrecisionReport("fp32", {"fp32": 1.0}, {"fp32": 1.0}, 10, "executed"),
        "onnxruntime",
        engine="engine.onnx",
        edgeseg_version="0.1.0",
        options={"threads": 2},
    )
    manifest = dataclasses.replace(manifest, **changes)
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest


def test_manifest_round_trips(tmp_path: Path) -> None:
    manifest = make_engine(tmp_path / "e")
    assert open_engine(tmp_path / "e").manifest == manifest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "engine.onnx").unlink(), "lacks engine.onnx"),
        (lambda f: (f / "engine.onnx").write_bytes(b"engin"), "truncated or edited"),
        (lambda f: (f / "engine.onnx").write_bytes(b"enginE"), "edited or damaged"),
        (lambda f: (f / MANIFEST_NAME).unlink(), "no manifest.json"),
    ],
)
def test_damaged_folder_is_refused_in_one_line(tmp_path: Path, damage: object, message: str) -> None:
    folder = tmp_path / "e"
    make_engine(folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=message) as caught:
        open_engine(folder)
    assert "\n" not in str(caught.value)


def test_symlink_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    make_engine(folder)
    (tmp_path / "elsewhere").write_bytes(b"engine")
    (folder / "engine.onnx").unlink()
    (folder / "engine.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"lacks engine\.onnx"):
        open_engine(folder)


def test_atomic_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "engines" / "a"
    with engine_folder(target, force=False) as scratch:
        (scratch / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert os.listdir(target.parent) == ["a"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_folder_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), engine_folder(tmp_path / "a", force=False) as scratch:
        (scratch / "x").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_folders_made_on_the_way_go_as_well_unless_something_else_is_in_them(tmp_path: Path) -> None:
    for kept in (False, True):
        with pytest.raises(ValueError, match="stop"), engine_folder(tmp_path / "a" / "b" / "e", force=False):
            if kept:
                (tmp_path / "a" / "other").touch()
            raise ValueError("stop")
        assert sorted(p.name for p in tmp_path.rglob("*")) == (["a", "other"] if kept else [])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
def test_a_parent_that_cannot_be_made_is_one_clear_error() -> None:
    with (
        pytest.raises(ArtifactError, match="cannot make folder /proc/x"),
        engine_folder(Path("/proc/x/e"), force=False),
    ):
        pass


def test_existing_folder_needs_force_and_survives_failure(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make_engine(folder)
    with pytest.raises(OutputExistsError, match="--force"), engine_folder(folder, force=False):
        pass
    with pytest.raises(RuntimeError), engine_folder(folder, force=True):
        raise RuntimeError
    open_engine(folder)
    with engine_folder(folder, force=True) as scratch:
        (scratch / "new").write_text("1")
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["a"]


def test_force_does_not_delete_what_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ArtifactError, match="not what edgeseg would write there"),
        engine_folder(tmp_path / "thesis", force=True),
    ):
        pass
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_two_builds_of_one_folder(tmp_path: Path) -> None:
    with (
        engine_folder(tmp_path / "a", force=False),
        pytest.raises(ArtifactError, match="another build"),
        engine_folder(tmp_path / "a", force=False),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="No space left"),
        engine_folder(tmp_path / "a", force=False),
        open("/dev/full", "wb") as f,
    ):
        f.write(b"x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_not_blamed_on_the_file_that_is_copied(tmp_path: Path) -> None:
    """Of a copy that fails the system names both files, the old one first."""

    def copy(source: str, new: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, str(new))

    with (
        pytest.raises(ArtifactError, match=rf"^cannot write {tmp_path}/a: No space left"),
        engine_folder(tmp_path / "a", force=False) as folder,
    ):
        copy("/models/model.onnx", folder / "model.onnx")
    with pytest.raises(InputError, match="^cannot read or write new.onnx: No space left"), refusals_as(InputError):
        copy("/models/model.onnx", Path("new.onnx"))


def test_sha256_json_does_not_depend_on_key_order() -> None:
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
