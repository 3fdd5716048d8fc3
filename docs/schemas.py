"""JSON Schemas of what edgeseg writes, made from the types that write and read it: ``make schemas``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from edgeseg.evaluate import results
from edgeseg.quantize.table import TABLE_SCHEMA_VERSION, CalibrationTable
from edgeseg.report import decision
from edgeseg.store import manifest

FOLDER = Path(__file__).resolve().parent / "schemas"
DOCUMENTS: dict[str, tuple[type, int]] = {
    "manifest": (manifest.Manifest, manifest.SCHEMA_VERSION),
    "bench-report": (results.BenchReport, results.SCHEMA_VERSION),
    "decision": (decision.Decision, decision.SCHEMA_VERSION),
    "calibration-table": (CalibrationTable, TABLE_SCHEMA_VERSION),
}


def schemas() -> dict[str, str]:
    """File name -> text, for every document."""
    return {f"{name}-v{version}.schema.json": _text(name, kind, version) for name, (kind, version) in DOCUMENTS.items()}


def _text(name: str, kind: type, version: int) -> str:
    (own,), parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    root: dict[str, Any] = parts.pop(own["$ref"].rpartition("/")[2])
    root["properties"]["schema_version"] = {"const": version}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **root,
        "title": f"edgeseg {name}, version {version}",
    }
    return json.dumps({**head, "$defs": parts}, indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every schema, and remove those of versions that are no more."""
    FOLDER.mkdir(exist_ok=True)
    made = schemas()
    for path in FOLDER.glob("*.schema.json"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
