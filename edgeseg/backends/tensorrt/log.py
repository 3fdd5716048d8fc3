"""TensorRT's log, caught: kept as text, and its errors brought down to one line that names the layer to look at."""

from __future__ import annotations

import re
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.errors import one_line
from edgeseg.store.cache import user_cache_folder

if TYPE_CHECKING:
    from tensorrt_surface import TensorRT

LOG_NAME = "tensorrt.log"
"""In the engine folder."""

_LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")
"""What is kept; VERBOSE is hundreds of megabytes for a large network."""


@dataclass
class LogCapture:
    """What TensorRT said during one build or load: level and text, in order."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Texts of the errors, first one first."""
        return [text for level, text in self.lines if level in ("INTERNAL_ERROR", "ERROR")]

    def first_error(self) -> str:
        """The first error on one line, or what can be said without one."""
        return one_line(self.errors[0]) if self.errors else "it gave no reason"

    def write(self, path: Path) -> None:
        """Write the log as text, a message a line."""
        path.write_text("".join(f"[{level}] {text}\n" for level, text in self.lines), encoding="utf-8")


def keep_log(log: LogCapture, graph_sha256: str) -> Path:
    """Keep the log of a failed build, whose folder vanishes, in edgeseg's cache folder or, failing that, a new one.

    Returns where.
    """
    path = user_cache_folder() / "tensorrt-log" / f"{graph_sha256[:16]}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log.write(path)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="edgeseg-log-")) / path.name
        log.write(path)
    return path


_lock = threading.Lock()
_listening: list[LogCapture] = []
_loggers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@contextmanager
def capture(trt: TensorRT) -> Iterator[tuple[Any, LogCapture]]:
    """Yield the logger to hand to TensorRT and what it says while the block runs.

    TensorRT keeps the first logger it is given and ignores all later ones, so there is one a process, which passes messages on.
    Messages carry no mark of who caused them: of two builds at the same time each keeps the messages of both.
    """
    heard = LogCapture()
    with _lock:
        if trt not in _loggers:
            _loggers[trt] = _make_logger(trt)
        _listening.append(heard)
    try:
        yield _loggers[trt], heard
    finally:
        with _lock:
            # By identity: two captures with the same lines are equal.
            _listening[:] = [other for other in _listening if other is not heard]


def blamed_node(text: str, names: Iterable[str]) -> str | None:
    """The ONNX node a message speaks of: the longest of ``names`` that stands in it as a whole."""
    named = [name for name in names if name and re.search(rf"(?<![\w./]){re.escape(name)}(?![\w/])", text)]
    return max(named, key=len, default=None)


def _make_logger(trt: TensorRT) -> Any:
    if TYPE_CHECKING:
        from tensorrt import ILogger
    else:
        ILogger = trt.ILogger  # noqa: N806  # a class of the module at hand

    class EdgesegLogger(ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            level = severity.name
            if level in _LEVELS:
                with _lock:
                    for heard in _listening:
                        heard.lines.append((level, msg))

    return EdgesegLogger()
