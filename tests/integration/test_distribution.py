"""Wheel and sdist hold what they should and nothing else; ``make dist`` installs them too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from check_distribution import build, sdist_faults, tracked, wheel_faults

pytestmark = pytest.mark.integration


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("build", "hatchling")),
    reason="build and hatchling are not installed",
)
def test_wheel_and_sdist_hold_the_package_and_no_more(tmp_path: Path) -> None:
    wheel, sdist = build(tmp_path)
    files = tracked()
    assert wheel_faults(wheel, files) == []
    assert sdist_faults(sdist, files) == []
    # The comparison sees what is missing, and what is too much.
    assert wheel_faults(wheel, files | {"edgeseg/new.py"}) == ["wheel lacks edgeseg/new.py"]
    assert wheel_faults(wheel, files - {"edgeseg/spec.py"}) == ["wheel has edgeseg/spec.py"]
    assert sdist_faults(sdist, files - {"calibration/demo/classes.txt"}) == ["sdist has calibration/demo/classes.txt"]
