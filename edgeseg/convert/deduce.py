"""Constructor arguments read off a checkpoint's tensors, each guess proven by building the model and comparing shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from edgeseg.convert.architectures import accepted_arguments, default_arguments, without_defaults
from edgeseg.convert.assemble import Assembly, assemble
from edgeseg.convert.fit import deeper_stages, parameter_shapes, translated_shapes
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.silence import without_warnings
from edgeseg.spec import ModelRequest

# A wrong guess of the encoder is no attack: up to here it is built, and told what does not fit.
_SLACK_VALUES = 200_000_000

_BLOCK_OUTPUT = re.compile(r"^decoder\.blocks\.(?:x_0_)?(\d+)\.conv2\.0\.weight$")
_HEAD = "segmentation_head.0.weight"

# The argument that says how many channels the segmentation head reads.
_HEAD_INPUT = {
    "deeplabv3": "decoder_channels",
    "deeplabv3plus": "decoder_channels",
    "pan": "decoder_channels",
    "upernet": "decoder_channels",
    "segformer": "decoder_segmentation_channels",
}


def fitting_request(request: ModelRequest, said: ModelRequest, tensors: Mapping[str, Any]) -> ModelRequest | None:
    """Return the request with input channels, depth and widths as the tensors have them, ``None`` when none fits."""
    own = request.model_args.get("encoder_depth", default_arguments(request.arch or "").get("encoder_depth", 5))
    if (usual := _fitting_at(own, request, said, tensors)) is not None:
        return usual
    others = [_fitting_at(depth, request, said, tensors) for depth in (5, 4, 3, 2, 1) if depth != own]
    fitting = [r for r in others if r is not None]
    # Two depths that both fit are two networks: nothing here tells which was trained.
    return fitting[0] if len(fitting) == 1 else None


def _fitting_at(
    depth: int, request: ModelRequest, said: ModelRequest, tensors: Mapping[str, Any]
) -> ModelRequest | None:
    return next((r for r in _hypotheses(depth, request, said, tensors) if fits(r, tensors)), None)


def fits(request: ModelRequest, tensors: Mapping[str, Any]) -> bool:
    """Whether the model of a request has tensors of exactly these names and shapes (unused deeper stages aside)."""
    try:
        assembly = build_without_memory(request)
    except SpecError:
        return False
    own = parameter_shapes(assembly.module.state_dict())
    theirs = translated_shapes(assembly.module, tensors)
    if assembly.module.classification_head is None:
        theirs = {k: v for k, v in theirs.items() if not k.startswith("classification_head.")}
    surplus = theirs.keys() - own.keys()
    same = all(theirs.get(k) == shape for k, shape in own.items())
    return same and (not surplus or surplus == deeper_stages(assembly.module, assembly.model.encoder, theirs))


def build_without_memory(request: ModelRequest) -> Assembly:
    """Build a request's model on the meta device, where its constructors allow that.

    Raises:
        SpecError: SMP refuses its arguments.
    """
    if not (request.encoder or "").startswith("mit_b"):  # mit computes on values while it is built
        with torch.device("meta"), without_warnings():
            return assemble(request)
    return assemble(request)


def require_fitting_size(request: ModelRequest, tensors: Mapping[str, Any]) -> None:
    """Refuse a model far larger than its checkpoint before memory is taken for it.

    Raises:
        CheckpointError: it has more than twice the checkpoint's values.
        SpecError: SMP refuses its arguments.
    """
    if (request.encoder or "").startswith("mit_b"):
        # Built in memory, it would be too late; it is small itself, so its decoder is counted with another.
        request = replace(request, encoder="resnet18")
    module = build_without_memory(request).module
    needed = sum(t.numel() for t in module.state_dict().values())
    stored = sum(t.numel() for t in tensors.values())
    if needed > 2 * stored + _SLACK_VALUES:
        raise CheckpointError(
            f"the model described has {needed / 1e6:.0f} million values, its checkpoint {stored / 1e6:.1f} million: "
            "it is another model's; check config.json, --encoder and --model-arg"
        )


def _hypotheses(
    depth: int, request: ModelRequest, said: ModelRequest, tensors: Mapping[str, Any]
) -> Iterator[ModelRequest]:
    arch = request.arch or ""
    guessed: dict[str, Any] = {**_widths(arch, tensors), "encoder_depth": depth}
    if "upsampling" not in request.model_args:  # no tensor contradicts one that is known
        if arch == "fpn" and depth > 2:
            guessed["upsampling"] = 2 ** (depth - 3)  # its finest features are at 2**(3 - depth) of the image's size
        elif arch == "pspnet":
            guessed["upsampling"] = 2**depth
    guessed = {k: v for k, v in guessed.items() if k in accepted_arguments(arch)}
    model_args = without_defaults(arch, {**request.model_args, **guessed, **said.model_args})
    hypothesis = replace(request, model_args=model_args)
    yield hypothesis
    stored = None if said.in_channels is not None else _input_channels(hypothesis, tensors)
    if stored is not None and stored != (request.in_channels if request.in_channels is not None else 3):
        yield replace(hypothesis, in_channels=stored)


def _input_channels(request: ModelRequest, tensors: Mapping[str, Any]) -> int | None:
    """Return how many channels the stored first convolution reads, the one that reads the image in the built model."""
    try:
        assembly = build_without_memory(request)
    except SpecError:
        return None
    theirs = translated_shapes(assembly.module, tensors)
    encoder = assembly.module.get_submodule("encoder")
    for name, shape in parameter_shapes(encoder.state_dict()).items():
        if len(shape) == 4:
            stored = theirs.get(f"encoder.{name}", ())
            return stored[1] if len(stored) == 4 and shape[1] == assembly.model.in_channels else None
    return None


def _widths(arch: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's arguments that its tensors' shapes tell; which are defaults is not asked here."""
    shapes = parameter_shapes(tensors)
    head = shapes.get(_HEAD, ())
    widths: dict[str, Any] = {}
    if arch in ("unet", "manet", "unetplusplus"):
        blocks = {int(m[1]): shape[0] for k, shape in shapes.items() if (m := _BLOCK_OUTPUT.match(k))}
        widths["decoder_channels"] = [blocks[i] for i in sorted(blocks)]
        if any(".attention" in k for k in shapes):
            widths["decoder_attention_type"] = "scse"
    if "decoder.center.top_conv.weight" in shapes:
        widths["decoder_pab_channels"] = shapes["decoder.center.top_conv.weight"][0]
    if arch == "fpn" and "decoder.p5.weight" in shapes and len(head) == 4:
        branch = shapes.get("decoder.seg_blocks.0.block.0.block.0.weight", (0,))[0]
        widths["decoder_pyramid_channels"] = shapes["decoder.p5.weight"][0]
        widths["decoder_segmentation_channels"] = branch
        widths["decoder_merge_policy"] = "cat" if head[1] == 4 * branch else "add"
    if arch == "pspnet" and len(head) == 4:
        widths["psp_out_channels"] = head[1]
    if arch in _HEAD_INPUT and len(head) == 4:
        widths[_HEAD_INPUT[arch]] = head[1]
    if arch in ("deeplabv3", "deeplabv3plus"):
        widths["decoder_aspp_separable"] = any(re.search(r"\.convs\.1\.0\.0\.weight$", k) for k in shapes)
    if not any(k.startswith("decoder.") and k.endswith(".running_mean") for k in shapes):
        widths["decoder_use_norm"] = False
    return widths


def differences(before: ModelRequest, after: ModelRequest) -> dict[str, str]:
    """Return what ``after`` has otherwise, as ``{option: value}`` for the command line."""
    changed: dict[str, str] = {}
    if before.encoder != after.encoder:
        changed["--encoder"] = str(after.encoder)
    if (before.in_channels or 3) != (after.in_channels or 3):
        changed["--in-channels"] = str(after.in_channels)
    defaults = default_arguments(after.arch or "")
    for name in sorted(before.model_args.keys() | after.model_args.keys()):
        old, new = (
            json.dumps(r.model_args.get(name, defaults.get(name)), separators=(",", ":")) for r in (before, after)
        )
        if old != new:
            changed[f"--model-arg {name}"] = new
    return changed


def as_options(changed: Mapping[str, str]) -> str:
    """``--in-channels 8 --model-arg 'decoder_channels=[64,32]'``: options that can be pasted into a shell."""
    words = []
    for option, value in changed.items():
        flag, _, name = option.partition(" ")
        pair = f"{name}={value.strip(chr(34))}" if name else value
        words.append(f"{flag} '{pair}'" if "[" in pair else f"{flag} {pair}")
    return " ".join(words)
