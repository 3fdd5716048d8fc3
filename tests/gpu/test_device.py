"""edgeseg on a real GPU: compile, proof of precision, masks, threads, graphs, device arrays, memory, latency."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from recorded_tensorrt.graphs import small_model

import edgeseg
from edgeseg.artifacts import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Engine,
    FileRef,
    Manifest,
    PrecisionReport,
    open_engine,
    read_manifest,
    write_json,
)
from edgeseg.backends import get_backend
from edgeseg.backends.cuda import open_cuda
from edgeseg.backends.portable import open_graph
from edgeseg.backends.tensorrt_session import TensorRTSession
from edgeseg.cli.bench import command as bench_command
from edgeseg.errors import StaleEngineError
from edgeseg.recompile import compile_folder
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec

pytestmark = pytest.mark.gpu

SIDE = 256
PRECISIONS = ("fp32", "fp16", "int8")
# Share of pixels whose class may differ from ONNX Runtime's: ties of random weights, and the GPU's order of sums.
AGREEMENT = {"fp32": 0.999, "fp16": 0.99, "int8": 0.98}


def graph(precision: str, batch: int | str = 1) -> onnx.ModelProto:
    """The small graph of the tests with random weights, so that its mask depends on the image."""
    made = small_model(precision, batch, (SIDE, SIDE))
    rng = np.random.default_rng(4)
    for tensor in made.graph.initializer:
        if len(tensor.dims) == 4:
            weights = rng.standard_normal(tuple(tensor.dims))
            weights -= weights.mean((1, 2, 3), keepdims=True)
            dtype = numpy_helper.to_array(tensor).dtype
            values = (weights * 40).clip(-127, 127) if dtype == np.int8 else weights
            tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    return made


def portable(folder: Path, precision: str, batch: BatchRange) -> Path:
    """A folder as ``edgeseg build --target tensorrt`` leaves it without a GPU."""
    folder.mkdir(parents=True)
    onnx.save(graph(precision, "batch" if batch.is_dynamic else batch.minimum), folder / "model.onnx")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        edgeseg_version=edgeseg.__version__,
        name=folder.name,
        spec=PipelineSpec(ModelSpec("fpn", classes=4), InputSpec(SIDE, SIDE, batch=batch)),
        precision=PrecisionReport(precision, {}, {}, 0),  # type: ignore[arg-type]
        target="tensorrt",
        scheme="tensorrt" if precision == "int8" else None,
        graph=FileRef.of(folder / "model.onnx"),
        engine=None,
        calibration=None,
        weights="random",
        inputs_sha256={"weights": "0"},
        options={},
        versions={},
        device={},
    )
    write_json(folder / MANIFEST_NAME, manifest)
    return folder


@pytest.fixture(scope="module")
def engines(device: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """A compiled engine of each precision."""
    root = tmp_path_factory.mktemp("engines")
    return {p: compile_folder(portable(root / p, p, BatchRange()), options={"tf32": False}) for p in PRECISIONS}


def with_options(engine: Engine, **options: Any) -> TensorRTSession:
    """Load an engine with other session options than it was compiled with."""
    manifest = dataclasses.replace(engine.manifest, options={**engine.manifest.options, **options})
    session = get_backend("tensorrt").load(Engine(engine.folder, manifest))
    assert isinstance(session, TensorRTSession)
    return session


def images(n: int, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    """Smooth random images: noise alone has a tie at every other pixel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, batch, SIDE // 8, SIDE // 8, 3)).astype(np.uint8)
    return list(np.ascontiguousarray(coarse.repeat(8, 2).repeat(8, 3)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_runs_in_the_precision_asked_for(
    engines: dict[str, Engine], figures: dict[str, Any], precision: str
) -> None:
    manifest = engines[precision].manifest
    assert manifest.engine is not None
    report = manifest.precision
    figures.update(mac_share=report.mac_share, node_share=report.node_share, size_bytes=manifest.engine.size_bytes)
    assert report.mac_share.get(precision, 0.0) > 0.9


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("host_memory", ["copy", "mapped"])
def test_masks_agree_with_onnxruntime(
    engines: dict[str, Engine], figures: dict[str, Any], precision: str, host_memory: str
) -> None:
    pytest.importorskip("onnxruntime", reason="the oracle: pip install onnxruntime")
    engine = engines[precision]
    with with_options(engine, host_memory=host_memory) as session, open_graph(engine) as oracle:
        pairs = [(session.run(image)["mask"], oracle.run(image)["mask"]) for image in images(8)]
    assert all(len(np.unique(theirs)) > 1 for _, theirs in pairs)
    agreement = float(np.mean([(ours == theirs).mean() for ours, theirs in pairs]))
    figures.update(agreement=agreement)
    assert agreement >= AGREEMENT[precision]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "given" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--portable", [])
        none = pytest.param(None, marks=pytest.mark.skip(reason="no folder given with --portable"), id="none")
        metafunc.parametrize("given", [pytest.param(folder, id=folder.name) for folder in folders] or [none])


def test_folders_given(device: dict[str, Any], figures: dict[str, Any], given: Path, tmp_path: Path) -> None:
    """A real model: compile a copy, compare with ONNX Runtime on the same graph, measure."""
    folder = tmp_path / given.name
    shutil.copytree(given, folder)
    begun = time.perf_counter()
    engine = compile_folder(folder, target="tensorrt")
    figures.update(compile_s=time.perf_counter() - begun, mac_share=engine.manifest.precision.mac_share)
    spec = engine.manifest.spec.input
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (spec.batch.minimum, spec.height, spec.width, spec.channels), np.uint8)
    session = get_backend("tensorrt").load(engine)
    assert isinstance(session, TensorRTSession)
    with session, open_graph(engine) as oracle:
        name = engine.manifest.spec.output.kind
        ours, theirs = session.run(image)[name], oracle.run(image)[name]
        figures.update(agreement=float(np.isclose(ours, theirs, atol=0.05).mean()), **measured(session, image))
    assert figures["agreement"] > 0.9


def test_eight_threads(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    wrong: list[int] = []

    def work(session: TensorRTSession, seed: int) -> None:
        for image, mask in zip(given, wanted, strict=True):
            if not np.array_equal(session.run(image)["mask"], mask):
                wrong.append(seed)

    given = images(16)
    with with_options(engines["int8"], contexts=3) as session:
        wanted = [session.run(image)["mask"] for image in given]
        threads = [threading.Thread(target=work, args=(session, seed)) for seed in range(8)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures.update(images_per_s=8 * len(given) / (time.perf_counter() - begun))
    assert wrong == []


def test_pipelining_gives_the_same_masks(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    given = images(64)
    with with_options(engines["int8"]) as session:
        session.run(given[0])
        begun = time.perf_counter()
        one_by_one = [session.run(image)["mask"] for image in given]
        middle = time.perf_counter()
        pipelined = [found["mask"] for found in session.run_many(given)]
        figures.update(one_by_one_s=middle - begun, pipelined_s=time.perf_counter() - middle)
    np.testing.assert_array_equal(np.stack(pipelined), np.stack(one_by_one))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graph_gives_the_same_masks(engines: dict[str, Engine], figures: dict[str, Any], precision: str) -> None:
    with open_cuda() as cuda:
        if not cuda.driver.has_graphs:
            pytest.skip(f"{cuda.driver.name} has no CUDA graphs; pip install 'edgeseg[jetson]'")
    given = images(8)
    with with_options(engines[precision]) as plain, with_options(engines[precision], cuda_graph=True) as graphed:
        for image in given:
            np.testing.assert_array_equal(graphed.run(image)["mask"], plain.run(image)["mask"])
        assert graphed.notes == ()
        figures.update(plain=measured(plain, given[0]), graph=measured(graphed, given[0]))


def test_arrays_on_the_device(engines: dict[str, Engine]) -> None:
    image = images(1)[0]
    with with_options(engines["fp16"]) as session, open_cuda() as cuda, cuda.device_memory(image.nbytes) as memory:
        with cuda.stream() as stream, cuda.active():
            stream.copy_to_device(memory.address, image.reshape(-1))
            stream.synchronize()

        class OnDevice:
            __cuda_array_interface__ = {  # noqa: RUF012  # as CuPy gives it
                "shape": image.shape,
                "typestr": "|u1",
                "data": (memory.address, False),
                "version": 3,
                "stream": None,
            }

        with session.run_device(OnDevice())["mask"] as mask:
            np.testing.assert_array_equal(mask.numpy(), session.run(image)["mask"])


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_torch_tensors_on_the_device(engines: dict[str, Engine]) -> None:
    """In by both protocols, out by DLPack, on a stream of its own, and for longer than the engine is there."""
    torch = pytest.importorskip("torch", reason="PyTorch with CUDA")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    given = images(16)
    side = torch.cuda.Stream()
    with with_options(engines["fp16"], contexts=1) as session:
        wanted = [session.run(image)["mask"] for image in given]
        taken = []
        for image in given:
            with torch.cuda.stream(side):
                tensor = torch.from_numpy(image).cuda(non_blocking=True)
                busy = torch.rand(2048, 2048, device="cuda")
                for _ in range(10):  # keeps the stream busy: the copy below must see this image's mask, not a later one
                    busy = busy @ busy / 2048
                with session.run_device(tensor)["mask"] as mask:
                    taken.append((torch.from_dlpack(mask) + 0, torch.from_dlpack(mask)))
    torch.cuda.synchronize()
    for (copy, view), mask in zip(taken, wanted, strict=True):
        np.testing.assert_array_equal(copy.cpu().numpy(), mask)
        np.testing.assert_array_equal(view.cpu().numpy(), mask)


def test_cuda_graph_over_one_buffer_on_the_device(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    """What a camera loop does: every frame at the same place, every mask closed before the next."""
    given = images(8)
    with open_cuda() as cuda, cuda.device_memory(given[0].nbytes) as memory, cuda.stream() as stream:
        if not cuda.driver.has_graphs:
            pytest.skip(f"{cuda.driver.name} has no CUDA graphs; pip install 'edgeseg[jetson]'")

        class Frame:
            __cuda_array_interface__ = {  # noqa: RUF012
                "shape": given[0].shape,
                "typestr": "|u1",
                "data": (memory.address, False),
                "version": 3,
                "stream": stream.address,
            }

        def loop(session: TensorRTSession) -> list[np.ndarray]:
            masks = []
            for image in given:
                with cuda.active():
                    stream.copy_to_device(memory.address, image.reshape(-1))
                with session.run_device(Frame())["mask"] as mask:
                    masks.append(mask.numpy())
            return masks

        with with_options(engines["fp16"]) as plain, with_options(engines["fp16"], cuda_graph=True) as graphed:
            for ours, theirs in zip(loop(graphed), loop(plain), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            assert graphed.notes == ()
            for name, session in (("plain_s", plain), ("graph_s", graphed)):
                begun = time.perf_counter()
                for _ in range(10):
                    loop(session)
                figures[name] = time.perf_counter() - begun


def test_dynamic_batch(device: dict[str, Any], tmp_path: Path) -> None:
    engine = compile_folder(portable(tmp_path / "dynamic", "fp32", BatchRange(1, 2, 4)), options={"tf32": False})
    with with_options(engine) as session:
        for batch in (1, 4, 2, 1):
            image = images(1, batch, seed=batch)[0]
            whole = session.run(image)["mask"]
            parts = [session.run(image[i : i + 1])["mask"][0] for i in range(batch)]
            assert (whole == np.stack(parts)).mean() > 0.999


def test_memory_comes_back(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    image = images(1)[0]
    with open_cuda() as cuda:
        with with_options(engines["int8"]) as session:  # what CUDA keeps for itself after the first load
            session.run(image)
        before = cuda.memory_info()[0]
        for _ in range(30):
            with with_options(engines["int8"], contexts=3) as session:
                list(session.run_many([image] * 3))
        lost = before - cuda.memory_info()[0]
    figures.update(lost_bytes=lost)
    # On a Jetson other processes share this memory: a leak of one engine's buffers each time would be far more.
    assert lost < 64 << 20


def test_an_engine_of_another_version_is_refused_and_recompiled(engines: dict[str, Engine], tmp_path: Path) -> None:
    folder = tmp_path / "stale"
    shutil.copytree(engines["fp16"].folder, folder)
    manifest = read_manifest(folder)
    write_json(folder / MANIFEST_NAME, dataclasses.replace(manifest, versions={**manifest.versions, "tensorrt": "1.0"}))
    with pytest.raises(StaleEngineError, match=r"built with tensorrt 1\.0"):
        edgeseg.load(folder)
    image = images(1)[0][0]
    with edgeseg.load(folder, recompile=True) as again, edgeseg.load(engines["fp16"].folder) as first:
        assert (again(image) == first(image)).mean() > 0.99
    assert open_engine(folder).manifest.versions["tensorrt"] == manifest.versions["tensorrt"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_latency(engines: dict[str, Engine], figures: dict[str, Any], precision: str) -> None:
    """Measured, not judged."""
    with with_options(engines[precision]) as session:
        figures.update(measured(session, images(1)[0]))
    assert figures["end_to_end_median_ms"] > 0


def test_bench(engines: dict[str, Engine], figures: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    folders = [str(engines[precision].folder) for precision in PRECISIONS]
    run = CliRunner().invoke(bench_command, [*folders, "--baseline", "none", "--json", str(path)])
    assert run.exit_code == 0, run.output
    figures.update(report=json.loads(path.read_text()))


def measured(session: TensorRTSession, image: np.ndarray, iterations: int = 200) -> dict[str, float | None]:
    """Medians in milliseconds, after 200 ms of warm-up; ``None``: there is no such stage."""
    until = time.perf_counter() + 0.2
    while time.perf_counter() < until:
        session.run(image)
    whole, stages = [], []
    for _ in range(iterations):
        begun = time.perf_counter()
        session.run(image)
        whole.append((time.perf_counter() - begun) * 1e3)
        stages.append(session.run_timed(image)[1])

    def median(name: str) -> float | None:
        values = [getattr(times, name) for times in stages]
        return None if None in values else statistics.median(values)

    names = ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")
    return {"end_to_end_median_ms": statistics.median(whole), **{f"median_{name}": median(name) for name in names}}
