"""What a bench compares: engine folders, and the PyTorch model they came from, each described so that another process can
open it again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeseg.backends import GPU_TARGETS, Session, get_backend
from edgeseg.backends.cpu.options import with_streams
from edgeseg.errors import CheckpointError, EdgesegError, MissingDependencyError, SpecError
from edgeseg.evaluate.results import Identity
from edgeseg.machine.cpu import this_cpu
from edgeseg.spec import BatchRange, ModelRequest, PipelineSpec
from edgeseg.store.engine import Engine, open_engine
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import Manifest

if TYPE_CHECKING:
    from edgeseg.convert.loaded import LoadedModel

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Contender:
    """An engine folder, or a PyTorch baseline; plain data, so that it travels to another process as JSON.

    Attributes:
        name: unique in a report.
        spec: the contract.
        folder: of the engine; ``None`` for a baseline.
        baseline: one of :data:`~edgeseg.evaluate.results.BASELINES`; ``None`` for an engine.
        request: how to load the baseline's model.
        weights_sha256: of the weights (both kinds).
        device: it runs on.
    """

    name: str
    spec: PipelineSpec
    folder: str | None = None
    baseline: str | None = None
    request: ModelRequest | None = None
    weights_sha256: str | None = None
    device: Device = "cpu"

    @property
    def is_baseline(self) -> bool:
        return self.baseline is not None

    @property
    def pair_key(self) -> str:
        """Contenders with the same key run the same model on the same input and decide alike, so they can be compared.

        Scores are decided upon at the size of the image, masks at the engine's.
        """
        spec, image = self.spec, dataclasses.replace(self.spec.input, batch=BatchRange())
        decides = [spec.output.kind == "mask", spec.output.threshold]
        return sha256_json([self.weights_sha256, spec.model, image, spec.preprocess, decides])


class Opener:
    """Opens contenders; a PyTorch model is read from disk once."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedModel] = {}

    def engine(self, contender: Contender) -> Engine:
        """The engine folder, hashes checked. Raises ``ArtifactError``."""
        assert contender.folder is not None  # asked of engines only
        return open_engine(Path(contender.folder))

    def loaded(self, contender: Contender) -> LoadedModel:
        """The baseline's model.

        Raises:
            CheckpointError: the weights are not those the engine was built from.
            MissingDependencyError, SpecError: see :func:`edgeseg.convert.load.load_model`.
        """
        from edgeseg.convert.load import load_model

        assert contender.request is not None  # a baseline has one
        key = sha256_json(contender.request)
        if key not in self._loaded:
            self._loaded[key] = load_model(contender.request)
        loaded = self._loaded[key]
        if contender.weights_sha256 is not None and loaded.weights_sha256 != contender.weights_sha256:
            raise CheckpointError(
                f"{loaded.weights} are not what the engine was built from (SHA-256 {loaded.weights_sha256[:12]}, the "
                f"manifest says {contender.weights_sha256[:12]}); give the right file with --weights"
            )
        return loaded

    def open(
        self,
        contender: Contender,
        threads: int | None = None,
        streams: int | None = None,
        *,
        with_scores: bool = False,
        exact: bool = False,
    ) -> Session:
        """Load a contender.

        Args:
            contender: what to load.
            threads: ``None``: the engine's own setting, one per core for PyTorch.
            streams: callers at the same time that an engine is to be loaded for; ``None``: its own setting.
            with_scores: let a baseline return its scores beside the mask; takes time.
            exact: a baseline on a GPU is to be judged for accuracy: without TF32, always the same kernels.

        Raises:
            SpecError: the backend has no such setting.
            ArtifactError, BuildError, CheckpointError, MissingDependencyError: it cannot be loaded.
        """
        if contender.is_baseline:
            from edgeseg.backends.pytorch import PyTorchSession

            return PyTorchSession(
                self.loaded(contender),
                contender.spec,
                device=contender.device,
                channels_last=contender.baseline == "pytorch-channels-last",
                compiled=contender.baseline == "pytorch-compile",
                bfloat16=contender.baseline == "pytorch-bf16",
                float16=contender.baseline == "pytorch-fp16",
                exact=exact,
                # Always said: PyTorch keeps the number of threads for the whole process.
                threads=threads or this_cpu().cores,
                with_scores=with_scores,
            )
        engine = self.engine(contender)
        if threads is not None:
            if "threads" not in engine.manifest.options:
                raise SpecError(
                    f"{contender.name}: target {engine.manifest.target} has no threads to set; leave --threads out"
                )
            engine = engine.with_options(threads=threads)
        return get_backend(engine.manifest.target).load(with_streams(engine, streams))

    def identity(self, contender: Contender) -> Identity:
        """What a report's rows say about the contender."""
        model, size = contender.spec.model, contender.spec.input
        common: dict[str, Any] = {
            "name": contender.name,
            "arch": model.arch,
            "encoder": model.encoder,
            "task": model.task,
            "classes": model.classes,
            "class_names": model.class_names,
            "height": size.height,
            "width": size.width,
            "fit": size.fit,
            "weights_sha256": contender.weights_sha256,
        }
        if contender.is_baseline:
            from edgeseg.machine.packages import package_versions

            loaded = self.loaded(contender)
            return Identity(
                **common,
                backend="pytorch",
                precision={"pytorch-bf16": "bf16", "pytorch-fp16": "fp16"}.get(contender.baseline or "", "fp32"),
                size_bytes=sum(p.numel() * p.element_size() for p in loaded.module.parameters()),
                is_baseline=True,
                weights=loaded.weights,
                options={"variant": contender.baseline, "device": contender.device},
                versions=package_versions("torch", "segmentation-models-pytorch"),
            )
        engine = self.engine(contender)
        manifest = engine.manifest
        return Identity(
            **common,
            backend=manifest.target,
            precision=manifest.precision.requested,
            size_bytes=engine.engine_path.stat().st_size,
            mac_share=dict(manifest.precision.mac_share),
            macs=manifest.precision.macs or None,
            scheme=manifest.scheme,
            weights=manifest.weights,
            engine_sha256=None if manifest.engine is None else manifest.engine.sha256,
            graph_sha256=manifest.graph.sha256,
            folder=contender.folder,
            build_command=manifest.command,
            options=dict(manifest.options),
            versions=dict(manifest.versions),
            repairs=manifest.repairs,
            search=manifest.search,
        )


