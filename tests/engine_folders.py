"""Manifests of engine folders, with what a test does not care about filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgeseg
from edgeseg.backends.base import BuiltEngine
from edgeseg.spec import PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, PrecisionReport


def manifest_of(
    folder: Path,
    spec: PipelineSpec,
    precision: PrecisionReport | None = None,
    target: str = "tensorrt",
    *,
    graph: str = "model.onnx",
    engine: str | None = None,
    built: BuiltEngine | None = None,
    **fields: Any,
) -> Manifest:
    """A manifest of ``folder``, whose ``graph`` and ``engine`` are there; ``built`` tells what a backend would."""
    if built is not None:
        precision, engine = built.precision, None if built.path is None else built.path.name
        told = {"options": dict(built.options), "versions": dict(built.versions), "device": dict(built.device)}
        told["options_given"] = told["options"] if built.path is None else {}
        fields = {**told, "extra_files": tuple(map(FileRef.of, built.extra_files)), **fields}
    return Manifest(
        **{
            "schema_version": SCHEMA_VERSION,
            "edgeseg_version": edgeseg.__version__,
            "name": folder.name,
            "spec": spec,
            "precision": precision or PrecisionReport("fp32", {}, {}, 0, "typed"),
            "target": target,
            "scheme": None,
            "graph": FileRef.of(folder / graph),
            "engine": None if engine is None else FileRef.of(folder / engine),
            "calibration": None,
            "weights": "random",
            "inputs_sha256": {"weights": "0" * 64},
            "options": {},
            "versions": {},
            "device": {},
            **fields,
        }
    )


def write_manifest(folder: Path, *args: Any, **fields: Any) -> Manifest:
    """Write :func:`manifest_of` into the folder."""
    manifest = manifest_of(folder, *args, **fields)
    write_json(folder / MANIFEST_NAME, manifest)
    return manifest
