"""What a checkpoint says about its own architecture, and how that meets what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeseg.convert import architectures
from edgeseg.convert.checkpoint import Checkpoint
from edgeseg.convert.loaded import is_plain
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import ModelRequest

# Where the arguments of smp.create_model stand among those of a training script.
_NESTED_ARGUMENTS = (
    *("model", "model_args", "model_kwargs", "model_params", "model_config", "smp_kwargs", "create_model_kwargs"),
    *("kwargs", "args", "config", "cfg", "network", "net", "init_args"),
)


@dataclass(frozen=True)
class RecordedModel:
    """Architecture and constructor arguments as recorded; ``None`` and empty where nothing was."""

    arch: str | None = None
    encoder: str | None = None
    encoder_weights: str | None = None
    classes: int | None = None
    in_channels: int | None = None
    activation: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    notes: tuple[str, ...] = ()


def recorded_model(checkpoint: Checkpoint, said: str | None = None) -> RecordedModel:
    """Read ``config.json`` of a ``save_pretrained`` folder, or what training saved beside the weights.

    Args:
        checkpoint: what was read.
        said: the architecture by request, which takes the place of a config that names none of SMP's.

    Raises:
        CheckpointError: the config is not one of an SMP model.
    """
    if checkpoint.config:
        return _from_config(checkpoint, said)
    return _from_settings(checkpoint.settings)


def _from_config(checkpoint: Checkpoint, said: str | None) -> RecordedModel:
    config = dict(checkpoint.config)
    name = config.pop("_model_class", None)
    what = f"is of the class {name!r}, which is not SMP's" if isinstance(name, str) else "names no SMP model"
    try:
        arch = architectures.resolve_arch(name if isinstance(name, str) else "")
    except SpecError as exc:
        if said is not None:
            return RecordedModel(notes=(f"config.json {what}: its arguments are left out, the tensors decide",))
        raise CheckpointError(
            f"config.json beside {checkpoint.path} {what}; hand the module to edgeseg.build(model=...), or give --arch to "
            "have the rest read off the tensors"
        ) from exc
    config.pop("preprocess", None)
    arguments = {k: v for k, v in config.items() if not k.startswith("_")}
    taken = {key: arguments.pop(key, None) for key in architectures.SPEC_ARGUMENTS}
    activation = taken["activation"]
    notes: tuple[str, ...] = ()
    if activation in ("argmax", "argmax2d"):
        activation, notes = None, (f"activation {activation} dropped: the mask output is the argmax",)
    return RecordedModel(
        arch=arch,
        encoder=_typed(checkpoint, "encoder_name", taken["encoder_name"], str),
        encoder_weights=taken["encoder_weights"] if isinstance(taken["encoder_weights"], str) else None,
        classes=_typed(checkpoint, "classes", taken["classes"], int),
        in_channels=_typed(checkpoint, "in_channels", taken["in_channels"], int),
        activation=None if activation is None else str(activation),
        model_args=arguments,
        complete=True,
        notes=notes,
    )


def _typed(checkpoint: Checkpoint, key: str, value: object, kind: type) -> Any:
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise CheckpointError(f"config.json beside {checkpoint.path}: {key} is {value!r}, not {kind.__name__}")
    return value


def _from_settings(settings: Mapping[str, Mapping[str, Any]]) -> RecordedModel:
    """Training scripts save their arguments under a few usual names; a value that means nothing here is left alone.

    Numbers of classes and channels are left to the tensors, which know them. What no tensor shows, such as the rates of an
    atrous convolution, is taken from here.
    """
    for place, outer in settings.items():
        said = dict(outer)
        for name in _NESTED_ARGUMENTS:
            inner = outer.get(name)
            said |= inner if isinstance(inner, Mapping) else {}
        recorded = _from_arguments(place, said)
        if recorded is not None:
            return recorded
    return RecordedModel()


def _from_arguments(place: str, said: Mapping[str, Any]) -> RecordedModel | None:
    def first(*names: str) -> str | None:
        return next((said[k] for k in names if isinstance(said.get(k), str)), None)

    arch, encoder = (
        first("arch", "architecture", "model_name", "arch_name"),
        first("encoder_name", "encoder", "backbone"),
    )
    try:
        arch = architectures.resolve_arch(arch) if arch else None
        encoder = architectures.resolve_encoder(encoder, arch or "unet", {}) if encoder else None
    except SpecError:
        return None
    if arch is None and encoder is None:
        return None
    own = () if arch is None else (*architectures.accepted_arguments(arch), *architectures.renamed_arguments(arch))
    model_args = {k: list(v) if isinstance(v, tuple) else v for k, v in said.items() if k in own and is_plain(v)}
    activation = first("activation")
    if activation is not None and activation.lower() not in architectures.ACTIVATIONS:
        activation = None
    words = [*filter(None, (arch, encoder)), *(f"{k} {v}" for k, v in model_args.items())]
    words += [f"activation {activation}"] if activation else []
    return RecordedModel(
        arch=arch,
        encoder=encoder,
        encoder_weights=first("encoder_weights"),
        activation=activation,
        model_args=model_args,
        notes=(f"read from the checkpoint's {place}: {', '.join(words)}",),
    )


def merge(request: ModelRequest, recorded: RecordedModel) -> ModelRequest:
    """Fill what the user left open with what is recorded.

    Raises:
        SpecError: the user contradicts a ``save_pretrained`` config, which describes the very model of the weights.
    """
    fields: dict[str, Any] = {
        "arch": architectures.resolve_arch(request.arch) if request.arch else None,
        "encoder": request.encoder,
        "classes": request.classes,
        "in_channels": request.in_channels,
        "activation": request.activation,
    }
    options = {"arch": "--arch", "encoder": "--encoder", "classes": "--classes", "in_channels": "--in-channels"}
    merged: dict[str, Any] = {}
    for name, said in fields.items():
        known = getattr(recorded, name)
        # A first convolution replaced after building is not in config.json: there the tensors decide, in loading.
        checked = recorded.complete and name != "in_channels"
        if checked and said is not None and known is not None and not _same(said, known):
            raise SpecError(
                f"{options.get(name, '--activation')} {said} contradicts the checkpoint's config.json, which says "
                f"{known}; leave the option out"
            )
        merged[name] = said if said is not None else known
    model_args = dict(recorded.model_args)
    for name, value in request.model_args.items():
        if recorded.complete and name in model_args and not _same(value, model_args[name]):
            raise SpecError(
                f"--model-arg {name}={value} contradicts the checkpoint's config.json, which says {model_args[name]}; "
                "leave it out"
            )
        model_args[name] = value
    return replace(request, **merged, model_args=model_args)


def _same(a: object, b: object) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.lower() == b.lower()
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return list(a) == list(b)
    return a == b
