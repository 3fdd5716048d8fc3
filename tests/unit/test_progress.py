"""What waits for work sees of it where there is no terminal."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from edgeseg.progress import ConsoleReporter, stage


class Log(io.StringIO):
    """Text that says when a reminder has come."""

    def __init__(self) -> None:
        super().__init__()
        self.reminded = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if "so far" in text:
            self.reminded.set()
        return written


def test_a_stage_that_lasts_says_so_without_a_terminal() -> None:
    log = Log()
    reporter = ConsoleReporter(Console(file=log, force_terminal=False, width=200), remind_after_s=0.01)
    with stage(reporter, "verify") as said:
        reporter.progress(3, 48)
        assert log.reminded.wait(20)
        said.append("48 images")
    lines = log.getvalue().splitlines()
    assert lines[0].split()[0] == "verify" and lines[0].endswith("s  so far, 3 of 48")
    assert lines[-1].endswith("s  48 images")


def test_a_short_stage_is_one_line() -> None:
    log = Log()
    reporter = ConsoleReporter(Console(file=log, force_terminal=False, width=200))
    with stage(reporter, "load"):
        pass
    assert len(log.getvalue().splitlines()) == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_does_not_split_the_figures_of_a_stage(is_terminal: bool) -> None:
    log = Log()
    reporter = ConsoleReporter(Console(file=log, force_terminal=is_terminal, width=80, color_system=None))
    detail = "256x256 RGB, resized; mean 0.485,0.456,0.406 std 0.229,0.224,0.225 of 0..1; the size is only a default"
    reporter.start("input")
    reporter.finish(detail, 12.3)
    *_, text = log.getvalue().rpartition("  input")
    lines = f"  input{text}".splitlines()
    assert max(map(len, lines)) <= 80 or not is_terminal
    assert " ".join(" ".join(lines).split()) == f"input 12.3 s {detail}"
    assert len(lines) == (2 if is_terminal else 1)
    assert {line[:22] for line in lines[1:]} <= {" " * 22}
