"""Artifacts on disk: graphs and engine folders, their manifests and hashes.

An engine folder holds plain files that their own tools open (Netron, onnxruntime, trtexec) and ``manifest.json``
beside them. Folders appear by rename (:mod:`edgeseg.store.atomic`), so a folder that exists is complete; its hashes say
whether it still is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from edgeseg.console import printable
from edgeseg.errors import ArtifactError, SpecError, StaleEngineError, refusals_as, typed
from edgeseg.machine.record import Count, Finite
from edgeseg.spec import ModelRequest, PipelineSpec, Precision
from edgeseg.store.atomic import atomic_folder, check_folder, listed_names, recover_folder, write_bytes

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_JSON_BYTES = 64 << 20
"""Of a manifest, table or report; the largest, a bench of hundreds of engines, has a few."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileRef:
    """A file of an engine folder: a plain name (no directories), its SHA-256 and size."""

    name: str
    sha256: str
    size_bytes: Count

    @classmethod
    def of(cls, path: Path) -> FileRef:
        return cls(path.name, sha256_file(path), path.stat().st_size)


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


@dataclass(frozen=True)
class Engine:
    """An engine folder whose manifest and hashes were checked."""

    folder: Path
    manifest: Manifest

    def __repr__(self) -> str:
        # The manifest alone would fill a page.
        about = self.manifest
        return f"<Engine {self.folder}: {about.spec.in_words}, {about.precision.requested} for {about.target}>"

    def with_options(self, **options: Any) -> Engine:
        """The same engine, to be loaded with other settings of its backend than it was built with."""
        return replace(self, manifest=replace(self.manifest, options={**self.manifest.options, **options}))

    @property
    def engine_path(self) -> Path:
        if self.manifest.engine is None:
            # A graph for one kind of CPU is compiled there; TensorRT's is for whatever GPU is at hand.
            scheme = self.manifest.scheme or ""
            where = f" ({scheme}); run on its device" if scheme.startswith(("onnxruntime", "openvino")) else "; run"
            raise StaleEngineError(f"{self.folder} holds a portable graph only{where}: {typed('compile', self.folder)}")
        return self.folder / self.manifest.engine.name

    @property
    def graph_path(self) -> Path:
        return self.folder / self.manifest.graph.name


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_chunks(f)


def _sha256_chunks(stream: Any) -> str:
    # hashlib.file_digest appeared in Python 3.11; 3.10 is still supported.
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a value's canonical JSON (dataclasses allowed, keys sorted)."""
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write a dataclass as indented JSON, atomically."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; ``-`` is standard output.

    Raises:
        ArtifactError: the place cannot be written.
    """
    try:
        write_bytes(path, text.encode())
    except OSError as exc:
        raise ArtifactError(f"cannot write {path}: {exc.strerror}; give another file") from exc


@contextmanager
def engine_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a scratch folder that becomes the engine folder ``target``; see :func:`edgeseg.store.atomic.atomic_folder`."""
    with atomic_folder(target, force=force, ours=engine_files) as scratch:
        yield scratch


def check_engine_folder(target: Path, *, force: bool) -> None:
    """Refuse, before the work, what :func:`engine_folder` would refuse after it."""
    check_folder(target, force=force, ours=engine_files)


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _AnyCandidate:
    graph: _Named | None = None


@dataclass(frozen=True)
class _AnySearch:
    candidates: tuple[_AnyCandidate, ...] = ()


@dataclass(frozen=True)
class _AnyManifest:
    """What manifests of all versions have, and others' do not."""

    edgeseg_version: str
    graph: _Named
    engine: _Named | None = None
    calibration: _Named | None = None
    extra_files: tuple[_Named, ...] = ()
    search: _AnySearch | None = None


def engine_files(folder: Path) -> frozenset[str] | None:
    """The names that edgeseg wrote in ``folder``; ``None`` when it is not empty and none of edgeseg's engine folders."""
    return listed_names(folder, MANIFEST_NAME, _AnyManifest, _names_in)


def engine_paths(folder: Path) -> list[Path]:
    """Where the files of :func:`engine_files` are; none in what is no engine folder."""
    return [folder / name for name in sorted(engine_files(folder) or ())]


