"""The stages in order: load, export, calibrate, quantize, build, verify, write the manifest.

Every stage is a function of its own room; this module only joins them, keeps what can be reused and makes the engine
folder appear at the end or not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends import AUTO_TARGETS, get_backend, require_backend, require_builder
from edgeseg.backends.portable import (
    DEVICE_TARGETS,
    awaits_calibration,
    check_options,
)
from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.errors import BuildError, QuantizationError, SpecError
from edgeseg.evaluate.summary import input_line
from edgeseg.evaluate.tables import counted
from edgeseg.evaluate.verify import check_gates
from edgeseg.graph.grid import Marks
from edgeseg.pipeline.candidate import (
    GRAPH_NAME,
    TABLE_NAME,
    Candidate,
    build_candidate,
    measured_sessions,
    require_precision,
)
from edgeseg.pipeline.command import build_command
from edgeseg.pipeline.manifest_maker import ManifestMaker
from edgeseg.pipeline.plan import DEMO_NAME, BuildPlan, default_name, refuse_early
from edgeseg.pipeline.verification import Verifier, verify_stage
from edgeseg.pipeline.verification_data import (
    calibration_and_held_out,
    calibration_source,
    sample_images,
)
from edgeseg.progress import Reporter, stage
from edgeseg.quantize.calibration import (
    AUTO,
    DEFAULT_METHOD,
    CalibrationSet,
    calibrate,
    method_or_default,
    table_key,
)
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import BatchRange, InputSpec, PipelineSpec, one_of
from edgeseg.store.artifacts import (
    MANIFEST_NAME,
    Engine,
    OnnxGraph,
    Verification,
    check_engine_folder,
    engine_folder,
    open_engine,
    read_json,
    read_manifest,
    sha256_file,
    write_json,
)
from edgeseg.store.cache import cached_folder, software, usable_cache

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only

    from edgeseg.convert.export import ConversionReport
    from edgeseg.convert.load import LoadedModel
    from edgeseg.pipeline.request import BuildRequest
    from edgeseg.quantize.table import CalibrationTable

EQUALIZED_NAME = "equalized.onnx"
EXPORT_FOLDER, PLAIN_FOLDER = "export", "plain"
"""What a build works in, inside the engine folder in the making."""


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
        command, asked = (None, None) if model is not None else (build_command(request), request.model)
        make = ManifestMaker(request, loaded, spec, conversion, quantized.table, folder.name, command, asked)
        with ExitStack() as opened:
            verifier = None
            if plan.held_out is not None:
                verifier = opened.enter_context(Verifier(request, loaded, plan.held_out))
            result = verified(request, quantized, make, scratch, verifier, reporter)
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


def verified(
    request: BuildRequest,
    quantized: Quantized,
    make: ManifestMaker,
    folder: Path,
    verifier: Verifier | None,
    reporter: Reporter,
) -> Result:
    """Take the fastest candidate, put its engine into ``folder`` and verify it."""
    best, medians = choose_fastest(quantized.candidates, make, reporter)
    return delivered(request, best, medians, make, folder, verifier, reporter)


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


def plan_build(request: BuildRequest, model: torch.nn.Module | None, reporter: Reporter) -> BuildPlan:
    """Refuse what cannot be, load the model, open the images, and say what the engine takes. Errors are the build's."""
    refuse_early(request, is_module=model is not None)
    targets = choose_targets(request, reporter)
    loaded = load_stage(request, model, reporter)
    spec = pipeline_spec(request, loaded, reporter)
    encoder = DEMO_NAME if loaded.is_demo else loaded.model.encoder
    folder = request.folder or Path("engines") / default_name(loaded.model.arch, encoder, request.precision)
    check_engine_folder(folder, force=request.force)
    if request.precision == "fp32" and request.calibration is not None:
        reporter.note("--calibration is not used: an fp32 engine has no ranges")
    with stage(reporter, "input") as said:
        samples, held_out = calibration_and_held_out(request, loaded)
        said.append(input_line(spec, is_default_size=request.size is None and not loaded.has_own_size))
    return BuildPlan(targets, loaded, spec, folder, samples, held_out)


def load_stage(request: BuildRequest, model: torch.nn.Module | None, reporter: Reporter) -> LoadedModel:
    """Load the model and tell the user all that was assumed on the way."""
    images = functools.partial(sample_images, request)
    with stage(reporter, "load") as said:
        if model is None:
            from edgeseg.convert.load import load_model

            loaded = load_model(request.model, images)
        else:
            from edgeseg.convert.load import wrap_module

            loaded = wrap_module(model, request.model, images)
        said.append(
            f"{loaded.model.display_name}, {counted(loaded.model.classes, 'class', 'classes')}, {loaded.weights}"
        )
    loaded = fitted(request, loaded)
    if loaded.trained is not None and request.precision != "int8":
        note = f"its fake-quantizers are off for {request.precision}: int8 takes their scales"
        loaded = dataclasses.replace(loaded.in_float(), notes=(*loaded.notes, note))
    for note in loaded.notes:
        reporter.note(note)
    return loaded


