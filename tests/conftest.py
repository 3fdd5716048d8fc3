"""What all tests share: one cache of exports and calibrations a run, and PyTorch on one thread where models are tiny."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """What one file exported or calibrated, every other finds; xdist's workers inherit the folder.

    A test that asserts on what is made anew brings a cache of its own. Who names one keeps it from run to run.
    """
    if "EDGESEG_CACHE" not in os.environ:
        folder = os.environ["EDGESEG_CACHE"] = tempfile.mkdtemp(prefix="edgeseg-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """Modules stay: what a full collection need not look at again. It takes a quarter of a second with PyTorch loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: threads would wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
