"""Take a module object a user has in Python: an SMP model, a subclass, a wrapper around one, or any other network.

The user's object is copied, never changed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeseg.convert import architectures
from edgeseg.convert.assemble import Geometry, resolve_activation, resolve_task, settle_geometry
from edgeseg.convert.fit import require_finite
from edgeseg.convert.geometry import custom_geometry, run_once
from edgeseg.convert.loaded import LoadedModel, freeze, hash_weights
from edgeseg.convert.outputs import adapt_outputs, observed_activation
from edgeseg.convert.preprocessing import recorded_preprocess, resolve_preprocess
from edgeseg.errors import SpecError
from edgeseg.spec import ModelRequest, ModelSpec, Preprocess

if TYPE_CHECKING:
    import torch


# A side of eight output strides is enough for every decoder; PAN's pools the encoder's last features three times.
_PROBE_STRIDES = 8


@dataclass(frozen=True)
class _Network:
    """What of the user's object is converted: ``smp`` when it is an SMP model whose forward is the whole story."""

    module: torch.nn.Module
    smp: bool
    inner: torch.nn.Module | None = None
    recorded: Preprocess | None = None
    notes: tuple[str, ...] = ()


def wrap_module(module: torch.nn.Module, request: ModelRequest) -> LoadedModel:
    """Describe a user's module so that it can be converted like a loaded one.

    Args:
        module: takes float32 ``(N, C, H, W)``, returns ``(N, classes, H, W)``, or a tuple or mapping that holds it.
        request: what the user says beside it; ``weights`` and ``model_args`` belong to models built here.

    Raises:
        SpecError: it cannot be copied or run, its output is no map of the input's size, or options contradict it.
        CheckpointError: NaN or Inf among its weights.
        MissingDependencyError: torch or SMP is not installed.
    """
    nn = architectures.import_for_conversion("torch.nn")
    architectures.import_smp()
    if not isinstance(module, nn.Module):
        raise SpecError(f"model is a {type(module).__name__}; give a torch.nn.Module, or weights=PATH of a checkpoint")
    if request.weights is not None or request.model_args:
        raise SpecError("weights and model_args are for models edgeseg builds; load the weights into the module first")
    name = type(_unwrapped(module)).__name__
    network = _find_network(_copied(_unwrapped(module)), request)
    found = network.module if network.smp else network.inner
    channels = _input_channels(network, request)
    notes = list(network.notes)
    described: torch.nn.Module = network.module
    if not network.smp:
        described, more = adapt_outputs(network.module, channels, keep_aux=request.keep_aux)
        notes.extend(more)
    else:
        notes.extend(_settle_auxiliary_head(described, request.keep_aux))
    freeze(described)
    require_finite(described, f"the {name} module")
    encoder = (_encoder_of(found) if found is not None else None) or request.encoder or name
    spec, geometry, more = _describe(described, network, request, encoder, channels)
    _check_request(request, spec.arch, encoder if found is not None else None)
    notes.extend(more)
    preprocess, more = resolve_preprocess(
        request,
        encoder=encoder,
        encoder_weights=_config_of(found).get("encoder_weights"),
        in_channels=channels,
        recorded=network.recorded,
        untrained=False,
    )
    notes.extend(more)
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
        users_module=True,
    )


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Look through DataParallel and torch.compile, which only change how a module runs."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if inner is None:
            return module
        module = inner


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    try:
        twin = copy.deepcopy(module)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as exc:
        raise SpecError(
            f"{type(module).__name__} cannot be copied ({' '.join(str(exc).split())[:100]}); give the network inside "
            "it, such as module.model"
        ) from exc
    return twin.cpu().float().eval().requires_grad_(False)


def _find_network(module: torch.nn.Module, request: ModelRequest) -> _Network:
    """Decide whether an SMP model inside does all the work, or the wrapper takes part."""
    base = architectures.import_for_conversion("segmentation_models_pytorch.base").SegmentationModel
    if isinstance(module, base):
        return _Network(module, smp=_arch_of(module) != "custom", inner=module)
    inside = [(path, part) for path, part in module.named_modules() if isinstance(part, base)]
    if len(inside) != 1:
        return _Network(module, smp=False)
    path, inner = inside[0]
    channels = _first_channels(inner) if request.in_channels is None else request.in_channels
    agreement = _same_work(module, inner, channels)
    if agreement is None or _arch_of(inner) == "custom":
        return _Network(
            module,
            smp=False,
            inner=inner,
            notes=(f"{type(module).__name__} does more than its network .{path}: the whole of it is converted",),
        )
    note = f"the network .{path} of {type(module).__name__} is converted; the wrapper adds nothing to it"
    if agreement == "same":
        return _Network(inner, smp=True, inner=inner, notes=(note,))
    buffers = {"mean": module.mean, "std": module.std}
    recorded = recorded_preprocess({}, buffers)
    return _Network(inner, smp=True, inner=inner, recorded=recorded, notes=(f"{note} but the normalization",))


