"""Bring a checkpoint's tensors into a model: strip prefixes, load, and explain what does not fit."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from edgeseg.convert.architectures import import_for_conversion
from edgeseg.convert.checkpoint import Checkpoint
from edgeseg.convert.leftovers import refuse_reparametrized, without_wrappers
from edgeseg.errors import CheckpointError
from edgeseg.silence import without_warnings
from edgeseg.spec import ModelSpec

Shapes: TypeAlias = dict[str, tuple[int, ...]]

# The last convolution before the mask: its first dimension is the number of classes.
_CLASS_LAYERS = ("segmentation_head.0.weight", "segmentation_head.head.4.weight")

_MODEL_PARTS = ("encoder.", "decoder.", "segmentation_head.", "classification_head.")

# A key that only one architecture's decoder has, in the spelling of SMP 0.6.0 (and, second, of 0.2 to 0.4).
ARCH_MARKERS: tuple[tuple[str, str], ...] = (
    ("unetplusplus", r"^decoder\.blocks\.x_0_0\."),
    ("manet", r"^decoder\.center\.query_conv\.|^decoder\.center\.top_conv\."),
    ("linknet", r"^decoder\.blocks\.0\.block\."),
    ("fpn", r"^decoder\.seg_blocks\."),
    ("pan", r"^decoder\.fpa\."),
    ("upernet", r"^decoder\.fpn_lateral_blocks\.|^decoder\.fpn_stages\."),
    ("pspnet", r"^decoder\.psp\."),
    ("deeplabv3plus", r"^decoder\.block2\."),
    ("deeplabv3", r"^decoder\.aspp\.convs\.|^decoder\.0\.convs\."),
    ("segformer", r"^decoder\.mlp_stage\."),
    ("dpt", r"^decoder\.projection_blocks\.|^decoder\.reassemble_blocks\.|^decoder\.fusion_blocks\."),
    ("unet", r"^decoder\.blocks\.0\.conv1\."),
)


class MisfitError(CheckpointError):
    """The tensors are not those of the model; the message says how they differ."""


@dataclass(frozen=True)
class NamedTensors:
    """A checkpoint's tensors under the names an SMP model uses.

    Attributes:
        tensors: keys as in ``model.state_dict()``.
        outside: tensors of the file that belong to something else (losses, metrics, a second copy).
        notes: what was stripped and dropped.
    """

    tensors: dict[str, torch.Tensor]
    outside: dict[str, torch.Tensor]
    notes: tuple[str, ...]


def strip_prefixes(checkpoint: Checkpoint) -> NamedTensors:
    """Find the SMP model among the keys, whatever wrapped it: ``model.``, ``module.``, ``net.``, ``_orig_mod.``, ...

    Raises:
        CheckpointError: there is no segmentation model among the keys, or several that cannot be told apart.
    """
    tensors, cleaned = without_wrappers(checkpoint.tensors)
    notes = list(cleaned)
    ends = ((key, layer) for key in tensors for layer in _CLASS_LAYERS)
    prefixes = [key.removesuffix(layer) for key, layer in ends if f".{key}".endswith(f".{layer}")]
    if not prefixes:
        refuse_reparametrized(checkpoint.path, tensors)
        raise CheckpointError(_no_head(checkpoint, tensors))
    prefix = _preferred(prefixes)
    others = [p for p in prefixes if p != prefix]
    if others:
        notes.append(
            f"the checkpoint holds {len(prefixes)} models; {prefix or 'the one without a prefix'} is used, "
            f"{', '.join(o or 'the one without a prefix' for o in others)} dropped"
        )
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    outside = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    if prefix:
        notes.append(f"stripped {prefix!r} from the checkpoint's keys")
    else:
        # Without a prefix, what belongs to something else can only be told by name.
        outside = {k: v for k, v in inside.items() if not k.startswith(_MODEL_PARTS)}
        inside = {k: v for k, v in inside.items() if k not in outside}
    refuse_reparametrized(checkpoint.path, inside)
    rest = [k for k in outside if not any(o and k.startswith(o) for o in others)]
    if rest:
        notes.append(f"dropped {_count(len(rest), 'tensor')} outside the model ({', '.join(sorted(rest)[:3])})")
    return NamedTensors(inside, outside, tuple(notes))


def _preferred(prefixes: list[str]) -> str:
    """The trained model rather than a teacher or an average kept beside it: the plainest name, then the shortest."""
    plain = ["", "model.", "module.", "net.", "network.", "module.model.", "model.module.", "model.model."]
    return min(prefixes, key=lambda p: (plain.index(p) if p in plain else len(plain), len(p), p))


def _no_head(checkpoint: Checkpoint, tensors: Mapping[str, object]) -> str:
    shown = ", ".join(list(tensors)[:3])
    if any("classifier" in k or k.startswith(("fc.", "head.")) for k in tensors):
        what = "looks like a classifier or another library's model"
    elif all(not k.startswith("decoder.") for k in tensors):
        what = "looks like an encoder only"
    else:
        what = "has no segmentation head"
    return (
        f"{checkpoint.path} holds {_count(len(tensors), 'tensor')} but no SMP segmentation model: it {what} "
        f"({shown[:120]}); give the state dict of the whole model"
    )


def checkpoint_classes(tensors: Mapping[str, torch.Tensor]) -> int | None:
    """Return the number of classes its segmentation head has."""
    for layer in _CLASS_LAYERS:
        if layer in tensors and tensors[layer].dim() == 4:
            return int(tensors[layer].shape[0])
    return None


def guess_arch(keys: Iterable[str]) -> str | None:
    """Return the architecture whose decoder has these keys, ``None`` when no marker is found."""
    listed = list(keys)
    for arch, marker in ARCH_MARKERS:
        if any(re.search(marker, key) for key in listed):
            return arch
    return None


def parameter_shapes(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return names and shapes; BatchNorm's counters, which some savers leave out, do not count."""
    return {k: tuple(t.shape) for k, t in tensors.items() if not k.endswith("num_batches_tracked")}


