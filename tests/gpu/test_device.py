"""edgeseg on a real GPU: compile, proof of precision, masks, threads, graphs, device arrays, memory, latency."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from described import Described
from device_engines import AGREEMENT, PRECISIONS, agreement, images, measured, portable, with_options
from in_threads import in_threads

import edgeseg
from edgeseg.backends import get_backend
from edgeseg.backends.compile import compile_folder
from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.portable import open_graph
from edgeseg.backends.tensorrt.session import TensorRTSession
from edgeseg.cli.bench import command as bench_command
from edgeseg.errors import ArtifactError, StaleEngineError
from edgeseg.spec import BatchRange
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine, open_engine, read_manifest
from edgeseg.store.manifest import MANIFEST_NAME

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engine_runs_in_the_precision_asked_for(
    engines: dict[str, Engine], figures: dict[str, Any], precision: str
) -> None:
    manifest = engines[precision].manifest
    assert manifest.engine is not None
    report = manifest.precision
    figures.update(
        mac_share=report.mac_share,
        node_share=report.node_share,
        time_share=report.time_share,
        size_bytes=manifest.engine.size_bytes,
    )
    assert report.mac_share.get(precision, 0.0) > 0.9
    # By names: those the profiler gives have to be those the inspector has.
    assert report.time_share is not None, "see the notes of the build"
    assert report.time_share.get("unknown", 0.0) < 0.1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("host_memory", ["copy", "mapped"])
def test_masks_agree_with_onnxruntime(
    engines: dict[str, Engine], figures: dict[str, Any], precision: str, host_memory: str
) -> None:
    pytest.importorskip("onnxruntime", reason="the oracle: pip install onnxruntime")
    engine = engines[precision]
    with with_options(engine, host_memory=host_memory) as session:
        figures.update(agreement=agreement(session, engine.folder))
    assert figures["agreement"] >= AGREEMENT[precision]


def test_an_integrated_gpu_works_in_the_cpus_memory(engines: dict[str, Engine], device: dict[str, Any]) -> None:
    """``host_memory=auto``: mapped on a Jetson, copied on a card."""
    image = images(1)[0]
    with with_options(engines["fp16"]) as session:
        times = session.run_timed(image)[1]
    assert (times.h2d_ms is None) == (times.d2h_ms is None) == device["integrated"]


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
        begun = time.perf_counter()
        in_threads(8, partial(work, session))
        figures.update(images_per_s=8 * len(given) / (time.perf_counter() - begun))
    assert wrong == []


def test_pipelining_gives_the_same_masks(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    given = images(64)
    with with_options(engines["int8"]) as session:
        session.run(given[0])
        begun = time.perf_counter()
        one_by_one = [session.run(image)["mask"] for image in given]
        middle = time.perf_counter()
        pipelined = [outputs["mask"] for outputs in session.run_many(given)]
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
        figures.update(plain=measured(plain, given[0]), graph=measured(graphed, given[0]))


def test_arrays_on_the_device(engines: dict[str, Engine]) -> None:
    image = images(1)[0]
    with with_options(engines["fp16"]) as session, open_cuda() as cuda, cuda.device_memory(image.nbytes) as memory:
        with cuda.stream() as stream, cuda.active():
            stream.copy_to_device(memory.address, image.reshape(-1))
            stream.synchronize()

        with session.run_device(Described(memory.address, image.shape, stream=None))["mask"] as mask:
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
    for (copy, view), expected in zip(taken, wanted, strict=True):
        np.testing.assert_array_equal(copy.cpu().numpy(), expected)
        np.testing.assert_array_equal(view.cpu().numpy(), expected)


def test_cuda_graph_over_one_buffer_on_the_device(engines: dict[str, Engine], figures: dict[str, Any]) -> None:
    """What a camera loop does: every frame at the same place, every mask closed before the next."""
    given = images(8)
    with open_cuda() as cuda, cuda.device_memory(given[0].nbytes) as memory, cuda.stream() as stream:
        if not cuda.driver.has_graphs:
            pytest.skip(f"{cuda.driver.name} has no CUDA graphs; pip install 'edgeseg[jetson]'")

        frame = Described(memory.address, given[0].shape, stream=stream.address)

        def loop(session: TensorRTSession) -> list[np.ndarray]:
            masks = []
            for image in given:
                with cuda.active():
                    stream.copy_to_device(memory.address, image.reshape(-1))
                with session.run_device(frame)["mask"] as mask:
                    masks.append(mask.numpy())
            return masks

        with with_options(engines["fp16"]) as plain, with_options(engines["fp16"], cuda_graph=True) as graphed:
            for ours, theirs in zip(loop(graphed), loop(plain), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            for name, session in (("plain_s", plain), ("graph_s", graphed)):
                begun = time.perf_counter()
                for _ in range(10):
                    loop(session)
                figures[name] = time.perf_counter() - begun


def test_dlpack_in_and_out(engines: dict[str, Engine]) -> None:
    """With PyTorch or CuPy, whichever is here: what a camera pipeline on the device hands over."""
    image = images(1)[0]
    with with_options(engines["fp16"]) as session:
        wanted = session.run(image)["mask"]
        try:
            import torch

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a driver it does not know is said by the answer
                usable = torch.cuda.is_available()
            if not usable:
                raise ImportError("this PyTorch has no CUDA")
            given: Any = torch.from_numpy(image).cuda()
            read: Any = lambda mask: torch.utils.dlpack.from_dlpack(mask).cpu().numpy()  # noqa: E731
        except ImportError as torch_missing:
            cupy = pytest.importorskip("cupy", reason=f"needs cupy, or PyTorch with CUDA ({torch_missing})")
            given = cupy.asarray(image)
            read = lambda mask: cupy.asnumpy(cupy.from_dlpack(mask))  # noqa: E731
        with session.run_device(given)["mask"] as mask:
            np.testing.assert_array_equal(read(mask), wanted)


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


def test_a_plan_that_was_edited_is_refused(engines: dict[str, Engine], tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(engines["fp16"].folder, folder)
    plan = open_engine(folder).engine_path
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not have the hash"):
        edgeseg.load(folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_latency(engines: dict[str, Engine], figures: dict[str, Any], precision: str) -> None:
    """Measured, not judged."""
    with with_options(engines[precision]) as session:
        figures.update(measured(session, images(1)[0]))
    assert figures["end_to_end_median_ms"] > 0


def test_bench(engines: dict[str, Engine], figures: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    folders = [str(engines[precision].folder) for precision in PRECISIONS]
    run = CliRunner().invoke(bench_command, [*folders, "--baseline", "none", "--profile", "--json", str(path)])
    assert run.exit_code == 0, run.output
    figures.update(report=json.loads(path.read_text()))
