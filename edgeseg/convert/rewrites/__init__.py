"""Segmentation-aware graph rewrites, one a file, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgeseg.errors import ExportError


@dataclass(frozen=True)
class Rewrite:
    """A graph rewrite that keeps every output equal.

    Attributes:
        name: for the report.
        apply: changes the graph in place, returns how many times it applied.
        leaves: postcondition: number of places where the pattern still stands although the rewrite handles it.
    """

    name: str
    apply: Callable[[ir.Model], int]
    leaves: Callable[[ir.Model], int]


REWRITES: tuple[Rewrite, ...] = ()


def apply_rewrites(model: ir.Model, rewrites: Sequence[Rewrite]) -> dict[str, int]:
    """Run ``rewrites`` in order on ``model`` in place; return the times each applied, those at 0 left out."""
    applied: dict[str, int] = {}
    for rewrite in rewrites:
        count = rewrite.apply(model)
        if left := rewrite.leaves(model):
            raise ExportError(f"rewrite {rewrite.name} left {left} of its patterns behind; please report the model")
        if count:
            applied[rewrite.name] = count
    return applied
