"""A TensorRT build's progress, from its ``IProgressMonitor`` (10 on), and a way to stop it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeseg.backends.base import Progress

if TYPE_CHECKING:
    from tensorrt import IBuilderConfig
    from tensorrt_surface import TensorRT


class BuildWatch:
    """What the monitor saw. Phases nest; the outermost one is the build, the others share its current step."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._interrupt: BaseException | None = None
        self._told = -1

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent, 0, max(steps, 1))

    def step(self, phase: str, step: int) -> bool:
        """Note a finished step; whether the build is to go on."""
        if phase in self._phases:
            parent, _, steps = self._phases[phase]
            self._phases[phase] = (parent, step + 1, steps)
        return self._tell()

    def finish(self, phase: str) -> None:
        self._phases.pop(phase, None)

    def percent(self) -> int:
        """Of the whole build."""
        share = 0.0
        for parent, done, steps in reversed(list(self._phases.values())):
            share = min(1.0, (done + share) / steps)
            if parent is None:
                break
        return int(100 * share)

    def _tell(self) -> bool:
        # Whatever is raised here (Ctrl-C above all) would be lost in TensorRT's threads: it is kept, and the build stops.
        try:
            percent = max(self.percent(), self._told)
            if self._progress is not None and percent != self._told:
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