def fitted(request: BuildRequest, loaded: LoadedModel) -> LoadedModel:
    """Settle how the preprocessing saved with the model brings images to the engine; the user's size and fit win.

    Raises:
        SpecError: the preprocessing has a transform that no engine can hold, and no option takes its place.
    """
    saved = loaded.saved
    if saved is None:
        return loaded
    saved.require_fit({name for name in ("mean", "std", "size", "fit") if getattr(request, name) is not None})
    channels = loaded.model.in_channels
    shapes = ((image.shape[0], image.shape[1]) for image in sample_images(request, channels))
    fitting = saved.fitting(request.size, request.fit, shapes, channels)
    notes = fitting.notes
    if request.dynamic_size and saved.scaling is not None:
        notes = (*notes, f"--dynamic-size overrides the saved {saved.scaling.words}: images keep their own scale")
    return dataclasses.replace(
        loaded,
        size=fitting.size or loaded.size,
        fitting=fitting,
        notes=tuple(dict.fromkeys((*loaded.notes, *notes))),
    )


def choose_targets(request: BuildRequest, reporter: Reporter) -> tuple[str, ...]:
    """The backends to build for: the one named, or for ``auto`` every one that can run here, to be measured.

    What cannot be had is said before minutes of work, not after: a backend that is not installed, an option nobody takes.

    Raises:
        BuildError: the backend cannot be used here.
        SpecError: an option, or a scheme, that the backend (with ``auto``: each of them) does not take.
    """
    target, scheme = request.target, request.scheme
    if scheme is not None:
        one_of("scheme", scheme, tuple(SCHEMES))
    if target != "auto":
        if target not in DEVICE_TARGETS:
            require_builder(target)
        check_options(target, request.options_for(target))
        return (target,)
    usable = [name for name in AUTO_TARGETS if get_backend(name).status().available]
    if not usable:
        # Raises, naming the pip line of the default backend.
        require_backend(AUTO_TARGETS[0])
    if scheme is not None:
        usable = [name for name in usable if scheme.startswith(name)]
        if not usable:
            raise SpecError(f"scheme {scheme} is for none of {', '.join(AUTO_TARGETS)}; name its target with --target")
    refusals: dict[str, SpecError] = {}
    for name in usable:
        try:
            check_options(name, request.options_for(name))
        except SpecError as exc:
            refusals[name] = exc
    if len(refusals) == len(usable):
        raise next(iter(refusals.values()))
    for name, refusal in refusals.items():
        reporter.note(f"{name} is left out: {refusal}")
    return tuple(name for name in usable if name not in refusals)


def pipeline_spec(request: BuildRequest, loaded: LoadedModel, reporter: Reporter) -> PipelineSpec:
    """Join what was asked for and what the model needs into the one contract."""
    height, width = request.size or loaded.size
    try:
        loaded.check_size(height, width)
    except SpecError as exc:
        if request.size is None and loaded.fitting.size is not None:
            raise SpecError(f"{exc} with --size: {height}x{width} is of {CONFIG_NAME}") from exc
        raise
    if loaded.fixed_batch is not None and request.batch != BatchRange(*(loaded.fixed_batch,) * 3):
        only = counted(loaded.fixed_batch, "image")
        raise SpecError(
            f"{loaded.model.display_name} was exported for {only} at a time, not {request.batch}; give --batch "
            f"{loaded.fixed_batch}, or export it with a dynamic batch"
        )
    stride, min_size = loaded.stride, None
    if request.dynamic_size:
        from edgeseg.convert.dynamic_size import dynamic_sizes

        with stage(reporter, "sizes") as said:
            sizes = dynamic_sizes(loaded, height, width)
            stride, min_size = sizes.stride, sizes.min_size
            said.append(f"multiples of {stride}, from {min_size[0]}x{min_size[1]}")
        for note in sizes.notes:
            reporter.note(note)
    return PipelineSpec(
        model=loaded.model,
        input=InputSpec(
            height=height,
            width=width,
            channels=loaded.model.in_channels,
            batch=request.batch,
            stride=stride,
            dynamic_size=request.dynamic_size,
            min_size=min_size,
            fit=request.fit or loaded.fitting.fit or "resize",
            interpolation=loaded.fitting.interpolation,
            padding=loaded.fitting.padding,
            dtype=request.input_dtype,
        ),
        preprocess=loaded.preprocess,
        output=request.output,
    )


