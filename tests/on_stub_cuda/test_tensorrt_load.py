"""From a portable folder to masks as a user goes there: compile, load, run, recompile, with recorded TensorRT modules.

No kernel is built or run: the plan is a made-up text, and ONNX Runtime does the engine's work on the stub's memory.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from described import Described
from engine_folders import write_manifest
from PIL import Image
from recorded_tensorrt import VERSIONS
from simulated import SIDE, Simulation, model, spec
from stub_cuda import OUT_OF_MEMORY, Stub

import edgeseg
from edgeseg.backends.base import DeviceSession
from edgeseg.backends.compile import compile_folder, recompile
from edgeseg.backends.cpu.onnxruntime import OnnxRuntimeSession
from edgeseg.cli.run import command as run_command
from edgeseg.errors import ArtifactError, DeviceError, StaleEngineError
from edgeseg.progress import SilentReporter
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.runtime.stream import stream
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine, read_manifest
from edgeseg.store.manifest import MANIFEST_NAME

RNG = np.random.default_rng(2)


@pytest.fixture(autouse=True)
def _first_choice_of_driver(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    """``open_cuda()`` takes cuda-bindings where both are installed."""
    from edgeseg.backends.cuda import device as cuda

    monkeypatch.setattr(cuda, "_DRIVERS", {driver: cuda._DRIVERS[driver]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A portable engine folder, as a workstation without a GPU leaves it."""
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "engine"
    folder.mkdir()
    onnx.save(model(), folder / "model.onnx")
    write_manifest(folder, spec())
    return folder


def tensorrt(monkeypatch: pytest.MonkeyPatch, stub: Stub, version: str) -> Simulation:
    """``import tensorrt`` gives the recorded module of a version."""
    simulation = Simulation(stub, model(), version)
    monkeypatch.setitem(sys.modules, "tensorrt", simulation.trt)
    return simulation


def photos(n: int) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(n)]


def wanted(simulation: Simulation, image: np.ndarray) -> np.ndarray:
    return Segmenter(OnnxRuntimeSession(simulation.reference), spec())(image)


