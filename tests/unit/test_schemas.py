"""The JSON schemas in ``docs/schemas`` are those of today's types, and what is written fits them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from bench_rows import report, row
from cpu_folders import verification
from small_graphs import spec

from edgeseg.decide.entries import Run, merge
from edgeseg.decide.requirement import Requirement
from edgeseg.decide.verdict import decide
from edgeseg.quantize.table import KEY_CAUSES, TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.report.decision import decision_of
from edgeseg.spec import ModelRequest
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import SCHEMA_VERSION, Manifest, PrecisionReport, WeightsOrigin

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "schemas"


def made() -> dict[str, str]:
    at = importlib.util.spec_from_file_location("schemas", ROOT / "docs" / "schemas.py")
    assert at is not None
    assert at.loader is not None
    module = importlib.util.module_from_spec(at)
    at.loader.exec_module(module)
    schemas: dict[str, str] = module.schemas()
    return schemas


def test_schemas_are_those_of_the_types() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()} == made(), "run: make schemas"
    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert all(f"schemas/{name}" in page for name in made())


def manifest() -> Manifest:
    file = FileRef("model.onnx", "0" * 64, 10)
    return Manifest(
        SCHEMA_VERSION, "1", "a", spec(16, 3), PrecisionReport("fp32", {"fp32": 1.0}, {"Conv": 1}, 10, "typed"),
        "onnxruntime", None,
        file, file, None, "weights of a", {"weights": "0" * 64}, {"threads": None}, {}, {}, verification=verification(),
        model_request=ModelRequest(arch="fpn", weights="a/b@c", mean=(0.5,) * 3, std=(0.5,) * 3),
        origin=WeightsOrigin("a/b", "c", {"license": "mit", "tags": ["x"]}),
    )  # fmt: skip


def table() -> CalibrationTable:
    ranges = {"a": TensorRange(-1.0, 2.0, -1.5, 2.5, (0.25, -0.125), 1), "b": TensorRange(0.0, 6.0, 0.0, 6.0)}
    key = dict.fromkeys(KEY_CAUSES, "hash")
    return CalibrationTable(TABLE_SCHEMA_VERSION, "percentile", {"percentile": 99.99}, key, 3, ranges)


def bench() -> Any:
    return report(row("a", 5, miou=0.7, agreement=0.9), row("b", None))


def decision() -> Any:
    merged = merge([Run(bench(), None)])
    return decision_of(merged, decide(merged, Requirement.parse("miou >= 0.6 and p99_ms < 9")), [("c", "why")])


@pytest.mark.parametrize(
    ("name", "document"),
    [("manifest", manifest), ("calibration-table", table), ("bench-report", bench), ("decision", decision)],
)
def test_what_is_written_fits_its_schema(name: str, document: Any) -> None:
    schema = json.loads(next(FOLDER.glob(f"{name}-v*.schema.json")).read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    written = json.loads(msgspec.json.encode(document()))
    validator.validate(written)
    for broken in ({**written, "schema_version": 99}, {k: v for k, v in written.items() if k != "schema_version"}):
        assert not validator.is_valid(broken)
