"""Building and segmenting on a Ray cluster: a local one of two nodes, in processes of their own, stands in for a larger one."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_folders import folder_for, own_scheme
from PIL import Image

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'edgeseg[sweep]'")

import edgeseg  # noqa: E402
from benchmarks.cluster_run import worker_processes  # noqa: E402
from edgeseg.cluster.run import run_on_cluster  # noqa: E402
from edgeseg.errors import InputError, StaleEngineError  # noqa: E402
from edgeseg.runtime.run import RunSettings, run_inputs  # noqa: E402
from edgeseg.store.engine import open_engine  # noqa: E402
from edgeseg.store.manifest import MANIFEST_NAME  # noqa: E402
from edgeseg.sweep.config import Cell, SweepConfig, expand  # noqa: E402
from edgeseg.sweep.executors import Built, build_cell, build_on_ray  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    # Ray's own files and sockets, closed by its shutdown or not at all.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors and two nodes of one; the first is for a test to lose."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    made.workers = [made.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return folder_for(tmp_path / "engine", "onnxruntime", own_scheme())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(200):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64 + number % 9, 60 + number % 5)).save(folder / f"image{number}.png")
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def test_cells_are_built_by_workers_and_a_dying_one_stops_nothing(cluster: Any, tmp_path: Path) -> None:
    def builder(cell: Cell) -> Built:
        if cell.name.startswith("fpn"):
            os._exit(9)
        if cell.name.startswith("pspnet"):
            return Built(cell, 0.1, f"refused in process {os.getpid()}")
        return build_cell(cell)

    config = SweepConfig(
        ("unet", "fpn", "pspnet"), output=str(tmp_path / "out"), precisions=("fp32",), targets=("onnxruntime",)
    )
    outcomes = {built.cell.request.model.arch: built for built in build_on_ray(expand(config), None, builder)}
    assert "Ray task failed" in (outcomes["fpn"].reason or "")
    process = (outcomes["pspnet"].reason or "").rsplit(" ", 1)[1]
    assert int(process) != os.getpid()
    assert outcomes["unet"].reason is None
    engine = open_engine(tmp_path / "out/engines/unet-demo-fp32-onnxruntime")
    assert engine.manifest.verification is not None and engine.manifest.verification.agreement > 0.99


def test_an_engine_that_no_node_can_load_is_refused_with_the_nodes_words(
    cluster: Any, engine: Path, photos: Path, tmp_path: Path
) -> None:
    manifest = json.loads((engine / MANIFEST_NAME).read_text())
    manifest["versions"]["onnxruntime"] = "0.1"
    (engine / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(StaleEngineError, match=rf"^{engine} was built with onnxruntime 0.1.*\(on node "):
        run_on_cluster(engine, [photos], tmp_path / "out", RunSettings(), progress=False)
    assert not (tmp_path / "out" / "masks").exists()


def test_no_cluster_at_the_address(engine: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(InputError, match="no Ray cluster at auto: Could not find any running Ray instance"):
        run_on_cluster(engine, [photos], tmp_path / "out", RunSettings(), address="auto", progress=False)


def test_a_worker_and_a_node_are_killed_and_every_image_has_its_mask(
    cluster: Any, engine: Path, photos: Path, tmp_path: Path
) -> None:
    output, killed = tmp_path / "out", []

    def disturb() -> None:
        wait_for(lambda: masks(output) >= 20)
        os.kill(min(worker_processes(cluster.address)), signal.SIGKILL)
        killed.append(masks(output))
        wait_for(lambda: masks(output) >= 100)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        killed.append(masks(output))

    thread = threading.Thread(target=disturb)
    thread.start()
    summary = run_on_cluster(engine, [photos], output, RunSettings(), workers=2, progress=False)
    thread.join()
    assert len(killed) == 2
    assert max(killed) < 200, "it was over before it was disturbed"
    assert summary.images == 200
    with edgeseg.load(engine) as segmenter:
        expected = run_inputs(segmenter, [photos], tmp_path / "one", progress=False)
    assert summary.failed == expected.failed
    assert [Path(path).name for path in summary.written] == [Path(path).name for path in expected.written]
    for path in expected.written:
        assert (output / "masks" / Path(path).name).read_bytes() == Path(path).read_bytes()
    lines = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    done = [image for line in lines for image, *_ in line.get("done", ())]
    assert len(done) == len(set(done)) == 200


def masks(output: Path) -> int:
    folder = output / "masks"
    return sum(not name.startswith(".") for name in os.listdir(folder)) if folder.is_dir() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    patience = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.005)
