"""``edgeseg bench``: all measurements of several engines and their PyTorch baselines, joined into one report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

import edgeseg
from edgeseg.backends.base import Session
from edgeseg.errors import BuildError, EdgesegError, SpecError
from edgeseg.evaluate.contenders import BASELINES, Contender, Opener, baseline_contenders, engine_contenders
from edgeseg.evaluate.fresh import measure_fresh
from edgeseg.evaluate.latency import LatencyProtocol, LatencySamples, measure_interleaved
from edgeseg.evaluate.machine import describe_machine, machine_flags, machine_state, read_counters
from edgeseg.evaluate.power import PowerSource, find_source, power_log
from edgeseg.evaluate.profile import profile_engine
from edgeseg.evaluate.results import (
    SCHEMA_VERSION,
    Accuracy,
    BenchReport,
    ColdStart,
    Identity,
    Latency,
    Memory,
    Power,
    Profile,
    Row,
    Setting,
    SpeedComparison,
    StageSplit,
    row_id,
)
from edgeseg.evaluate.stages import StageClock
from edgeseg.evaluate.statistics import distribution, noise_flags, speed_comparison
from edgeseg.evaluate.streams import measure_streams
from edgeseg.progress import Reporter, stage
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import one_of

WARMUP_STABLE_WITHIN = 0.03
POWER_SECONDS = 2.0
IDLE_SECONDS = 1.0
STAGE_CALLS, MIN_STAGE_CALLS, STAGE_SECONDS = 50, 5, 1.0


class AccuracyStep(Protocol):
    """How accuracy is judged; :class:`edgeseg.evaluate.evaluation.AccuracyRequest` is one."""

    def check(self, contenders: Sequence[Contender]) -> None:
        """Raise what :meth:`__call__` would raise about the data, before minutes are spent on measuring."""
        ...

    def __call__(self, contenders: Sequence[Contender], opener: Opener, reporter: Reporter) -> dict[str, Accuracy]:
        """Accuracy by contender's name."""
        ...


@dataclass(frozen=True)
class BenchRequest:
    """What ``edgeseg bench`` can be asked about speed and memory.

    Attributes:
        engines: engine folders.
        baselines: of :data:`~edgeseg.evaluate.contenders.BASELINES`, the first is what the engines are compared with; empty
            for none.
        weights: the checkpoint the engines were built from, when the manifest's path no longer holds.
        batches: images of one call.
        threads: of one inference; ``None``: the engine's own setting.
        streams: callers at the same time.
        duration_s: counted time of each contender in each setting; 0 for no latency.
        source_size: height and width of the images given; ``None``: the engine's.
        fresh_processes: for cold start and memory; 0 for neither.
        profile: also measure per-module times.
        command: what to type to repeat it.
    """

    engines: tuple[Path, ...]
    baselines: tuple[str, ...] = ("pytorch",)
    weights: Path | None = None
    batches: tuple[int, ...] = (1,)
    threads: tuple[int | None, ...] = (None,)
    streams: tuple[int, ...] = (1,)
    duration_s: float = 3.0
    source_size: tuple[int, int] | None = None
    fresh_processes: int = 3
    profile: bool = False
    command: str = "edgeseg bench"

    def __post_init__(self) -> None:
        if not self.engines:
            raise SpecError("no engine given; give at least one engine folder")
        for kind in self.baselines:
            one_of("baseline", kind, BASELINES)
        numbers = (*self.batches, *self.streams, *(n for n in self.threads if n is not None))
        if not self.batches or not self.streams or not self.threads or any(n < 1 for n in numbers):
            raise SpecError("batch sizes, threads and streams are counted from 1; give at least one of each")
        if not 0 <= self.duration_s < float("inf") or self.fresh_processes < 0:
            raise SpecError("duration and fresh processes must not be negative")

    @property
    def protocol(self) -> LatencyProtocol:
        """trtexec's protocol, warm-up until stable, for this duration."""
        return LatencyProtocol(min_duration_ms=self.duration_s * 1000, stable_within=WARMUP_STABLE_WITHIN)


@dataclass
class _Measured:
    """What is found out about one contender, apart from its latency."""

    identity: Identity
    cold_start: ColdStart | None = None
    memory: Memory | None = None
    profile: Profile | None = None
    accuracy: Accuracy | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Timed:
    """Latency of one contender in one setting."""

    latency: Latency | None
    power: Power | None = None
    samples: LatencySamples | None = None