def translated_shapes(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the tensors' shapes under the names of this version; the module keeps the values it has."""
    # SMP translates names of older versions in place, in load_state_dict, before it compares. Meta tensors have no
    # values to load, and strict because SMP takes mismatched tensors out of the dictionary otherwise.
    renamed = {k: t.to("meta") for k, t in tensors.items()}
    with without_warnings(), contextlib.suppress(RuntimeError, KeyError, AttributeError, NotImplementedError):
        module.load_state_dict(renamed, strict=True)
    return parameter_shapes(renamed)


def deeper_stages(module: torch.nn.Module, encoder: str, names: Iterable[str]) -> set[str]:
    """Return those of the names that belong to stages of the encoder beyond the depth it was built with.

    SMP 0.4 and older kept such stages of some encoders in the model, and in its checkpoints, without using them.
    """
    smp = import_for_conversion("segmentation_models_pytorch")
    built: Any = module.encoder
    device = "cpu" if encoder.startswith("mit_b") else "meta"
    with torch.device(device), without_warnings():
        whole = smp.encoders.get_encoder(encoder, in_channels=built._in_channels, depth=5, weights=None)
    deeper = {f"encoder.{k}" for k in whole.state_dict()} - {f"encoder.{k}" for k in built.state_dict()}
    return deeper & set(names)


def load_tensors(
    module: torch.nn.Module, named: NamedTensors, checkpoint: Checkpoint, model: ModelSpec
) -> tuple[str, ...]:
    """Copy the tensors into the model, in its float32, and check that every value is finite.

    Returns:
        notes.

    Raises:
        MisfitError: missing, unexpected or mismatched tensors.
        CheckpointError: integers among the weights, or NaN and Inf among the values.
    """
    own = module.state_dict()
    translated: dict[str, torch.Tensor] = dict(named.tensors)
    floats = {k for k, t in own.items() if t.is_floating_point()}
    integers = [k for k, t in translated.items() if k in floats and not t.is_floating_point()]
    if integers:
        raise CheckpointError(
            f"{checkpoint.path}: {_names(integers)} hold integers, {model.arch} with encoder {model.encoder} has floats: "
            "quantized? give the float ones"
        )
    notes: list[str] = []
    try:
        with without_warnings():
            # It translates the names in place, then compares: what it leaves is what gets compared below.
            module.load_state_dict(translated, strict=True)
    except (RuntimeError, KeyError, AttributeError) as exc:
        surplus = translated.keys() - own.keys()
        deeper = deeper_stages(module, model.encoder, translated) if surplus else set()
        if (
            not surplus
            or surplus != deeper
            or not parameter_shapes(own).items() <= parameter_shapes(translated).items()
        ):
            raise MisfitError(_differences(translated, module)) from exc
        with without_warnings():
            module.load_state_dict({k: t for k, t in translated.items() if k not in deeper}, strict=True)
        notes.append(f"dropped {_count(len(deeper), 'tensor')} of deeper encoder stages, which the model does not use")
    require_finite(module, str(checkpoint.path))
    kinds = {str(t.dtype).removeprefix("torch.") for t in named.tensors.values() if t.is_floating_point()} - {"float32"}
    if kinds:
        notes.append(f"weights cast from {' and '.join(sorted(kinds))} to float32")
    return tuple(notes)


def require_finite(module: torch.nn.Module, what: str) -> None:
    """Raise :class:`CheckpointError` when a parameter or buffer holds NaN or Inf, naming the tensors."""
    bad = [k for k, t in module.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckpointError(
            f"{what} has NaN or Inf in {_count(len(bad), 'tensor')} ({_names(bad)}): training diverged, or an overflow "
            "in float16; give an earlier checkpoint"
        )


def _differences(given: Mapping[str, torch.Tensor], module: torch.nn.Module) -> str:
    own, theirs = parameter_shapes(module.state_dict()), parameter_shapes(given)
    groups = {
        "missing": own.keys() - theirs.keys(),
        "unexpected": theirs.keys() - own.keys(),
        "of another shape": {k for k in own.keys() & theirs.keys() if own[k] != theirs[k]},
    }
    return ", ".join(f"{len(keys)} {word} ({_by_module(keys)})" for word, keys in groups.items() if keys)


def _by_module(keys: Iterable[str]) -> str:
    """``encoder.layer3: 12, decoder.blocks: 4``: tensors per module, the most affected first."""
    counts = Counter(".".join(k.split(".")[:2]) if k.count(".") > 1 else k for k in keys)
    common = counts.most_common(3)
    more = len(counts) - len(common)
    return ", ".join(f"{name}: {n}" for name, n in common) + (f", {more} more" if more else "")


def _names(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
