"""``edgeseg bench``: all measurements of several engines and their PyTorch baselines, joined into one report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from edgeseg.arguments import FLAG, MOST, PATH, SIZE, argument, counts, number, settle, several, whole
from edgeseg.errors import BuildError, EdgesegError, SpecError
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest, evaluate
from edgeseg.evaluate.contenders import (
    Contender,
    Opener,
    baseline_contenders,
    engine_contenders,
    engine_names,
    first_baseline,
)
from edgeseg.evaluate.latency.fresh import measure_fresh
from edgeseg.evaluate.latency.measure import Timed, idle_power, measure_setting
from edgeseg.evaluate.latency.profile import profile_engine
from edgeseg.evaluate.latency.protocol import BENCH, LatencyProtocol
from edgeseg.evaluate.latency.statistics import speed_comparison
from edgeseg.evaluate.results import (
    BASELINES,
    SCHEMA_VERSION,
    BenchReport,
    FailedMeasurement,
    Row,
    Setting,
    SpeedComparison,
    row_id,
)
from edgeseg.machine.power import find_source
from edgeseg.machine.state import describe_machine, machine_state
from edgeseg.progress import Reporter, stage
from edgeseg.spec import InputSpec
from edgeseg.version import __version__

MAX_CALL_BYTES = 4_000_000_000
"""Of the images of one call; what is asked for beyond is a slip of the keyboard, and would end for want of memory."""


@dataclass(frozen=True)
class BenchRequest:
    """What ``edgeseg bench`` can be asked about speed and memory.

    Attributes:
        engines: engine folders.
        baselines: of :data:`~edgeseg.evaluate.results.BASELINES`, the first is what the engines are compared with; empty
            for none.
        threads: of one inference; ``None``: the engine's own setting.
        command: what to type to repeat it.
    """

    engines: tuple[Path, ...] = ()
    baselines: tuple[str, ...] = argument(
        several("baseline", BASELINES),
        ("pytorch",),
        name="baseline",
        help="What to compare with, on the engine's device; repeatable, the first counts.  [default: pytorch]",
    )
    weights: Path | None = argument(PATH, help="The checkpoint, if it is no longer where the engine was built from.")
    batches: tuple[int, ...] = argument(counts(MOST, "1,4,8"), (1,), name="batch", help="Images of one call.")
    threads: tuple[int, ...] | None = argument(counts(MOST, "1,4,8"), help="Threads of an engine.  [default: its own]")
    streams: tuple[int, ...] = argument(
        counts(1024, "1,4,8"),
        (1,),
        help="Callers at the same time, among whom a CPU engine divides its threads.",
    )
    duration_s: float = argument(
        number(0, 86400, "seconds, from 0 to 86400"), 3.0, help="Of each engine in each setting; 0: no latency."
    )
    source_size: tuple[int, int] | None = argument(SIZE, help="Size of the images given.  [default: the engine's]")
    fresh_processes: int = argument(whole(0, 100, 3), 3, help="For cold start and memory.")
    profile: bool = argument(FLAG, False, help="Also measure where the time goes, by module of the model.")
    command: str = "edgeseg bench"

    def __post_init__(self) -> None:
        settle(self)

    @property
    def protocol(self) -> LatencyProtocol:
        """trtexec's protocol, warm-up until stable, for this duration."""
        return dataclasses.replace(BENCH, min_duration_ms=self.duration_s * 1000)


def run_bench(request: BenchRequest, reporter: Reporter, accuracy: AccuracyRequest | None = None) -> BenchReport:
    """Measure everything asked for and return the report.

    An engine that cannot be loaded or fails while it is measured does not stop the others: it is in the report's
    ``failed``. What merely cannot be measured here is ``None``, with a note.

    Raises:
        ArtifactError, BuildError, ...: no engine is left to measure.
        CheckpointError, InputError, SpecError: the weights, the data or a setting given cannot be used.
    """
    before = machine_state()
    engines, broken = engine_contenders(request.engines)
    bench = _Bench(request, reporter)
    names = engine_names(request.engines)
    for folder, error in broken.items():
        bench.fail(names[folder], str(folder), "load", error)
    bench.raise_if_none_left(engines)
    _check_call_size(request, engines)
    baselines, missing = baseline_contenders(engines, request.baselines, request.weights, bench.opener)
    bench.notes += missing
    if not request.baselines:
        bench.notes.append("no baseline asked for: nothing is compared with PyTorch")
    contenders = [*baselines, *engines]
    for engine in engines:
        reference = first_baseline(engine, contenders)
        if reference is not None and reference.device != engine.device:
            bench.notes.append(
                f"{engine.name} runs on the GPU and is compared with {reference.name}, which runs on the CPU"
            )
    if accuracy is not None:
        bench.notes += accuracy.check(contenders)
    contenders = bench.timed(contenders) if request.duration_s > 0 else bench.loadable(contenders)
    bench.rows = {c.name: Row(c.name, bench.opener.identity(c), Setting()) for c in contenders}
    if request.fresh_processes:
        bench.start_afresh(contenders)
    if request.profile:
        bench.profile([c for c in contenders if not c.is_baseline])
    if accuracy is not None:
        bench.judge(accuracy, contenders)
    after = machine_state()
    times = bench.times
    rows = [
        _row(bench.rows[c.name], c.spec.input, setting, by_name.get(c.name))
        for setting, by_name in (times or {Setting(): {}}).items()
        for c in contenders
        if not times or c.name in by_name
    ]
    for note in bench.notes:
        reporter.note(note)
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        edgeseg_version=__version__,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=request.command,
        environment=describe_machine(before, after),
        rows=tuple(rows),
        comparisons=tuple(_comparisons(contenders, times)),
        protocol=dataclasses.asdict(request.protocol),
        notes=tuple(bench.notes),
        failed=tuple(bench.failed),
    )


