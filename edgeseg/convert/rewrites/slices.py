"""Slices that partition an axis -> one Split.

``x[:, :1]`` and ``x[:, 1:]`` read the same value twice; TensorRT's parser makes 27 layers (shape arithmetic) of
each Slice and one of each output of a Split.

Precondition: two or more Slices of one value, each along one and the same axis of static size, step 1, constant
bounds, that cover the axis without gap or overlap. Postcondition: no such set is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite
from edgeseg.graph.editing import dims, emit, nodes, replace, slice_bounds, weight


@dataclass(frozen=True)
class _Piece:
    node: ir.Node
    axis: int
    start: int
    end: int


def _matches(model: ir.Model) -> list[tuple[list[_Piece]]]:
    groups: dict[tuple[ir.Value, int], dict[tuple[int, int], _Piece]] = {}
    for node in nodes(model, "Slice"):
        piece = _piece(node)
        if piece is not None and node.inputs[0] is not None:
            groups.setdefault((node.inputs[0], piece.axis), {}).setdefault((piece.start, piece.end), piece)
    result = []
    for (value, axis), by_bounds in groups.items():
        pieces = [by_bounds[bounds] for bounds in sorted(by_bounds)]
        size = (dims(value) or ())[axis]
        edges = [0, *(p.end for p in pieces)]
        if len(pieces) > 1 and edges[-1] == size and all(p.start == e for p, e in zip(pieces, edges, strict=False)):
            result.append((pieces,))
    return result


def _piece(node: ir.Node) -> _Piece | None:
    start, end, axis, step = slice_bounds(node) or (0, 0, 0, 0)
    size = (dims(node.inputs[0]) or (None,))[axis]
    if size is None or step != 1:
        return None
    start, end = (min(max(v + size if v < 0 else v, 0), size) for v in (start, end))
    return _Piece(node, axis, start, end) if end > start else None


def _rewrite(pieces: list[_Piece]) -> int:
    """Returns how many Slices became a Split's output."""
    first = pieces[0].node
    sizes = [p.end - p.start for p in pieces]
    # the earliest node of the set may not be the first piece
    before = next(node for node in first.graph or () if node in {piece.node for piece in pieces})
    inputs = [first.inputs[0], weight(before, np.array(sizes, np.int64), "split_sizes")]
    head = emit(before, "Split", inputs, {"axis": pieces[0].axis}, outputs=len(pieces))
    split = head.producer()
    assert split is not None
    for piece, output in zip(pieces, split.outputs, strict=True):
        replace(piece.node.outputs[0], output)
    return len(pieces)


REWRITE = Rewrite(_matches, _rewrite)
