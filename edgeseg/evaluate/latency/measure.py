"""All contenders in one setting, in turns: latency, its stages, power. One that fails is left out, and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from statistics import median
from typing import Any

from numpy.typing import NDArray

from edgeseg.backends.base import Session, StageTimes, TimedSession
from edgeseg.closing import Closing
from edgeseg.errors import EdgesegError, SpecError
from edgeseg.evaluate.contenders import Contender, Opener
from edgeseg.evaluate.latency.protocol import Call, LatencyProtocol, LatencySamples, measure_interleaved, noise_images
from edgeseg.evaluate.latency.statistics import distribution, noise_flags
from edgeseg.evaluate.latency.streams import measure_streams
from edgeseg.evaluate.results import Latency, Setting, StageSplit, row_id
from edgeseg.machine.power import PowerSource, power_log
from edgeseg.machine.record import Power
from edgeseg.machine.state import MachineWatch
from edgeseg.runtime.segmenter import Segmenter

POWER_SECONDS = 2.0
IDLE_SECONDS = 1.0
STAGE_CALLS, MIN_STAGE_CALLS, STAGE_SECONDS = 50, 5, 1.0


@dataclass(frozen=True)
class Timed:
    """Latency of one contender in one setting; ``samples`` only where they were taken in turns."""

    latency: Latency
    power: Power | None = None
    samples: LatencySamples | None = None


@dataclass
class Measured:
    """What one setting gave: by contender's name its times, or why there are none.

    Attributes:
        timed: the contenders that ran.
        not_loaded: error by name of those that could not be opened: they will not run in another setting either.
        failed: error by name of those that were opened and then failed.
    """

    timed: dict[str, Timed] = field(default_factory=dict)
    not_loaded: dict[str, EdgesegError] = field(default_factory=dict)
    failed: dict[str, EdgesegError] = field(default_factory=dict)


class _CallFailedError(Exception):
    """A call of one contender failed while several were measured."""

    def __init__(self, name: str, reason: EdgesegError) -> None:
        super().__init__(name)
        self.name = name
        self.reason = reason


def _named(name: str, call: Call) -> Call:
    def named() -> object:
        try:
            return call()
        except EdgesegError as exc:
            raise _CallFailedError(name, exc) from exc

    return named


def measure_setting(
    contenders: Sequence[Contender],
    opener: Opener,
    setting: Setting,
    protocol: LatencyProtocol,
    power: PowerSource | None = None,
    idle_w: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Measure all contenders in one setting, in turns.

    With one stream the samples of all are taken in turns (see
    :func:`~edgeseg.evaluate.latency.protocol.measure_interleaved`). Then each runs by itself: for its
    stages, which a GPU backend times by events that the end-to-end figure must not pay for, and for power, since a meter
    cannot tell contenders apart. When one fails, the others are measured again without it; baselines without an engine
    are not measured.

    Raises:
        SpecError: a contender's backend has no such setting.
    """
    measured = Measured()
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for contender in contenders:
            try:
                streams = setting.streams if setting.streams > 1 else None
                sessions[contender.name] = stack.enter_context(opener.open(contender, setting.threads, streams))
            except SpecError:
                raise
            except EdgesegError as exc:
                measured.not_loaded[contender.name] = exc
        while True:
            running = [c for c in contenders if c.name in sessions and c.name not in measured.failed]
            if all(c.is_baseline for c in running):
                break  # nothing to compare them with
            try:
                measured.timed = _measure(running, sessions, setting, protocol, power, idle_w, progress)
                break
            except _CallFailedError as exc:
                measured.failed[exc.name] = exc.reason
    return measured