def _check_call_size(request: BenchRequest, engines: Sequence[Contender]) -> None:
    """Raise ``SpecError`` for calls whose images alone would fill the memory."""
    for spec in (engine.spec.input for engine in engines):
        height, width = request.source_size or (spec.height, spec.width)
        needed = max(request.batches) * height * width * spec.channels * max(request.streams)
        if request.duration_s and needed > MAX_CALL_BYTES:
            raise SpecError(
                f"{max(request.batches)} images of {height}x{width} for each of {max(request.streams)} callers are "
                f"{needed / 1e9:.3g} GB; at most {MAX_CALL_BYTES / 1e9:g} GB are measured: give a smaller --batch, "
                "--source-size or --streams"
            )


@dataclass
class _Bench:
    """A bench under way.

    Attributes:
        rows: by contender's name, what is found out about it apart from its latency.
        times: latency by setting and contender's name.
        failed: what went wrong so far; ``errors``: the errors themselves, for when nothing is left.
    """

    request: BenchRequest
    reporter: Reporter
    opener: Opener = field(default_factory=Opener)
    notes: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    times: dict[Setting, dict[str, Timed]] = field(default_factory=dict)
    failed: list[FailedMeasurement] = field(default_factory=list)
    errors: list[EdgesegError] = field(default_factory=list)

    def fail(self, engine: str, folder: str | None, what: str, error: EdgesegError) -> None:
        """Keep a failure and tell it at once: whoever waits may want to stop here."""
        self.failed.append(FailedMeasurement(engine, folder, what, str(error)))
        self.errors.append(error)
        self.reporter.note(f"{engine} failed ({what}): {error}")

    def raise_if_none_left(self, contenders: Sequence[Contender]) -> None:
        """Raise when no engine is left to measure: the error itself if there was but one."""
        if any(not contender.is_baseline for contender in contenders):
            return
        if len(self.errors) == 1:
            raise self.errors[0]
        reasons = "; ".join(f"{f.engine}: {f.reason}" for f in self.failed)
        raise BuildError(f"no engine could be measured: {reasons}")

    def loadable(self, contenders: Sequence[Contender]) -> list[Contender]:
        """The contenders that can be opened."""
        loadable = []
        for contender in contenders:
            try:
                self.opener.open(contender).close()
            except EdgesegError as exc:
                self.fail(contender.name, contender.folder, "load", exc)
            else:
                loadable.append(contender)
        self.raise_if_none_left(loadable)
        return loadable

    def timed(self, contenders: Sequence[Contender]) -> list[Contender]:
        """Measure latency in all settings; returns the contenders that ran in at least one."""
        request = self.request
        source = find_source(say=self.notes.append)
        if source is None:
            self.notes.append(
                "no power source could be read (INA3221, tegrastats, NVML, RAPL): power and energy are '-'"
            )
        idle_w = None if source is None else idle_power(source)
        size = request.source_size or (None, None)
        settings = [
            Setting(batch, threads, streams, size[0], size[1])
            for threads in request.threads or (None,)
            for batch in request.batches
            for streams in request.streams
        ]
        left = list(contenders)
        try:
            for number, setting in enumerate(settings):
                name = row_id("latency", setting)
                with stage(self.reporter, "latency") as said:
                    progress = partial(_overall_progress, self.reporter, number, len(settings))
                    measured = measure_setting(left, self.opener, setting, request.protocol, source, idle_w, progress)
                    self.times[setting] = measured.timed
                    medians = {n: t.latency.end_to_end.median_ms for n, t in measured.timed.items()}
                    said.append(
                        f"{name.removeprefix('latency ')}: "
                        + ", ".join(f"{n} {ms:.2f} ms" for n, ms in medians.items())
                    )
                for contender in left:
                    for what, errors in (("load", measured.not_loaded), (name, measured.failed)):
                        if contender.name in errors:
                            self.fail(contender.name, contender.folder, what, errors[contender.name])
                left = [c for c in left if c.name not in measured.not_loaded]
        finally:
            if source is not None:
                source.close()
        ran = [c for c in left if any(c.name in by_name for by_name in self.times.values())]
        self.raise_if_none_left(ran)
        return ran

    def start_afresh(self, contenders: Sequence[Contender]) -> None:
        """Cold start and memory of each contender, in processes of its own."""
        with stage(self.reporter, "cold start") as said:
            for index, contender in enumerate(contenders):
                try:
                    cold_start, memory = measure_fresh(contender, self.request.fresh_processes)
                    self._learn(contender, cold_start=cold_start, memory=memory)
                    said.append(f"{contender.name} {cold_start.total_ms:.0f} ms")
                except BuildError as exc:
                    self._note(contender, f"cold start and memory not measured: {exc}")
                    said.append(f"{contender.name}: {exc}")
                self.reporter.progress(index + 1, len(contenders))

    def profile(self, engines: Sequence[Contender]) -> None:
        """Where the time of each engine goes, by module."""
        with stage(self.reporter, "profile") as said:
            for contender in engines:
                try:
                    profile = profile_engine(self.opener.engine(contender))
                except EdgesegError as exc:
                    self._note(contender, f"not profiled: {exc}")
                    continue
                self._learn(contender, profile=profile)
                slowest = max(profile.modules, key=lambda module: module.time_ms)
                said.append(f"{contender.name}: {slowest.module} {slowest.share:.0%}")

    def judge(self, request: AccuracyRequest, contenders: Sequence[Contender]) -> None:
        """Judge all; when that fails, the latency found before is not thrown away."""
        try:
            by_name = evaluate(request, contenders, self.opener, self.reporter)
        except EdgesegError as exc:
            if not self.times:
                raise
            for contender in contenders:
                if not contender.is_baseline:
                    self.fail(contender.name, contender.folder, "accuracy", exc)
        else:
            for contender in contenders:
                self._learn(contender, accuracy=by_name.get(contender.name))

    def _learn(self, contender: Contender, **changes: Any) -> None:
        self.rows[contender.name] = dataclasses.replace(self.rows[contender.name], **changes)

    def _note(self, contender: Contender, note: str) -> None:
        self._learn(contender, notes=(*self.rows[contender.name].notes, note))


