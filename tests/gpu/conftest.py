"""The suite for a machine with an NVIDIA GPU and TensorRT; elsewhere every test is skipped with the reason.

    python -m pytest -m gpu tests/gpu --device-report report.json [--portable engines/NAME ...]

``report.json`` holds what the device is, what happened, and every figure measured: one file to send back.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from device_engines import PRECISIONS, portable

import edgeseg
from edgeseg.backends.compile import compile_folder
from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.tensorrt.backend import TensorRTBackend
from edgeseg.backends.tensorrt.log import capture
from edgeseg.backends.tensorrt.module import TENSORRT
from edgeseg.errors import EdgesegError
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine

REPORT_VERSION = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("edgeseg on a device")
    group.addoption(
        "--device-report", metavar="FILE", type=Path, help="Write what was found and measured there, as JSON."
    )
    group.addoption(
        "--portable", metavar="ENGINE_DIR", type=Path, action="append", default=[], help="Also these folders."
    )


class Findings:
    """What goes into the report."""

    def __init__(self) -> None:
        self.device: dict[str, Any] = {}
        self.figures: dict[str, Any] = {}
        self.outcomes: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINDINGS] = Findings()


FINDINGS = pytest.StashKey[Findings]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if "gpu" not in item.keywords or (report.when != "call" and report.passed):
        return
    said = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    item.config.stash[FINDINGS].outcomes[item.name] = {
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
        "said": said[-4000:],
    }


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--device-report", None)
    if path is None:
        return
    findings = session.config.stash[FINDINGS]
    report = {
        "report_version": REPORT_VERSION,
        "edgeseg_version": edgeseg.__version__,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": findings.device,
        "figures": findings.figures,
        "tests": findings.outcomes,
    }
    write_json(path, report)


def first_line(path: str) -> str | None:
    """Of a text file; ``None`` where there is none."""
    file = Path(path)
    return file.read_text(errors="replace").split("\n")[0].strip("\0 ") if file.is_file() else None


def dla_cores() -> int:
    """How many DLA cores TensorRT sees."""
    trt = TENSORRT.load()
    with capture(trt) as (logger, _):
        return int(trt.Builder(logger).num_DLA_cores)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The GPU; skips where TensorRT cannot run."""
    status = TensorRTBackend().status()
    if not status.available:
        pytest.skip(f"needs an NVIDIA GPU and TensorRT: {status.detail}")
    try:
        cuda = open_cuda()
    except EdgesegError as exc:
        pytest.skip(f"needs an NVIDIA GPU and TensorRT: {exc}")
    with cuda:
        free, total = cuda.memory_info()
        described = {
            "gpu": cuda.device.name,
            "compute_capability": list(cuda.device.compute_capability),
            "multiprocessors": cuda.device.multiprocessors,
            "dla_cores": dla_cores(),
            "integrated": cuda.device.integrated,
            "cuda": cuda.device.cuda_version,
            "cuda_package": cuda.driver.name,
            "memory_bytes": total,
            "memory_free_bytes": free,
            "tensorrt": status.version,
            "python": sys.version.split()[0],
            "machine": platform.machine(),
            "system": platform.platform(),
            "board": first_line("/proc/device-tree/model"),
            "l4t": first_line("/etc/nv_tegra_release"),
            "power_mode": first_line("/var/lib/nvpmodel/status"),
        }
    request.config.stash[FINDINGS].device.update(described)
    return described


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where a test writes what it measured, for the report."""
    all_figures: dict[str, Any] = request.config.stash[FINDINGS].figures
    return all_figures.setdefault(request.node.name, {})  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def engines(device: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """A compiled engine of each precision."""
    root = tmp_path_factory.mktemp("engines")
    return {p: compile_folder(portable(root / p, p), options={"tf32": False}) for p in PRECISIONS}
