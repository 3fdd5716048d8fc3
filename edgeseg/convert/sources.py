"""Where a model comes from: a demo model, a checkpoint, the hub, an encoder's weights, none at all, or an ONNX file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgeseg.convert import architectures
from edgeseg.convert.albumentations_file import saved_beside
from edgeseg.convert.assemble import Assembly, assemble, settle_geometry
from edgeseg.convert.checkpoint import Checkpoint, read_checkpoint
from edgeseg.convert.deduce import as_options, differences, fitting_request, require_fitting_size
from edgeseg.convert.demo import read_demo
from edgeseg.convert.diagnosis import likely_cause, matching_encoders
from edgeseg.convert.evidence import best_fit
from edgeseg.convert.fit import (
    MisfitError,
    NamedTensors,
    checkpoint_classes,
    guess_arch,
    load_tensors,
    parameter_shapes,
    strip_prefixes,
)
from edgeseg.convert.geometry import DEFAULT_PIXELS
from edgeseg.convert.hub import hub_weights_names, prepare_hub_weights
from edgeseg.convert.hub_models import fetch_model, is_hub_id
from edgeseg.convert.loaded import ImageSource, LoadedModel, freeze, hash_weights
from edgeseg.convert.model_card import read_card
from edgeseg.convert.older_smp import settle_version
from edgeseg.convert.onnx_network import OnnxNetwork
from edgeseg.convert.preprocessing import RecordedNormalization, recorded_preprocess, resolve_preprocess
from edgeseg.convert.recorded import merge, recorded_model
from edgeseg.convert.saved_preprocessing import CONFIG_NAME
from edgeseg.convert.wrap import wrap_module
from edgeseg.errors import CheckpointError, EdgesegError, SpecError, one_line
from edgeseg.spec import ModelRequest, Preprocess
from edgeseg.store.manifest import WeightsOrigin


def load_from_source(request: ModelRequest, images: ImageSource) -> LoadedModel:
    """Load it; see :func:`edgeseg.convert.load.load_model`."""
    weights = request.weights
    if request.is_onnx_file:
        return _load_onnx(request, images)
    if request.weights_key is not None and (weights is None or not Path(weights).expanduser().is_file()):
        raise SpecError(f"weights_key is {request.weights_key!r}, but the weights are no checkpoint file; leave it out")
    if weights is None:
        return _load_demo(request)
    if is_hub_id(weights):
        return _load_hub_model(request, weights, images)
    if weights == "random":
        return _load_random(request)
    if not Path(weights).expanduser().exists() and _is_hub_name(request, weights):
        return _load_pretrained_encoder(request, weights)
    return _load_checkpoint(request, read_checkpoint(weights, request.weights_key), images)


def _load_onnx(request: ModelRequest, images: ImageSource) -> LoadedModel:
    path = Path(str(request.weights)).expanduser()
    network = OnnxNetwork(path)
    try:
        loaded = wrap_module(network, replace(request, weights=None), images)
    except SpecError as exc:
        raise SpecError(_of_file(str(exc))) from exc
    return replace(
        loaded,
        weights=f"the ONNX file {path}",
        weights_sha256=network.graphs.source.sha256,
        users_module=False,
        notes=(*network.graphs.source.notes, *map(_of_file, loaded.notes)),
        onnx_bytes=network.graphs.source.size_bytes,
    )


def _of_file(words: str) -> str:
    return re.sub("(the )?OnnxNetwork|the module", "the ONNX file", words)


def _is_hub_name(request: ModelRequest, weights: str) -> bool:
    if weights == "imagenet":
        return True
    if request.encoder is None or request.arch is None:
        return False
    return weights in hub_weights_names(architectures.network_names(request)[1])


def _load_demo(request: ModelRequest) -> LoadedModel:
    demo, checkpoint = read_demo(request, architectures.require_arch(request.arch))
    described = ModelRequest(
        arch=demo.arch,
        encoder=demo.encoder,
        classes=demo.classes,
        class_names=demo.class_names,
        task=demo.task,
        model_args=demo.model_args,
    )
    assembly = assemble(described)
    _fill(assembly, checkpoint, strip_prefixes(checkpoint))
    words = "demo weights (trained on generated street scenes)"
    note = f"no weights given: the demo model is used ({demo.encoder}, {demo.classes} classes of street scenes)"
    loaded = _finish(assembly, demo.normalization, words, (note,))
    return replace(loaded, size=demo.size, is_demo=True)


def _load_random(request: ModelRequest) -> LoadedModel:
    assembly = assemble(request)
    model = assembly.model
    preprocess, notes = resolve_preprocess(request, model.encoder, model.in_channels, untrained=True)
    loud = "RANDOM WEIGHTS: the masks mean nothing; for measuring speed and trying out the conversion only"
    return _finish(assembly, preprocess, "random weights (untrained)", (loud, *assembly.notes, *notes))


def _load_pretrained_encoder(request: ModelRequest, name: str) -> LoadedModel:
    _, encoder = architectures.network_names(request)
    repository, loading_args = prepare_hub_weights(encoder, name)
    try:
        assembly = assemble(request, encoder_weights=name, loading_args=loading_args)
    except EdgesegError:
        raise
    except Exception as exc:  # the hub's client raises errors of several HTTP libraries
        what = f"the weights of {encoder} ({repository})"
        raise CheckpointError(f"fetching {what} failed: {one_line(exc)}; try again, or give --weights PATH") from exc
    channels = assembly.model.in_channels
    preprocess, notes = resolve_preprocess(request, encoder, channels, encoder_weights=name)
    loud = f"the encoder has {name} weights, the DECODER IS RANDOM: the masks mean nothing until it is trained"
    words = f"{name} encoder weights ({repository}), random decoder"
    return _finish(assembly, preprocess, words, (loud, *assembly.notes, *notes))


def _load_hub_model(request: ModelRequest, weights: str, images: ImageSource) -> LoadedModel:
    model = fetch_model(weights, needs_preprocessing=request.mean is None)
    loaded = _load_checkpoint(request, read_checkpoint(model.folder), images)
    return replace(
        loaded,
        weights=f"weights of {model.repository} at revision {model.revision} (Hugging Face hub)",
        notes=(*model.notes, *loaded.notes),
        origin=WeightsOrigin(model.repository, model.revision, read_card(model.folder)),
    )


def _load_checkpoint(request: ModelRequest, checkpoint: Checkpoint, images: ImageSource) -> LoadedModel:
    recorded = recorded_model(checkpoint, request.arch)
    saved = saved_beside(checkpoint.path, request.input_dtype)
    named = strip_prefixes(checkpoint)
    settled, notes = _settle(merge(request, recorded), checkpoint, named)
    assembly, fit_notes = _assemble_for(settled, request, checkpoint, named)
    freeze(assembly.module)
    channels = assembly.model.in_channels
    samples = images(channels)
    normalization = recorded_preprocess(checkpoint.config, named.outside, request.input_dtype)
    saved_notes: tuple[str, ...] = ()
    if saved is not None:
        saved_notes = (saved.note, *saved.doubts)
        known = saved.for_channels(channels)
        if known is not None and request.mean is not None:
            saved_notes = (*saved_notes, "--mean and --std override the saved normalization")
        normalization = normalization if known is None else RecordedNormalization(known, scale_known=True)
    preprocess, preprocess_notes = resolve_preprocess(
        request,
        assembly.model.encoder,
        channels,
        encoder_weights=recorded.encoder_weights,
        recorded=normalization,
        judge=lambda candidates: best_fit(assembly.module, samples, (DEFAULT_PIXELS,) * 2, candidates),
    )
    # The saved preprocessing is told in full already.
    preprocess_notes = tuple(n for n in preprocess_notes if n != f"normalization: {CONFIG_NAME}")
    every = (*checkpoint.notes, *recorded.notes, *named.notes, *notes, *assembly.notes, *fit_notes, *saved_notes)
    loaded = _finish(assembly, preprocess, f"weights of {checkpoint.path}", (*every, *preprocess_notes))
    card = read_card(checkpoint.path.parent) if checkpoint.config else {}
    return replace(loaded, saved=saved, origin=WeightsOrigin(card=card) if card else None)


def _assemble_for(
    settled: ModelRequest, said: ModelRequest, checkpoint: Checkpoint, named: NamedTensors
) -> tuple[Assembly, tuple[str, ...]]:
    """Build the model and load the tensors; where they do not fit, what the tensors themselves tell is used.

    Raises:
        CheckpointError: no model that agrees with what was said has these tensors.
    """
    try:
        assembly, notes = _assemble_version(settled, checkpoint, named)
        return assembly, (*notes, *_fill(assembly, checkpoint, named))
    except (MisfitError, SpecError) as exc:
        # SpecError: decoder_channels of four blocks, say, with the encoder_depth of five that nobody said.
        failure: EdgesegError = exc
    by_tensors = _by_tensors(settled, said, named)
    if by_tensors is not None:
        changed = differences(settled, by_tensors)
        assembly, notes = _assemble_version(by_tensors, checkpoint, named)
        told = ", ".join(f"{option.split()[-1].removeprefix('--')} {value}" for option, value in changed.items())
        note = f"by the shapes of the checkpoint's tensors: {told}"
        return assembly, (note, *notes, *_fill(assembly, checkpoint, named))
    if not isinstance(failure, MisfitError):
        raise failure
    spec = assembly.model
    contradicted = _by_tensors(settled, ModelRequest(encoder=said.encoder), named)
    if contradicted is not None:
        cause = f"its tensors are those of another model: give {as_options(differences(settled, contradicted))}"
    else:
        own = parameter_shapes(assembly.module.state_dict())
        depth = int(getattr(assembly.module.encoder, "_depth", 5))
        cause = likely_cause(named.tensors, own, spec.arch, spec.encoder, depth)
    what = f"{checkpoint.path.name} does not fit {spec.arch} with encoder {spec.encoder} and {spec.classes} classes"
    raise CheckpointError(f"{what}: {failure}" + (f"; {cause}" if cause else "")) from failure


def _by_tensors(settled: ModelRequest, said: ModelRequest, named: NamedTensors) -> ModelRequest | None:
    if settled.encoder is None:
        encoders = matching_encoders(parameter_shapes(named.tensors))
        if len(encoders) > 1:
            names = " or ".join(encoders[:4])
            raise CheckpointError(f"its tensors are those of {names}, which compute otherwise; give --encoder")
        settled = replace(settled, encoder=encoders[0]) if encoders else settled
    return fitting_request(settled, said, named.tensors)


def _assemble_version(
    request: ModelRequest, checkpoint: Checkpoint, named: NamedTensors
) -> tuple[Assembly, tuple[str, ...]]:
    """Build the model as the version of SMP that trained it did."""
    arch, encoder = architectures.network_names(request)
    model_args, notes = settle_version(arch, encoder, request.model_args, named.tensors, checkpoint.config)
    request = replace(request, model_args=model_args)
    require_fitting_size(request, named.tensors)
    return assemble(request), notes


def _settle(request: ModelRequest, checkpoint: Checkpoint, named: NamedTensors) -> tuple[ModelRequest, tuple[str, ...]]:
    """Fill architecture and classes from the tensors themselves where nobody said them."""
    notes: list[str] = []
    if request.arch is None:
        arch = guess_arch(named.tensors)
        if arch is None:
            raise SpecError(f"{checkpoint.path} does not say its architecture, nor do its tensors; give --arch")
        notes.append(f"architecture not given: {arch}, by the names of the decoder's tensors")
        request = replace(request, arch=arch)
    told = checkpoint_classes(named.tensors)
    asked = request.classes if request.classes is not None else len(request.class_names) or None
    if asked is None and told is not None:
        notes.append(f"classes not given: {told}, by the shape of the checkpoint's segmentation head")
        request = replace(request, classes=told)
    elif asked is not None and told is not None and asked != told:
        if request.classes is None:
            raise CheckpointError(
                f"{checkpoint.path.name} has {told} classes, --class-names has {asked}; give one name for each class"
            )
        raise CheckpointError(
            f"{checkpoint.path.name} has {told} classes, {asked} were asked for; give --classes {told}"
        )
    return request, tuple(notes)


def _fill(assembly: Assembly, checkpoint: Checkpoint, named: NamedTensors) -> tuple[str, ...]:
    """Load the tensors; an auxiliary head's are left out when the model was built without one."""
    notes: tuple[str, ...] = ()
    head = [k for k in named.tensors if k.startswith("classification_head.")]
    if head and assembly.module.classification_head is None:
        named = replace(named, tensors={k: v for k, v in named.tensors.items() if k not in head})
        notes = ("auxiliary classification head of the checkpoint dropped",)
    return *notes, *load_tensors(assembly.module, named, checkpoint, assembly.model)


def _finish(assembly: Assembly, preprocess: Preprocess, weights: str, notes: tuple[str, ...]) -> LoadedModel:
    module, model = assembly.module, assembly.model
    freeze(module)
    sha256 = hash_weights(module)
    geometry = settle_geometry(module, model, check_output=bool(model.model_args))
    return LoadedModel(
        module=module,
        model=model,
        preprocess=preprocess,
        weights=weights,
        weights_sha256=sha256,
        stride=geometry.stride,
        size=geometry.size,
        notes=tuple(dict.fromkeys((*notes, *geometry.notes))),
        fixed_size=geometry.fixed,
    )
