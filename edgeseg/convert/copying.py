"""A copy of a user's module to convert: the object itself is never changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from edgeseg.convert.evidence import ReachedError
from edgeseg.convert.geometry import PROBE_SIZES, noise
from edgeseg.errors import SpecError, one_line
from edgeseg.silence import without_warnings


def require_python(module: torch.nn.Module) -> None:
    """Refuse TorchScript, which keeps no Python to export. Raises :class:`SpecError`."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"its part {path} is" if path else "it is"
            raise SpecError(
                f"{type(module).__name__} cannot be exported: {what} TorchScript, which keeps no Python; give the "
                "torch.nn.Module it was made from, or the weights in its state_dict() with arch and encoder"
            )


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Look through DataParallel and torch.compile around a module, which only change how it runs."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = module.module
        if inner is None:
            return module
        module = inner


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU, float32, in evaluation mode, without DataParallel and torch.compile around it or its parts.

    Raises:
        SpecError: it has no weights, or cannot be copied.
    """
    unset = [k for k, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if unset:
        raise SpecError(
            f"{type(module).__name__} is on the meta device and has no weights ({unset[0]}, ...): load them, with "
            "load_state_dict(..., assign=True), or build it on the CPU"
        )
    # What old weight_norm, spectral_norm and prune compute in each forward is no leaf, which deepcopy refuses.
    computed = [
        v for part in module.modules() for v in vars(part).values() if isinstance(v, torch.Tensor) and not v.is_leaf
    ]
    try:
        twin = unwrapped(copy.deepcopy(module, {id(tensor): tensor.detach().clone() for tensor in computed}))
        for name in ("train", "eval"):
            # torch.export puts its own there, which raise: nothing of such a graph depends on the mode any more.
            vars(twin).pop(name, None)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as exc:
        raise SpecError(
            f"{type(module).__name__} cannot be copied ({one_line(exc)}); give the network inside "
            "it, such as module.model"
        ) from exc
    for part in [*twin.modules()]:
        for name, child in part._modules.items():
            part._modules[name] = None if child is None else unwrapped(child)
    twin = twin.cpu().float().eval().requires_grad_(False)
    for part in twin.modules():
        _join_weights(part)
    return twin


def _join_weights(part: torch.nn.Module) -> None:
    """Keep the weight that old weight_norm, spectral_norm and prune compute in each forward in the place of its parts."""
    with without_warnings():
        for hook in [*part._forward_pre_hooks.values()]:
            if isinstance(hook, WeightNorm):
                remove_weight_norm(part, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(part, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]


def require_apart(module: torch.nn.Module, twin: torch.nn.Module, likely_channels: Iterable[int]) -> None:
    """Refuse a copy that runs parts of the module it was made of, where these are in training mode.

    A function put on an object (``model.forward = lambda x: ...``, a hook) goes on calling what it was made with.

    Raises:
        SpecError: it does so.
    """

    def stop(*_: object) -> None:
        raise ReachedError

    training = [part for part in module.modules() if part.training]
    hooks = [part.register_forward_pre_hook(stop) for part in training]
    try:
        for channels in likely_channels if hooks else ():
            with torch.no_grad(), without_warnings():
                twin(noise(channels, PROBE_SIZES[0], PROBE_SIZES[0]))
    except ReachedError:
        raise SpecError(
            f"a function put on {type(module).__name__} (its forward, or a hook) runs the object itself, of which no copy is "
            "made, and it is in training mode: call its eval() first"
        ) from None
    except Exception:  # a user's forward may raise anything: who runs it in earnest says what is wrong
        return
    finally:
        for hook in hooks:
            hook.remove()
