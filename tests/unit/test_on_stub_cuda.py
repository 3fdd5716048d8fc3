"""Runs the tests of ``tests/on_stub_cuda`` in processes whose CUDA driver is a stub compiled here.

The stub launches no kernel: the tests prove the plumbing of memory, streams, events, graphs, contexts and threads.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stub_cuda

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


@needs_compiler
@pytest.mark.parametrize("package", MODULES)
@pytest.mark.parametrize("suite", sorted(path.stem for path in TESTS.glob("test_*.py")))
def test_on_the_stub_driver(environment: dict[str, str], package: str, suite: str) -> None:
    if not installed(package):
        pytest.skip(
            f"{package} is not installed" + ("; building it takes a CUDA toolkit" if package == "pycuda" else "")
        )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"{suite}.py")]
    found = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    path = os.pathsep.join([str(TESTS.parents[1]), *found])
    done = subprocess.run(
        command,
        env={**environment, "STUB_CUDA_DRIVER": package, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=TESTS.parents[1],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 4, done.stdout


def test_without_a_driver_the_error_says_so() -> None:
    """Here, and on any machine without an NVIDIA driver."""
    script = (
        "from edgeseg.backends.cuda import open_cuda\n"
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
