"""Folders whose engine is built on the device: the typed graph is what is built here, and ONNX Runtime checks it.

TensorRT plans can only be built on the GPU that runs them, and a graph quantized for another kind of CPU is run in
integers by that one only. Such a build stops at the portable graph; what it is worth is measured by running that graph on
this CPU as it is written, which says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeseg.backends.base import Backend, BuiltEngine, Session
from edgeseg.backends.cpu.options import CPU_OPTIONS, cpu_options
from edgeseg.backends.tensorrt.options import RtxOptions, TensorRTOptions, parse_options
from edgeseg.machine.cpu import this_cpu
from edgeseg.spec import Precision
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import Manifest, OnnxGraph, PrecisionReport

DEVICE_TARGETS = ("tensorrt",)
"""Targets whose engines are built on the device; elsewhere a build for them stops at the portable graph."""


_OPTIONS: Mapping[str, type[TensorRTOptions | RtxOptions]] = {"tensorrt": TensorRTOptions, "tensorrt-rtx": RtxOptions}


def check_options(target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check build options before minutes of work.

    Returns:
        the options to record: without those that are ``None`` (which asks for the default), file names made absolute,
        since the engine may be built again from another folder.

    Raises:
        SpecError: one the target does not take.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if target in CPU_OPTIONS:
        cpu_options(target, options)
        return given
    parsed = parse_options(_OPTIONS[target], target, options)
    return {name: getattr(parsed, name) for name in given}


def builds_here(backend: Backend, scheme: str | None) -> bool:
    """Whether this machine can build the backend's engine of a graph of ``scheme`` (``None``: not quantized)."""
    if backend.name in CPU_OPTIONS:
        return this_cpu().computes(scheme)
    status = backend.status()
    return backend.name not in DEVICE_TARGETS or status.available or status.can_build


def portable_engine(graph: OnnxGraph, target: str, precision: Precision, options: Mapping[str, Any]) -> BuiltEngine:
    """What a build without the device comes to: no engine file, and the precision the graph's types ask for.

    Raises:
        SpecError: a wrong option.
    """
    from edgeseg.graph.types import typed_precision

    check_options(target, options)
    report = typed_precision(graph.path, precision, graph.spec.input)
    return BuiltEngine(None, report, options=dict(options))


def awaits_calibration(report: PrecisionReport, options: Mapping[str, Any]) -> bool:
    """Whether int8 comes later, from ranges given to TensorRT: the graph itself is float and says nothing of it."""
    return report.requested == "int8" and bool(options.get("implicit_calibration"))


def measured_on(manifest: Manifest) -> str:
    """What accuracy figures of a folder stand for whose engine did not run."""
    if awaits_calibration(manifest.precision, manifest.options):
        return "accuracy of the fp32 graph in ONNX Runtime: TensorRT makes it int8 on the device; latency not measured"
    return "accuracy of the portable graph in ONNX Runtime; latency not measured"


def open_graph(engine: Engine) -> Session:
    """Run the folder's portable graph in ONNX Runtime on this CPU. Raises ``ArtifactError``, ``MissingDependencyError``."""
    from edgeseg.backends.cpu.onnxruntime import open_unoptimized

    return open_unoptimized(engine.graph_path)
