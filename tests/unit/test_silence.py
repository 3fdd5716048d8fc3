"""Libraries are silenced, the program around edgeseg is not."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from edgeseg.silence import silenced, without_warnings


def elsewhere(work: Callable[[], object]) -> None:
    """Do the work in another thread, and wait for it."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def test_only_the_thread_that_is_silenced_is(capsys: pytest.CaptureFixture[str]) -> None:
    with silenced():
        print("a tool's")
        print("a tool's", file=sys.stderr)
        elsewhere(lambda: print("the program's"))
        elsewhere(lambda: print("the program's log", file=sys.stderr, flush=True))
    print("after")
    assert capsys.readouterr() == ("the program's\nafter\n", "the program's log\n")


def test_what_another_thread_redirects_meanwhile_does_not_silence_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    redirected = contextlib.redirect_stdout(io.StringIO())
    before = sys.stdout
    try:
        with silenced():
            elsewhere(redirected.__enter__)
        elsewhere(lambda: redirected.__exit__(None, None, None))  # puts back what it found, inside the block
        print("the program's")
        assert capsys.readouterr().out == "the program's\n"
    finally:
        sys.stdout = before


@pytest.mark.parametrize("other", [silenced, without_warnings])
def test_blocks_of_two_threads_leave_the_warnings_as_they_were(
    other: Callable[[], AbstractContextManager[None]],
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        with other():
            entered.set()
            assert leave.wait(20)

    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as pool:
        with without_warnings():
            longer = pool.submit(block)
            assert entered.wait(20)
            warnings.warn("of a library", UserWarning, stacklevel=1)
        warnings.warn("of a library", UserWarning, stacklevel=1)  # the other block is not over
        leave.set()
        longer.result()
    assert warnings.filters == before
    with pytest.raises(UserWarning):
        warnings.warn("of the program", UserWarning, stacklevel=1)
