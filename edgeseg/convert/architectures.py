"""Which SMP architectures and encoders there are, what each accepts, and how to build one.

SMP and timm are imported inside functions: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from edgeseg.arguments import one_of, shortened
from edgeseg.convert import older_smp
from edgeseg.errors import MissingDependencyError, SpecError, did_you_mean, is_interruption, one_line
from edgeseg.silence import without_warnings
from edgeseg.spec import ARCHITECTURES, ModelRequest, ModelSpec, Task

if TYPE_CHECKING:
    import torch

DEFAULT_ENCODER = "resnet34"
DEFAULT_DPT_ENCODER = "tu-vit_tiny_patch16_224"

# The constructor arguments that have a field of their own in ModelSpec.
SPEC_ARGUMENTS = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation")

# Spellings SMP accepted until 0.4 and still forwards: {old: (new, architectures)}.
_RENAMED_ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "decoder_use_batchnorm": ("decoder_use_norm", ("unet", "unetplusplus", "linknet", "manet")),
    "psp_use_batchnorm": ("decoder_use_norm", ("pspnet",)),
    "upscale_mode": ("decoder_interpolation", ("pan",)),
}

# ``64,32,16`` as written on a command line, for the arguments that take a list.
_NUMBERS = re.compile(r"\d{1,6}(,\d{1,6}){1,63}")

# What may reach timm's constructors for ``tu-`` encoders, since config.json may come from anywhere: sizes of images and
# windows, and what only training uses. ``checkpoint_path`` would open any file, ``layers`` build a network of any size.
TIMM_ARGUMENTS = (
    *("img_size", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "always_partition"),
    *("patch_size", "window_size", "class_token", "reg_tokens", "no_embed_class", "pos_embed"),
    *("drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"),
    *("patch_drop_rate", "act_layer", "norm_layer"),
)

# The largest numbers arguments may hold: what an image is enlarged, pooled or dilated by is memory in every run.
MAX_NUMBER = 16384
_MAX_NUMBERS = {"upsampling": 64, "psp_sizes": 256, "decoder_atrous_rates": 256}
_MAX_ITEMS = 64
MAX_CHANNELS = 4096

ACTIVATIONS: Mapping[str | None, Literal["none", "sigmoid", "softmax", "logsoftmax", "tanh", "clamp"]] = {
    None: "none",
    "identity": "none",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "softmax2d": "softmax",
    "logsoftmax": "logsoftmax",
    "tanh": "tanh",
    "clamp": "clamp",
}
"""SMP's names of activations that a mask can be made from, and what they do to logits."""

# Downsampling by pooling cannot be replaced by dilation (SMP 0.6.0: each of these raises in make_dilated).
_NOT_DILATABLE = ("vgg", "densenet", "inceptionresnetv2", "inceptionv4", "xception")


def import_smp() -> ModuleType:
    """Import segmentation_models_pytorch, or raise :class:`MissingDependencyError`."""
    return import_for_conversion("segmentation_models_pytorch")


def import_for_conversion(package: str) -> ModuleType:
    """Import a package of the ``convert`` extra, or raise :class:`MissingDependencyError`."""
    try:
        with without_warnings():
            return importlib.import_module(package)
    except ImportError as exc:
        if is_interruption(exc):
            raise KeyboardInterrupt from exc
        raise MissingDependencyError(exc.name or package, "convert", "convert a model") from exc


def resolve_arch(name: str) -> str:
    """Return edgeseg's spelling of an architecture: ``"DeepLabV3+"`` and ``"DeepLabV3Plus"`` are ``deeplabv3plus``.

    Raises:
        SpecError: there is no such architecture; names the nearest.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))
    one_of("architecture", plain, ARCHITECTURES, given=name)
    return plain


def require_arch(name: str | None) -> str:
    """Return the architecture's name; raise :class:`SpecError` when there is none, or none of that name."""
    if name is None:
        raise SpecError(f"no architecture given; give --arch, one of {', '.join(ARCHITECTURES)}")
    return resolve_arch(name)


def default_encoder(arch: str) -> str:
    """Return the encoder taken when none is given: SMP's default, or for dpt a small vision transformer."""
    return DEFAULT_DPT_ENCODER if arch == "dpt" else DEFAULT_ENCODER


def network_names(request: ModelRequest) -> tuple[str, str]:
    """(architecture, encoder) that a request means, SMP's spelling; the default encoder where none is said.

    Raises:
        SpecError: no architecture, or one of the two is unknown or impossible with the other.
    """
    arch = require_arch(request.arch)
    return arch, resolve_encoder(request.encoder or default_encoder(arch), arch, request.model_args)


