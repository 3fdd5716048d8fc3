"""Take a module object a user has in Python: an SMP model, a subclass, a wrapper around one, or any other network.

The user's object is copied, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgeseg.convert import architectures
from edgeseg.convert.assemble import Geometry, settle_geometry
from edgeseg.convert.copying import copied, require_apart, require_python, unwrapped
from edgeseg.convert.evidence import best_fit, normalized
from edgeseg.convert.fake_quantizers import require_same, settled
from edgeseg.convert.fit import require_finite
from edgeseg.convert.geometry import (
    DEFAULT_PIXELS,
    PROBE_SIZES,
    custom_geometry,
    exported_shape,
    exported_size,
    noise,
    run_on,
    run_raw,
    smp_native_size,
)
from edgeseg.convert.loaded import ImageSource, LoadedModel, freeze, hash_weights, no_images
from edgeseg.convert.onnx_network import OnnxNetwork
from edgeseg.convert.outputs import adapt_outputs, output_ending
from edgeseg.convert.parity import make_probe_images
from edgeseg.convert.preprocessing import RecordedNormalization, recorded_preprocess, resolve_preprocess
from edgeseg.convert.training_tools import read_fake_quantizers
from edgeseg.errors import SpecError
from edgeseg.images.resize import resize_image
from edgeseg.silence import silenced
from edgeseg.spec import ModelRequest

# A side of eight output strides is enough for every decoder; PAN's pools the encoder's last features three times.
_PROBE_STRIDES = 8


@dataclass(frozen=True)
class _Network:
    """What of the user's object is converted: ``smp`` when it is an SMP model whose forward is SMP's own.

    ``recorded`` is the normalization a wrapper was seen to do, which then is none of ``module``'s.
    """

    module: torch.nn.Module
    smp: bool
    inner: torch.nn.Module | None = None
    recorded: RecordedNormalization | None = None
    notes: tuple[str, ...] = ()


def wrap_module(
    module: torch.nn.Module,
    request: ModelRequest,
    images: ImageSource = no_images,
    asked: tuple[int, int] | None = None,
) -> LoadedModel:
    """Describe a user's module so that it can be converted like a loaded one.

    Args:
        module: takes float32 ``(N, C, H, W)``, returns ``(N, classes, H, W)``, or a tuple, list or mapping that holds it.
        request: what the user says beside it; ``weights`` and ``model_args`` belong to models built here.
        images: a few of the kind it was trained on, to tell its normalization and activation by.
        asked: height and width to build with, the only ones where it runs at none that is usual.

    Raises:
        SpecError: it cannot be copied or run, its output is no map of the input's size, or options contradict it.
        CheckpointError: NaN or Inf among its weights.
    """
    if not isinstance(module, torch.nn.Module):
        raise SpecError(f"model is a {type(module).__name__}; give a torch.nn.Module, or weights=PATH of a checkpoint")
    if request.weights is not None or request.model_args:
        raise SpecError("weights and model_args are for models edgeseg builds; load the weights into the module first")
    require_python(module)
    name = module.stem if isinstance(module, OnnxNetwork) else type(unwrapped(module)).__name__
    twin = copied(module)
    require_apart(module, twin, _likely_channels(twin, request))
    read, reading = read_fake_quantizers(twin)
    whole = read if reading is None else copied(read)
    network = _find_network(read, request, asked)
    channels = _input_channels(network, request, asked)
    notes = list(network.notes)
    described: torch.nn.Module = network.module
    fixed = None if network.smp else _only_size(network, channels, asked)
    if not network.smp:
        described, more = adapt_outputs(network.module, channels, fixed, keep_aux=request.keep_aux)
        notes.extend(more)
    else:
        notes.extend(_settle_head(described, request.keep_aux))
    freeze(described)
    require_finite(described, f"the {name} module")
    encoder = (_encoder_of(network.inner) if network.inner is not None else None) or request.encoder or name
    if network.smp:
        classes, size = int(_last_convolution(described).out_channels), _probe_size(described, channels)
        geometry = None
    else:
        stride, size, classes = custom_geometry(described, channels, fixed)
        geometry = Geometry(stride, size, fixed, ())
    samples = images(channels)
    preprocess, more = resolve_preprocess(
        request,
        encoder,
        channels,
        encoder_weights=_config_of(network.inner).get("encoder_weights"),
        recorded=network.recorded,
        judge=lambda candidates: best_fit(described, samples, size, candidates),
        whole=None if network.smp else name,
    )
    shown = (
        np.stack([resize_image(sample, size) for sample in samples])
        if len(samples)
        else make_probe_images(*size, channels, preprocess=preprocess, dtype=request.input_dtype)
    )
    inputs = normalized(shown, preprocess)
    if run_on(described, inputs) is None:
        inputs = inputs[:1]  # a graph that was exported for one image
    if reading is not None and not reading.quantizers:
        reading = settled(described, reading, inputs)
        require_same(copied(module), whole, inputs)
        reading = reading if reading.quantizers else None  # none of them takes part
    if reading is not None:
        notes.append(reading.words)
    activation, activation_notes = _activation(described, network, request, inputs)
    if request.classes not in (None, classes):
        raise SpecError(f"{request.classes} classes were asked for, the module returns {classes}; leave classes out")
    arch, model_args = _arch_of(network.module), _recorded_args(described) if network.smp else {}
    spec, task_notes = architectures.model_spec(request, arch, encoder, classes, channels, activation, model_args)
    geometry = geometry or settle_geometry(described, spec, check_output=True)
    _check_request(request, spec.arch, encoder if network.inner is not None else None)
    notes.extend((*activation_notes, *task_notes, *geometry.notes, *more))
    return LoadedModel(
        module=described,
        model=spec,
        preprocess=preprocess,
        weights=f"weights of the {name} module given",
        weights_sha256=hash_weights(described),
        stride=geometry.stride,
        size=geometry.size,
        notes=tuple(dict.fromkeys(notes)),
        fixed_size=geometry.fixed,
        fixed_batch=exported_shape(network.module)[0],
        users_module=True,
        trained=reading,
    )


def _find_network(module: torch.nn.Module, request: ModelRequest, asked: tuple[int, int] | None) -> _Network:
    """Decide whether an SMP model inside does all the work, or the wrapper takes part."""
    base = architectures.import_for_conversion("segmentation_models_pytorch.base").SegmentationModel
    name = type(module).__name__
    if isinstance(module, base):
        if _is_plain_smp(module):
            return _Network(module, smp=True, inner=module)
        own = "a forward" if _has_smp_parts(module) else "parts"
        return _Network(
            module, smp=False, inner=module, notes=(f"{name} has {own} of its own: the whole is converted",)
        )
    inside = [(path, part) for path, part in module.named_modules() if isinstance(part, base)]
    if len(inside) != 1:
        return _Network(module, smp=False)
    path, inner = inside[0]
    channels = _first_channels(inner) if request.in_channels is None else request.in_channels
    agreement = _same_work(module, inner, channels, asked) if _is_plain_smp(inner) else None
    if agreement == "normalized" and not (request.mean is None and request.std is None):
        agreement = None  # what was said is of the images that the wrapper gets
    if agreement is None:
        note = f"{name} does more than its network .{path}: the whole of it is converted"
        return _Network(module, smp=False, inner=inner, notes=(note,))
    note = f"the network .{path} of {name} is converted; the wrapper adds nothing to it"
    if agreement == "same":
        return _Network(inner, smp=True, inner=inner, notes=(note,))
    recorded = recorded_preprocess({}, {"mean": module.mean, "std": module.std}, request.input_dtype)
    return _Network(inner, smp=True, inner=inner, recorded=recorded, notes=(f"{note} but the normalization",))


def _is_plain_smp(module: torch.nn.Module) -> bool:
    """Whether an SMP model runs SMP's own forward and nothing else: no override, no hooks."""
    own = architectures.import_smp().MODEL_ARCHITECTURES_MAPPING.get(_arch_of(module))
    changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return own is not None and type(module).forward is own.forward and not changed and _has_smp_parts(module)


