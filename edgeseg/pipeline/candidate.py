"""One backend's engine in the making: the typed graph in the backend's scheme, and what was built from it."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.backends.base import Backend, BuiltEngine
from edgeseg.backends.portable import DEVICE_TARGETS, builds_here, portable_engine
from edgeseg.errors import QuantizationError
from edgeseg.progress import Reporter
from edgeseg.spec import one_of
from edgeseg.store.artifacts import OnnxGraph

if TYPE_CHECKING:
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

GRAPH_NAME = "model.onnx"
TABLE_NAME = "calibration.json"


@dataclass(frozen=True)
class Candidate:
    """One backend's engine, built in a scratch folder of its own.

    ``median_ms`` is measured only when several candidates compete.
    """

    backend: Backend
    folder: Path
    graph: OnnxGraph
    built: BuiltEngine
    median_ms: float | None = None


def build_candidate(
    request: BuildRequest,
    backend: Backend,
    graph: OnnxGraph,
    table: CalibrationTable | None,
    folder: Path,
    reporter: Reporter,
    engines_folder: Path,
) -> Candidate:
    """Write the typed graph in the backend's scheme and build the backend's engine from it, if that can be done here.

    ``engines_folder`` is the parent of the engine folder in the making; see :meth:`~edgeseg.backends.base.Backend.build`.
    """
    folder.mkdir()
    typed = folder / GRAPH_NAME
    options = request.backend_options
    if table is not None and options.get("implicit_calibration"):
        # The graph stays fp32: TensorRT quantizes it from the ranges of the table beside it.
        shutil.copyfile(graph.path, typed)
        table.save(folder / TABLE_NAME)
        graph = dataclasses.replace(graph, path=typed)
    elif request.precision == "int8":
        from edgeseg.quantize.qdq import write_qdq
        from edgeseg.quantize.schemes import SCHEMES

        assert table is not None  # run_build calibrates before an int8 graph is written
        scheme = request.scheme or backend.scheme
        one_of("scheme", scheme, tuple(SCHEMES))
        graph = write_qdq(graph, table, SCHEMES[scheme], typed)
    elif request.precision == "fp16":
        from edgeseg.quantize.fp16 import write_fp16

        graph = write_fp16(graph, table, typed)
    else:
        shutil.copyfile(graph.path, typed)
        graph = dataclasses.replace(graph, path=typed)
    if backend.name in DEVICE_TARGETS and not builds_here(backend):
        built = portable_engine(graph, backend.name, request.precision, options)
    else:
        built = backend.build(graph, folder, options, reporter.progress, engines_folder)
    for note in built.notes:
        reporter.note(note)
    return Candidate(backend, folder, graph, built)


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
