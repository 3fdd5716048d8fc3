"""Building on a Ray cluster: a local one of two workers stands in for a larger one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'edgeseg[sweep]'")

from edgeseg.store.artifacts import open_engine  # noqa: E402
from edgeseg.sweep.config import Cell, SweepConfig, expand  # noqa: E402
from edgeseg.sweep.executors import Built, build_cell, build_on_ray  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    # Ray's own files and sockets, closed by its shutdown or not at all.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


def test_cells_are_built_by_workers_and_a_dying_one_stops_nothing(tmp_path: Path) -> None:
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
