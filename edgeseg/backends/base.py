"""What a backend is: build an engine from a portable graph, load it, and say whether it can run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgeseg.artifacts import Engine, OnnxGraph, PrecisionReport

Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used on this machine.

    Attributes:
        available: it can load and run engines here.
        version: of its package, ``None`` when not installed.
        detail: one line: the device it would use and what is fast on it, or why it is not available and what to do.
        can_build: engines can be built here, though they may only run elsewhere.
    """

    available: bool
    version: str | None
    detail: str
    can_build: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """What :meth:`Backend.build` wrote.

    Attributes:
        path: the engine file inside the folder given to ``build``; ``None`` when it has to be built on the device.
        precision: what the built engine really executes.
        extra_files: further files the engine file needs beside it.
        options: settings chosen, for the manifest.
        versions: package versions the engine depends on.
        device: what it was built for.
    """

    path: Path | None
    precision: PrecisionReport
    extra_files: tuple[Path, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)


class Session(Protocol):
    """A loaded engine. Safe to call from several threads."""

    def run(self, images: NDArray[np.uint8]) -> Mapping[str, NDArray[Any]]:
        """Run one batch.

        Args:
            images: uint8 ``(N, H, W, C)``, C-contiguous, of a size the engine accepts.

        Returns:
            by output name (``mask`` | ``logits`` | ``probabilities``, and ``confidence``); arrays the caller owns.
        """
        ...

    def close(self) -> None:
        """Free device memory, streams and threads; the session cannot be used afterwards."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """One way to execute a portable graph. Implemented by one module each; see :data:`edgeseg.backends.BACKENDS`."""

    name: str
    scheme: str
    """Q/DQ scheme (a key of ``edgeseg.quantize.schemes.SCHEMES``) that is fast on this backend on this machine."""

    def status(self) -> BackendStatus:
        """Say whether this backend works here. Never raises."""
        ...

    def build(
        self, graph: OnnxGraph, folder: Path, options: Mapping[str, Any], progress: Progress | None = None
    ) -> BuiltEngine:
        """Write the engine file into ``folder``. Raises ``BuildError``, ``SpecError`` for unknown options.

        Args:
            graph: the portable graph; the calibration table of an int8 one may be beside it.
            folder: to write into.
            options: settings of this backend.
            progress: told how far the build is, by backends that know.
        """
        ...

    def load(self, engine: Engine) -> Session:
        """Load a checked engine folder. Raises ``BuildError``, ``ArtifactError``, ``MissingDependencyError``."""
        ...
