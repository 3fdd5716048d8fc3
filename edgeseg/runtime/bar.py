"""How far a run is, on standard error, for whoever waits for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgeseg.closing import Closing
from edgeseg.console import draws_bars, plain_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Silent:
    """Takes progress and says nothing."""

    def expect(self, frames: int | None) -> None:
        """The next input, counted as one so far, has ``frames`` frames (``None``: nobody knows)."""

    def advance(self, *, failed: bool = False, count: int = 1) -> None:
        """One more image or frame is done, or so many windows of a raster; or an input has failed."""

    def say(self, text: str) -> None:
        """Something a person should read."""


class Bar(Silent, Closing):
    """A progress bar with frames per second on standard error."""

    def __init__(self, inputs: int, limit: int | None, unit: str = "frames") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("segment"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(f"{{task.fields[fps]:.1f}} {unit}/s"),
            TimeRemainingColumn(),
        )
        console = plain_console(stderr=True)
        self._bar: Progress = Progress(*columns, console=console, disable=not draws_bars(console))
        self._inputs: int | None = inputs
        self._limit = limit
        self._done = self._failed = 0
        self._task: TaskID = self._bar.add_task("segment", total=self._total, fps=0.0)
        self._begin = time.perf_counter()
        self._bar.start()

    @property
    def _total(self) -> int | None:
        """What there will be at the end; inputs that fail do not count towards the limit."""
        most = None if self._limit is None else self._limit + self._failed
        return min((n for n in (self._inputs, most) if n is not None), default=None)

    def expect(self, frames: int | None) -> None:
        self._inputs = None if frames is None or self._inputs is None else self._inputs - 1 + frames
        self._bar.update(self._task, total=self._total)

    def advance(self, *, failed: bool = False, count: int = 1) -> None:
        self._done += count
        self._failed += failed
        seconds = time.perf_counter() - self._begin
        self._bar.update(self._task, completed=self._done, total=self._total, fps=self._done / seconds)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
