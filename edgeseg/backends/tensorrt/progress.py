"""A TensorRT build's progress, from its ``IProgressMonitor`` (10 on), and a way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeseg.backends.base import Progress

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig
    from tensorrt_surface import TensorRT


class BuildWatch:
    """What the monitor saw: phases, each a step of its parent. TensorRT tells from several threads.

    Args:
        progress: told the whole build's percentage, which never falls.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._interrupt: BaseException | None = None
        self._told = -1

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (parent, 0, max(steps, 1))

    def step(self, phase: str, step: int) -> bool:
        """Note a finished step; whether the build is to go on."""
        with self._lock:
            if phase in self._phases:
                # Counted, not taken from its number: steps may end in another order.
                parent, done, steps = self._phases[phase]
                self._phases[phase] = (parent, min(done + 1, steps), steps)
            return self._tell(self._percent(phase))

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)

    def _percent(self, phase: str) -> int:
        """Of the whole build: a phase's share of its parent's step, and so on up."""
        share, at, seen = 0.0, phase, set[str]()
        while at in self._phases and at not in seen:
            seen.add(at)
            parent, done, steps = self._phases[at]
            share = min(1.0, (done + share) / steps)
            if parent is None:
                return int(100 * share)
            at = parent
        # A phase under one that was never started says nothing about the whole.
        return max(self._told, 0)

    def _tell(self, percent: int) -> bool:
        # Whatever is raised here (Ctrl-C above all) would be lost in TensorRT's threads: it is kept, and the build stops.
        try:
            if self._progress is not None and percent > self._told:
                self._told = percent
                self._progress(percent, 100)
        except BaseException as exc:
            self._interrupt = exc
        return self._interrupt is None

    def raise_interrupt(self) -> None:
        """Raise what stopped the build from within, if anything did."""
        if self._interrupt is not None:
            raise self._interrupt


@contextmanager
def progress_monitor(trt: TensorRT, config: IBuilderConfig, progress: Progress | None) -> Iterator[BuildWatch]:
    """Watch a build for as long as the block lasts; on versions without a monitor nothing is told."""
    watch = BuildWatch(progress)
    if not hasattr(trt, "IProgressMonitor"):
        yield watch
        return

    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor
    else:
        IProgressMonitor = trt.IProgressMonitor  # noqa: N806  # a class of the module at hand

    class Monitor(IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    monitor = Monitor()  # the config keeps no reference to it
    config.progress_monitor = monitor
    yield watch
    del monitor
