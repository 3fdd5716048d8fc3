"""What training tools leave in a state dict: harmless things are dropped, the rest is named with the call that removes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from edgeseg.errors import CheckpointError

Value = TypeVar("Value")

# Modules that wrap another and put their name into its keys.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_fsdp_wrapped_module.": "FSDP",
}
_PARALLEL = re.compile(r"(^|\.)(encoder|decoder|segmentation_head|classification_head)\.module\.")

# Buffers that only watch: without them the network is the same.
_WATCHERS = (
    ("thop's counters", re.compile(r"(^|\.)total_(ops|params)$")),
    (
        # torch.ao and PT2E; NVIDIA's pytorch-quantization and Model Optimizer; NNCF.
        "fake-quantizers of quantization-aware training; the weights are used as floats (edgeseg.build(module) in Python takes "
        "their scales)",
        re.compile(
            r"(^|\.)((activation_post_process(_\d+)?|weight_fake_quant)\.|_?(input|weight|output)_quantizer\.|__nncf_hooks\.)"
        ),
    ),
)

# Tensors from which the weights would have to be computed first, and what does that.
_REPARAMETRIZED = (
    (
        re.compile(r"\.lora_|\.base_layer\."),
        "LoRA adapters",
        "save the state dict of what model.merge_and_unload() returns",
    ),
    (
        re.compile(r"\.\w+_mask$"),
        "pruning masks",
        'call torch.nn.utils.prune.remove(module, "weight") on each pruned module, and save the state dict again',
    ),
    (
        re.compile(r"\.parametrizations\.\w+\."),
        "parametrized weights",
        'call torch.nn.utils.parametrize.remove_parametrizations(module, "weight") on each such module, and save the '
        "state dict again",
    ),
    (
        re.compile(r"\.weight_[gv]$"),
        "weight normalization",
        "call torch.nn.utils.remove_weight_norm(module) on each such module, and save the state dict again",
    ),
    (
        re.compile(r"\.weight_[uv]$|\.weight_orig$"),
        "spectral normalization",
        "call torch.nn.utils.remove_spectral_norm(module) on each such module, and save the state dict again",
    ),
)


def without_wrappers(tensors: Mapping[str, Value]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the tensors without wrappers' names in their keys and without watchers' buffers, and notes."""
    notes: list[str] = []
    cleaned = dict(tensors)
    for name, tool in _WRAPPERS.items():
        if any(name in key for key in cleaned):
            cleaned = {key.replace(name, ""): value for key, value in cleaned.items()}
            notes.append(f"stripped '{name}' ({tool}) from the checkpoint's keys")
    if any(_PARALLEL.search(key) for key in cleaned):
        cleaned = {_PARALLEL.sub(r"\1\2.", key): value for key, value in cleaned.items()}
        notes.append("stripped '.module.' (DataParallel of a part) from the checkpoint's keys")
    for what, pattern in _WATCHERS:
        watchers = [key for key in cleaned if pattern.search(key)]
        if watchers:
            cleaned = {key: value for key, value in cleaned.items() if key not in set(watchers)}
            notes.append(f"dropped {len(watchers)} tensors: {what}")
    return cleaned, tuple(notes)


def refuse_reparametrized(path: Path, names: Mapping[str, object]) -> None:
    """Raise :class:`CheckpointError` when weights are kept in parts (LoRA, pruning, weight norm); say what joins them."""
    for pattern, what, advice in _REPARAMETRIZED:
        parts = [name for name in names if pattern.search(f".{name}")]
        if parts:
            raise CheckpointError(f"{path} holds {what} ({parts[0][:80]} and {len(parts) - 1} more): {advice}")
