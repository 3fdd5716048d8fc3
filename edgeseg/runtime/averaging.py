"""Several answers to one image, averaged: test-time augmentation, ensembles.

The probabilities are averaged, not the logits: an answer that is certain does not outweigh the others by how certain it is.
The image is turned and mirrored as the engine takes it, fitted and padded, as wrappers around a model do it (ttach's
``flip_transform`` and ``d4_transform`` over a model that ends in its activation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import choice
from edgeseg.backends import Session
from edgeseg.closing import Closing
from edgeseg.errors import SpecError
from edgeseg.runtime.scores import ScoreRule
from edgeseg.spec import InputSpec, PipelineSpec

Augmentation: TypeAlias = Literal["flips", "d4"]
AUGMENTATION = choice(get_args(Augmentation))

# Quarter turns, and whether the result is mirrored: mirroring in both directions is half a turn.
_VIEWS: dict[Augmentation | None, tuple[tuple[int, bool], ...]] = {
    None: ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}


class AveragedSession(Closing):
    """Engines of one contract that answer as one, with probabilities.

    Args:
        sessions: closed with this one.
        specs: the contract of each.
        names: of each, for messages.
        augmentation: views of each image; ``None`` for the image alone.

    Attributes:
        spec: the contract of all as one; see :func:`averaged_spec`, which says what is raised.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        specs: Sequence[PipelineSpec],
        names: Sequence[str],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.spec = averaged_spec(specs, augmentation, names)
        self._sessions = tuple(sessions)
        self._rules = tuple(ScoreRule.of(spec) for spec in specs)
        self._kinds = tuple(spec.output.kind for spec in specs)
        self._views = _VIEWS[augmentation]

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        """Run a batch, ``(N, H, W, C)``: the means of ``probabilities`` and, where all give them, ``aux_logits``."""
        totals: dict[str, NDArray[np.float32]] = {}
        answers = 0
        for turns, mirrored in self._views:
            seen = np.rot90(images, turns, axes=(1, 2))
            seen = np.ascontiguousarray(seen[:, :, ::-1] if mirrored else seen)
            for session, rule, kind in zip(self._sessions, self._rules, self._kinds, strict=True):
                outputs = session.run(seen)
                turned = np.stack([rule.probabilities(scores) for scores in outputs[kind]])
                upright = np.rot90(turned[..., ::-1] if mirrored else turned, -turns, axes=(2, 3))
                for name, array in (("probabilities", upright), ("aux_logits", outputs.get("aux_logits"))):
                    if array is not None:
                        totals[name] = totals[name] + array if name in totals else array.astype(np.float32)
                answers += 1
        return {name: np.ascontiguousarray(total / np.float32(answers)) for name, total in totals.items()}

    def close(self) -> None:
        """Close every session."""
        for session in self._sessions:
            session.close()


def averaged_spec(
    specs: Sequence[PipelineSpec], augmentation: Augmentation | None, names: Sequence[str]
) -> PipelineSpec:
    """The contract of an :class:`AveragedSession`: that of the first engine, with probabilities.

    Args:
        specs: of the engines.
        augmentation: ``None``, ``flips`` or ``d4``.
        names: of the engines, for messages.

    Raises:
        SpecError: an engine returns masks; engines differ in what they take or say; the engine's input cannot be turned.
    """
    first = specs[0]
    for spec, name in zip(specs, names, strict=True):
        if spec.output.kind == "mask":
            raise SpecError(
                f"{name} returns masks, and only scores can be averaged; build it with output kind probabilities"
            )
        for what in ("classes", "class_names", "task"):
            _require_same(getattr(first.model, what), getattr(spec.model, what), what.replace("_", " "), names[0], name)
        for field in fields(InputSpec):
            ours, theirs = getattr(first.input, field.name), getattr(spec.input, field.name)
            _require_same(ours, theirs, field.name.replace("_", " "), names[0], name)
        _require_same(first.output.threshold, spec.output.threshold, "threshold", names[0], name)
    if augmentation == "d4" and not _is_square(first.input):
        raise SpecError(
            f"d4 turns images by 90 degrees, which an input of {first.input.height}x{first.input.width} does not take; use "
            "flips, or an engine of a square size"
        )
    return replace(first, output=replace(first.output, kind="probabilities"))


def _is_square(given: InputSpec) -> bool:
    sizes = [(given.height, given.width)]
    if given.dynamic_size:
        sizes = [size for size in (given.min_size, given.max_size) if size is not None]
    return all(height == width for height, width in sizes)


def _require_same(ours: object, theirs: object, what: str, our_name: str, their_name: str) -> None:
    if ours != theirs:
        raise SpecError(
            f"engines differ in their {what}: {our_name} has {ours}, {their_name} has {theirs}; averages need the same"
        )