def engine_contenders(folders: Sequence[Path]) -> tuple[list[Contender], dict[Path, EdgesegError]]:
    """One contender per folder, named after it (equal names get the path in front), and what is wrong with the others.

    Raises:
        SpecError: a folder given twice.
    """
    if len({os.path.realpath(folder) for folder in folders}) != len(folders):
        raise SpecError("an engine folder was given twice; give each once")
    opened: list[Contender] = []
    broken: dict[Path, EdgesegError] = {}
    for folder, name in engine_names(folders).items():
        try:
            manifest = open_engine(folder).manifest
        except EdgesegError as exc:
            broken[folder] = exc
            continue
        device: Device = "cuda" if manifest.target in GPU_TARGETS else "cpu"
        weights = manifest.inputs_sha256.get("weights")
        opened.append(Contender(name, manifest.spec, str(folder), weights_sha256=weights, device=device))
    return opened, broken


def engine_names(folders: Sequence[Path]) -> dict[Path, str]:
    """A name for each folder, unique among them."""
    names = [os.path.basename(os.path.realpath(folder)) for folder in folders]
    return {
        folder: name if names.count(name) == 1 else str(folder).strip("/").replace("/", "-")
        for folder, name in zip(folders, names, strict=True)
    }


def baseline_contenders(
    engines: Sequence[Contender], kinds: Sequence[str], weights: Path | None, opener: Opener
) -> tuple[list[Contender], list[str]]:
    """The PyTorch models the engines came from, one per kind and :attr:`Contender.pair_key`, and why one is missing.

    Args:
        engines: from :func:`engine_contenders`.
        kinds: of :data:`~edgeseg.evaluate.results.BASELINES`.
        weights: checkpoint, given again; ``None`` takes what the manifest says.
        opener: loads them, to see that they are the right ones.

    Raises:
        CheckpointError, SpecError: ``weights`` was given and cannot be read, or is not what an engine was built from.
    """
    baselines: list[Contender] = []
    beside: list[str] = []
    notes: list[str] = []
    seen: set[tuple[str, Device, str]] = set()
    distinct = len({engine.pair_key for engine in engines})
    for engine in engines:
        wanted = _on_devices(kinds, engine.device, notes)
        wanted = [(device, kind) for device, kind in wanted if (engine.pair_key, device, kind) not in seen]
        seen |= {(engine.pair_key, device, kind) for device, kind in wanted}
        if not wanted:
            continue
        manifest = opener.engine(engine).manifest
        request, reason = baseline_request(manifest, weights)
        if request is None:
            notes.append(f"no PyTorch baseline for {engine.name}: {reason}")
            continue
        size = f"{engine.spec.input.height}x{engine.spec.input.width}"
        suffix = "" if distinct == 1 else f"-{engine.spec.model.display_name}-{size}"
        made = [
            Contender(
                f"{_on_its_device(kind, device)}{suffix}",
                engine.spec,
                None,
                kind,
                request,
                manifest.inputs_sha256.get("weights"),
                device,
            )
            for device, kind in wanted
        ]
        try:
            opener.loaded(made[0])
        except EdgesegError as exc:
            if weights is not None and not isinstance(exc, MissingDependencyError):
                raise
            notes.append(f"no PyTorch baseline for {engine.name}: {exc}")
            continue
        baselines += made
        beside += [engine.name] * len(made)
    # Two of one architecture and size would get one name: the weights tell them apart, else the engine they are beside.
    named = []
    for contender, engine_name in zip(baselines, beside, strict=True):
        others = [o for o in baselines if o.name == contender.name and o is not contender]
        name = contender.name
        if any(o.weights_sha256 == contender.weights_sha256 for o in others):
            name = f"{_on_its_device(contender.baseline, contender.device)}-{engine_name}"
        elif others:
            name = f"{name}-{(contender.weights_sha256 or '')[:8]}"
        named.append(dataclasses.replace(contender, name=name))
    return named, notes