def _same_work(wrapper: torch.nn.Module, inner: torch.nn.Module, channels: int) -> str | None:
    """Compare the two on one image: ``"same"``, ``"normalized"`` (by buffers mean and std), or ``None``."""
    torch = architectures.import_for_conversion("torch")
    side = _PROBE_STRIDES * _output_stride(inner)
    theirs = run_once(wrapper, channels, side, side)
    plain = run_once(inner, channels, side, side)
    if theirs is None or plain is None or theirs.shape != plain.shape:
        return None
    if torch.allclose(theirs, plain, rtol=1e-4, atol=1e-5):
        return "same"
    mean, std = getattr(wrapper, "mean", None), getattr(wrapper, "std", None)
    if not isinstance(mean, torch.Tensor) or not isinstance(std, torch.Tensor):
        return None
    shaped = [t.detach().float().reshape(1, -1, 1, 1) for t in (mean, std)]
    normalized = run_once(_Normalized(inner, *shaped), channels, side, side)
    alike = normalized is not None and torch.allclose(theirs, normalized, rtol=1e-4, atol=1e-5)
    return "normalized" if alike else None


class _Normalized:
    """``inner((image - mean) / std)``, for comparison only."""

    def __init__(self, inner: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.inner, self.mean, self.std = inner, mean, std

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner((image - self.mean) / self.std)
        return result


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


def _input_channels(network: _Network, request: ModelRequest) -> int:
    found = _first_channels(network.inner if network.inner is not None else network.module)
    if request.in_channels is not None and network.inner is not None and request.in_channels != found:
        raise SpecError(f"in_channels {request.in_channels} was given, the module takes {found}; leave it out")
    return found if request.in_channels is None else request.in_channels


def _first_channels(module: torch.nn.Module) -> int:
    torch = architectures.import_for_conversion("torch")
    first = next((m for m in module.modules() if isinstance(m, torch.nn.Conv2d)), None)
    return int(first.in_channels) if first is not None else 3


def _settle_auxiliary_head(module: torch.nn.Module, keep: bool) -> tuple[str, ...]:
    if keep and module.classification_head is None:
        raise SpecError("the module has no auxiliary head to keep; leave keep_aux out")
    if keep or module.classification_head is None:
        return ()
    module.classification_head = None  # type: ignore[assignment]
    return ("auxiliary classification head dropped; keep it with --keep-aux",)


def _check_request(request: ModelRequest, arch: str, encoder: str | None) -> None:
    if request.arch is not None and request.arch != "custom" and architectures.resolve_arch(request.arch) != arch:
        what = "is no SMP model" if arch == "custom" else f"is a {arch}"
        raise SpecError(f"arch {request.arch!r} was given, but the module {what}; leave arch out")
    if request.encoder is not None and encoder is not None and request.encoder.lower() != encoder.lower():
        raise SpecError(f"encoder {request.encoder!r} was given, but the module's is {encoder}; leave encoder out")


def _describe(
    module: torch.nn.Module, network: _Network, request: ModelRequest, encoder: str, channels: int
) -> tuple[ModelSpec, Geometry, tuple[str, ...]]:
    geometry = None
    if network.smp:
        classes = int(_last_convolution(module).out_channels)
        probe = (_PROBE_STRIDES * _output_stride(module),) * 2
    else:
        stride, size, classes = custom_geometry(module, channels)
        geometry, probe = Geometry(stride, size, None, ()), size
    asked = request.classes if request.classes is not None else len(request.class_names) or classes
    if asked != classes:
        raise SpecError(f"{asked} classes were asked for, the module returns {classes}; leave classes out")
    notes: list[str] = []
    activation = resolve_activation(request.activation)
    if request.activation is None and network.smp:
        activation = _head_activation(module)
    if request.activation is None and activation is None:
        activation = observed_activation(module, channels, probe)
        if activation is not None:
            notes.append(f"the module returns probabilities: activation {activation}; else give activation 'none'")
    task, task_notes = resolve_task(request.task, classes, activation)
    notes.extend(task_notes)
    spec = ModelSpec(
        arch=_arch_of(module) if network.smp else "custom",
        encoder=encoder,
        classes=classes,
        class_names=request.class_names,
        task=task,
        in_channels=channels,
        activation=activation,
        model_args=_recorded_args(module) if network.smp else {},
    )
    geometry = geometry or settle_geometry(module, spec, check_output=True)
    return spec, geometry, (*notes, *geometry.notes)


def _last_convolution(module: torch.nn.Module) -> torch.nn.Conv2d:
    import torch

    head: Any = module.segmentation_head
    return [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)][-1]


def _head_activation(module: torch.nn.Module) -> str | None:
    """Read the activation SMP put at the end of the segmentation head."""
    import torch

    head: Any = module.segmentation_head
    last = list(head.modules())[-1]
    names: dict[type[torch.nn.Module], str] = {
        torch.nn.Sigmoid: "sigmoid",
        torch.nn.Softmax: "softmax",
        torch.nn.LogSoftmax: "logsoftmax",
        torch.nn.Tanh: "tanh",
    }
    return names.get(type(last))
