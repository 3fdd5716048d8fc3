"""What all tests that build engines share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeseg.demo import sample_folder
from edgeseg.evaluate.latency.protocol import SHORT


@pytest.fixture(autouse=True, scope="module")
def _builds_time_their_engines_for_a_moment(request: pytest.FixtureRequest) -> Iterator[None]:
    """A build's time is up to six seconds of warm-up and measuring, and no test asserts a speed.

    A file whose builds choose an engine by its time says so: ``CHOOSES_BY_TIME = True``.
    """
    quick = {"warmup_ms": 20.0, "max_warmup_ms": 50.0, "min_duration_ms": 50.0}
    usual = {name: getattr(SHORT, name) for name in quick}
    if getattr(request.module, "CHOOSES_BY_TIME", False):
        quick = usual
    # In place: it is a default argument, too.
    for name, value in quick.items():
        object.__setattr__(SHORT, name, value)
    yield
    for name, value in usual.items():
        object.__setattr__(SHORT, name, value)


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's images, every fourth to judge on: for builds whose accuracy over all 48 is not asserted."""
    folder = tmp_path_factory.mktemp("calibration") / "demo"
    for kind, every in (("calib/images", 2), ("val/images", 4), ("val/masks", 4)):
        (folder / kind).mkdir(parents=True)
        for path in sorted((sample_folder() / kind).iterdir())[::every]:
            (folder / kind / path.name).symlink_to(path.resolve())
    return folder
