"""The most likely reason why a checkpoint does not fit a model, as advice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

import torch

from edgeseg.convert.architectures import accepted_arguments, import_for_conversion
from edgeseg.convert.fit import Shapes, guess_arch, parameter_shapes
from edgeseg.silence import without_warnings

# Enough to tell a family apart without building all of timm's 1300 models for an error message.
_TIMM_SAMPLE = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2_100", "mobilenetv3_large_100"),
    *("mobilenetv3_small_100", "efficientnet_b0", "tf_efficientnet_lite0", "convnext_tiny", "regnety_008"),
)
_MAX_BUILDS = 14
_OWN_MODULE = "load the weights into your own module and give that to edgeseg.build(model=...)"


def likely_cause(given: Mapping[str, torch.Tensor], own: Shapes, arch: str, encoder: str, depth: int) -> str:
    """Return advice such as ``"its encoder is that of resnet50: give --encoder resnet50"``, or ``""``."""
    theirs = parameter_shapes(given)
    guessed = guess_arch(theirs)
    if guessed is not None and guessed != arch:
        return f"its decoder is that of {guessed}: give --arch {guessed}"
    missing = own.keys() - theirs.keys()
    changed = {k for k in own.keys() & theirs.keys() if own[k] != theirs[k]}
    if missing and not changed and all(k.endswith((".running_mean", ".running_var")) for k in missing):
        return (
            "it holds parameters without BatchNorm's running_mean and running_var: save model.state_dict(), which has "
            "both, not model.parameters()"
        )
    wrong = missing | changed | (theirs.keys() - own.keys())
    if any(
        k.startswith("segmentation_head.") and _differs_by_more_than_input(own.get(k), theirs.get(k)) for k in wrong
    ):
        return f"its segmentation head is not SMP's: {_OWN_MODULE}"
    if not missing and not changed:
        added = ", ".join(sorted(wrong)[:2])
        return (
            f"the model's own tensors are all there: if what training added ({added}, ...) does not take part in the result, "
            f"delete it from the state dict, else {_OWN_MODULE}"
        )
    inside = {k for k in wrong if k.startswith("encoder.")}
    if inside:
        return _input_cause(inside, own, theirs) or _encoder_cause(theirs, encoder, depth)
    return _decoder_cause(wrong, own, arch)


def _differs_by_more_than_input(mine: tuple[int, ...] | None, stored: tuple[int, ...] | None) -> bool:
    # A decoder built with other arguments hands the head another number of channels.
    return mine is None or stored is None or (mine[:1], mine[2:]) != (stored[:1], stored[2:])


def _input_cause(wrong: set[str], own: Shapes, theirs: Shapes) -> str:
    both = [k for k in wrong if k in own and k in theirs]
    if len(both) != len(wrong):
        return ""
    if len(wrong) == 1 and len(own[both[0]]) == len(theirs[both[0]]) == 4:
        mine, stored = own[both[0]], theirs[both[0]]
        if (mine[0], *mine[2:]) == (stored[0], *stored[2:]):
            return f"it takes {stored[1]} input channels: give --in-channels {stored[1]}"
    tables = [k for k in both if k.endswith("pos_embed")]
    if tables and len(wrong) == len(tables):
        patch = theirs.get(tables[0].replace("pos_embed", "patch_embed.proj.weight"), ())
        return _image_size_cause(theirs[tables[0]], patch[2:])
    return ""


def _image_size_cause(shape: tuple[int, ...], patch: tuple[int, ...]) -> str:
    # (1, tokens + 0..5 prefix tokens, width): trained at another image size.
    for prefix in (1, 0, 2, 5):
        side = math.isqrt(max(shape[1] - prefix, 0))
        if side > 0 and side * side == shape[1] - prefix and len(set(patch)) == 1:
            size = side * patch[0]
            return f"its position embedding is for images of {size}x{size}: give --model-arg img_size={size}"
    return "its position embedding is for another image size: give --model-arg img_size=[HEIGHT,WIDTH]"


def matching_encoders(theirs: Shapes) -> list[str]:
    """Return the encoders whose tensors have the names and shapes of the stored ones (the first convolution aside).

    Several are twins that compute otherwise: timm's ``efficientnet_b0`` and ``tf_efficientnet_b0``, say.
    """
    stored = _encoder_shapes(theirs)
    if not stored:
        return []
    candidates = _candidates(stored, "")
    for depth in (5, 4, 3):
        likeness = {name: _similarity(shapes, stored) for name, shapes in _built(candidates, depth)}
        exact = [name for name, alike in likeness.items() if alike == 1.0]
        nearest = max(likeness, key=lambda name: likeness[name], default="")
        if not exact and nearest.startswith("tu-"):
            exact = _exactly([n for n in _relatives(nearest) if n not in likeness], stored, depth)
        if exact and exact[0].startswith("tu-"):
            base = exact[0].removeprefix("tu-").removeprefix("tf_")
            twins = import_for_conversion("timm").list_models(f"*{base}*")
            exact += _exactly([f"tu-{n}" for n in twins if f"tu-{n}" not in exact], stored, depth)
        if exact or not likeness:
            return exact
    return []


def _exactly(names: list[str], stored: Shapes, depth: int) -> list[str]:
    """Those of the encoders whose tensors are like the stored ones throughout."""
    return [name for name, shapes in _built(names, depth) if _similarity(shapes, stored) == 1.0]


def _encoder_shapes(theirs: Shapes) -> Shapes:
    return {k.removeprefix("encoder."): v for k, v in theirs.items() if k.startswith("encoder.")}


def _candidates(stored: Shapes, encoder: str) -> list[str]:
    return _timm_candidates(encoder) if any(k.startswith("model.") for k in stored) else _smp_candidates(stored)


def _encoder_cause(theirs: Shapes, encoder: str, depth: int) -> str:
    stored = _encoder_shapes(theirs)
    if not stored:
        return "it holds no encoder"
    best, score = "", 0.0
    for name, shapes in _built(_candidates(stored, encoder), depth):
        alike = _similarity(shapes, stored)
        if alike == 1.0 and name != encoder:
            return f"its encoder is that of {name}: give --encoder {name}"
        if alike > score:
            best, score = name, alike
    if best == encoder:
        return f"its encoder is {encoder} with other tensors than SMP's, changed in training or of an older timm: {_OWN_MODULE}"
    if score > 0.6:
        return f"its encoder is not {encoder}; the nearest known is {best}"
    return f"its encoder is not {encoder}: give --encoder as in training"


def _smp_candidates(stored: Shapes) -> list[str]:
    """The encoders of the family (SMP's encoder class) whose smallest member is most like the stored one."""
    encoders: Mapping[str, Mapping[str, Any]] = import_for_conversion("segmentation_models_pytorch").encoders.encoders
    families: dict[type, list[str]] = {}
    for name, entry in encoders.items():
        families.setdefault(entry["encoder"], []).append(name)
    overlap = {
        names[0]: len(shapes.keys() & stored.keys()) / len(shapes.keys() | stored.keys())
        for names in families.values()
        for _, shapes in _built(names[:1], 5)
    }
    nearest = max(overlap, key=lambda name: overlap[name])
    return next(names for names in families.values() if names[0] == nearest) if overlap[nearest] else []


def _timm_candidates(encoder: str) -> list[str]:
    relatives = _relatives(encoder) if encoder.startswith("tu-") else []
    return [*dict.fromkeys([*(f"tu-{n}" for n in _TIMM_SAMPLE), *relatives])][: 2 * _MAX_BUILDS]


def _relatives(encoder: str) -> list[str]:
    """A few timm encoders of the family of ``tu-NAME``, those first whose names are most alike."""
    timm = import_for_conversion("timm")
    base = encoder.removeprefix("tu-").split(".")[0]
    stem = re.split(r"[\d_]", base)[0]
    names = timm.list_models(f"{stem}*") if len(stem) > 2 else []
    alike = sorted(names, key=lambda name: SequenceMatcher(None, name, base).ratio(), reverse=True)
    return [f"tu-{n}" for n in alike[:_MAX_BUILDS]]


def _built(names: list[str], depth: int) -> Iterator[tuple[str, Shapes]]:
    """Names and tensor shapes of encoders, built without memory where their constructors allow."""
    smp = import_for_conversion("segmentation_models_pytorch")
    for name in names:
        for device in ("meta", "cpu"):
            try:
                with torch.device(device), without_warnings():
                    module = smp.encoders.get_encoder(name, in_channels=3, depth=depth, weights=None)
            except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError):
                continue  # mit encoders compute on values while they are built, which meta tensors have not
            yield name, parameter_shapes(module.state_dict())
            break


def _similarity(candidate: Shapes, stored: Shapes) -> float:
    """Share of tensors with the same name and shape; another number of input channels counts as the same."""
    keys = candidate.keys() | stored.keys()
    pairs = [(candidate.get(k), stored.get(k)) for k in keys]
    return sum(1 for mine, other in pairs if mine == other or _first_convolution(mine, other)) / len(keys)


def _first_convolution(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is not None and b is not None and len(a) == len(b) == 4 and a[1] == 3 and (a[0], *a[2:]) == (b[0], *b[2:])


def _decoder_cause(wrong: set[str], own: Shapes, arch: str) -> str:
    if any(".attention" in k for k in wrong - own.keys()):
        return "it has attention blocks: give --model-arg decoder_attention_type=scse"
    decoder = ", ".join(a for a in accepted_arguments(arch) if a.startswith(("decoder_", "psp_")))
    return f"its decoder was built with other arguments: give them with --model-arg ({decoder})" if decoder else ""
