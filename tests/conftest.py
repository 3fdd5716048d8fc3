"""What all tests share: one cache of exports and calibrations a run, and PyTorch on one thread."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from typing import Any

import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """What one file exported or calibrated, every other finds; xdist's workers inherit the folder.

    A test that asserts on what is made anew brings a cache of its own. Who names one keeps it from run to run.
    PyTorch takes one thread, here and in the programs that tests start: the models are tiny, and two workers share the cores.
    Where a build asks for more, they sleep while they wait for each other: on a busy machine spinning takes most of a build.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "EDGESEG_CACHE" not in os.environ:
        folder = os.environ["EDGESEG_CACHE"] = tempfile.mkdtemp(prefix="edgeseg-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """Modules stay: what a full collection need not look at again. It takes a quarter of a second with PyTorch loaded."""
    gc.collect()
    gc.freeze()


_STARTS: dict[str, Any] = {}
"""Of the generators of test files, when their first test began."""


@pytest.fixture(autouse=True)
def _the_same_random_numbers_in_any_order(request: pytest.FixtureRequest) -> None:
    """A generator that tests share starts each of them anew, a file's own and that of small graphs: no draw depends on others."""
    small_graphs = sys.modules.get("small_graphs")
    if small_graphs is not None:
        small_graphs.RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
    own = getattr(request.module, "RNG", None)
    if isinstance(own, np.random.Generator):
        own.bit_generator.state = _STARTS.setdefault(request.module.__name__, own.bit_generator.state)
