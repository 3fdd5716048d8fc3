"""The stages of a build in order, what can be reused kept; the engine folder appears at the end or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.errors import BuildError, QuantizationError
from edgeseg.evaluate.verify import check_gates
from edgeseg.graph.grid import Marks
from edgeseg.pipeline.calibration import calibration_stage, judging_schemes, trained_stage
from edgeseg.pipeline.candidate import Candidate, candidate_stage, measured_sessions
from edgeseg.pipeline.manifest_maker import ManifestMaker
from edgeseg.pipeline.plan import plan_build
from edgeseg.pipeline.stages import EXPORT_FOLDER, export_stage, read_marks
from edgeseg.pipeline.verification import Verifier, verify_stage
from edgeseg.progress import Reporter, stage
from edgeseg.quantize.calibration import CalibrationSet
from edgeseg.store.artifacts import (
    MANIFEST_NAME,
    Engine,
    OnnxGraph,
    Verification,
    engine_folder,
    open_engine,
    read_manifest,
)
from edgeseg.store.cache import usable_cache

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only

    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

PLAIN_FOLDER = "plain"
"""What plain engines are built in, inside the engine folder in the making."""


def run_build(request: BuildRequest, *, model: torch.nn.Module | None, reporter: Reporter) -> Engine:
    """Run every stage of ``request`` and return the finished engine folder. See :func:`edgeseg.build`."""
    plan = plan_build(request, model, reporter)
    targets, loaded, spec, folder = plan.targets, plan.loaded, plan.spec, plan.folder
    with usable_cache(reporter.note), engine_folder(folder, force=request.force) as scratch:
        exported, conversion = export_stage(loaded, spec, scratch, reporter)
        marks = None if loaded.trained is None else read_marks(exported)
        quantized = quantize_stage(request, targets, exported, plan.samples, scratch / PLAIN_FOLDER, reporter, marks)
        # What no file describes cannot be loaded again, nor built by a command.
        if loaded.origin is not None and loaded.origin.hub_id is not None:
            # A branch moves on; the engine is made again from the commit it was made from.
            request = dataclasses.replace(request, weights=loaded.origin.hub_id)
        command, asked = (None, None) if model is not None else (request.command, request.model)
        make = ManifestMaker(request, loaded, spec, conversion, quantized.table, folder.name, command, asked)
        with ExitStack() as opened:
            verifier = None
            if plan.held_out is not None:
                verifier = opened.enter_context(Verifier(request, loaded, plan.held_out))
            best, medians = choose_fastest(quantized.candidates, make, reporter)
            result = delivered(request, best, medians, make, scratch, verifier, reporter)
            if verifier is not None and verifier.misses(result.verification):
                result, make = reach_goal(request, quantized, result, make, scratch, verifier, reporter)
        if result.verification is not None:
            check_gates(result.verification, max_drop=request.max_drop, min_agreement=request.min_agreement)
        make.write(result.best, result.medians, scratch, result.verification)
        for name in (EXPORT_FOLDER, PLAIN_FOLDER):
            shutil.rmtree(scratch / name, ignore_errors=True)
    return open_engine(folder)


@dataclass(frozen=True)
class Quantized:
    """What the targets of a build have in common, and the engine of each in the making.

    Attributes:
        graph: fp32, that ``table`` is for.
        table: ``None`` of a build without calibration.
        candidates: a target each, those left out that could not be built.
    """

    graph: OnnxGraph
    table: CalibrationTable | None
    candidates: list[Candidate]


@dataclass(frozen=True)
class Result:
    """The engine of a build: of the candidates the one to take, the medians they were compared by, and what it is worth."""

    best: Candidate
    medians: dict[str, float]
    engine: Engine
    verification: Verification | None


def quantize_stage(
    request: BuildRequest,
    targets: tuple[str, ...],
    exported: OnnxGraph,
    samples: Any,
    scratch: Path,
    reporter: Reporter,
    marks: Marks | None = None,
) -> Quantized:
    """Calibrate and build for every target, in ``scratch``, which is made. Errors are those of a build.

    ``marks``: the fake-quantizers of ``exported``, of a network that was trained with them.
    """
    scratch.mkdir()
    graph, table = exported, None
    if samples is not None and (marks is None or not isinstance(samples, CalibrationSet)):
        judges = judging_schemes(request, targets)
        graph, table = calibration_stage(request, exported, samples, judges, scratch, reporter)
    elif marks is not None:
        table = trained_stage(request, exported, marks, samples, reporter)
    if request.precision == "fp16" and table is None:
        reporter.note(
            "no --calibration: which layers FP16 cannot hold was decided by their weights alone, not by their values"
        )
    candidates: list[Candidate] = []
    for target in targets:
        try:
            candidates.append(candidate_stage(request, target, graph, table, scratch, reporter))
        except (BuildError, QuantizationError) as exc:
            # With --target auto the others may still do; the one asked for by name may not fail.
            if target == targets[-1] and not candidates:
                raise
            reporter.note(f"{target} is left out: {exc}")
    return Quantized(graph, table, candidates)


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


def delivered(
    request: BuildRequest,
    best: Candidate,
    medians: dict[str, float],
    make: ManifestMaker,
    folder: Path,
    verifier: Verifier | None,
    reporter: Reporter,
) -> Result:
    """Put an engine into ``folder``, in place of one that is there, and verify it."""
    if (folder / MANIFEST_NAME).exists():
        before = read_manifest(folder)
        for file in (before.engine, *before.extra_files):
            if file is not None:
                (folder / file.name).unlink()
    engine = make.write(best, medians, folder, None)
    return Result(best, medians, engine, verify_stage(request, engine, verifier, reporter))


def reach_goal(
    request: BuildRequest,
    quantized: Quantized,
    plain: Result,
    make: ManifestMaker,
    folder: Path,
    verifier: Verifier,
    reporter: Reporter,
) -> tuple[Result, ManifestMaker]:
    """Find the fastest engine that keeps the limits which plain INT8 did not keep, and put it into ``folder``."""
    from edgeseg.mixed.judge import Remembered
    from edgeseg.pipeline.goal import GoalSearch, carried_names

    assert quantized.table is not None  # nothing is int8 without
    reporter.note("plain INT8 misses the goal: looking for modules to leave in float (--no-search does not)")
    candidates = [plain.best, *(candidate for candidate in quantized.candidates if candidate is not plain.best)]
    with verifier.reference(make.spec, verifier.device) as (reference, _):
        assert isinstance(reference, Remembered)  # of a build with a goal
        reached = GoalSearch(
            request=request,
            graph=quantized.graph,
            table=quantized.table,
            pairs=verifier.data.pairs,
            reference=reference,
            write=lambda candidate: make.write(candidate, {}, candidate.folder, None),
            engines_folder=folder.parent,
            reporter=reporter,
        ).run(candidates)
    make = dataclasses.replace(make, search=reached.record)
    for path, name in zip(reached.carried, carried_names(len(reached.carried)), strict=True):
        shutil.copyfile(path, folder / name)
    return delivered(request, reached.candidate, plain.medians, make, folder, verifier, reporter), make
