"""Damaged files of every kind raise nothing but edgeseg's own errors: a short run of ``fuzz_readers.py``; the seed is fixed."""

from __future__ import annotations

import random
import resource

import pytest
from fuzz_readers import Subject, fuzz, subjects

KINDS = (
    "image",
    "bands",
    "wide",
    "mask",
    "calibration",
    "list",
    "camvid",
    "sweep",
    "report",
    "onnx",
    "table",
    "engine",
    "transform",
    "card",
    "names",
    "state",
    "cache",
    "video",
    "handover",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return subjects(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_nothing_but_our_own(whole: dict[str, Subject], kind: str) -> None:
    chosen = {name: subject for name, subject in whole.items() if name.startswith(f"{kind}/")}
    if not chosen:
        pytest.skip("needs a package that is not installed")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, subject in chosen.items():
        subject.read(subject.path)
        assert fuzz(subject, random.Random(name), 25) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2 << 20
