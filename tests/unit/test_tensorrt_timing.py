"""TensorRT's timing cache beside the engine folders: used again, joined, and never taken from another device or version."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from recorded_tensorrt import VERSIONS, Recorder
from recorded_tensorrt.fake import build_serialized_network, cuda_device
from recorded_tensorrt.graphs import SIDE, small_model

from edgeseg.backends.base import BuildContext, BuiltEngine
from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.backends.tensorrt.backend import TensorRTBackend
from edgeseg.errors import SpecError
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

ORIN_NANO = cuda_device("Orin", (8, 7), 8)
AGX_ORIN = cuda_device("Orin", (8, 7), 16)
MARK = "recorded-tensorrt-timing"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))


def build(
    engines: Path, recorder: Recorder, gpu: CudaDevice = ORIN_NANO, name: str = "fpn", **options: Any
) -> BuiltEngine:
    """Build ``engines/NAME`` as ``edgeseg compile`` does, in a scratch folder deeper down."""
    scratch = engines / f".{name}.partial-1" / "target-tensorrt"
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "model.onnx"
    path.write_bytes(small_model().SerializeToString())
    spec = PipelineSpec(ModelSpec("unet", classes=4), InputSpec(SIDE, SIDE))
    graph = OnnxGraph(path, sha256_file(path), "fp32", spec, "0" * 64)
    backend = TensorRTBackend(import_module=lambda: recorder.module, gpu=lambda: gpu, layer_times=lambda *_: [])
    return backend.build(graph, scratch, options, BuildContext(engines_folder=engines))


def given(recorder: Recorder) -> list[bytes]:
    """What TensorRT got to begin with; more than one: the first was not taken."""
    return [call.arguments["serialized_timing_cache"] for call in recorder.of("IBuilderConfig.create_timing_cache")]


def caches(engines: Path) -> list[str]:
    return sorted(path.name for path in (engines / ".timing").glob("*.cache"))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_next_build_begins_with_what_the_first_measured(tmp_path: Path, version: str) -> None:
    first, second = Recorder(version), Recorder(version)
    second.fakery.kernels = ("gemm",)
    assert build(tmp_path, first).notes == ()
    assert given(first) == [b""]
    assert caches(tmp_path) == [f"Orin-8sm-8.7-tensorrt-{version}.cache"]
    path = tmp_path / ".timing" / caches(tmp_path)[0]
    kept = path.read_bytes()
    assert kept.decode() == f"{MARK}\n{version}\nconv"
    assert build(tmp_path, second, name="unet").notes == ()
    assert given(second) == [kept]
    assert path.read_text().splitlines()[2:] == ["conv", "gemm"]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["origin"] == {
        "gpu": "Orin", "multiprocessors": 8, "compute_capability": "8.7", "tensorrt": version
    }  # fmt: skip
    assert facts["file"]["sha256"] == sha256_file(path)
    # Nothing but the cache, its facts and the lock: no temporary file stays.
    assert len(list((tmp_path / ".timing").iterdir())) <= 3


def test_each_device_and_version_has_its_own(tmp_path: Path) -> None:
    for version in VERSIONS:
        for gpu in (ORIN_NANO, AGX_ORIN, cuda_device("NVIDIA Thor", (11, 0), 20)):
            recorder = Recorder(version)
            build(tmp_path, recorder, gpu)
            assert given(recorder) == [b""]
    assert len(caches(tmp_path)) == len(VERSIONS) * 3
    assert "NVIDIA-Thor-20sm-11.0-tensorrt-11.4.0.106.cache" in caches(tmp_path)


def test_several_builds_at_once_join_what_they_measured(tmp_path: Path) -> None:
    """A second build begins and ends while the first one is in TensorRT's hands."""

    def meanwhile(builder: Any, network: Any, config: Any) -> Any:
        other = Recorder("10.3.0")
        other.fakery.kernels = ("gemm", "pool")
        build(tmp_path, other, name="unet")
        return build_serialized_network(builder, network, config)

    build(tmp_path, Recorder("10.3.0"), name="old")
    recorder = Recorder("10.3.0", {"Builder.build_serialized_network": meanwhile})
    recorder.fakery.kernels = ("resize",)
    assert build(tmp_path, recorder).notes == ()
    (name,) = caches(tmp_path)
    assert (tmp_path / ".timing" / name).read_text().splitlines()[2:] == ["conv", "gemm", "pool", "resize"]