def _has_smp_parts(module: torch.nn.Module) -> bool:
    """Whether the head is SMP's, which says its classes and activation, and the encoder one that knows its stride."""
    head, encoder = getattr(module, "segmentation_head", None), getattr(module, "encoder", None)
    smp = architectures.import_smp()
    known = type(head) in (smp.base.SegmentationHead, smp.decoders.dpt.decoder.DPTSegmentationHead)
    return known and hasattr(encoder, "output_stride")


def _same_work(
    wrapper: torch.nn.Module, inner: torch.nn.Module, channels: int, asked: tuple[int, int] | None
) -> str | None:
    """Compare the two on several images: ``"same"``, ``"normalized"`` (by buffers mean and std), or ``None``.

    Dark and bright ones in 0..1 and 0..255, so that a branch that depends on the image shows; one that no image of these
    takes is found by tracing, which such a branch stops. Other sizes, that of the engine and one that is no multiple of the
    stride among them: a wrapper may resize or pad.
    """
    stride, (height, width) = _output_stride(inner), _probe_size(inner, channels)
    pixels = torch.from_numpy(make_probe_images(height, width, channels)).permute(0, 3, 1, 2).float() / 255.0
    random = noise(channels, height, width)
    images = (random, pixels[:1], 0.1 * pixels[1:], 1.0 - 0.1 * pixels[1:], 255.0 * pixels[:1], 4.0 * pixels[1:] - 2.0)
    sizes = (asked or (DEFAULT_PIXELS,) * 2, (height + 3 * stride, width + stride), (height + 1, width - 1))
    others = [noise(channels, *size) for size in sizes]
    mean, std = getattr(wrapper, "mean", None), getattr(wrapper, "std", None)
    candidates: dict[str, Callable[[torch.Tensor], Any]] = {"same": inner}
    if isinstance(mean, torch.Tensor) and isinstance(std, torch.Tensor):
        shaped = [t.detach().float().reshape(1, -1, 1, 1) for t in (mean, std)]
        candidates["normalized"] = lambda image: inner((image - shaped[0]) / shaped[1])
    theirs = [run_on(wrapper, image) for image in images]
    if any(output is None for output in theirs):
        return None
    theirs += [run_on(wrapper, image) for image in others]
    for word, candidate in candidates.items():
        mine = [run_on(candidate, image) for image in (*images, *others)]
        if all(_alike(a, b) for a, b in zip(theirs, mine, strict=True)):
            return word if _is_traceable(wrapper, random) else None
    return None