def _on_its_device(kind: str | None, device: Device) -> str:
    """The name, never without its device where that is not the one every reader takes for granted."""
    return f"{kind}-cuda" if device == "cuda" else str(kind)


def _on_devices(kinds: Sequence[str], device: Device, notes: list[str]) -> list[tuple[Device, str]]:
    """What of ``kinds`` runs where, for an engine on ``device``; what cannot be had is noted once."""
    reason = _why_no_cuda() if device == "cuda" and set(kinds) - {"pytorch-cpu"} else None
    if reason is not None:
        _note_once(
            notes,
            f"no PyTorch baseline on the GPU, where the engines run: {reason}; --baseline pytorch-cpu compares with the "
            "CPU, and says so",
        )
    wanted: list[tuple[Device, str]] = []
    for kind in kinds:
        if kind == "pytorch-cpu":
            wanted.append(("cpu", kind))
        elif device == "cpu" and kind == "pytorch-fp16":
            _note_once(notes, "no pytorch-fp16 beside engines of the CPU: PyTorch's float16 is for GPUs")
        elif reason is None:
            wanted.append((device, kind))
    return wanted


def _note_once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _why_no_cuda() -> str | None:
    try:
        from edgeseg.backends.pytorch import why_no_cuda
    except ImportError as exc:
        return str(MissingDependencyError(exc.name or "torch", "convert", "run the PyTorch baseline"))
    return why_no_cuda()


def baseline_request(manifest: Manifest, weights: Path | None) -> tuple[ModelRequest | None, str]:
    """How to load the model an engine was built from, or why that is not known."""
    model, asked = manifest.spec.model, manifest.model_request
    if asked is not None and asked.is_onnx_file:
        return None, f"it was built from the ONNX file {asked.weights}, and PyTorch runs none"
    if model.arch == "custom":
        return None, "it was built from a module object, which no file describes"
    if weights is None and asked is not None:
        return asked, ""
    if weights is None:
        return None, "its manifest does not say how the model is loaded; give the checkpoint with --weights"
    # Another file may say less of the model than the one asked for then: all that is known is said.
    return (
        dataclasses.replace(
            asked or ModelRequest(),
            arch=model.arch,
            encoder=model.encoder,
            weights=str(weights),
            classes=model.classes,
            class_names=model.class_names,
            task=model.task,
            in_channels=model.in_channels,
            activation=model.activation,
            model_args=dict(model.model_args),
            keep_aux="aux_params" in model.model_args,
        ),
        "",
    )


def first_baseline(contender: Contender, contenders: Sequence[Contender]) -> Contender | None:
    """The baseline an engine (or a further baseline) is compared with: the first of the same model, input size and device.

    One on the CPU stands for an engine of the GPU only where it was asked for by that name.
    """
    same = [other for other in contenders if other.is_baseline and other.pair_key == contender.pair_key]
    here = [other for other in same if other.device == contender.device]
    first = next(iter(here), None) or next((other for other in same if other.baseline == "pytorch-cpu"), None)
    return None if first is contender else first