def run_bench(request: BenchRequest, reporter: Reporter, accuracy: AccuracyStep | None = None) -> BenchReport:
    """Measure everything asked for and return the report.

    Raises:
        ArtifactError, BuildError, CheckpointError, InputError, SpecError: an engine, the weights or the data cannot be
            used. What merely cannot be measured here is ``None`` in the report, with a note.
    """
    opener, notes = Opener(), list[str]()
    before = machine_state()
    engines = engine_contenders(request.engines)
    baselines, missing = baseline_contenders(engines, request.baselines, request.weights, opener)
    notes += missing
    if not request.baselines:
        notes.append("no baseline asked for: nothing is compared with PyTorch")
    contenders = [*baselines, *engines]
    if accuracy is not None:
        accuracy.check(contenders)
    measured = {c.name: _Measured(opener.identity(c)) for c in contenders}
    timed = _latency_stage(request, contenders, opener, reporter, notes) if request.duration_s > 0 else {}
    _memory_stage(request, contenders, measured, reporter)
    if request.profile:
        _profile_stage(engines, measured, opener, reporter)
    if accuracy is not None:
        for name, found in accuracy(contenders, opener, reporter).items():
            measured[name].accuracy = found
    after = machine_state()
    settings = list(timed) or [Setting()]
    rows = [_row(c, setting, measured[c.name], timed.get(setting, {})) for setting in settings for c in contenders]
    for note in notes:
        reporter.note(note)
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        edgeseg_version=edgeseg.__version__,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=request.command,
        environment=describe_machine(before, after),
        rows=tuple(rows),
        comparisons=tuple(_comparisons(contenders, timed)),
        protocol=dataclasses.asdict(request.protocol),
        notes=tuple(notes),
    )


def _latency_stage(
    request: BenchRequest, contenders: Sequence[Contender], opener: Opener, reporter: Reporter, notes: list[str]
) -> dict[Setting, dict[str, _Timed]]:
    source = find_source()
    if source is None:
        notes.append("no power source could be read (INA3221, tegrastats, NVML, RAPL): power and energy are '-'")
    idle_w = None if source is None else _idle_power(source)
    size = request.source_size or (None, None)
    settings = [
        Setting(batch, threads, streams, size[0], size[1])
        for threads in request.threads
        for batch in request.batches
        for streams in request.streams
    ]
    found: dict[Setting, dict[str, _Timed]] = {}
    try:
        for setting in settings:
            name = row_id("latency", setting).removeprefix("latency ")
            with stage(reporter, "latency") as said:
                found[setting] = measure_setting(
                    contenders, opener, setting, request.protocol, source, idle_w, reporter.progress
                )
                medians = {
                    n: t.latency.end_to_end.median_ms for n, t in found[setting].items() if t.latency is not None
                }
                said.append(f"{name}: " + ", ".join(f"{n} {ms:.2f} ms" for n, ms in medians.items()))
    finally:
        if source is not None:
            source.close()
    return found


def measure_setting(
    contenders: Sequence[Contender],
    opener: Opener,
    setting: Setting,
    protocol: LatencyProtocol,
    power: PowerSource | None = None,
    idle_w: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, _Timed]:
    """Measure all contenders in one setting, in turns.

    With one stream the samples of all are taken in turns (see :func:`~edgeseg.evaluate.latency.measure_interleaved`). Then
    each runs by itself: for its stages, which a GPU backend times by events that the end-to-end figure must not pay for,
    and for power, since a meter cannot tell contenders apart.
    """
    with ExitStack() as stack:
        sessions = {c.name: stack.enter_context(opener.open(c, setting.threads)) for c in contenders}
        calls: dict[str, Callable[[], object]] = {
            c.name: partial(Segmenter(sessions[c.name], c.spec), _noise(c, setting)) for c in contenders
        }
        state, counters = machine_state(), read_counters()
        if setting.streams == 1:
            samples = measure_interleaved(calls, protocol, progress=progress)
            rates = {n: setting.batch * len(s.samples_ms) / (sum(s.samples_ms) / 1000) for n, s in samples.items()}
        else:
            under_load = measure_streams(calls, setting.streams, protocol.min_duration_ms, warmup_ms=protocol.warmup_ms)
            samples = {n: LatencySamples(n, s.samples_ms, s.warmup_iterations, protocol) for n, s in under_load.items()}
            rates = {n: setting.batch * s.calls_per_s for n, s in under_load.items()}
        flags = machine_flags(counters, read_counters(), (state, machine_state()))
        powers = {} if power is None else {n: _power(call, power, setting, idle_w) for n, call in calls.items()}
        stages = {c.name: _stages(sessions[c.name], c, setting) for c in contenders}
        group = row_id("", setting).strip()
        return {
            name: _Timed(
                Latency(
                    end_to_end=distribution(s.samples_ms),
                    stages=stages[name],
                    images_per_s=rates[name],
                    warmup_iterations=s.warmup_iterations,
                    warmup_stable=s.warmup_stable,
                    flags=(*noise_flags(s.samples_ms), *flags),
                    samples_ms=tuple(round(ms, 5) for ms in s.samples_ms),
                    round_group=group if setting.streams == 1 else "",
                ),
                powers.get(name),
                s if setting.streams == 1 else None,
            )
            for name, s in samples.items()
        }


