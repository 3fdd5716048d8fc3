"""Runs the tests of ``tests/on_stub_cuda`` in processes whose CUDA driver is a stub compiled here.

The stub launches no kernel: the tests prove the plumbing of memory, streams, events, graphs, contexts and threads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stub_cuda
from stub_cuda.install_pycuda import REASON

TESTS = Path(__file__).resolve().parents[1] / "on_stub_cuda"
MODULES = {"cuda-bindings": "cuda.bindings", "pycuda": "pycuda"}

needs_compiler = pytest.mark.skipif(stub_cuda.compiler() is None, reason="no C compiler (cc) to build the stub driver")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return stub_cuda.build(tmp_path_factory.mktemp("stub"))


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(MODULES[package]) is not None
    except ModuleNotFoundError:
        return False


def no_pycuda() -> str:
    """Why, in the words of ``make pycuda`` if it was tried."""
    return REASON.read_text(encoding="utf-8").strip() if REASON.is_file() else "make pycuda builds it"


@needs_compiler
@pytest.mark.parametrize("package", MODULES)
def test_on_the_stub_driver(environment: dict[str, str], package: str) -> None:
    if not installed(package):
        pytest.skip(f"{package} is not installed" + (f": {no_pycuda()}" if package == "pycuda" else ""))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    search_path = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    path = os.pathsep.join([str(TESTS.parents[1]), *search_path])
    done = subprocess.run(
        command,
        env={**environment, "STUB_CUDA_DRIVER": package, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=TESTS.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 150, done.stdout


def test_without_a_driver_the_error_says_so() -> None:
    """Here, and on any machine without an NVIDIA driver."""
    script = (
        "from edgeseg.backends.cuda.device import open_cuda\n"
        "from edgeseg.errors import EdgesegError\n"
        "try:\n    open_cuda().close()\n"
        "except EdgesegError as exc:\n    print(type(exc).__name__, exc)\n"
        "else:\n    print('opened')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=TESTS.parents[1])
    said = done.stdout.strip()
    if said == "opened":
        pytest.skip("this machine has a GPU")
    assert re.match(r"DeviceError (no NVIDIA driver|cuInit failed)|MissingDependencyError .*pip install", said), said


@needs_compiler
@pytest.mark.skipif(not installed("cuda-bindings"), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "11.4.0.106"])
def test_the_gpu_suite_itself_runs_and_leaves_its_report(
    environment: dict[str, str], tmp_path: Path, version: str
) -> None:
    """On recorded TensorRT modules, without its slow measurements: what is tried here is the suite, not a device."""
    root = TESTS.parents[1]
    report = tmp_path / "report.json"
    quick = "not latency and not cuda_graph and not pipelining and not memory_comes_back and not bench and not torch"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "simulated_tensorrt", "-k", quick]
    done = subprocess.run(
        [*command, "-m", "gpu", str(root / "tests" / "gpu"), "--device-report", str(report)],
        env={
            **environment,
            "EDGESEG_CACHE": str(tmp_path / "cache"),
            "STUB_TENSORRT_VERSION": version,
            "PYTHONPATH": os.pathsep.join([str(root), str(TESTS), str(TESTS.parent)]),
        },
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(report.read_text())
    assert written["device"]["gpu"] == "Stub (no GPU)"
    outcomes = [test["outcome"] for test in written["tests"].values()]
    assert outcomes.count("passed") >= 25
    assert "failed" not in outcomes
    assert written["figures"]["test_masks_agree_with_onnxruntime[copy-int8]"] == {"agreement": 1.0}
    assert (
        written["figures"]["test_kernel_times_are_used_again"]["cache"]
        == f"Stub-no-GPU-8sm-8.7-tensorrt-{version}.cache"
    )
    # What is skipped is what this machine or version lacks.
    skipped = {name.partition("[")[0] for name, test in written["tests"].items() if test["outcome"] == "skipped"}
    lacking = {"test_folders_given", "test_dlpack_in_and_out", "test_each_cuda_package_gives_the_same_masks"}
    lacking |= {"test_cupy_both_ways"}
    if version.startswith("8."):
        lacking |= {"test_progress_of_a_build", "test_options_give_the_same_masks"}
    if version.startswith("11."):
        lacking |= {"test_implicit_calibration", "test_options_give_the_same_masks"}
    assert skipped <= lacking
