"""Keeps vendors' warnings and progress chatter away from the user's terminal while a step runs."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

_filters_changing = threading.Lock()
_quiet_blocks = 0
_filters_before = warnings.catch_warnings()

_LOGGERS = ("torch", "torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir", "onnxsim")


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keep back what libraries warn of inside the block: what matters of it becomes an error of ours. For any thread."""
    global _quiet_blocks, _filters_before
    # The list of warning filters is one for the whole process. Blocks of several threads share one change of it: did each
    # put back what it found, the last to end would leave the filters of another behind, and the program without warnings.
    with _filters_changing:
        if _quiet_blocks == 0:
            _filters_before = warnings.catch_warnings()
            _filters_before.__enter__()
            warnings.simplefilter("ignore")
        _quiet_blocks += 1
    try:
        yield
    finally:
        with _filters_changing:
            _quiet_blocks -= 1
            if _quiet_blocks == 0:
                _filters_before.__exit__(None, None, None)


class _Muted:
    """A stream that drops what the thread that made it writes. Other threads are the program's own: theirs is passed on."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = io.StringIO() if stream is None else stream
        self._thread: int | None = threading.get_ident()

    def end(self) -> None:
        """Pass on all: whoever took it for the program's stream meanwhile may put it back as that."""
        self._thread = None

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silence warnings, logging and this thread's prints, those of the export tools, inside the block. Exceptions pass."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    stdout, stderr = _Muted(sys.stdout), _Muted(sys.stderr)
    with without_warnings(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            stdout.end()
            stderr.end()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
