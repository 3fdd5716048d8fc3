"""What all rewrites have in common: look for matches, rewrite each, tidy up, until none is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir

from edgeseg.errors import ExportError
from edgeseg.graph.editing import matched, tidy

# Each sweep leaves fewer or cheaper operators; deep networks take two or three.
MAX_SWEEPS = 100

Match: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Rewrite:
    """A graph rewrite; its name is that of its file.

    Attributes:
        matches: where it applies: arguments for ``rewrite``. From a generator each is found in the graph as the ones before
            left it; from a list all are found first.
        rewrite: changes the graph at one match; returns for how many it counts in the report, ``None``: one.
    """

    matches: Callable[[ir.Model], Iterable[Match]]
    rewrite: Callable[..., int | None]

    @property
    def name(self) -> str:
        return self.rewrite.__module__.rpartition(".")[2]

    def apply(self, model: ir.Model) -> int:
        """Rewrite ``model`` in place until nothing matches; return how often.

        Raises:
            ExportError: it makes its own pattern again and again.
        """
        count = 0
        for _ in range(MAX_SWEEPS):
            counts = [self.rewrite(*match) for match in self.matches(model)]
            if not counts:
                return count
            count += sum(1 if n is None else n for n in counts)
            tidy(model)
        raise ExportError(f"rewrite {self.name} comes to no end; please report the model")


def each(match: Callable[[ir.Node], Any], *op_types: str) -> Callable[[ir.Model], Iterator[tuple[ir.Node, Any]]]:
    """Matches anchored at one node: those of :func:`~edgeseg.graph.editing.matched`."""
    return lambda model: matched(model, match, *op_types)


# When moving linear work pays: a rough price list, in multiply-accumulates, of touching one tensor element instead of doing
# arithmetic. Measured as orders of magnitude in ONNX Runtime (float and INT8) and the same side of every decision on a GPU,
# where memory is dearer still. They only have to rank two forms of the same computation; a close call is left alone.

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