def _measure(
    contenders: Sequence[Contender],
    sessions: dict[str, Session],
    setting: Setting,
    protocol: LatencyProtocol,
    power: PowerSource | None,
    idle_w: float | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Timed]:
    calls: dict[str, Call] = {
        c.name: _named(c.name, partial(Segmenter(sessions[c.name], c.spec), noise(c, setting))) for c in contenders
    }
    watch = MachineWatch()

    def after_round(done: int, total: int) -> None:
        watch.warm()
        if progress is not None:
            progress(done, total)

    if setting.streams == 1:
        samples = measure_interleaved(calls, protocol, progress=after_round)
        rates = {n: setting.batch * len(s.samples_ms) / (sum(s.samples_ms) / 1000) for n, s in samples.items()}
    else:
        under_load = measure_streams(
            calls, setting.streams, protocol.min_duration_ms, warmup_ms=protocol.warmup_ms, progress=after_round
        )
        samples = dict[str, LatencySamples](under_load)
        rates = {n: setting.batch * s.calls_per_s for n, s in under_load.items()}
    flags = watch.flags()
    powers = {} if power is None else {n: _power(call, power, setting, idle_w) for n, call in calls.items()}
    stages = {c.name: _stages(sessions[c.name], c, setting) for c in contenders}
    group = row_id("", setting).strip()
    return {
        name: Timed(
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


def noise(contender: Contender, setting: Setting) -> NDArray[Any]:
    """Images to time with, always the same: what they show does not change what the kernels do."""
    spec = contender.spec.input
    height, width = setting.source_height or spec.height, setting.source_width or spec.width
    images = noise_images(contender.spec, (setting.batch, height, width))
    return images[0] if setting.batch == 1 else images


def _stages(session: Session, contender: Contender, setting: Setting) -> StageSplit:
    """Medians of the stages of one caller's calls."""
    clock = StageClock(session)
    call = _named(contender.name, partial(Segmenter(clock, contender.spec), noise(contender, setting)))
    began = time.perf_counter()
    for done in range(STAGE_CALLS):
        if done >= MIN_STAGE_CALLS and time.perf_counter() - began > STAGE_SECONDS:
            break
        clock.timed(call)
    return clock.split()


def idle_power(source: PowerSource) -> float | None:
    """Watts while nothing is asked of the machine."""
    with power_log(source) as log:
        time.sleep(IDLE_SECONDS)
    power = log.result(1.0)
    return None if power is None else power.mean_w


def _power(call: Call, source: PowerSource, setting: Setting, idle_w: float | None) -> Power | None:
    with power_log(source) as log:
        rates = measure_streams({"": call}, setting.streams, POWER_SECONDS * 1000)[""]
    return log.result(rates.calls_per_s * setting.batch, idle_w)


Clock = Callable[[], int]
_DEVICE = ("h2d_ms", "compute_ms", "d2h_ms", "enqueue_ms")


class StageClock(Closing):
    """A session that notes when the engine was entered and left, for the split of a call; for one caller at a time.

    Of a session that has the device's own times (:class:`~edgeseg.backends.base.TimedSession`), those are taken; asking for
    them costs it the recording of four events a run.
    """

    def __init__(self, session: Session, clock_ns: Clock = time.perf_counter_ns) -> None:
        self._session = session
        self._clock_ns = clock_ns
        self._runs: list[tuple[int, int, StageTimes | None]] = []
        self._split: dict[str, list[float]] = {field.name: [] for field in fields(StageSplit)}

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`."""
        times: StageTimes | None = None
        begin = self._clock_ns()
        if isinstance(self._session, TimedSession):
            outputs, times = self._session.run_timed(images)
        else:
            outputs = self._session.run(images)
        self._runs.append((begin, self._clock_ns(), times))
        return outputs

    def timed(self, call: Call) -> None:
        """Make ``call``, which runs this session, and keep its split."""
        self._runs = []
        begin = self._clock_ns()
        call()
        end = self._clock_ns()
        inside_ms = sum(stop - start for start, stop, _ in self._runs) / 1e6
        pre_ms = (self._runs[0][0] - begin) / 1e6
        stages: dict[str, float | None] = {"pre_ms": pre_ms, "post_ms": (end - begin) / 1e6 - pre_ms - inside_ms}
        device = [times for _, _, times in self._runs if times is not None]
        if len(device) == len(self._runs):
            stages |= {name: _sum([getattr(times, name) for times in device]) for name in _DEVICE}
        else:
            stages["compute_ms"] = inside_ms
        for name, ms in stages.items():
            if ms is not None:
                self._split[name].append(ms)

    def split(self) -> StageSplit:
        """Medians over the calls made through :meth:`timed`; ``None`` for what was not seen."""
        return StageSplit(**{name: median(values) if values else None for name, values in self._split.items()})

    def close(self) -> None:
        """Close the engine."""
        self._session.close()


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
