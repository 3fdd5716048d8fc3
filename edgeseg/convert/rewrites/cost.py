"""When moving linear work pays: a rough price list, in multiply-accumulates.

Prices of touching one tensor element instead of doing arithmetic, measured as orders of magnitude in ONNX Runtime
(float and INT8) and the same side of every decision on a GPU, where memory is dearer still. They only have to
rank two forms of the same computation; a close call is left alone.
"""

from __future__ import annotations

RESIZED_ELEMENT = 150
"""Interpolating one output element."""

COPIED_ELEMENT = 40
"""Reading and writing one element, as Concat does."""

ADDED_ELEMENT = 60
"""One element of an Add of two tensors in memory."""

MARGIN = 0.95
"""The new form must cost at most this share of the old one."""


def pays(new: float, old: float) -> bool:
    """True when the new form is clearly cheaper."""
    return new <= MARGIN * old
