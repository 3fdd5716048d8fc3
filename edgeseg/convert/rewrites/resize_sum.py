"""A sum of equal Resizes -> one Resize of the sum: FPN's merge of three pyramid levels.

Resize is linear, so resize(a) + resize(b) = resize(a + b): one Resize is left, and the Adds work on the smaller plane.

Precondition: nothing else reads the resized values, which grow by the same rule from planes of the same shape.
Postcondition: no sum holds two such Resizes.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite
from edgeseg.graph.editing import constant_array, dims, emit_sum, maker, nodes, reads, replace, sole_maker
from edgeseg.graph.resize import Resizing, emit_resize, resizing


def _matches(model: ir.Model) -> list[tuple[ir.Node, list[ir.Value]]]:
    sums = []
    for node in nodes(model, "Add"):
        terms = _terms(node.outputs[0])
        readers = list(node.outputs[0].consumers())
        is_inner = len(readers) == 1 and readers[0].op_type == "Add" and len(_terms(readers[0].outputs[0])) > 2
        if not is_inner and any(len(group) > 1 for group in _groups(terms)):
            sums.append((node, terms))
    return sums


def _terms(total: ir.Value) -> list[ir.Value]:
    """The values a chain of Adds of one shape adds up."""
    node = maker(total, "Add")
    if node is None or any(v is None or dims(v) is None or dims(v) != dims(total) for v in node.inputs):
        return [total]
    terms: list[ir.Value] = []
    for value in node.inputs:
        if value is not None:
            terms += _terms(value) if sole_maker(value, "Add") is not None else [value]
    return terms


def _groups(terms: list[ir.Value]) -> list[list[Resizing]]:
    groups: dict[object, list[Resizing]] = {}
    for term in terms:
        resized = resizing(sole_maker(term, "Resize"))
        if resized is not None and resized.can_move and (resized.growth or 0) > 1 and reads(resized.output) == 1:
            groups.setdefault(_rule(resized), []).append(resized)
    return list(groups.values())


def _rule(resized: Resizing) -> object:
    attributes = tuple(sorted((name, str(a.value)) for name, a in resized.node.attributes.items()))
    extents = tuple(None if a is None else tuple(a.tolist()) for a in map(constant_array, resized.node.inputs[1:]))
    return attributes, extents, dims(resized.source)


def _rewrite(node: ir.Node, terms: list[ir.Value]) -> None:
    rest = list(terms)
    sums = []
    for group in _groups(terms):
        if len(group) > 1:
            total = emit_sum(node, [one.source for one in group], shape=group[0].source.shape)
            sums.append(emit_resize(node, total, group[0]))
            rest = [v for v in rest if all(v is not g.output for g in group)]
    replace(node.outputs[0], emit_sum(node, [*sums, *rest], shape=node.outputs[0].shape))


REWRITE = Rewrite(_matches, _rewrite)
