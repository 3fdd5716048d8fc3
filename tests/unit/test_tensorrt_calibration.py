"""Calibration caches: the text TensorRT writes, and caches that are refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgeseg.backends.tensorrt.calibration import cache_header, cache_text, check_cache, read_cache, version_number
from edgeseg.errors import ArtifactError
from edgeseg.quantize.table import KEY_CAUSES, TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange

# The scales and names are of caches TensorRT 8.5 and 7.2 wrote that people published, but for the last line: a denormal.
GOLDEN = Path(__file__).parent.parent / "data" / "tensorrt-calibration.cache"


def table(**magnitudes: float) -> CalibrationTable:
    ranges = {name: TensorRange(-high, high, -high, high) for name, high in magnitudes.items()}
    return CalibrationTable(TABLE_SCHEMA_VERSION, "minmax", {}, dict.fromkeys(KEY_CAUSES, "0"), 8, ranges)


def golden_table() -> CalibrationTable:
    """The table whose cache the golden file is: scales read with numpy, not with the code under test."""
    ranges = {}
    for line in GOLDEN.read_text().splitlines()[1:]:
        name, _, digits = line.rpartition(": ")
        scale = np.array([int(digits, 16)], np.uint32).view(np.float32)[0]
        ranges[name] = float(scale) * 127.0
    return table(**ranges)


def test_the_text_is_what_tensorrt_writes() -> None:
    assert cache_text(golden_table(), "8.5.10") == GOLDEN.read_text()


def test_the_larger_side_of_a_range_counts() -> None:
    lopsided = table(x=1.0)
    lopsided.ranges["x"] = TensorRange(-254.0, 1.0, -254.0, 1.0)
    assert cache_text(lopsided, "8.6.1").splitlines()[1] == "x: 40000000"


@pytest.mark.parametrize(
    ("version", "number"),
    [("8.5.10", 8510), ("8.6.1", 8601), ("10.3.0", 100300), ("10.16.1.11", 101601), ("8.5.2.2", 8502)],
)
def test_versions_number_themselves_as_their_headers_do(version: str, number: int) -> None:
    assert version_number(version) == number
    assert cache_header(version) == f"TRT-{number}-EntropyCalibration2"


def test_reading_gives_back_the_scales() -> None:
    header, scales = read_cache(GOLDEN.read_text())
    assert header == "TRT-8510-EntropyCalibration2"
    assert scales["x"] == pytest.approx(2.00836, abs=1e-5)
    assert list(scales)[3] == "(Unnamed Layer* 8) [Constant]_output"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: 3f800000\n", "not a TensorRT calibration cache"),
        ("TRT-8601-EntropyCalibration2\nx: 3f80000g\n", "damaged at 'x: 3f80000g'"),
        ("TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "damaged"),
        ("TRT-8601-EntropyCalibration2\nx: bf800000\n", "damaged"),
        ("TRT-8601-EntropyCalibration2\nx: 3f800000\nx: 3f800000\n", "damaged"),
        ("TRT-8601-EntropyCalibration2\nx 3f800000\n", "damaged"),
        ("TRT-8601-EntropyCalibration2\nx: 1ffffffff\n", "damaged"),
    ],
)
def test_damaged_caches_are_refused(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_cache(text)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ArtifactError, match="cannot read calibration cache .*(no regular file|a folder)"):
            check_cache(path, "10.3.0", {"x"}, None)


def test_a_cache_of_this_version_graph_and_table_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "c.cache"
    path.write_text(cache_text(table(x=3.0, y=1.0), "10.3.0"))
    assert check_cache(path, "10.3.0", {"x", "y", "z"}, table(x=3.0, y=1.0)) == path.read_bytes()
    assert check_cache(path, "10.3.0", {"x", "y"}, None) == path.read_bytes()


@pytest.mark.parametrize(
    ("version", "tensors", "other", "message"),
    [
        ("8.6.1", {"x"}, None, "of another TensorRT .TRT-100300-EntropyCalibration2, this one reads TRT-8601-"),
        ("10.3.0", {"y"}, None, "of another model: it speaks of 'x'"),
        ("10.3.0", {"x"}, 3.5, "stale: 1 of its scales, such as that of 'x'"),
    ],
)
def test_stale_and_foreign_caches_are_refused(
    tmp_path: Path, version: str, tensors: set[str], other: float | None, message: str
) -> None:
    path = tmp_path / "c.cache"
    path.write_text(cache_text(table(x=3.0), "10.3.0"))
    with pytest.raises(ArtifactError, match=message):
        check_cache(path, version, tensors, None if other is None else table(x=other))
