"""From a request whose every field is settled to a built SMP model, its spec and its geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgeseg.convert import architectures
from edgeseg.convert.geometry import (
    accepts,
    default_size,
    first_of,
    noise,
    run_raw,
    smp_fixed_size,
    smp_native_size,
    smp_size_multiple,
)
from edgeseg.errors import SpecError
from edgeseg.spec import ModelRequest, ModelSpec

# Weights of random models must be the same in every build, or no cache and no report could be compared.
SEED = 0


@dataclass(frozen=True)
class Assembly:
    """A built SMP model and what is known about it before its weights arrive."""

    module: torch.nn.Module
    model: ModelSpec
    notes: tuple[str, ...]


def assemble(
    request: ModelRequest,
    *,
    encoder_weights: str | None = None,
    loading_args: Mapping[str, Any] | None = None,
) -> Assembly:
    """Build the SMP model a request describes; fields left open get SMP's defaults, with a note each.

    Args:
        request: with every field that a checkpoint could tell filled in.
        encoder_weights: SMP's argument of that name; ``None`` initializes at random, from a fixed seed.
        loading_args: constructor arguments that only serve to load (not recorded in the spec).

    Raises:
        SpecError: unknown names, impossible combinations or contradicting options.
    """
    arch, encoder = architectures.network_names(request)
    notes = [] if request.encoder is not None else [f"encoder not given: {encoder}"]
    model_args, renamed = architectures.check_arguments(arch, encoder, request.model_args)
    notes.extend(renamed)
    classes = request.classes if request.classes is not None else len(request.class_names) or None
    if classes is None:
        classes = 1
        notes.append("classes not given: 1, as SMP's default")
    activation = architectures.resolve_activation(request.activation)
    model_args = architectures.without_defaults(arch, model_args)
    model_args, aux_notes = _settle_auxiliary_head(model_args, request.keep_aux)
    channels = request.in_channels if request.in_channels is not None else 3
    if channels > architectures.MAX_CHANNELS:
        raise SpecError(f"in_channels is {channels}; at most {architectures.MAX_CHANNELS} are built")
    spec, task_notes = architectures.model_spec(request, arch, encoder, classes, channels, activation, model_args)
    notes.extend((*task_notes, *aux_notes))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        module, flexible = architectures.build_model(spec, encoder_weights, loading_args or {})
    notes.extend(flexible)
    return Assembly(module, spec, tuple(notes))


def _settle_auxiliary_head(model_args: dict[str, Any], keep: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    if keep:
        if not model_args.get("aux_params"):
            raise SpecError(
                "there is no auxiliary head to keep; describe it as in training, such as "
                "--model-arg aux_params='{\"classes\": 4}', or leave --keep-aux out"
            )
        return model_args, ()
    dropped = model_args.get("aux_params")
    rest = {k: v for k, v in model_args.items() if k != "aux_params"}
    return rest, ("auxiliary classification head dropped; keep it with --keep-aux",) if dropped else ()


def settle_output_size(module: torch.nn.Module, spec: ModelSpec, size: tuple[int, int]) -> tuple[str, ...]:
    """Make the output as large as the input where constructor arguments left it smaller.

    SMP's final upsampling factor is an argument of its own: PSPNet with ``encoder_depth=4``, say, returns half the
    size. The missing factor is added to the head, by the resize SMP itself uses there.

    Raises:
        SpecError: the model does not run, or its output is no whole fraction of its input.
    """
    output, reason = run_raw(module, noise(spec.in_channels, *size))
    what = f"{spec.display_name} with {spec.model_args}"
    if output is None:
        raise SpecError(f"{what} does not run at {size[0]}x{size[1]} ({reason}); check --model-arg")
    height, width = first_of(output).shape[2:]
    if (height, width) == size:
        return ()
    factor = size[0] // height if height else 0
    head = module.segmentation_head
    if factor < 1 or (height * factor, width * factor) != size or not isinstance(head, torch.nn.Sequential):
        sizes = f"{height}x{width} for {size[0]}x{size[1]}"
        upsampling = spec.model_args.get("upsampling", 4)
        fitting = upsampling * size[0] // height if height and isinstance(upsampling, int) else 0
        advice = f"give --model-arg upsampling={fitting}" if spec.arch == "fpn" and fitting else "check --model-arg"
        raise SpecError(f"{what} returns {sizes}; the output must have the input's size, {advice}")
    head[1] = torch.nn.Sequential(head[1], torch.nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True))
    return (f"the network's output is 1/{factor} of its input's size; enlarged bilinearly, as SMP's head does",)


@dataclass(frozen=True)
class Geometry:
    """Image sizes a model takes, pixels.

    Attributes:
        stride: height and width must be multiples of this.
        size: height and width to build with unless told otherwise.
        fixed: the only height and width, or ``None``.
        notes: what was found or changed.
    """

    stride: int
    size: tuple[int, int]
    fixed: tuple[int, int] | None
    notes: tuple[str, ...]


def settle_geometry(module: torch.nn.Module, spec: ModelSpec, *, check_output: bool) -> Geometry:
    """Find out which sizes an SMP model takes; see :func:`settle_output_size` for ``check_output``."""
    stride = smp_size_multiple(module, spec.in_channels)
    fixed = smp_fixed_size(module, spec.in_channels, stride, spec.model_args.get("img_size"))
    size = default_size(stride, fixed)
    native = smp_native_size(module, spec.model_args.get("img_size"))
    if native is not None and native != size and not accepts(module, spec.in_channels, *size):
        size = native  # relative positions may be known up to it only
    notes = settle_output_size(module, spec, size) if check_output else ()
    if fixed is not None:
        only = f"{fixed[0]}x{fixed[1]}"
        notes = (*notes, f"{spec.encoder} takes {only} only; for another size give --model-arg img_size=N")
    return Geometry(stride, size, fixed, notes)