def export_stage(
    loaded: LoadedModel, spec: PipelineSpec, scratch: Path, reporter: Reporter
) -> tuple[OnnxGraph, ConversionReport]:
    """Export, simplify and check the fp32 graph, or find it in the cache.

    Only a model that edgeseg built is found again: a user's module computes what its code says, which no key knows. Its
    graph is made in ``scratch``.
    """
    from edgeseg.convert.export import ConversionReport, export_onnx
    from edgeseg.convert.loaded import hash_structure
    from edgeseg.convert.reparameterize import merge_branches

    def make(folder: Path) -> None:
        # The merged module is only what is exported; the verification compares with the one that was loaded.
        side = loaded.fixed_size[0] if loaded.fixed_size else max(spec.input.height, spec.input.width)
        module, saved = loaded.module, 0
        if loaded.trained is None:
            module, saved = merge_branches(loaded.module, spec.input.channels, side)
        _, report = export_onnx(dataclasses.replace(loaded, module=module), spec, folder / GRAPH_NAME)
        write_json(folder / "report.json", dataclasses.replace(report, layers_merged=saved))

    with stage(reporter, "export") as said:
        if loaded.users_module:
            folder, reused = scratch / EXPORT_FOLDER, False
            folder.mkdir()
            make(folder)
        else:
            inputs = {
                "weights": loaded.weights_sha256,
                "structure": hash_structure(loaded.module),
                "spec": spec,
                "software": software(),
            }
            folder, reused = cached_folder("export", inputs, make)
        report = read_json(folder / "report.json", ConversionReport, "conversion report")
        graph = OnnxGraph(folder / GRAPH_NAME, sha256_file(folder / GRAPH_NAME), "fp32", spec, loaded.weights_sha256)
        said.append(
            f"{report.nodes_exported} -> {report.nodes} nodes, {report.macs_exported / 1e9:.2f} -> "
            f"{report.macs / 1e9:.2f} GMAC, mask agreement with {loaded.reference} {report.mask_agreement:.6f}"
        )
        if reused:
            said.append("reused")
    if report.layers_merged:
        reporter.note(f"the encoder's training branches were merged: {report.layers_merged} layers fewer, same results")
    return graph, report


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
) -> tuple[OnnxGraph, CalibrationTable]:
    """Take the table that was given, find one in the cache, or calibrate; return the graph it is for, channels equalized.

    ``judges``: the schemes that decide about repairs; ``None``, for a table of no target, all that can.
    """
    from edgeseg.quantize.repair.equalization import write_equalized
    from edgeseg.quantize.repair.repaired import calibrate_repaired
    from edgeseg.quantize.samples import MINIMUM_IMAGES
    from edgeseg.quantize.table import CalibrationTable, check_fresh, load_table

    if isinstance(samples, (CalibrationTable, Path)):
        table = load_table(samples) if isinstance(samples, Path) else samples
        with stage(reporter, "calibrate") as said:
            if table.equalization:
                graph, _ = write_equalized(graph, table.equalization, scratch / EQUALIZED_NAME)
            check_fresh(table, table_key(graph, None, table.method, table.options))
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
    inputs = {
        "key": table_key(graph, samples, method, {}),
        "equalizes": equalizes,
        "judges": judges if repairs else None,
        "repairs": repairs,
        "software": software(),
    }

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
        folder, reused = cached_folder("calibration", inputs, make)
        table = load_table(folder / TABLE_NAME)
        said.append(f"{chosen_methods(table)} over {table.images} images")
        if equalizes:
            equalized = folder / EQUALIZED_NAME
            graph = dataclasses.replace(graph, path=equalized, sha256=sha256_file(equalized))
            said.append("channels equalized")
        if reused:
            said.append("reused")
    return graph, table


def read_marks(exported: OnnxGraph) -> Marks:
    """The fake-quantizers that :func:`export_stage` found in a module."""
    from edgeseg.convert.export import MARKS_NAME

    return read_json(exported.path.with_name(MARKS_NAME), Marks, "list of fake-quantizers")


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


def run_calibration(request: BuildRequest, path: Path, reporter: Reporter) -> CalibrationTable:
    """Load, export and calibrate, and write the table to ``path``: ``edgeseg calibrate``."""
    refuse_early(request, is_module=False, makes_engine=False)
    loaded = load_stage(request, None, reporter)
    spec = pipeline_spec(request, loaded, reporter)
    samples = calibration_source(request, loaded)
    with usable_cache(reporter.note), tempfile.TemporaryDirectory(prefix="edgeseg-") as scratch:
        graph, _ = export_stage(loaded, spec, Path(scratch), reporter)
        if loaded.trained is not None and isinstance(samples, CalibrationSet):
            table = trained_stage(request, graph, read_marks(graph), samples, reporter)
        else:
            _, table = calibration_stage(request, graph, samples, None, Path(scratch), reporter)
    table.save(path)
    return table


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
        candidate = build_candidate(request, get_backend(target), graph, table, folder, reporter, engines)
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