@pytest.mark.parametrize("damage", ["truncated", "edited", "no facts", "facts no json"])
def test_a_damaged_cache_is_not_shown_to_tensorrt(tmp_path: Path, damage: str) -> None:
    build(tmp_path, Recorder("10.3.0"))
    path = tmp_path / ".timing" / caches(tmp_path)[0]
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-2])
    elif damage == "edited":
        path.write_bytes(whole[:-1] + b"X")
    elif damage == "no facts":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text("{")
    recorder = Recorder("10.3.0")
    built = build(tmp_path, recorder)
    assert given(recorder) == [b""]
    assert built.notes and all(str(path) in note and "not used" in note and "\n" not in note for note in built.notes)
    assert path.read_bytes() == whole
    assert build(tmp_path, Recorder("10.3.0")).notes == ()


def test_a_cache_under_another_devices_name_is_not_used(tmp_path: Path) -> None:
    build(tmp_path, Recorder("10.3.0"), AGX_ORIN)
    (name,) = caches(tmp_path)
    for suffix in (".cache", ".json"):
        source = (tmp_path / ".timing" / name).with_suffix(suffix)
        source.rename(source.with_name(source.name.replace("16sm", "8sm")))
    recorder = Recorder("10.3.0")
    (note,) = set(build(tmp_path, recorder).notes)
    assert given(recorder) == [b""]
    assert "is of Orin (8.7) and TensorRT 10.3.0: not used, measured anew" in note


@pytest.mark.parametrize("content", ["another gpu", f"{MARK}\n8.6.1\nconv"])
def test_a_file_someone_named_that_does_not_fit_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.cache"
    file.write_text(content)
    recorder = Recorder("10.3.0")
    built = build(tmp_path, recorder, timing_cache=str(file))
    assert given(recorder) == [content.encode(), b""]
    assert [call.arguments["ignore_mismatch"] for call in recorder.of("IBuilderConfig.set_timing_cache")][-1] is False
    (note,) = built.notes
    assert "mine.cache is damaged or of another GPU or TensorRT: not used, left as it is" in note
    assert file.read_text() == content


def test_a_file_someone_named_is_used_and_added_to(tmp_path: Path) -> None:
    file = tmp_path / "mine.cache"
    file.write_text(f"{MARK}\n10.3.0\ngemm")
    assert build(tmp_path, Recorder("10.3.0"), timing_cache=str(file)).notes == ()
    assert file.read_text() == f"{MARK}\n10.3.0\nconv\ngemm"
    assert not (tmp_path / ".timing").exists() and not file.with_suffix(".json").exists()


def test_a_place_that_cannot_be_written_is_a_note_not_a_failure(tmp_path: Path) -> None:
    (tmp_path / ".timing").write_text("in the way")
    built = build(tmp_path, Recorder("10.3.0"))
    assert built.path is not None and built.path.is_file()
    (note,) = built.notes
    assert note.startswith("kernel times are not kept for the next build: cannot write ")
    assert note.endswith("make it writable, or give --backend-option timing_cache=FILE")


def test_without_one(tmp_path: Path) -> None:
    recorder = Recorder("10.3.0")
    build(tmp_path, recorder, timing_cache=False)
    assert "DISABLE_TIMING_CACHE" in recorder.set_flags() and not (tmp_path / ".timing").exists()
    with pytest.raises(SpecError, match="is a folder, pipe or device; give a file, or true"):
        build(tmp_path, Recorder("10.3.0"), timing_cache=str(tmp_path))


def test_the_name_of_a_gpu_is_no_path() -> None:
    from edgeseg.backends.tensorrt.timing import CacheOrigin

    origin = CacheOrigin("../NVIDIA RTX 4000 / Ada", 8, "8.9", "10.3.0")
    assert origin.file_name == "NVIDIA-RTX-4000-Ada-8sm-8.9-tensorrt-10.3.0.cache"
    assert "/" not in dataclasses.replace(origin, gpu="/").file_name