def model_class(arch: str) -> type[torch.nn.Module]:
    """Return SMP's class of an architecture."""
    model: type[torch.nn.Module] = import_smp().MODEL_ARCHITECTURES_MAPPING[arch]
    return model


def resolve_encoder(name: str, arch: str, model_args: Mapping[str, Any]) -> str:
    """Return the encoder's exact name, checked to exist and to be one ``arch`` can take.

    Raises:
        SpecError: unknown (names the nearest) or impossible with ``arch`` (names what works).
    """
    smp = import_smp()
    timm = import_for_conversion("timm")
    own: dict[str, str] = {n.lower(): n for n in smp.encoders.encoders}
    exact = own.get(name.lower())
    if exact is None and name.lower().startswith("tu-"):
        base = name[3:].split(".", 1)[0]
        if timm.is_model(base):
            exact = f"tu-{name[3:]}"
        elif timm.is_model(base.lower()):
            exact = f"tu-{name[3:].lower()}"
    elif exact is None and name.lower().startswith("timm-") and _is_renamed_timm(name.lower()):
        # SMP itself forwards timm-regnet..., timm-res2..., ... to its timm encoder.
        exact = name.lower()
    if exact is None:
        raise SpecError(_unknown_encoder(name, own, timm))
    _check_pair(arch, exact, model_args)
    return exact


def _is_renamed_timm(name: str) -> bool:
    from segmentation_models_pytorch.encoders import is_equivalent_to_timm_universal

    timm = import_for_conversion("timm")
    base = name.removeprefix("timm-")
    if "mobilenetv3" in base:
        base = f"tf_{base}"
    return bool(is_equivalent_to_timm_universal(name)) and bool(timm.is_model(base))


def _unknown_encoder(name: str, own: Mapping[str, str], timm: ModuleType) -> str:
    base = name.lower().removeprefix("tu-").removeprefix("timm-").split(".", 1)[0]
    if timm.is_model(base):
        # efficientnet-b4 is SMP's, efficientnet_b4 is timm's.
        twin = own.get(base.replace("_", "-"))
        return f"unknown encoder {name!r}; for timm's write 'tu-{base}'" + (f", for SMP's {twin!r}" if twin else "")
    near = [f"tu-{n}" for n in timm.list_models(f"*{base}*")[:200]] if len(base) > 2 else []
    others = [f"tu-{n}" for n in timm.list_models()] if name.lower().startswith("tu-") else [*own.values()]
    candidates = [*near, *others]
    return f"unknown encoder {name!r}{did_you_mean(name, candidates)} (SMP's encoders, or 'tu-' plus a timm model name)"


def _check_pair(arch: str, encoder: str, model_args: Mapping[str, Any]) -> None:
    if arch == "dpt" and not encoder.startswith("tu-"):
        raise SpecError(
            f"dpt takes timm's encoders only, got {encoder!r}; give a vision transformer: {DEFAULT_DPT_ENCODER} or "
            "tu-vit_base_patch16_224.augreg_in21k"
        )
    if arch in ("unetplusplus", "linknet") and encoder.startswith("mit_b"):
        raise SpecError(
            f"{arch} cannot take {encoder} (it has no features at half size); use unet, manet, fpn, segformer or "
            f"upernet with {encoder}, or {arch} with a convolutional encoder such as resnet34"
        )
    undilated_pan = arch == "pan" and model_args.get("encoder_output_stride") == 32
    if arch in older_smp.DILATING and not undilated_pan and encoder.startswith(_NOT_DILATABLE):
        raise SpecError(_cannot_dilate(arch, encoder))


def _cannot_dilate(arch: str, encoder: str) -> str:
    more = " (or --model-arg encoder_output_stride=32)" if arch == "pan" else ""
    return (
        f"{arch} needs an encoder that can be dilated, {encoder} cannot; use a resnet, resnext, mobilenet_v2 or "
        f"efficientnet encoder{more}, or {encoder} with fpn, unet or pspnet"
    )


def accepted_arguments(arch: str) -> tuple[str, ...]:
    """Return the names ``model_args`` may hold: those of SMP's constructor, ``smp_version``, and pspnet's ``psp_sizes``."""
    parameters = inspect.signature(model_class(arch).__init__).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
    own = ("psp_sizes", older_smp.ARGUMENT) if arch == "pspnet" else (older_smp.ARGUMENT,)
    return (*(n for n in names if n not in SPEC_ARGUMENTS), *own)


def renamed_arguments(arch: str) -> tuple[str, ...]:
    """Return the names ``model_args`` may hold as SMP called them until 0.4."""
    return tuple(old for old, (_, archs) in _RENAMED_ARGUMENTS.items() if arch in archs)


