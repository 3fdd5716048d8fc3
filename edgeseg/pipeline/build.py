"""The stages of a build in order, what can be reused kept; the engine folder appears at the end or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.errors import BuildError, QuantizationError
from edgeseg.evaluate.verify import check_gates
from edgeseg.pipeline.calibration import calibration_stage, judging_schemes, table_inputs
from edgeseg.pipeline.candidate import Candidate, candidate_stage, measured_sessions
from edgeseg.pipeline.estimate import WORTH_SAYING_S, time_to_go
from edgeseg.pipeline.manifest_maker import ManifestMaker
from edgeseg.pipeline.plan import BuildPlan, plan_build
from edgeseg.pipeline.stages import EXPORT_FOLDER, export_stage, few_collections
from edgeseg.pipeline.verification import Verifier, verify_stage
from edgeseg.progress import Reporter, stage
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.store.cache import is_kept, usable_cache
from edgeseg.store.engine import Engine, engine_folder, open_engine, read_manifest
from edgeseg.store.manifest import OnnxGraph

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only

    from edgeseg.convert.export import ConversionReport
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

PLAIN_FOLDER = "plain"
"""What plain engines are built in, inside the engine folder in the making."""


@few_collections()
def run_build(request: BuildRequest, *, model: torch.nn.Module | None, reporter: Reporter) -> Engine:
    """Run every stage of ``request`` and return the finished engine folder. See :func:`edgeseg.build`."""
    plan = plan_build(request, model, reporter)
    loaded, spec, folder = plan.loaded, plan.spec, plan.folder
    with usable_cache(reporter.note), engine_folder(folder, force=request.force) as scratch:
        exported, conversion = export_stage(loaded, spec, scratch, reporter)
        say_time_to_go(request, plan, exported, conversion, reporter)
        (scratch / PLAIN_FOLDER).mkdir()
        graph, table = ranges_stage(request, plan, exported, scratch / PLAIN_FOLDER, reporter)
        candidates = build_for_each(request, plan.targets, graph, table, scratch / PLAIN_FOLDER, reporter)
        # What no file describes cannot be loaded again, nor built by a command.
        if loaded.origin is not None and loaded.origin.hub_id is not None:
            # A branch moves on; the engine is made again from the commit it was made from.
            request = dataclasses.replace(request, weights=loaded.origin.hub_id)
        command, asked = (None, None) if model is not None else (request.command, request.model)
        make = ManifestMaker(request, loaded, spec, conversion, table, folder.name, command, asked)
        with ExitStack() as opened:
            verifier = None
            if plan.held_out is not None:
                verifier = opened.enter_context(Verifier(request, loaded, plan.held_out))
            best, medians = choose_fastest(candidates, make, reporter)
            verification = verify_stage(request, make.write(best, medians, scratch, None), verifier, reporter)
            if verifier is not None and verifier.misses(verification):
                candidates = [best, *(candidate for candidate in candidates if candidate is not best)]
                best, make = reach_goal(graph, candidates, make, scratch, verifier, reporter)
                before = read_manifest(scratch)
                for file in filter(None, (before.engine, *before.extra_files)):
                    (scratch / file.name).unlink()
                verification = verify_stage(request, make.write(best, medians, scratch, None), verifier, reporter)
        if verification is not None:
            check_gates(verification, max_drop=request.max_drop, min_agreement=request.min_agreement)
        make.write(best, medians, scratch, verification)
        for name in (EXPORT_FOLDER, PLAIN_FOLDER):
            shutil.rmtree(scratch / name, ignore_errors=True)
    return open_engine(folder)


def say_time_to_go(
    request: BuildRequest, plan: BuildPlan, exported: OnnxGraph, conversion: ConversionReport, reporter: Reporter
) -> None:
    """Tell how long the rest may take, and with what, where that is worth a line."""
    judges = judging_schemes(request, plan.targets)
    calibrates = (
        plan.loaded.trained is None
        and isinstance(plan.samples, CalibrationSet)
        and not is_kept("calibration", table_inputs(request, exported, plan.samples, judges))
    )
    estimate = time_to_go(request, plan, exported, conversion.nodes, len(judges), calibrates=calibrates)
    if estimate.high_s >= WORTH_SAYING_S:
        reporter.note(estimate.words)


def ranges_stage(
    request: BuildRequest, plan: BuildPlan, exported: OnnxGraph, scratch: Path, reporter: Reporter
) -> tuple[OnnxGraph, CalibrationTable | None]:
    """Calibrate, or take what training left: the fp32 graph and the table that is for it; ``None`` without calibration."""
    graph, table, trained = exported, None, plan.loaded.trained is not None
    if plan.samples is not None or trained:
        judges = judging_schemes(request, plan.targets)
        graph, table = calibration_stage(request, exported, plan.samples, judges, scratch, reporter, is_trained=trained)
    if request.precision == "fp16" and table is None:
        reporter.note(
            "no --calibration: which layers FP16 cannot hold was decided by their weights alone, not by their values"
        )
    return graph, table


def build_for_each(
    request: BuildRequest,
    targets: tuple[str, ...],
    graph: OnnxGraph,
    table: CalibrationTable | None,
    scratch: Path,
    reporter: Reporter,
) -> list[Candidate]:
    """A candidate for each target, those left out that could not be built."""
    candidates: list[Candidate] = []
    for target in targets:
        try:
            candidates.append(candidate_stage(request, target, graph, table, scratch, reporter))
        except (BuildError, QuantizationError) as exc:
            # With --target auto the others may still do; the one asked for by name may not fail.
            if target == targets[-1] and not candidates:
                raise
            reporter.note(f"{target} is left out: {exc}")
    return candidates


def choose_fastest(
    candidates: list[Candidate], make: ManifestMaker, reporter: Reporter
) -> tuple[Candidate, dict[str, float]]:
    """With several candidates, measure them in turns on one image; return the one to take and all medians.

    The medians are milliseconds of an image, those of a build for throughput with a caller per core.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    from edgeseg.evaluate.latency.statistics import fastest_or_first

    with stage(reporter, "measure") as said:
        with ExitStack() as opened:
            sessions = {}
            for candidate in candidates:
                engine = make.write(candidate, {}, candidate.folder, None)
                sessions[candidate.backend.name] = opened.enter_context(candidate.backend.load(engine))
            measured = measured_sessions(make.request, sessions, make.spec)
        medians = {name: samples.median_ms for name, samples in measured.items()}
        said.append(", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()))
    name, why = fastest_or_first(measured)
    reporter.note(f"target auto took {name}: {why}; name one with --target")
    return next(candidate for candidate in candidates if candidate.backend.name == name), medians


def reach_goal(
    graph: OnnxGraph,
    candidates: list[Candidate],
    make: ManifestMaker,
    folder: Path,
    verifier: Verifier,
    reporter: Reporter,
) -> tuple[Candidate, ManifestMaker]:
    """Find the fastest engine that keeps the limits which plain INT8, ``candidates[0]``, did not keep.

    Graphs that a device may choose among go into ``folder``; the maker knows of the search.
    """
    from edgeseg.mixed.judge import Remembered
    from edgeseg.pipeline.goal import GoalSearch, carried_names

    assert make.table is not None  # nothing is int8 without
    reporter.note(
        "plain INT8 misses the goal: looking for modules to leave in float, at most "
        f"{make.request.search_minutes:g} minutes (--search-minutes; --no-search does not look)"
    )
    with verifier.reference(make.spec, verifier.device) as (reference, _):
        assert isinstance(reference, Remembered)  # of a build with a goal
        best, carried, record = GoalSearch(
            request=make.request,
            graph=graph,
            table=make.table,
            pairs=verifier.data.pairs,
            reference=reference,
            write=lambda candidate: make.write(candidate, {}, candidate.folder, None),
            engines_folder=folder.parent,
            reporter=reporter,
        ).run(candidates)
    for path, name in zip(carried, carried_names(len(carried)), strict=True):
        shutil.copyfile(path, folder / name)
    return best, dataclasses.replace(make, search=record)
