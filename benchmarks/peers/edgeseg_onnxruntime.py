"""edgeseg INT8 for ONNX Runtime, through the public interface: ``edgeseg.build`` and ``edgeseg.load``."""

from __future__ import annotations

from pathlib import Path

import edgeseg
from benchmarks.peers import Contender
from benchmarks.workload import Workload
from edgeseg.spec import Precision
from edgeseg.store.engine import Engine, open_engine


def prepare(work: Workload, folder: Path) -> Contender:
    return contender(work, folder, "onnxruntime")


def build(work: Workload, output: Path, target: str, precision: Precision = "int8") -> Engine:
    """The workload's network at its images' size, calibrated on its calibration images."""
    model, size = work.spec.model, work.spec.input
    return edgeseg.build(
        model=work.loaded.module,
        arch=model.arch,
        classes=model.classes,
        class_names=model.class_names,
        mean=work.spec.preprocess.mean,
        std=work.spec.preprocess.std,
        size=(size.height, size.width),
        precision=precision,
        calibration=work.calibration,
        target=target,
        output=output,
        force=True,
    )


def contender(work: Workload, folder: Path, target: str) -> Contender:
    engine = build(work, folder / "engine", target)
    manifest = open_engine(engine.folder).manifest
    segmenter = edgeseg.load(engine.folder)
    assert manifest.engine is not None
    files = (manifest.engine, *manifest.extra_files)
    settings = {
        "target": target,
        "scheme": manifest.scheme,
        "precision": manifest.precision.mac_share,
        **manifest.options,
    }
    return Contender(segmenter, sum(f.size_bytes for f in files), settings)
