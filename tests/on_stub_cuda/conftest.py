"""Tests that run in a process whose ``libcuda.so.1`` is the stub; started by ``tests/unit/test_on_stub_cuda.py``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from simulated import Simulation, model, session
from stub_cuda import Stub

from edgeseg.backends.cuda.driver import DriverName
from edgeseg.backends.tensorrt.session import TensorRTSession

DRIVER = os.environ.get("STUB_CUDA_DRIVER", "")
if not DRIVER:
    collect_ignore_glob = ["test_*.py"]
if DRIVER == "pycuda":
    # pycuda binds every function of the driver when loaded; the stub has those edgeseg calls.
    sys.setdlopenflags(os.RTLD_LAZY)


@pytest.fixture
def driver() -> DriverName:
    """The package under test."""
    return DRIVER  # type: ignore[return-value]


@pytest.fixture
def stub() -> Iterator[Stub]:
    """The stub; afterwards nothing may be left, freed twice, or touched after being freed."""
    stub = Stub()
    before = stub.violations()
    yield stub
    stub.work_again()
    assert stub.errors == []
    assert stub.live() == {}
    assert stub.violations() == before


@pytest.fixture
def simulation(stub: Stub) -> Simulation:
    """An engine of a small network, of one shape."""
    return Simulation(stub, model())


@pytest.fixture
def opened(simulation: Simulation, driver: DriverName) -> Iterator[TensorRTSession]:
    """A session of that engine."""
    with session(simulation, driver) as opened:
        yield opened
