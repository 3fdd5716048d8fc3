"""How long work tells whoever waits for it: stages, progress within a stage, and notes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

from edgeseg.console import draws_bars, hanging
from edgeseg.errors import SpecError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Reporter(Protocol):
    """Receives what happens during a build."""

    def start(self, stage: str) -> None:
        """A stage begins; ``stage`` is what a person reads, such as ``"calibrate"``."""
        ...

    def progress(self, done: int, total: int) -> None:
        """``done`` of ``total`` items of the current stage are finished."""
        ...

    def finish(self, detail: str, seconds: float) -> None:
        """The current stage ended well."""
        ...

    def note(self, text: str) -> None:
        """Something was assumed, stripped or dropped; one line."""
        ...


class SilentReporter:
    """Keeps the durations of the stages, says nothing: the default of :func:`edgeseg.build`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = ""

    def start(self, stage: str) -> None:
        self._stage = stage

    def progress(self, done: int, total: int) -> None:
        pass

    def finish(self, detail: str, seconds: float) -> None:
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + seconds

    def note(self, text: str) -> None:
        pass


class LineReporter(SilentReporter):
    """Hands a line per finished stage and per note to a function, such as ``print``."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__()
        self._say = say

    def finish(self, detail: str, seconds: float) -> None:
        super().finish(detail, seconds)
        self._say(stage_line(self._stage, detail, seconds))

    def note(self, text: str) -> None:
        self._say(f"note: {text}")


def reporter_of(given: Reporter | Callable[[str], object] | None) -> Reporter:
    """A reporter of what :func:`edgeseg.build` was given: one, a function that takes a line, or ``None`` for silence.

    Raises:
        SpecError: neither.
    """
    if given is None:
        return SilentReporter()
    if all(callable(getattr(given, name, None)) for name in ("start", "progress", "finish", "note")):
        return cast("Reporter", given)
    if not callable(given):
        raise SpecError(f"reporter is {given!r}; give a function that takes a line, such as print")
    return LineReporter(given)


def stage_line(name: str, detail: str, seconds: float) -> str:
    """What a person reads of a finished stage."""
    return f"{name:<10} {seconds:6.1f} s  {detail}"


class ConsoleReporter:
    """One line a stage on standard error, with a progress bar and an estimate while it lasts.

    Without a terminal there is no bar: a stage that lasts says so with a line every ``remind_after_s`` seconds.
    """

    def __init__(self, console: Console, remind_after_s: float = 60.0) -> None:
        self._console = console
        self._remind_after_s = remind_after_s
        self._ended: threading.Event | None = None
        self._done = ""
        self._stage = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, stage: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._stage = stage
        if not draws_bars(self._console):
            # Into a file or a log, a bar is noise; but minutes without a word look like a hang.
            self._done = ""
            self._ended = threading.Event()
            threading.Thread(target=self._remind, args=(self._ended, stage), daemon=True).start()
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(stage, total=None)
        self._bar.start()

    def _remind(self, ended: threading.Event, stage: str) -> None:
        begin = time.perf_counter()
        while not ended.wait(self._remind_after_s):
            seconds = time.perf_counter() - begin
            self._console.print(f"  {stage:<10} {seconds:6.1f} s  so far{self._done}", highlight=False, markup=False)

    def progress(self, done: int, total: int) -> None:
        self._done = f", {done} of {total}" if total else f", {done} done"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def finish(self, detail: str, seconds: float) -> None:
        self.close()
        for line in hanging(f"  {stage_line(self._stage, '', seconds)}", detail, self._console):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        console = self._bar.console if self._bar is not None else self._console
        console.print(f"  note: {text}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the progress bar off the terminal, end the reminders; called when a stage ends, well or not."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def stage(reporter: Reporter, name: str) -> Iterator[list[str]]:
    """Report a stage around a block, which appends what it has to say to the yielded list."""
    detail: list[str] = []
    begin = time.perf_counter()
    reporter.start(name)
    yield detail
    reporter.finish("; ".join(detail), time.perf_counter() - begin)
