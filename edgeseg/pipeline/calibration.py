"""The ranges of a build: a table that was given, what training left, or images."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends import get_backend
from edgeseg.evaluate.tables import counted
from edgeseg.graph.grid import Marks
from edgeseg.pipeline.candidate import TABLE_NAME
from edgeseg.pipeline.plan import refuse_early
from edgeseg.pipeline.stages import export_stage, few_collections, load_stage, pipeline_spec, read_marks
from edgeseg.pipeline.verification_data import calibration_source
from edgeseg.progress import Reporter, stage
from edgeseg.quantize.calibration import AUTO, DEFAULT_METHOD, calibrate, method_or_default, table_key
from edgeseg.quantize.ranges import RangeMethod
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.cache import cached_folder, software, usable_cache
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

if TYPE_CHECKING:
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

EQUALIZED_NAME = "equalized.onnx"


def judging_schemes(request: BuildRequest, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The schemes whose rounding decides about repairs: the targets', or ones that round alike."""
    from edgeseg.quantize.repair.fidelity import judge_of

    schemes = [request.scheme or get_backend(target).scheme for target in targets]
    return tuple(dict.fromkeys(judge_of(SCHEMES[scheme]) for scheme in schemes))


def calibration_stage(
    request: BuildRequest,
    graph: OnnxGraph,
    samples: Any,
    judges: tuple[str, ...] | None,
    scratch: Path,
    reporter: Reporter,
    *,
    is_trained: bool,
) -> tuple[OnnxGraph, CalibrationTable]:
    """Take the table that was given, find one in the cache, or calibrate; return the graph it is for, channels equalized.

    Args:
        request: of the build.
        graph: as exported.
        samples: images or a table; ``None`` of a network with fake-quantizers that has to do with their scales.
        judges: the schemes that decide about repairs; ``None``, for a table of no target, all that can.
        scratch: for the graph with its channels equalized.
        reporter: told about it.
        is_trained: the network has fake-quantizers, whose scales are taken where no table is given.
    """
    from edgeseg.quantize.repair.equalization import write_equalized
    from edgeseg.quantize.repair.repaired import calibrate_repaired
    from edgeseg.quantize.samples import MINIMUM_IMAGES
    from edgeseg.quantize.table import CalibrationTable, check_fresh, load_table

    if is_trained and not isinstance(samples, (CalibrationTable, Path)):
        return graph, trained_stage(request, graph, read_marks(graph), samples, reporter)
    if isinstance(samples, (CalibrationTable, Path)):
        table = load_table(samples) if isinstance(samples, Path) else samples
        with stage(reporter, "calibrate") as said:
            if table.equalization:
                graph, _ = write_equalized(graph, table.equalization, scratch / EQUALIZED_NAME)
            check_fresh(table, table_key(graph, None, RangeMethod(table.method, table.options)))
            said.append(f"table given: {chosen_methods(table)} over {table.images} images")
        return graph, table

    if samples.skipped:
        listed = "; ".join(f"{name}: {reason}" for name, reason in samples.skipped[:5])
        more = f"; and {len(samples.skipped) - 5} more" if len(samples.skipped) > 5 else ""
        skipped = counted(len(samples.skipped), "calibration image was", "calibration images were")
        reporter.note(f"{skipped} skipped: {listed}{more}")
    if len(samples) < MINIMUM_IMAGES:
        reporter.note(
            f"calibrated on {counted(len(samples), 'image')}: what others need may lie outside the ranges; give "
            f"{MINIMUM_IMAGES} or more"
        )
    method = method_or_default(request.calibration_method)
    repairs = request.precision == "int8"
    equalizes = request.equalize and repairs

    def make(folder: Path) -> None:
        if repairs:
            equalized = folder / EQUALIZED_NAME if equalizes else None
            _, table = calibrate_repaired(
                graph, samples, equalized, method=method, judges=judges, progress=reporter.progress
            )
        else:
            # Ranges for FP16 are what the values reach, which no method cuts.
            chosen = DEFAULT_METHOD if method == AUTO else method
            table = calibrate(graph, samples, method=chosen, progress=reporter.progress)
        table.save(folder / TABLE_NAME)

    with stage(reporter, "calibrate") as said:
        folder, reused = cached_folder("calibration", table_inputs(request, graph, samples, judges), make)
        table = load_table(folder / TABLE_NAME)
        said.append(f"{chosen_methods(table)} over {table.images} images")
        if table.equalization:
            equalized = folder / EQUALIZED_NAME
            graph = dataclasses.replace(graph, path=equalized, sha256=sha256_file(equalized))
            said.append("channels equalized")
        elif equalizes and "equalization" not in {repair.name for repair in table.repairs}:
            said.append("channels not equalized: scores were further off with it")
        if reused:
            said.append("reused")
    return graph, table


def table_inputs(
    request: BuildRequest, graph: OnnxGraph, samples: CalibrationSet, judges: tuple[str, ...] | None
) -> dict[str, object]:
    """All that the ranges of images depend on: what they are kept under."""
    repairs = request.precision == "int8"
    return {
        "key": table_key(graph, samples, RangeMethod(method_or_default(request.calibration_method))),
        "equalizes": request.equalize and repairs,
        "judges": judges if repairs else None,
        "repairs": repairs,
        "software": software(),
    }


def trained_stage(
    request: BuildRequest, graph: OnnxGraph, marks: Marks, samples: CalibrationSet | None, reporter: Reporter
) -> CalibrationTable:
    """Take the scales of training; what it left in float is calibrated where there are images."""
    from edgeseg.quantize.trained import trained_table

    method = request.calibration_method
    method = DEFAULT_METHOD if method in (None, AUTO) else method_or_default(method)
    with stage(reporter, "calibrate") as said:
        table = trained_table(graph, marks, samples, method, reporter.progress)
        assert table.trained is not None
        said.append(f"scales of {table.trained.activations} tensors taken from {' and '.join(marks.tools)}")
        if samples is not None:
            said.append(f"{table.trained.calibrated} others: {method} over {table.images} images")
    if samples is None:
        reporter.note("tensors without a fake-quantizer stay float; --calibration DIR gives them ranges")
    if marks.lost:
        reporter.note(
            f"{marks.lost} fake-quantizers are left out: they round between a convolution and the batch normalization that is "
            "folded into it (fuse the two before prepare_qat)"
        )
    if table.trained.ambiguous:
        reporter.note(
            f"{table.trained.ambiguous} tensors are rounded by each of their readers in its own way: the first is taken"
        )
    return table


def chosen_methods(table: CalibrationTable) -> str:
    """The method; for one chosen by tensor, which and for how many: ``auto (90 percentile, 12 mse)``."""
    counts = Counter(limits.method for limits in table.ranges.values() if limits.method is not None)
    chosen = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{table.method} ({chosen})" if chosen else table.method


@few_collections()
def run_calibration(request: BuildRequest, path: Path, reporter: Reporter) -> CalibrationTable:
    """Load, export and calibrate, and write the table to ``path``: ``edgeseg calibrate``."""
    refuse_early(request, is_module=False, makes_engine=False)
    loaded = load_stage(request, None, reporter)
    spec = pipeline_spec(request, loaded, reporter)
    samples = calibration_source(request, loaded)
    with usable_cache(reporter.note), tempfile.TemporaryDirectory(prefix="edgeseg-") as scratch:
        graph, _ = export_stage(loaded, spec, Path(scratch), reporter)
        trained = loaded.trained is not None
        _, table = calibration_stage(request, graph, samples, None, Path(scratch), reporter, is_trained=trained)
    table.save(path)
    return table