def _names_in(manifest: _AnyManifest) -> Iterator[str]:
    searched = (candidate.graph for candidate in manifest.search.candidates) if manifest.search is not None else ()
    files = (manifest.graph, manifest.engine, manifest.calibration, *manifest.extra_files, *searched)
    return (file.name for file in files if file is not None)


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read JSON into a dataclass, every field type-checked.

    Raises:
        ArtifactError: missing, unreadable, above 64 MiB, not JSON, or of another shape; says which field.
    """
    return _decoded(_regular(path, what), path, kind, what)


def read_versioned(path: Path, kind: type[T], what: str, *, version: int, again: str) -> T:
    """:func:`read_json` of a file that states its ``schema_version``; ``again`` says how to make one anew.

    Raises:
        ArtifactError: see :func:`read_json`; or another version.
    """
    return _of_version(_regular(path, what), path, kind, what, version, again)


def _regular(path: Path, what: str) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ArtifactError(f"{what} {path} is no regular file; save it as one first")  # reading it may never end
    try:
        return _bounded(path, what)
    except OSError as exc:
        raise ArtifactError(f"cannot read {what} {path}: {exc.strerror}") from exc


@dataclass(frozen=True)
class _Versioned:
    schema_version: Count


def _of_version(data: bytes, path: Path, kind: type[T], what: str, version: int, again: str) -> T:
    stated = _decoded(data, path, _Versioned, what).schema_version
    if stated != version:
        raise ArtifactError(
            f"{what} {path} has schema version {stated}, this edgeseg reads {version}; "
            + ("upgrade edgeseg" if stated > version else again)
        )
    return _decoded(data, path, kind, what)


def _bounded(path: Path, what: str) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ArtifactError(f"{what} {path} is larger than {MAX_JSON_BYTES >> 20} MiB, which none of edgeseg's is")
    return data


def _decoded(data: bytes, path: Path, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as exc:
        raise ArtifactError(f"{what} {path} is damaged or not one: it is nested too deeply") from exc
    except (msgspec.DecodeError, ValueError) as exc:
        raise ArtifactError(f"{what} {path} is damaged or not one: {exc}") from exc


@refusals_as(ArtifactError)
def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of an engine folder without checking the files beside it.

    Raises:
        ArtifactError: no folder, no manifest, a damaged one, or one of a newer schema.
    """
    path = folder / MANIFEST_NAME
    data = _manifest_bytes(path)
    if data is None:
        what = "no such folder" if not folder.exists() else f"no {MANIFEST_NAME} in it"
        raise ArtifactError(
            f"{folder} is not an engine folder ({what}); make one with: {typed('build', '--output', folder)}"
        )
    return _of_version(data, path, Manifest, "manifest", SCHEMA_VERSION, "build the engine again")


def _manifest_bytes(path: Path) -> bytes | None:
    for _ in range(3):  # a folder that is replaced again and again can be missed more than once
        if path.is_file():
            try:
                return _bounded(path, "manifest")
            except FileNotFoundError:
                continue
            except OSError as exc:
                raise ArtifactError(f"cannot read manifest {path}: {exc.strerror}") from exc
        recover_folder(path.parent, engine_files)
    return None


def open_engine(folder: Path) -> Engine:
    """Read an engine folder and check every file's hash against the manifest.

    Raises:
        ArtifactError: see :func:`read_manifest`; or a file is missing, edited or truncated.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            for ref in manifest.files:
                check_file(folder, ref)
        except ArtifactError:
            # The folder may have been replaced since its manifest was read.
            before, manifest = manifest, read_manifest(folder)
            if manifest == before:
                raise
        else:
            return Engine(folder, manifest)


@refusals_as(ArtifactError)
def check_file(folder: Path, ref: FileRef) -> None:
    """Raise :class:`ArtifactError` unless the file is in the folder with the size and hash of ``ref``."""
    if printable(ref.name) != ref.name:
        raise ArtifactError(
            f"manifest of {folder} names a file {ref.name!r}, which none of edgeseg's is; build it again"
        )
    # A manifest is untrusted input: a name with a directory in it would reach outside the folder.
    if ref.name != Path(ref.name).name or ref.name in {"", ".", ".."}:
        raise ArtifactError(
            f"manifest of {folder} names a file outside the folder: {ref.name!r}; do not use this folder"
        )
    path = folder / ref.name
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{folder} lacks {ref.name}, which its manifest lists; build it again")
    try:
        size, sha256 = path.stat().st_size, None
        if size == ref.size_bytes:
            sha256 = sha256_file(path)
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror}") from exc
    if sha256 is None:
        raise ArtifactError(
            f"{path} has {size} bytes, its manifest says {ref.size_bytes}: truncated or edited; build it again"
        )
    if sha256 != ref.sha256:
        raise ArtifactError(
            f"{path} does not have the hash its manifest vouches for: edited or damaged; build it again"
        )