@pytest.mark.parametrize("version", VERSIONS)
def test_compile_and_load(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    simulation = tensorrt(monkeypatch, stub, version)
    with pytest.raises(StaleEngineError, match="portable graph only; run: edgeseg compile"):
        edgeseg.load(folder)
    engine = compile_folder(folder, options={"contexts": 1, "host_memory": "copy"})
    assert engine.manifest.versions["tensorrt"] == version
    assert engine.manifest.device == {"gpu": "Stub (no GPU)", "compute_capability": "8.7"}
    assert stub.live() == {}, "compiling holds nothing"
    with edgeseg.load(folder) as segmenter:
        for image in photos(2):
            np.testing.assert_array_equal(segmenter(image), wanted(simulation, image))
        assert stub.live()["streams"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_compile_measures_time_per_dtype(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str
) -> None:
    """The n-th layer takes n quarters of a millisecond; one of them is made to run in fp16."""
    simulation = tensorrt(monkeypatch, stub, version)
    simulation.recorder.fakery.layer_dtype = lambda name, dtype: "fp16" if name == "decoder.block/Conv" else dtype
    report = compile_folder(folder).manifest.precision
    order = 1 + simulation.layers.index("decoder.block/Conv")
    whole = sum(range(1, len(simulation.layers) + 1))
    assert report.time_share is not None
    assert report.time_share == pytest.approx({"fp16": order / whole, "fp32": 1 - order / whole})
    assert report.mac_share["fp16"] == pytest.approx(8 * 4 / (8 * 4 + 3 * 8))
    assert simulation.executed == 11, "one run that is not counted, ten that are"
    assert compile_folder(folder, options={"layer_times": False}).manifest.precision.time_share is None
    assert simulation.executed == 11
    assert stub.live() == {}


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_an_engine_without_weights_gets_them_back_to_be_measured_and_to_run(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str
) -> None:
    simulation = tensorrt(monkeypatch, stub, version)
    refitted: list[bytes] = []

    def refit(parser: object, model: str) -> bool:
        refitted.append(Path(model).read_bytes())
        return True

    simulation.recorder.behaviour["OnnxParserRefitter.refit_from_file"] = refit
    simulation.recorder.behaviour["Refitter.refit_cuda_engine"] = lambda refitter: len(refitted) > 0
    engine = compile_folder(folder, options={"strip_weights": True})
    assert engine.manifest.precision.time_share == pytest.approx({"fp32": 1.0})
    with edgeseg.load(folder) as segmenter:
        image = photos(1)[0]
        np.testing.assert_array_equal(segmenter(image), wanted(simulation, image))
    assert refitted == [engine.graph_path.read_bytes()] * 2
    simulation.recorder.behaviour["Refitter.refit_cuda_engine"] = lambda refitter: False
    with pytest.raises(ArtifactError, match="cannot put the weights of .*model.onnx back"):
        edgeseg.load(folder)


def test_an_engine_that_cannot_run_at_compile_time_is_a_note(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    simulation = tensorrt(monkeypatch, stub, "10.3.0")
    simulation.refuse = 3
    said: list[str] = []

    class Notes(SilentReporter):
        def note(self, text: str) -> None:
            said.append(text)

    assert compile_folder(folder, reporter=Notes()).manifest.precision.time_share is None
    assert said == [
        "time per dtype was not measured: TensorRT refuses to run the engine (execute_async_v3); its log says why"
    ]
    assert stub.live() == {}


def test_another_tensorrt_is_refused_or_compiled_for_on_request(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    tensorrt(monkeypatch, stub, "10.3.0")
    compile_folder(folder, options={"contexts": 3, "optimization_level": 4})
    simulation = tensorrt(monkeypatch, stub, "11.4.0.106")
    with pytest.raises(
        StaleEngineError, match=r"built with tensorrt 10\.3\.0.*this is tensorrt 11\.4\.0\.106.*compile"
    ):
        edgeseg.load(folder)
    with edgeseg.load(folder, recompile=True) as segmenter:
        image = photos(1)[0]
        np.testing.assert_array_equal(segmenter(image), wanted(simulation, image))
    manifest = Engine(folder, edgeseg.store.engine.read_manifest(folder)).manifest
    assert manifest.versions["tensorrt"] == "11.4.0.106"
    assert (manifest.options["contexts"], manifest.options["optimization_level"]) == (3, 4), (
        "the user's wishes are kept"
    )
    with edgeseg.load(folder):
        pass


def test_nothing_is_deserialized_before_the_checks(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A plan is native code: one that is not what the manifest says, or is of another device, is not handed to TensorRT."""
    tensorrt(monkeypatch, stub, "10.3.0")
    engine = compile_folder(folder)
    whole = read_manifest(folder)

    def refused(said: str, **changed: object) -> None:
        write_json(folder / MANIFEST_NAME, replace(whole, **changed))  # type: ignore[arg-type]
        simulation = tensorrt(monkeypatch, stub, "10.3.0")
        with pytest.raises(ArtifactError, match=said):
            edgeseg.load(folder)
        assert simulation.recorder.of("Runtime.deserialize_cuda_engine") == []
        assert stub.live() == {}

    refused("this is tensorrt 10.3.0 on Stub", versions={**whole.versions, "tensorrt": "10.3.1"})
    refused(
        r"built with tensorrt 10\.3\.0 for Orin \(compute capability 8\.7\), this is tensorrt 10\.3\.0 on Stub .*"
        rf"run: edgeseg compile {folder}",
        device={**whole.device, "gpu": "Orin"},
    )
    refused(r"compute capability 8\.6\), this is", device={**whole.device, "compute_capability": "8.6"})
    assert whole.engine is not None
    refused("does not have the hash", engine=replace(whole.engine, sha256="0" * 64))
    write_json(folder / MANIFEST_NAME, whole)
    engine.engine_path.write_bytes(engine.engine_path.read_bytes()[::-1])
    refused("edited or damaged")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_load_that_fails_late_destroys_the_engine_before_the_context(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, version: str
) -> None:
    """TensorRT frees GPU memory when its objects go; they are in the frames of the exception until somebody clears them."""
    from edgeseg.backends.cuda.device import Cuda

    simulation = tensorrt(monkeypatch, stub, version)
    compile_folder(folder)
    inner = simulation.recorder.behaviour["Runtime.deserialize_cuda_engine"]
    made: list[weakref.ref[object]] = []
    gone: list[bool] = []

    def deserialize(runtime: object, serialized_engine: object) -> object:
        made.append(weakref.ref(engine := inner(runtime, serialized_engine)))
        return engine

    close = Cuda.close

    def closing(cuda: Cuda) -> None:
        simulation.recorder.calls.clear()  # which has every object that was called
        if made:
            gone.append(made[-1]() is None)
        close(cuda)

    simulation.recorder.behaviour["Runtime.deserialize_cuda_engine"] = deserialize
    monkeypatch.setattr(Cuda, "close", closing)
    for function, said in [("cuStreamCreate", "cuStreamCreate failed"), ("cuMemHostAlloc", "MiB asked of")]:
        stub.fail(function, 1, OUT_OF_MEMORY)
        with pytest.raises(DeviceError, match=said) as caught:
            edgeseg.load(folder)
        assert gone == [True]
        assert stub.live() == {}
        assert caught.traceback
        gone.clear()
        made.clear()


def test_two_processes_compile_again_once(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Both find the engine stale; the second waits for the first and takes what it built."""
    tensorrt(monkeypatch, stub, "8.6.1")
    stale = compile_folder(folder)
    simulation = tensorrt(monkeypatch, stub, "10.3.0")
    built, go_on = threading.Event(), threading.Event()
    inner = simulation.recorder.behaviour["Builder.build_serialized_network"]

    def slow(builder: object, network: object, config: object) -> object:
        built.set()
        assert go_on.wait(10)
        return inner(builder, network, config)

    simulation.recorder.behaviour["Builder.build_serialized_network"] = slow
    engines: list[Engine] = []
    threads = [threading.Thread(target=lambda: engines.append(recompile(stale))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert built.wait(10)
    lock = folder.parent / ".engine.recompile.lock"
    assert lock.exists()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert [engine.manifest.versions["tensorrt"] for engine in engines] == ["10.3.0"] * 2
    assert len(simulation.recorder.of("Builder.build_serialized_network")) == 1
    assert not lock.exists()


def test_a_folder_that_cannot_be_written_says_what_to_do(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    tensorrt(monkeypatch, stub, "8.6.1")
    compile_folder(folder)
    tensorrt(monkeypatch, stub, "10.3.0")

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("edgeseg.backends.compile.lock", read_only)
    with pytest.raises(
        ArtifactError, match=r"cannot be compiled again where it is \(Read-only file system\); run: edgeseg"
    ):
        edgeseg.load(folder, recompile=True)
    assert stub.live() == {}


def test_loading_and_running_imports_numpy_and_tensorrt_alone(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, driver: str
) -> None:
    tensorrt(monkeypatch, stub, "10.3.0")
    compile_folder(folder)
    code = f"""
import os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import edgeseg
assert not {{"numpy", "PIL", "torch", "onnx"}} & set(sys.modules), "import edgeseg"
from edgeseg.backends.cuda import device as cuda
cuda._DRIVERS = {{{driver!r}: cuda._DRIVERS[{driver!r}]}}
for name in ("torch", "onnx", "onnxruntime", "segmentation_models_pytorch", "timm", "cv2", "scipy", "rich", "filelock"):
    sys.modules[name] = None  # importing one of them fails
import types
class Module(types.ModuleType):
    def __getattr__(self, name):
        raise AssertionError(f"reached TensorRT: {{name}}")
tensorrt = Module("tensorrt")
tensorrt.__version__ = "10.3.0"
tensorrt.Builder = object
tensorrt.ILogger = type("ILogger", (), {{}})
tensorrt.__file__ = tensorrt.__path__ = tensorrt.__spec__ = None
sys.modules["tensorrt"] = tensorrt
import edgeseg.backends.tensorrt.session, edgeseg.backends.cuda.arrays, edgeseg.runtime.stream
try:
    edgeseg.load({str(folder)!r})
except AssertionError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "reached TensorRT: Runtime", done.stderr


def test_a_damaged_folder_is_not_compiled_over(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tensorrt(monkeypatch, stub, "10.3.0")
    plan = compile_folder(folder).engine_path
    plan.write_bytes(plan.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated or edited"):
        edgeseg.load(folder, recompile=True)


def test_run_recompile(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    tensorrt(monkeypatch, stub, "8.6.1")
    compile_folder(folder)
    simulation = tensorrt(monkeypatch, stub, "10.16.1.11")
    image = photos(1)[0]
    Image.fromarray(image).save(tmp_path / "photo.png")
    arguments = [str(folder), str(tmp_path / "photo.png"), "--output", str(tmp_path / "out")]
    refused = CliRunner().invoke(run_command, arguments)
    assert isinstance(refused.exception, StaleEngineError)
    done = CliRunner().invoke(run_command, [*arguments, "--recompile"], catch_exceptions=False)
    assert done.exit_code == 0
    written = np.asarray(Image.open(done.output.splitlines()[-1]))
    np.testing.assert_array_equal(written, wanted(simulation, image))


def test_a_stream_copies_one_frame_while_another_is_computed(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    simulation = tensorrt(monkeypatch, stub, "10.3.0")
    compile_folder(folder, options={"host_memory": "copy"})
    frames = [RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(6)]
    with edgeseg.load(folder) as segmenter:
        stub.record_calls()
        with stream(iter(frames), segmenter) as masks:
            for frame, given in zip(masks, frames, strict=True):
                np.testing.assert_array_equal(frame.image, given)
                np.testing.assert_array_equal(frame.mask, simulation.masks(given[None])[0])
        calls = [call for call in stub.calls() if call in ("cuMemcpyHtoDAsync_v2", "cuStreamSynchronize")]
        assert calls[:3] == ["cuMemcpyHtoDAsync_v2", "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"]


def test_segmenter_on_the_device(stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    simulation = tensorrt(monkeypatch, stub, "10.3.0")
    compile_folder(folder)
    image = RNG.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    with edgeseg.load(folder) as segmenter:
        assert isinstance(segmenter._session, DeviceSession)
        from edgeseg.backends.cuda.device import open_cuda

        with open_cuda() as cuda, cuda.device_memory(image.nbytes) as memory, cuda.stream() as copying:
            with cuda.active():
                copying.copy_to_device(memory.address, image.reshape(-1))
                copying.synchronize()
            frame = Described(memory.address, image.shape, stream=None)
            with segmenter.run_device(frame)["mask"] as mask:
                np.testing.assert_array_equal(mask.numpy(), simulation.masks(image[None]))
    with pytest.raises(edgeseg.InputError, match="closed"):
        segmenter.run_device(frame)
    with pytest.raises(edgeseg.SpecError, match="takes no images from a device's memory"):
        Segmenter(OnnxRuntimeSession(simulation.reference), spec()).run_device(frame)


@pytest.mark.parametrize("host_memory", ["copy", "mapped"])
def test_the_harness_gets_the_stages_from_the_device(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, folder: Path, host_memory: str
) -> None:
    from edgeseg.backends import get_backend
    from edgeseg.evaluate.latency.measure import StageClock

    simulation = tensorrt(monkeypatch, stub, "10.3.0")
    engine = compile_folder(folder, options={"host_memory": host_memory})
    image = photos(1)[0]
    with StageClock(get_backend("tensorrt").load(engine)) as clock:
        segmenter = Segmenter(clock, spec())
        for _ in range(3):
            clock.timed(lambda: np.testing.assert_array_equal(segmenter(image), wanted(simulation, image)))
        split = clock.split()
    assert split.compute_ms is not None
    assert split.compute_ms > 0
    assert (split.h2d_ms is None) == (split.d2h_ms is None) == (host_memory == "mapped")
