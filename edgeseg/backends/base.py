"""What a backend is: build an engine from a portable graph, load it, and say whether it can run here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import SpecError, did_you_mean
from edgeseg.spec import InputSpec
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

if TYPE_CHECKING:
    from edgeseg.backends.cuda.arrays import DeviceTensor

Options: TypeAlias = Mapping[str, Any]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with what is done and what there is in all."""

NodeTime: TypeAlias = "tuple[str, float, str | None]"
"""A node or layer that ran: its name, milliseconds, and dtype where known."""


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
class BuildContext:
    """What surrounds a build.

    Attributes:
        progress: told how far it is, by backends that know.
        engines_folder: holds engine folders, this one's too when it is complete; what helps the next build on this machine
            may be kept there. ``None``: the parent of the folder that is written into.
    """

    progress: Progress | None = None
    engines_folder: Path | None = None


ALONE = BuildContext()
"""Of a build by itself."""


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
        notes: what the user should know of this build, one line each.
    """

    path: Path | None
    precision: PrecisionReport
    extra_files: tuple[Path, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Session(Protocol):
    """A loaded engine. Safe to call from several threads."""

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run one batch.

        Args:
            images: ``(N, H, W, C)`` of the contract's dtype, C-contiguous, of a size the engine accepts.

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


@dataclass(frozen=True)
class StageTimes:
    """Where the time of one batch went, on the device's clock, in trtexec's terms.

    Attributes:
        h2d_ms: copying the images to the device; ``None`` when nothing is copied (memory shared with the CPU).
        compute_ms: the engine.
        d2h_ms: copying the results back; ``None`` when nothing is copied.
        enqueue_ms: host time of the call that hands the engine's work to the device.
    """

    h2d_ms: float | None
    compute_ms: float
    d2h_ms: float | None
    enqueue_ms: float


@runtime_checkable
class TimedSession(Protocol):
    """A session that can say how long its stages take."""

    def run_timed(self, images: NDArray[Any]) -> tuple[Mapping[str, NDArray[Any]], StageTimes | None]:
        """Like :meth:`Session.run`, and the times of this one batch; ``None`` where the device has no clock of its own."""
        ...


@runtime_checkable
class PipelinedSession(Protocol):
    """A session that copies one batch while it computes another."""

    def run_many(self, batches: Iterable[NDArray[Any]]) -> Generator[Mapping[str, NDArray[Any]], None, None]:
        """Run batch after batch; results in order, as :meth:`Session.run` returns them."""
        ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session that takes images from the device's memory and leaves the results there."""

    def run_device(self, image: object) -> Mapping[str, DeviceTensor]:
        """Run an array that has ``__cuda_array_interface__`` or ``__dlpack__``."""
        ...


class Backend(Protocol):
    """One way to execute a portable graph. Implemented by one module each; see :data:`edgeseg.backends.BACKENDS`."""

    name: str
    scheme: str
    """Q/DQ scheme (a key of ``edgeseg.quantize.schemes.SCHEMES``) that is fast on this backend on this machine."""
    profiler: str
    """What :meth:`profile` has its times from, in words."""

    def status(self) -> BackendStatus:
        """Say whether this backend works here. Never raises."""
        ...

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Write the engine file into ``folder``. Raises ``BuildError``, ``SpecError`` for unknown options.

        Args:
            graph: the portable graph; the calibration table of an int8 one may be beside it.
            folder: to write into.
            options: settings of this backend.
            context: what surrounds the build.
        """
        ...

    def load(self, engine: Engine) -> Session:
        """Load a checked engine folder. Raises ``BuildError``, ``ArtifactError``, ``MissingDependencyError``."""
        ...

    def profile(self, engine: Engine, runs: int) -> Sequence[NodeTime]:
        """Time every node or layer in each of ``runs`` runs of a grey image, in the order they run. Raises as :meth:`load`."""
        ...


def grey_batch(spec: InputSpec) -> NDArray[Any]:
    """The smallest batch of an engine's own size, ``(N, H, W, C)``: for what does not depend on what images show."""
    return np.full((spec.batch.minimum, spec.height, spec.width, spec.channels), 127, spec.dtype)


def require_known(target: str, options: Iterable[str], allowed: Sequence[str]) -> None:
    """Raise ``SpecError`` for the first of these options that the target does not have."""
    for name in options:
        if name not in allowed:
            raise SpecError(
                f"target {target} has no build option {name!r}{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})"
            )
