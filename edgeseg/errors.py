"""Every error edgeseg raises on purpose.

Each message is one line a user can act on: what we got, what is allowed, what to do.
The command line prints it without a traceback (``--debug`` shows one).

EdgesegError                                        exit 1
 ├─ SpecError (ValueError)                          exit 2: a request that cannot be met: architecture, size, classes
 │   └─ OutputExistsError                           exit 2: a file or folder that only --force replaces
 ├─ InputError (ValueError)                         an image, mask, folder or array that cannot be used
 ├─ CheckpointError                                 weights that cannot be read, or do not fit the model
 ├─ MissingDependencyError (ImportError)            an extra that is not installed; names the pip line
 ├─ ArtifactError                                   an engine folder, graph, table or manifest that is damaged, stale or foreign
 │   └─ StaleEngineError                            whole, but built for another device or version: compile it again
 ├─ ExportError                                     PyTorch -> ONNX, simplification or a rewrite failed or changed the result
 ├─ QuantizationError                               calibration or Q/DQ insertion failed, or the written graph breaks its scheme
 ├─ BuildError                                      a backend could not build or load its engine
 ├─ DeviceError                                     the GPU or its driver refused: none there, out of memory, launch failed
 └─ GateError                                       exit 3: the engine works, a limit the user set is not met
"""

from __future__ import annotations

import difflib
import importlib
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeseg.console import printable

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class EdgesegError(Exception):
    """Base of all errors edgeseg raises on purpose.

    Attributes:
        figures: what there is all the same, for ``--json``.
    """

    exit_code = 1
    figures: object = None


class SpecError(EdgesegError, ValueError):
    """A request that cannot be met: unknown architecture, impossible size, contradicting options."""

    exit_code = 2


class OutputExistsError(SpecError):
    """An output is there already, and nobody said that it may be replaced."""


class InputError(EdgesegError, ValueError):
    """An image, mask, folder or array that cannot be used."""


class CheckpointError(EdgesegError):
    """Weights that cannot be read, or that do not fit the model."""


class MissingDependencyError(EdgesegError, ImportError):
    """A package that belongs to an extra is not installed.

    Args:
        package: the import name that failed.
        extra: the edgeseg extra that brings it.
        purpose: what needed it, as the rest of "... is needed to <purpose>".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed to {purpose}: pip install 'edgeseg[{extra}]'")
        self.package = package
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingDependencyError], tuple[str, str, str]]:
        # Exceptions are made again of their message alone, which these are not.
        return type(self), (self.package, self.extra, self.purpose)


def imported(package: str, extra: str, purpose: str) -> Any:
    """Import a package of an extra; arguments and error are those of :class:`MissingDependencyError`."""
    try:
        return importlib.import_module(package)
    except ImportError as exc:
        if is_interruption(exc):
            raise KeyboardInterrupt from exc
        raise MissingDependencyError(package, extra, purpose) from exc


def is_interruption(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what an error came of: a compiled module whose import it ends says "initialization failed"."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__
    return error is not None


class ArtifactError(EdgesegError):
    """An engine folder, graph, calibration table or manifest that is damaged, stale or foreign."""


class StaleEngineError(ArtifactError):
    """An engine that is whole, but was built for another device or version, or not built yet: compile it again.

    Args:
        message: in which may stand whatever a manifest says of device and versions.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ExportError(EdgesegError):
    """PyTorch to ONNX, simplification or a rewrite failed or changed the result."""


class QuantizationError(EdgesegError):
    """Calibration or Q/DQ insertion failed, or the written graph breaks the rules of its scheme."""


class BuildError(EdgesegError):
    """A backend could not build or load its engine."""


class DeviceError(EdgesegError):
    """The GPU or its driver refused a call.

    Args:
        message: the line to show.
        code: CUDA's name of the error (``CUDA_ERROR_OUT_OF_MEMORY``); ``None`` when no CUDA call was made.
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class GateError(EdgesegError):
    """The engine works, but a limit the user set (``--max-drop``, ``--min-agreement``) is not met.

    Args:
        message: the line to show.
        figures: what was measured, for ``--json``.
    """

    exit_code = 3

    def __init__(self, message: str, figures: object = None) -> None:
        super().__init__(message)
        self.figures = figures


@contextmanager
def refusals_as(kind: type[EdgesegError]) -> Iterator[None]:
    """Make one line of the system's refusals (permissions, names too long, a full disk): of a block, or of a function."""
    try:
        yield
    except OSError as exc:
        raise kind(refusal(exc)) from exc
    except ValueError as exc:
        if "null byte" not in str(exc):
            raise
        raise kind("the path holds a NUL character; no file's name does") from exc


def refusal(error: OSError) -> str:
    """The system's refusal to read or write a file as one line that names it."""
    why = error.strerror or type(error).__name__
    if error.filename is None and isinstance(error, FileNotFoundError):
        return "the working folder is not there any more; go to another"
    if error.filename is None:
        return f"cannot read or write: {why}"
    return f"cannot read or write {refused_file(error)}: {why}; check the path and its permissions"


def refused_file(error: OSError) -> str:
    """The file that could not be read or written; of a copy or a move the new one, which is what disks and permissions refuse."""
    return str(error.filename if error.filename2 is None else error.filename2)


def one_line(error: BaseException | str) -> str:
    """A vendor's or a decoder's text on one line of at most 300 characters, without the file name the system repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:300] or ("" if isinstance(error, str) else type(error).__name__)


def first_line(error: BaseException) -> str:
    """The first line of the exception at the bottom of ``error``'s chain, for our one-line errors.

    Exporters wrap the real cause in general words ("failed to convert"); the cause is what a user can act on.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def typed(*words: str | Path) -> str:
    """A command of ours as a shell reads it back: ``typed("compile", folder)``. Paths are quoted where need be."""
    # A path that begins with a dash would be read as an option.
    said = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join(["edgeseg", *said])


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the allowed words nearest to ``word``, or ``""``."""
    near = difflib.get_close_matches(word, list(allowed), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