def _overall_progress(reporter: Reporter, number: int, settings: int, done: int, total: int) -> None:
    """Tell how far all settings are, in percent: each takes about as long as the others."""
    share = (number + (done / total if total else 1.0)) / settings
    reporter.progress(int(100 * share), 100)


def _row(row: Row, spec: InputSpec, setting: Setting, timed: Timed | None) -> Row:
    """What is known of a contender, in one setting."""
    notes = list(row.notes)
    if timed is not None and setting.batch > spec.batch.maximum:
        runs = -(-setting.batch // spec.batch.maximum)
        notes.append(f"the engine takes batches of up to {spec.batch.maximum}: {setting.batch} images are {runs} runs")
    if timed is not None and setting.batch < spec.batch.minimum:
        notes.append(f"the engine takes batches of at least {spec.batch.minimum}: {setting.batch} images are filled up")
    height, width = setting.source_height or spec.height, setting.source_width or spec.width
    return dataclasses.replace(
        row,
        id=row_id(row.engine.name, setting),
        setting=dataclasses.replace(setting, source_height=height, source_width=width),
        latency=None if timed is None else timed.latency,
        power=None if timed is None else timed.power,
        notes=tuple(notes),
    )


def _comparisons(contenders: Sequence[Contender], timed: dict[Setting, dict[str, Timed]]) -> list[SpeedComparison]:
    comparisons = []
    for setting, by_name in timed.items():
        here = [c for c in contenders if c.name in by_name]
        for contender in here:
            baseline = first_baseline(contender, here)
            if baseline is None:
                continue
            first, second = by_name[baseline.name].samples, by_name[contender.name].samples
            if first is not None and second is not None:
                ids = row_id(baseline.name, setting), row_id(contender.name, setting)
                comparisons.append(speed_comparison(*ids, first, second))
    return comparisons