def _alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


def _is_traceable(module: torch.nn.Module, image: torch.Tensor) -> bool:
    try:
        with silenced(), torch.no_grad():
            torch.export.export(module, (image,), strict=False)
    except Exception:  # a user's forward may raise anything; the export of the whole of it then says why
        return False
    return True


def _probe_size(module: torch.nn.Module, channels: int) -> tuple[int, int]:
    """Height and width an SMP model is run at: eight output strides, or the only ones that its encoder takes."""
    size = (_PROBE_STRIDES * _output_stride(module),) * 2
    native = _native_size(module)
    return size if native is None or run_on(module, noise(channels, *size)) is not None else native


def _native_size(module: torch.nn.Module | None) -> tuple[int, int] | None:
    known = None if module is None or not hasattr(module, "encoder") else module
    return None if known is None else smp_native_size(known, _recorded_args(known).get("img_size"))


def _output_stride(module: torch.nn.Module) -> int:
    encoder: Any = module.encoder
    return int(encoder.output_stride)


def _arch_of(module: torch.nn.Module) -> str:
    known = architectures.import_smp().MODEL_ARCHITECTURES_MAPPING
    return next((c.__name__.lower() for c in type(module).__mro__ if known.get(c.__name__.lower()) is c), "custom")


def _config_of(module: torch.nn.Module | None) -> dict[str, Any]:
    """Return the constructor arguments SMP's models keep; those of a subclass are its own."""
    config = getattr(module, "config", None)
    return config if isinstance(config, dict) else {}


def _encoder_of(module: torch.nn.Module) -> str | None:
    """Read the encoder's name from the arguments SMP keeps, else from the model's ``name`` (``"u-resnet34"``)."""
    recorded = _config_of(module).get("encoder_name")
    if isinstance(recorded, str):
        return recorded
    name = getattr(module, "name", None)
    if not isinstance(name, str) or "-" not in name:
        return None
    encoder = name.split("-", 1)[1]
    return f"tu-{encoder}" if _arch_of(module) == "dpt" and not encoder.startswith("tu-") else encoder


def _recorded_args(module: torch.nn.Module) -> dict[str, Any]:
    """Return the constructor arguments of an SMP model that differ from the defaults."""
    config = _config_of(module)
    known = architectures.import_smp().MODEL_ARCHITECTURES_MAPPING.get(type(module).__name__.lower())
    if known is not type(module):
        return {}
    elsewhere = (*architectures.SPEC_ARGUMENTS, "aux_params")
    given = {k: v for k, v in config.items() if not k.startswith("_") and k not in elsewhere}
    return architectures.without_defaults(_arch_of(module), given)


def _input_channels(network: _Network, request: ModelRequest, asked: tuple[int, int] | None) -> int:
    exported = exported_shape(network.module)[1]
    likely = _likely_channels(network.module, request)
    if network.smp or exported is not None:
        channels = exported or _first_channels(network.module)
        if request.in_channels is not None and request.in_channels != channels:
            raise SpecError(f"in_channels {request.in_channels} was given, the module takes {channels}; leave it out")
        return channels
    sizes = [(side, side) for side in PROBE_SIZES] + ([] if asked is None else [asked])
    tried = (c for c in likely for size in sizes if run_raw(network.module, noise(c, *size))[0] is not None)
    return likely[0] if len(likely) == 1 else next(tried, likely[0])