def _noise(contender: Contender, setting: Setting) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images to time with, always the same: what they show does not change what the kernels do."""
    spec = contender.spec.input
    height, width = setting.source_height or spec.height, setting.source_width or spec.width
    images = np.random.default_rng(0).integers(0, 256, (setting.batch, height, width, spec.channels), dtype=np.uint8)
    return images[0] if setting.batch == 1 else images


def _stages(session: Session, contender: Contender, setting: Setting) -> StageSplit:
    """Medians of the stages of one caller's calls."""
    clock = StageClock(session)
    call = partial(Segmenter(clock, contender.spec), _noise(contender, setting))
    began = time.perf_counter()
    for done in range(STAGE_CALLS):
        if done >= MIN_STAGE_CALLS and time.perf_counter() - began > STAGE_SECONDS:
            break
        clock.timed(call)
    return clock.split()


def _idle_power(source: PowerSource) -> float | None:
    """Watts while nothing is asked of the machine."""
    with power_log(source) as log:
        time.sleep(IDLE_SECONDS)
    power = log.result(1.0)
    return None if power is None else power.mean_w


def _power(call: Callable[[], object], source: PowerSource, setting: Setting, idle_w: float | None) -> Power | None:
    with power_log(source) as log:
        found = measure_streams({"": call}, setting.streams, POWER_SECONDS * 1000)[""]
    return log.result(found.calls_per_s * setting.batch, idle_w)


def _memory_stage(
    request: BenchRequest, contenders: Sequence[Contender], measured: dict[str, _Measured], reporter: Reporter
) -> None:
    if not request.fresh_processes:
        return
    with stage(reporter, "cold start") as said:
        for index, contender in enumerate(contenders):
            found = measured[contender.name]
            try:
                found.cold_start, found.memory = measure_fresh(contender, request.fresh_processes)
                said.append(f"{contender.name} {found.cold_start.total_ms:.0f} ms")
            except BuildError as exc:
                found.notes.append(f"cold start and memory not measured: {exc}")
                said.append(f"{contender.name}: {exc}")
            reporter.progress(index + 1, len(contenders))


def _profile_stage(
    engines: Sequence[Contender], measured: dict[str, _Measured], opener: Opener, reporter: Reporter
) -> None:
    with stage(reporter, "profile") as said:
        for contender in engines:
            found = measured[contender.name]
            try:
                found.profile = profile_engine(opener.engine(contender))
            except EdgesegError as exc:
                found.notes.append(f"not profiled: {exc}")
            if found.profile is not None:
                slowest = max(found.profile.modules, key=lambda m: m.time_ms)
                said.append(f"{contender.name}: {slowest.module} {slowest.share:.0%}")


def _row(contender: Contender, setting: Setting, found: _Measured, timed: dict[str, _Timed]) -> Row:
    spec = contender.spec.input
    latency = timed.get(contender.name)
    notes = list(found.notes)
    if latency is not None and setting.batch > spec.batch.maximum:
        runs = -(-setting.batch // spec.batch.maximum)
        notes.append(f"the engine takes batches of up to {spec.batch.maximum}: {setting.batch} images are {runs} runs")
    if latency is not None and setting.batch < spec.batch.minimum:
        notes.append(f"the engine takes batches of at least {spec.batch.minimum}: {setting.batch} images are filled up")
    exact = dataclasses.replace(
        setting,
        source_height=setting.source_height or spec.height,
        source_width=setting.source_width or spec.width,
    )
    return Row(
        id=row_id(contender.name, setting),
        engine=found.identity,
        setting=exact,
        latency=None if latency is None else latency.latency,
        cold_start=found.cold_start,
        memory=found.memory,
        power=None if latency is None else latency.power,
        profile=found.profile,
        accuracy=found.accuracy,
        notes=tuple(notes),
    )


def _comparisons(contenders: Sequence[Contender], timed: dict[Setting, dict[str, _Timed]]) -> list[SpeedComparison]:
    found = []
    for setting, by_name in timed.items():
        for contender in contenders:
            baseline = first_baseline(contender, contenders)
            if baseline is None:
                continue
            first, second = by_name[baseline.name].samples, by_name[contender.name].samples
            if first is not None and second is not None:
                ids = row_id(baseline.name, setting), row_id(contender.name, setting)
                found.append(speed_comparison(*ids, first, second))
    return found


def first_baseline(contender: Contender, contenders: Sequence[Contender]) -> Contender | None:
    """The baseline an engine (or a further baseline) is compared with: the first of the same model and input size."""
    for other in contenders:
        if other.is_baseline and other.pair_key == contender.pair_key:
            return None if other is contender else other
    return None
