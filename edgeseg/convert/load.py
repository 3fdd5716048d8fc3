"""Load a model with its weights and everything that is known about it: what can be said before torch is imported.

The user's words win; what they left open is read from the checkpoint, else defaulted, and every assumption becomes
a note. Nothing asked for is silently changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeseg.convert import architectures
from edgeseg.convert.hub import refuse_early
from edgeseg.convert.loaded import ImageSource, LoadedModel, no_images
from edgeseg.spec import ModelRequest

if TYPE_CHECKING:
    import torch


def load_model(request: ModelRequest, images: ImageSource = no_images) -> LoadedModel:
    """Load the model a request describes; ``images`` of its kind tell the normalization of one that records none.

    Raises:
        SpecError: unknown or impossible architecture, encoder or arguments; options that contradict the checkpoint.
        CheckpointError: weights that cannot be read, do not fit, are not finite, or cannot be fetched.
        MissingDependencyError: torch or SMP is not installed.
    """
    weights = request.weights
    if weights == "imagenet" and not Path(weights).exists():
        arch = architectures.require_arch(request.arch)
        refuse_early(request.encoder or architectures.default_encoder(arch))
    architectures.import_for_conversion("torch")
    architectures.import_smp()
    from edgeseg.convert.sources import load_from_source

    return load_from_source(request, images)


def wrap_module(
    module: torch.nn.Module,
    request: ModelRequest,
    images: ImageSource = no_images,
    size: tuple[int, int] | None = None,
) -> LoadedModel:
    """Describe a user's module as a loaded one; see :func:`edgeseg.convert.wrap.wrap_module`.

    Raises:
        MissingDependencyError: SMP is not installed.
    """
    architectures.import_smp()
    from edgeseg.convert import wrap

    return wrap.wrap_module(module, request, images, size)
