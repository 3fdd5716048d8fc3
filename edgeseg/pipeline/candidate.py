"""One backend's engine in the making: the typed graph in the backend's scheme, and what was built from it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends import get_backend
from edgeseg.backends.base import Backend, BuildContext, BuiltEngine, Session
from edgeseg.backends.portable import DEVICE_TARGETS, awaits_calibration, builds_here, portable_engine
from edgeseg.errors import QuantizationError
from edgeseg.progress import Reporter, stage
from edgeseg.spec import PipelineSpec
from edgeseg.store.manifest import OnnxGraph

if TYPE_CHECKING:
    from edgeseg.evaluate.latency.protocol import LatencySamples
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

GRAPH_NAME = "model.onnx"
TABLE_NAME = "calibration.json"


@dataclass(frozen=True)
class Candidate:
    """One backend's engine, built in a scratch folder of its own."""

    backend: Backend
    folder: Path
    graph: OnnxGraph
    built: BuiltEngine


def write_typed(
    request: BuildRequest,
    backend: Backend,
    graph: OnnxGraph,
    table: CalibrationTable | None,
    folder: Path,
    float_modules: Collection[str] = (),
) -> OnnxGraph:
    """Write ``graph`` into a new folder in the precision asked for and the backend's scheme.

    ``float_modules``: those that stay float in an int8 graph.
    """
    folder.mkdir()
    typed = folder / GRAPH_NAME
    if table is not None and request.backend_options.get("implicit_calibration"):
        # The graph stays fp32: TensorRT quantizes it from the ranges of the table beside it.
        shutil.copyfile(graph.path, typed)
        table.save(folder / TABLE_NAME)
        return dataclasses.replace(graph, path=typed)
    if request.precision == "int8":
        from edgeseg.quantize.qdq import write_qdq
        from edgeseg.quantize.schemes import SCHEMES

        assert table is not None  # run_build calibrates before an int8 graph is written
        return write_qdq(graph, table, SCHEMES[request.scheme or backend.scheme], typed, float_modules)
    if request.precision == "fp16":
        from edgeseg.quantize.fp16 import write_fp16

        return write_fp16(graph, table, typed)
    shutil.copyfile(graph.path, typed)
    return dataclasses.replace(graph, path=typed)


def build_typed(
    request: BuildRequest,
    backend: Backend,
    graph: OnnxGraph,
    reporter: Reporter,
    engines_folder: Path,
    *,
    is_portable: bool = False,
) -> Candidate:
    """Build the engine of a typed graph in its folder, or leave it at the graph where that has to be done on the device.

    Args:
        request: of the build.
        backend: whose engine it is.
        graph: of :func:`write_typed`.
        reporter: told about progress, and the backend's notes.
        engines_folder: parent of the engine folder in the making; see :class:`~edgeseg.backends.base.BuildContext`.
        is_portable: leave it at the graph though the engine could be built here.
    """
    options = request.options_for(backend.name)
    if is_portable or not builds_here(backend, graph.scheme):
        built = portable_engine(graph, backend.name, request.precision, options)
    else:
        built = backend.build(graph, graph.path.parent, options, BuildContext(reporter.progress, engines_folder))
    for note in built.notes:
        reporter.note(note)
    return Candidate(backend, graph.path.parent, graph, built)


def measured_sessions(
    request: BuildRequest, sessions: Mapping[str, Session], spec: PipelineSpec
) -> dict[str, LatencySamples]:
    """Milliseconds of an image on each session, in turns: one caller's, or those of as many as cores by their number."""
    from edgeseg.evaluate.latency.protocol import measure_sessions
    from edgeseg.evaluate.latency.streams import measure_throughput
    from edgeseg.machine.cpu import this_cpu

    if request.optimize_for == "latency":
        return measure_sessions(sessions, spec)
    return measure_throughput(sessions, spec, this_cpu().cores)


def require_precision(candidate: Candidate, min_int8_share: float) -> None:
    """Raise :class:`QuantizationError` when int8 was asked for and something else was delivered."""
    report = candidate.built.precision
    share = report.mac_share.get("int8", 0.0)
    if report.requested != "int8" or share >= min_int8_share:
        return
    listed = "; ".join(f"{layer} ({reason})" for layer, reason in list(report.float_layers.items())[:8])
    more = f" and {len(report.float_layers) - 8} more" if len(report.float_layers) > 8 else ""
    raise QuantizationError(
        f"int8 was asked for, but {candidate.backend.name} executes {share:.1%} of the multiply-accumulates in int8 "
        f"(at least {min_int8_share:.0%} wanted; --min-int8-share changes that). Float: {listed}{more}"
    )


def candidate_stage(
    request: BuildRequest,
    target: str,
    graph: OnnxGraph,
    table: CalibrationTable | None,
    scratch: Path,
    reporter: Reporter,
) -> Candidate:
    """Quantize and build for one backend, and check that the precision asked for is delivered."""
    with stage(reporter, "compile" if request.precision == "fp32" else "quantize") as said:
        folder = scratch / f"target-{target}"
        # The folder around is the engine folder in the making, whose neighbours are engines.
        engines = scratch.parent.parent
        backend = get_backend(target)
        typed = write_typed(request, backend, graph, table, folder)
        candidate = build_typed(request, backend, typed, reporter, engines)
        share = candidate.built.precision.mac_share.get(request.precision, 0.0)
        said.append(f"{target}: {share:.1%} of MACs in {request.precision}")
    if table is not None and table.trained is not None and candidate.graph.precision == "int8":
        from edgeseg.quantize.trained import held

        reporter.note(f"{target}: {held(graph, candidate.graph, table).words}")
    if candidate.built.path is not None or not awaits_calibration(candidate.built.precision, request.backend_options):
        try:
            require_precision(candidate, request.min_int8_share)
        except QuantizationError as exc:
            if table is None or table.trained is None or table.images:
                raise
            raise QuantizationError(
                f"{exc}; the fake-quantizers of training leave them so: give --calibration DIR"
            ) from exc
    if request.precision == "fp16" and target not in DEVICE_TARGETS and share < 0.5:
        path = candidate.built.path or candidate.graph.path
        size, fp32_size = path.stat().st_size / 1e6, graph.path.stat().st_size / 1e6
        reporter.note(
            f"{target} computes most of this FP16 graph in FP32 here: no more speed than fp32, and its file has "
            f"{size:.1f} MB where the fp32 graph has {fp32_size:.1f} MB"
        )
    return candidate
