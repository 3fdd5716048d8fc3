"""What INT8 costs and saves by module, and how a search chose from that: as documents say it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgeseg.errors import SpecError
from edgeseg.machine.record import Count, Finite
from edgeseg.spec import PipelineSpec, Precision
from edgeseg.store.hashing import FileRef


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval over images; without one (``None``) where the images are too few."""

    value: Finite
    low: Finite | None = None
    high: Finite | None = None


@dataclass(frozen=True)
class ModuleSensitivity:
    """What INT8 of one module costs and saves, all other modules in float.

    Attributes:
        module: of the SMP model, such as ``encoder.layer3``.
        mac_share: of the network's multiply-accumulates.
        agreement: share of pixels with the class that the float graph gives; ``None`` where it was not measured.
        miou_drop: mIoU lost against the float graph (0.003 = 0.3 points); ``None`` without masks.
        class_drops: IoU lost per class; empty without masks, ``None`` for a class that does not occur.
        saved_ms: milliseconds that the module takes less in INT8 than in float; ``None`` where times are not known.
    """

    module: str
    mac_share: Finite
    agreement: Estimate | None
    miou_drop: Estimate | None
    class_drops: tuple[float | None, ...] = ()
    saved_ms: Finite | None = None


@dataclass(frozen=True)
class SensitivityReport:
    """What ``edgeseg sensitivity`` found of one network, as it is written to JSON.

    Attributes:
        schema_version: of this layout.
        edgeseg_version: that wrote it.
        spec: of the network.
        target, scheme: that INT8 is judged and timed for.
        images: modules were judged on.
        data: where they came from, in words.
        latency_source: where milliseconds by module came from; ``None`` where none are known.
        modules: in the network's order.
    """

    schema_version: int
    edgeseg_version: str
    spec: PipelineSpec
    target: str
    scheme: str
    images: Count
    data: str
    latency_source: str | None
    modules: tuple[ModuleSensitivity, ...]


@dataclass(frozen=True)
class SearchCandidate:
    """An engine that a search for ``--max-drop`` or ``--min-agreement`` looked at.

    Attributes:
        target: its backend.
        precision: of its graph: ``int8``, ``float_modules`` excepted, or a float type throughout.
        scheme: Q/DQ scheme of an int8 graph, else ``None``.
        float_modules: modules of the SMP model that are not INT8.
        mac_share: share of multiply-accumulates per dtype.
        agreement: with PyTorch.
        miou_drop: mIoU lost against PyTorch, its interval that of the paired difference; ``None`` without masks.
        meets_goal: whether it keeps the limits that were set.
        median_ms: measured in turns with the others that have one; ``None`` where it was not measured.
        estimated_ms: from the milliseconds of its modules, which do not add up exactly; ``None`` where none are known.
        size_bytes: of its engine file, or of its graph where no engine was built.
        graph: in the folder, for the device to choose from; ``None`` for a candidate that was not kept.
    """

    target: str
    precision: Precision
    float_modules: tuple[str, ...]
    mac_share: dict[str, float]
    agreement: Estimate
    miou_drop: Estimate | None
    meets_goal: bool
    median_ms: Finite | None
    estimated_ms: Finite | None
    size_bytes: Count
    scheme: str | None = None
    graph: FileRef | None = None


@dataclass(frozen=True)
class Search:
    """How an engine came to keep ``--max-drop`` or ``--min-agreement`` when plain INT8 did not.

    Attributes:
        max_drop, min_agreement: the limits that were set.
        images: on how many the candidates were judged.
        is_complete: ``False`` when ``--search-minutes`` ended it; the candidates are then those of until then.
        latency_source: where milliseconds by module came from, in words; ``None`` where none were known.
        modules: most accuracy for a millisecond first: the order in which modules gave INT8 up.
        candidates: in the order they were tried.
        chosen: which of them the folder's engine is.
    """

    max_drop: float | None
    min_agreement: float | None
    images: Count
    is_complete: bool
    latency_source: str | None
    modules: tuple[ModuleSensitivity, ...]
    candidates: tuple[SearchCandidate, ...]
    chosen: Count

    def __post_init__(self) -> None:
        if self.chosen >= len(self.candidates):
            raise SpecError(f"candidate {self.chosen} was chosen of {len(self.candidates)}")

    def untimed(self) -> Search:
        """Without measured times, which are of the machine that made the folder."""
        return replace(self, candidates=tuple(replace(candidate, median_ms=None) for candidate in self.candidates))

    @property
    def float_modules(self) -> tuple[str, ...]:
        """Those of the engine that was chosen; none of an engine that is float throughout."""
        return self.candidates[self.chosen].float_modules

    @property
    def graphs(self) -> tuple[FileRef, ...]:
        """Of the candidates that travel with the folder."""
        return tuple(c.graph for c in self.candidates if c.graph is not None)
