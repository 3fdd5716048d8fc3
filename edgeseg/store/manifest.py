"""``manifest.json`` of an engine folder: what the engine is, what it was made from and what of it was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from edgeseg.errors import SpecError
from edgeseg.machine.record import Count
from edgeseg.spec import ModelRequest, PipelineSpec, Precision
from edgeseg.store.hashing import FileRef, sha256_json
from edgeseg.store.search import Search

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX file and the contract it fulfils.

    Attributes:
        path: the ``.onnx`` file, weights inside.
        sha256: of that file.
        precision: what the graph's own types say.
        scheme: name of the Q/DQ scheme for an int8 graph, else ``None``.
        weights_sha256: over the parameters the graph was exported from.
        spec: model, input, preprocessing and output contract.
    """

    path: Path
    sha256: str
    precision: Precision
    spec: PipelineSpec
    weights_sha256: str
    scheme: str | None = None


MIN_INT8_SHARE = 0.7
"""Below this share of int8 multiply-accumulates an engine is not what "int8" promises."""
Evidence: TypeAlias = Literal["executed", "inspected", "typed"]


@dataclass(frozen=True)
class PrecisionReport:
    """What precision was asked for and what the engine really does.

    Attributes:
        requested: the precision asked for.
        mac_share: share of multiply-accumulates per dtype (``{"int8": 0.98, "fp32": 0.02}``).
        node_share: share of nodes per dtype.
        macs: multiply-accumulates of one image.
        time_share: share of the engine's time in layers of each dtype, measured with the backend's profiler when the engine
            was built; ``None`` where it was not measured.
        float_layers: names of the MAC-carrying layers not executed in the requested precision, with the reason.
        evidence: ``executed``: counted from a profiled run; ``inspected``: from what the backend says of the built engine;
            ``typed``: from the types of the graph or network, nothing was run.
    """

    requested: Precision
    mac_share: dict[str, float]
    node_share: dict[str, float]
    macs: Count
    evidence: Evidence
    float_layers: dict[str, str] = field(default_factory=dict)
    time_share: dict[str, float] | None = None


@dataclass(frozen=True)
class AccuracyFigures:
    """Accuracy of one model on the verification images; ``None`` where no masks were given."""

    miou: float | None = None
    dice: float | None = None
    pixel_accuracy: float | None = None
    per_class_iou: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class LatencyFigures:
    """Milliseconds from an image in memory to a mask in memory, batch 1, short protocol.

    ``noise``: reasons not to trust them, a line each, as ``edgeseg bench`` flags them; empty for a quiet run.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    iterations: Count
    noise: tuple[str, ...] = ()


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the engine is than PyTorch: median of the paired ratios of samples taken in turns.

    ``low``, ``high``: its 95 % interval; ``verdict`` as in a bench report: ``faster``, ``slower``, ``no difference`` or
    ``cannot tell``.
    """

    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class Verification:
    """Engine against the PyTorch model on held-out images.

    Attributes:
        agreement: share of pixels with the same class.
        boundary_agreement: the same, within 2 pixels of a class boundary of PyTorch's mask.
        miou_vs_pytorch: mean IoU of the engine's masks against PyTorch's; ``None`` when neither shows any foreground.
        images: how many images were compared.
        data: where they came from, in words; whether they were also used for calibration.
        speedup: ``None`` where latency was not measured.
        reference: what stands for PyTorch in all of these, in words: it, or the ONNX file that the engine was built from.
    """

    agreement: float
    boundary_agreement: float | None
    miou_vs_pytorch: float | None
    images: Count
    data: str
    pytorch_accuracy: AccuracyFigures
    engine_accuracy: AccuracyFigures
    pytorch_latency: LatencyFigures | None
    engine_latency: LatencyFigures | None
    pytorch_size_bytes: Count
    engine_size_bytes: Count
    speedup: SpeedUp | None = None
    reference: str = "PyTorch"

    def __post_init__(self) -> None:
        classes = len(self.pytorch_accuracy.per_class_iou), len(self.engine_accuracy.per_class_iou)
        if all(classes) and classes[0] != classes[1]:
            raise SpecError(f"figures of {classes[0]} classes for PyTorch and of {classes[1]} for the engine")

    @property
    def miou_drop(self) -> float | None:
        """mIoU lost against PyTorch, in absolute terms (0.003 = 0.3 points); negative is a gain."""
        if self.pytorch_accuracy.miou is None or self.engine_accuracy.miou is None:
            return None
        return self.pytorch_accuracy.miou - self.engine_accuracy.miou


RepairName = Literal["equalization", "calibration-method", "bias-correction"]


