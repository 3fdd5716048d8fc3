"""The calibration table: exact round trips, hostile files, and which input made it stale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeseg.errors import ArtifactError
from edgeseg.quantize.table import (
    KEY_CAUSES,
    TABLE_SCHEMA_VERSION,
    CalibrationTable,
    TensorRange,
    check_fresh,
    load_table,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def ranges(draw: st.DrawFn) -> TensorRange:
    low = -abs(draw(FINITE))
    high = abs(draw(FINITE.filter(lambda v: v != 0)))
    minimum, maximum = sorted((draw(FINITE), draw(FINITE)))
    mean = draw(st.none() | st.lists(FINITE, max_size=4).map(tuple))
    return TensorRange(low, high, minimum, maximum, mean, None if mean is None else draw(st.integers(0, 3)))


TABLES = st.builds(
    CalibrationTable,
    st.just(TABLE_SCHEMA_VERSION),
    st.text(),
    st.dictionaries(st.text(), FINITE, max_size=2),
    st.fixed_dictionaries({cause: st.text() for cause in KEY_CAUSES}),
    st.integers(1, 2**31),
    st.dictionaries(st.text(), ranges(), max_size=4),
)


def example_table() -> CalibrationTable:
    return CalibrationTable(
        schema_version=TABLE_SCHEMA_VERSION,
        method="percentile",
        options={"percentile": 99.99},
        key={cause: f"hash of {cause}" for cause in KEY_CAUSES},
        images=3,
        ranges={"a": TensorRange(-1.0, 2.0, -1.5, 2.5, (0.25, -0.125), 1), "b": TensorRange(0.0, 6.0, 0.0, 6.0)},
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=TABLES)
def test_round_trip_is_exact(tmp_path: Path, table: CalibrationTable) -> None:
    path = tmp_path / "table.json"
    table.save(path)
    assert load_table(path) == table
    assert list(load_table(path).ranges) == list(table.ranges)


def test_table_is_readable_json(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    example_table().save(path)
    assert json.loads(path.read_text())["ranges"]["a"]["channel_mean"] == [0.25, -0.125]
    assert len(path.read_text().splitlines()) > 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("low", "NaN"),
        ("high", "Infinity"),
        ("high", "1e999"),
        ("minimum", "null"),
        ("maximum", '"6"'),
        ("low", "0.5"),
        ("low", "3.0"),
        ("high", "-1.0"),
        ("maximum", "-2.0"),
        ("channel_mean", "[1e999]"),
        ("channel_mean", "null"),
        ("channel_axis", "null"),
        ("channel_axis", "1.5"),
    ],
)
def test_hostile_range_is_refused(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "table.json"
    example_table().save(path)
    content = json.loads(path.read_text())
    content["ranges"]["a"][field] = "HERE"
    path.write_text(json.dumps(content).replace('"HERE"', value))
    with pytest.raises(ArtifactError, match="damaged or not one") as caught:
        load_table(path)
    assert "\n" not in str(caught.value)


def test_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TensorRange(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("missing", sorted(KEY_CAUSES))
def test_incomplete_key_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "table.json"
    example_table().save(path)
    content = json.loads(path.read_text())
    del content["key"][missing]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="must have"):
        load_table(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read calibration table"):
        load_table(tmp_path / "none.json")
    with pytest.raises(ArtifactError, match="cannot write calibration table"):
        example_table().save(tmp_path)


def test_fresh_table_passes() -> None:
    table = example_table()
    check_fresh(table, table.key)
    check_fresh(table, {cause: value for cause, value in table.key.items() if cause != "images"})


@pytest.mark.parametrize("cause", sorted(KEY_CAUSES))
def test_stale_table_names_the_one_cause(cause: str) -> None:
    table = example_table()
    with pytest.raises(ArtifactError) as caught:
        check_fresh(table, {**table.key, cause: "changed"})
    named = [c for c, words in KEY_CAUSES.items() if words in str(caught.value)]
    assert named == [cause]


def test_stale_table_names_all_causes() -> None:
    table = example_table()
    expected = {**table.key, "weights": "x", "graph": "y", "images": "z"}
    with pytest.raises(ArtifactError, match="the model weights, the fp32 graph and the calibration images changed"):
        check_fresh(table, expected)
