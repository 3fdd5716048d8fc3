"""TensorRT-RTX on this side of the GPU: what ``status`` and ``load`` say, and the runtime cache, on the recorded module."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from recorded_tensorrt import RTX, Recorder
from recorded_tensorrt.fake import PLAN_MARK, create_execution_context, cuda_device, host_memory

from edgeseg.backends import compile as recompile
from edgeseg.backends.tensorrt import device as tensorrt_device
from edgeseg.backends.tensorrt import rtx as tensorrt_rtx
from edgeseg.backends.tensorrt.rtx import TensorRTRtxBackend, check_sm
from edgeseg.backends.tensorrt.rtx_cache import runtime_cache_path
from edgeseg.errors import MissingDependencyError, StaleEngineError

ADA = cuda_device("NVIDIA RTX 4000", (8, 9), 8)


def missing() -> Any:
    raise MissingDependencyError("tensorrt_rtx", "tensorrt-rtx", "build TensorRT-RTX engines")


def engine(folder: Path, sm: str = "86,89", version: str = "1.7.1.116", **options: Any) -> Any:
    path = folder / "engine.rtx"
    tensors = [
        {"name": "image", "mode": "INPUT", "dtype": "UINT8", "dims": [1, 32, 32, 3]},
        {"name": "mask", "mode": "OUTPUT", "dtype": "UINT8", "dims": [1, 32, 32]},
    ]
    plan = {"version": RTX, "tensors": tensors, "layers": [], "profiles": [], "refittable": False}
    path.write_bytes(PLAN_MARK + json.dumps(plan).encode())
    manifest = SimpleNamespace(
        versions={"tensorrt-rtx": version},
        device={"sm": sm},
        options=options,
        spec=None,
        engine=SimpleNamespace(sha256="ab"),
    )
    return SimpleNamespace(folder=folder, manifest=manifest, engine_path=path, graph_path=folder / "model.onnx")


def test_status_tells_building_from_running() -> None:
    assert not TensorRTRtxBackend(import_module=missing).status().can_build
    module = Recorder(RTX).module
    without = TensorRTRtxBackend(import_module=lambda: module, gpu=missing).status()
    assert without.can_build and not without.available and "builds engines (--sm 75,80,86" in without.detail
    status = TensorRTRtxBackend(import_module=lambda: module, gpu=lambda: ADA).status()
    assert status.available and status.detail == "NVIDIA RTX 4000, compute capability 8.9"


def test_an_engine_runs_on_the_gpus_it_was_built_for(tmp_path: Path) -> None:
    check_sm(engine(tmp_path), "1.7.1.116", ADA)
    check_sm(engine(tmp_path, sm="default"), "1.7.1.116", ADA)
    with pytest.raises(StaleEngineError, match=r"for SM 86,89, this is 1.7.1.116 on T4 \(SM 75\); run: .* --sm 75"):
        check_sm(engine(tmp_path), "1.7.1.116", cuda_device("T4", (7, 5), 8))
    with pytest.raises(StaleEngineError, match=r"built with TensorRT-RTX 1.6.0 for SM 86,89, this is 1.7.1.116 on"):
        check_sm(engine(tmp_path, version="1.6.0"), "1.7.1.116", ADA)
    with pytest.raises(StaleEngineError, match=r"for SM \\x1b\[2J\\n, this is"):
        check_sm(engine(tmp_path, sm="\x1b[2J\n"), "1.7.1.116", ADA)


class Kernels:
    """Behaviour of a runtime cache that holds what was put in, plus one kernel for every context made."""

    def __init__(self) -> None:
        self.content = b""

    def behaviour(self) -> dict[str, Any]:
        return {
            "ICudaEngine.create_runtime_config": lambda e: e._recorder.new("IRuntimeConfig"),
            "IRuntimeConfig.create_runtime_cache": lambda c: c._recorder.new("IRuntimeCache"),
            "IRuntimeConfig.set_runtime_cache": lambda c, cache: True,
            "IRuntimeCache.deserialize": self.take,
            "IRuntimeCache.reset": lambda cache: True,
            "IRuntimeCache.serialize": lambda cache: host_memory(cache._recorder, self.content),
            "ICudaEngine.create_execution_context": self.compile,
        }

    def take(self, cache: Any, blob: bytes) -> bool:
        self.content = b"" if blob == b"damaged" else bytes(blob)
        return bool(self.content)

    def compile(self, cuda_engine: Any, runtime_config: Any) -> Any:
        self.content = self.content or b"kernel"
        return create_execution_context(cuda_engine)


def load(monkeypatch: pytest.MonkeyPatch, folder: Any) -> Recorder:
    recorder = Recorder(RTX, Kernels().behaviour())
    cuda = SimpleNamespace(active=nullcontext, close=lambda: None, device=ADA)
    monkeypatch.setattr(tensorrt_device, "open_cuda", lambda: cuda)
    monkeypatch.setattr(
        tensorrt_rtx,
        "open_session",
        lambda trt, engine, *rest: (engine.create_execution_context(), engine.num_io_tensors),
    )
    backend = TensorRTRtxBackend(import_module=lambda: recorder.module)
    assert backend.load(folder)[1] == 2  # type: ignore[index]  # the stand-in of a session
    return recorder


def test_kernels_are_kept_for_the_next_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))
    folder = engine(tmp_path, runtime_cache=True)
    path = runtime_cache_path("ab", ADA, "1.7.1.116")
    first = load(monkeypatch, folder)
    assert path.read_bytes() == b"kernel" and "IRuntimeCache.deserialize" not in first.names
    second = load(monkeypatch, folder)
    assert second.of("IRuntimeCache.deserialize")[0].arguments == {"blob": b"kernel"}
    assert path != runtime_cache_path("ab", cuda_device("NVIDIA RTX 5000", (8, 9), 8), "1.7.1.116")
    path.write_bytes(b"damaged")
    assert "IRuntimeCache.reset" in load(monkeypatch, folder).names
    assert path.read_bytes() == b"kernel"


def test_recompiling_adds_this_gpu_to_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(recompile, "compile_folder", lambda folder, options: asked.append(options["sm"]))
    monkeypatch.setattr(tensorrt_rtx, "backend", lambda: TensorRTRtxBackend(gpu=lambda: ADA))
    for given in ({"sm": [75, 120]}, {"sm": [89, 120]}):
        manifest = SimpleNamespace(target="tensorrt-rtx", options_given=given)
        monkeypatch.setattr(recompile, "read_manifest", lambda folder, read=manifest: read)
        recompile.recompile(SimpleNamespace(folder=tmp_path, manifest=manifest))  # type: ignore[arg-type]
    assert asked == [(75, 120, 89), (89, 120)]