@dataclass(frozen=True)
class Repair:
    """Something that was done so that INT8 keeps its accuracy.

    Attributes:
        name: ``equalization`` of channels, ``calibration-method`` by what the output loses, ``bias-correction``.
        changed: how many of what: ``channels``, ``biases``; for the methods, tensors by method.
        scheme: the Q/DQ scheme it was judged in, which rounds as the engine's does.
        images: that judged; none of them gave ranges where there are enough calibration images for both.
        agreement_before, agreement_after: share of the pixels that the Q/DQ graph decides as the float graph, 0..1, without
            this repair and with it, each on top of those before; ``None`` where it was not measured.
    """

    name: RepairName
    changed: dict[str, Count]
    scheme: str
    images: Count
    agreement_before: float | None
    agreement_after: float | None


@dataclass(frozen=True)
class WeightsOrigin:
    """Where weights are from, as their own files say; nothing of it was checked.

    Attributes:
        repository: ``user/model`` of the Hugging Face hub; ``None`` for a folder here.
        revision: the commit of it.
        card: metadata of the model card beside the weights: ``license``, ``datasets``, ``tags`` and the like.
    """

    repository: str | None = None
    revision: str | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def hub_id(self) -> str | None:
        """The id that always means this very commit."""
        return None if self.repository is None else f"{self.repository}@{self.revision}"

    @property
    def licence_words(self) -> str | None:
        """``says "mit"``: what the card says, which is not what is so; ``None`` where it says nothing."""
        said = self.card.get("license")
        if said is None:
            return None
        name = self.card.get("license_name")
        words = f'says "{said}"' + (f" ({name})" if name else "")
        if said == "mit" and self.card.get("library_name") == "segmentation-models-pytorch":
            # SMPHubMixin.generate_model_card has no other.
            words += "; SMP writes that into every card, whatever the weights are"
        return words


@dataclass(frozen=True)
class Manifest:
    """``manifest.json`` of an engine folder.

    Attributes:
        schema_version: of this layout; a newer one is refused.
        name: the folder's name when built.
        target: backend the engine file is for (a key of :data:`edgeseg.backends.BACKENDS`), or ``portable``.
        graph: the portable ONNX graph the engine was built from.
        engine: the backend's file; ``None`` in a portable folder that still has to be compiled.
        calibration: the calibration table of an int8 graph.
        extra_files: further files the engine file needs beside it.
        weights: where the weights came from, in words, for people.
        model_request: what was asked of the model, so that it can be loaded again; ``None`` when it was a module object.
        origin: repository, revision and model card of the weights; ``None`` where nothing says.
        inputs_sha256: hash per input of the build (weights, fp32 graph, calibration images, options).
        options: backend build options and session settings, as chosen, defaults included.
        options_given: those of them someone asked for; what building the engine again keeps.
        candidates: with ``--target auto``, median milliseconds of each backend that was built and measured.
        versions: packages that took part.
        device: what the engine was built on (CPU model or GPU name, flags that matter).
        conversion: nodes and MACs before and after simplification, parity of the fp32 graph with PyTorch.
        command: the ``edgeseg build`` that makes the engine again; ``None`` when it was built from objects in Python, or
            compiled for another target or with other options than that command says.
        notes: everything assumed, stripped or dropped on the way; the same lines the build printed.
        repairs: what was done so that INT8 keeps its accuracy, in order.
        search: how the precision of each module was chosen; ``None`` where no search was needed or asked for.
    """

    schema_version: int
    edgeseg_version: str
    name: str
    spec: PipelineSpec
    precision: PrecisionReport
    target: str
    scheme: str | None
    graph: FileRef
    engine: FileRef | None
    calibration: FileRef | None
    weights: str
    inputs_sha256: dict[str, str]
    options: dict[str, Any]
    versions: dict[str, str]
    device: dict[str, str]
    extra_files: tuple[FileRef, ...] = ()
    candidates: dict[str, float] = field(default_factory=dict)
    conversion: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    notes: tuple[str, ...] = ()
    verification: Verification | None = None
    options_given: dict[str, Any] = field(default_factory=dict)
    model_request: ModelRequest | None = None
    origin: WeightsOrigin | None = None
    repairs: tuple[Repair, ...] = ()
    search: Search | None = None

    @property
    def candidate_graphs(self) -> tuple[FileRef, ...]:
        """Those the device may choose instead of ``graph``."""
        return () if self.search is None else tuple(file for file in self.search.graphs if file != self.graph)

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All files of the folder but the manifest itself."""
        single = (self.graph, self.engine, self.calibration)
        return (*(file for file in single if file is not None), *self.extra_files, *self.candidate_graphs)

    @property
    def engine_key(self) -> str:
        """SHA-256 over all that makes an engine the one it is; a figure is true of engines with the same key only.

        The file is not enough: threads and the like are set when it is loaded, and the same file runs another way in another
        version or on another device.
        """
        parts = (self.target, self.engine, self.extra_files, self.graph, self.spec)
        return sha256_json([*parts, self.options, self.versions, self.device])