def _only_size(network: _Network, channels: int, asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width that an exported graph says; of a module that runs at no usual size, those asked for or its encoder's."""
    exported = exported_size(network.module)
    others = [size for size in (asked, _native_size(network.inner)) if size is not None]
    if exported is not None or not others:
        return exported

    def runs(size: tuple[int, int]) -> bool:
        return run_raw(network.module, noise(channels, *size))[0] is not None

    usual = any(runs((side, side)) for side in PROBE_SIZES)
    return None if usual else next(filter(runs, others), None)


def _likely_channels(module: torch.nn.Module, request: ModelRequest) -> list[int]:
    """What was said; else of the SMP model inside, then of the first convolution, which may be before it."""
    if request.in_channels is not None:
        return [request.in_channels]
    base = architectures.import_smp().base.SegmentationModel
    inside = next((part for part in module.modules() if isinstance(part, base)), module)
    return [*dict.fromkeys((_first_channels(inside), _first_channels(module)))]


def _first_channels(module: torch.nn.Module) -> int:
    first = next((m for m in module.modules() if isinstance(m, torch.nn.Conv2d)), None)
    return int(first.in_channels) if first is not None else 3


def _settle_head(module: torch.nn.Module, keep_aux: bool) -> tuple[str, ...]:
    """Drop what an SMP model has beside its map: the auxiliary head, and an argmax in the place of the activation."""
    if keep_aux and module.classification_head is None:
        raise SpecError("the module has no auxiliary head to keep; leave keep_aux out")
    notes = []
    if not keep_aux and module.classification_head is not None:
        module.classification_head = None  # type: ignore[assignment]
        notes.append("auxiliary classification head dropped; keep it with --keep-aux")
    if type(_last_layer(module)).__name__ == "ArgMax":
        head: Any = module.segmentation_head
        head[-1].activation = torch.nn.Identity()
        notes.append("activation argmax dropped: the mask output is the argmax")
    return tuple(notes)


def _check_request(request: ModelRequest, arch: str, encoder: str | None) -> None:
    if request.arch is not None and request.arch != "custom" and architectures.resolve_arch(request.arch) != arch:
        what = "is no SMP model" if arch == "custom" else f"is a {arch}"
        raise SpecError(f"arch {request.arch!r} was given, but the module {what}; leave arch out")
    if request.encoder is not None and encoder is not None and request.encoder.lower() != encoder.lower():
        raise SpecError(f"encoder {request.encoder!r} was given, but the module's is {encoder}; leave encoder out")


def _activation(
    module: torch.nn.Module, network: _Network, request: ModelRequest, inputs: torch.Tensor
) -> tuple[str | None, tuple[str, ...]]:
    """SMP's name of the activation that the module ends in, and notes.

    Raises:
        SpecError: it cannot be told, or is not what the request says.
    """
    ending = output_ending(module, inputs)
    values = f"values from {ending.low:.3g} to {ending.high:.3g}"
    if request.activation is None:
        head = _head_activation(module) if network.smp else None
        if head is not None and (ending.activation == head or not ending.sure):
            return head, ()
        if not ending.sure and not (ending.low >= 0 and ending.high <= 1):
            raise SpecError(
                f"the module returns {values}, computed from the result of an activation, which are neither logits nor "
                "probabilities: let it return one of these, or say activation='none' if these are logits"
            )
        if not ending.sure:
            raise SpecError(
                f"the module returns {values} and does not end in a sigmoid, or a softmax over the classes, that "
                "could be recognized; say activation='sigmoid' or 'softmax' if these are probabilities, 'none' if logits"
            )
        if ending.activation is None:
            return None, ()
        note = f"the module returns the result of {ending.activation}: its masks and probabilities are made of that"
        return ending.activation, (note,)
    asked = architectures.resolve_activation(request.activation)
    if asked is None and ending.activation is not None:
        return None, (f"the module ends in {ending.activation}; its values are taken for logits, as asked",)
    probable = ("sigmoid", "softmax", "softmax2d", "clamp")
    if asked in probable and not (ending.low >= -1e-5 and ending.high <= 1 + 1e-5):
        raise SpecError(
            f"activation {asked!r} was given, but the module returns {values}, which are no probabilities: leave it out "
            "(task says whether the classes exclude each other)"
        )
    return asked, ()


def _last_layer(module: torch.nn.Module) -> torch.nn.Module:
    head: Any = module.segmentation_head
    last: torch.nn.Module = list(head.modules())[-1]
    return last


def _last_convolution(module: torch.nn.Module) -> torch.nn.Conv2d:
    head: Any = module.segmentation_head
    return [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)][-1]


def _head_activation(module: torch.nn.Module) -> str | None:
    """Read the activation SMP put at the end of the segmentation head."""
    name = type(_last_layer(module)).__name__.lower()
    return name if name in ("sigmoid", "softmax", "logsoftmax", "tanh") else None