def default_arguments(arch: str) -> dict[str, Any]:
    """Return the constructor's arguments with their defaults."""
    return {n: p.default for n, p in inspect.signature(model_class(arch).__init__).parameters.items()}


def without_defaults(arch: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that differ from the constructor's defaults; lists and tuples count as the same."""
    defaults = default_arguments(arch)
    return {k: v for k, v in arguments.items() if _plain(defaults.get(k, ...)) != _plain(v)}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_arguments(arch: str, encoder: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return ``model_args`` in today's spelling, and notes on what was translated.

    Arguments the constructor does not know go to timm for ``tu-`` encoders, those of ``TIMM_ARGUMENTS`` only; SMP
    ignores them silently for its own encoders, which is refused here.

    Raises:
        SpecError: an unknown argument (lists the accepted ones), or a number beyond what any model has.
    """
    own = accepted_arguments(arch)
    timms = TIMM_ARGUMENTS if encoder.startswith("tu-") else ()
    accepted = (*own, *timms)
    checked: dict[str, Any] = {}
    notes: list[str] = []
    for name, given in arguments.items():
        value = [int(v) for v in given.split(",")] if isinstance(given, str) and _NUMBERS.fullmatch(given) else given
        new, archs = _RENAMED_ARGUMENTS.get(name, ("", ()))
        if name in SPEC_ARGUMENTS:
            option = name.removeprefix("encoder_") if name == "encoder_weights" else name.removesuffix("_name")
            option = option.replace("_", "-")
            raise SpecError(f"model argument {name!r} has an option of its own; use --{option}")
        if arch in archs:
            checked[new] = value
            notes.append(f"model argument {name} is called {new} now")
        elif name in accepted:
            checked[name] = value
        else:
            raise SpecError(
                f"{arch} has no argument {name!r}{did_you_mean(name, accepted)} (accepted: {', '.join(own)}"
                + (f"; of timm's: {', '.join(timms[:8])}, ...)" if timms else ")")
            )
        _require_bounded(name, value, _MAX_NUMBERS.get(name, MAX_NUMBER))
    return checked, tuple(notes)


def _require_bounded(name: str, value: object, largest: int) -> None:
    """Raise :class:`SpecError` for values no model has: memory and time grow with them."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        if len(value) > _MAX_ITEMS:
            raise SpecError(f"model argument {name} has {len(value)} values; at most {_MAX_ITEMS} are taken")
        for item in value:
            _require_bounded(name, item, largest)
    elif isinstance(value, (int, float)) and not -largest <= value <= largest:
        raise SpecError(f"model argument {name} holds {shortened(value)}; numbers up to {largest} are taken")
    elif isinstance(value, str) and len(value) > _MAX_ITEMS:
        raise SpecError(f"model argument {name} is a text of {len(value)} characters; at most {_MAX_ITEMS} are taken")


def resolve_activation(name: str | None) -> str | None:
    """Return SMP's name of an activation, ``None`` for none.

    Raises:
        SpecError: unknown, or one from which no mask or probability can be made.
    """
    plain = (name or "none").lower()
    if plain in ("none", "identity", "linear"):
        return None
    if plain.startswith("argmax"):
        raise SpecError(f"activation {name!r} is what the mask output does; leave it out")
    one_of("activation", plain, ("none", *filter(None, ACTIVATIONS)), given=name)
    return plain


def resolve_task(task: Task | None, classes: int, activation: str | None) -> tuple[Task, tuple[str, ...]]:
    """Return what the classes mean, and notes: one is binary, several under a sigmoid multilabel, else multiclass.

    Raises:
        SpecError: a softmax over one class, which says nothing.
    """
    if classes == 1 and activation in ("softmax", "softmax2d", "logsoftmax"):
        raise SpecError(f"activation {activation} over 1 class is always 1; give --activation sigmoid, or --classes")
    if task is not None:
        return task, ()
    if classes == 1:
        return "binary", ()
    if activation == "sigmoid":
        return "multilabel", (
            f"{classes} classes under a sigmoid: multilabel (a mask per class) assumed; else give --task multiclass",
        )
    return "multiclass", ()


def model_spec(
    request: ModelRequest,
    arch: str,
    encoder: str,
    classes: int,
    in_channels: int,
    activation: str | None,
    model_args: Mapping[str, Any],
) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of a network, all of which is known; and notes on the task. Raises :class:`SpecError`."""
    task, notes = resolve_task(request.task, classes, activation)
    spec = ModelSpec(arch, encoder, classes, request.class_names, task, in_channels, activation, dict(model_args))
    return spec, notes


def build_model(
    spec: ModelSpec, encoder_weights: str | None, loading_args: Mapping[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Build an SMP model, randomly initialized unless ``encoder_weights`` is given, and say what was added.

    Raises:
        SpecError: the constructor rejects the arguments.
    """
    arguments: dict[str, Any] = {
        "encoder_name": spec.encoder,
        "encoder_weights": encoder_weights,
        "in_channels": spec.in_channels,
        "classes": spec.classes,
        "activation": spec.activation,
        **spec.model_args,
        **loading_args,
    }
    sizes = arguments.pop("psp_sizes", None)
    arguments.pop(older_smp.ARGUMENT, None)
    if spec.arch == "dpt" and "dynamic_img_size" not in arguments:
        # Without it a vision transformer takes the one size of its name; the weights are the same either way.
        with contextlib.suppress(SpecError):
            module = _construct(spec, {**arguments, "dynamic_img_size": True})
            return module, (f"{spec.encoder}: position embedding resized to the image (dynamic_img_size=True)",)
    module = _construct(spec, arguments)
    if sizes is not None:
        _replace_pyramid(module, spec, sizes)
    with without_warnings():
        older_smp.rebuild_encoder(module, spec.arch, spec.encoder, spec.model_args)
    return module, ()


def _construct(spec: ModelSpec, arguments: Mapping[str, Any]) -> torch.nn.Module:
    try:
        with without_warnings():
            return model_class(spec.arch)(**arguments)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as exc:
        raise SpecError(_rejection(spec, exc)) from exc


def _rejection(spec: ModelSpec, exc: Exception) -> str:
    """Say why a constructor raised; timm's own words are often an empty assertion."""
    said = one_line(exc)
    if spec.arch in older_smp.DILATING and (isinstance(exc, AssertionError) or "output_stride" in said):
        return _cannot_dilate(spec.arch, spec.encoder)
    if "downsampling pattern" in said:
        return (
            f"{spec.arch} needs an encoder that halves its features stage by stage, {spec.encoder} does not; vision "
            "transformers go with dpt"
        )
    norm = spec.model_args.get("decoder_use_norm")
    if isinstance(exc, AttributeError) and "instancenorm" in (
        norm,
        norm.get("type") if isinstance(norm, dict) else None,
    ):
        # Its initialization sets scale and shift, which torch's instance norm has only when asked.
        return (
            "SMP cannot build a decoder with instance norm that has no scale and shift; give "
            """--model-arg 'decoder_use_norm={"type": "instancenorm", "affine": true}'"""
        )
    given = f" and {spec.model_args}" if spec.model_args else ""
    return f"SMP cannot build {spec.arch} with encoder {spec.encoder}{given}: {said}"


def _replace_pyramid(module: torch.nn.Module, spec: ModelSpec, sizes: object) -> None:
    """Give PSPNet another pooling pyramid; SMP 0.6.0 fixes it at 1, 2, 3, 6."""
    from segmentation_models_pytorch.base import modules
    from segmentation_models_pytorch.base.initialization import initialize_decoder
    from segmentation_models_pytorch.decoders.pspnet.decoder import PSPModule

    if not isinstance(sizes, (list, tuple)) or not sizes or not all(type(s) is int and s > 0 for s in sizes):
        raise SpecError(f"psp_sizes is {sizes!r}; give positive whole numbers, such as 1,2,3,6")
    encoder: Any = module.encoder
    channels = int(encoder.out_channels[-1])
    if len(sizes) > channels:
        raise SpecError(f"psp_sizes has {len(sizes)} levels, more than the encoder's {channels} channels")
    norm = spec.model_args.get("decoder_use_norm", "batchnorm")
    decoder: Any = module.decoder
    decoder.psp = PSPModule(channels, tuple(sizes), use_norm=norm)
    decoder.conv = modules.Conv2dReLU(
        in_channels=channels + channels // len(sizes) * len(sizes),
        out_channels=spec.model_args.get("psp_out_channels", 512),
        kernel_size=1,
        use_norm=norm,
    )
    initialize_decoder(decoder)


def name_softmax_axis(module: torch.nn.Module) -> None:
    """Set the axis of ``nn.Softmax()`` built without one, as SMP's ``activation="softmax"`` is.

    torch then takes axis 1 for four dimensions, with a warning at every call: the values are the same.
    """
    import torch

    for part in module.modules():
        if isinstance(part, (torch.nn.Softmax, torch.nn.LogSoftmax)) and part.dim is None:
            part.dim = 1
