"""Attention's ``qkv.reshape(B, N, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)`` -> split first, reshape each part.

Reshape + Transpose + Split + three Squeezes become Split + three times (Reshape + Transpose); the key's own
transposition then joins its Transpose. The values are the same, moved only.

Precondition: Squeeze(Split(Transpose(Reshape(x)))) where the split axis has as many parts as its size and is,
before the Transpose, the first factor of x's last axis. Postcondition: no such Split is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite, each
from edgeseg.graph.editing import constant_array, dims, emit, given, replace, sole_maker, sole_reader, weight


def _match(split: ir.Node) -> tuple[ir.Node, ir.Node, list[ir.Node]] | None:
    transpose = sole_maker(split.inputs[0], "Transpose")
    reshape = sole_maker(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or reshape.inputs[0] is None:
        return None
    before, after = dims(reshape.inputs[0]), dims(reshape.outputs[0])
    axis = split.attributes.get_int("axis", 0)
    if before is None or after is None or constant_array(reshape.inputs[1]) is None:
        return None
    # x's last axis becomes axes factor, factor + 1, ...; those before it must be kept as they are
    factor = len(before) - 1
    source = transpose.attributes.get_ints("perm", ())[axis % len(after)]
    if len(after) <= len(before) or source != factor or after[factor] != len(split.outputs):
        return None
    if before[:factor] != after[:factor] or None in after[factor:] or None in (*before[1:], *after[1:]):
        return None
    squeezes = []
    for part in split.outputs:
        squeeze = sole_reader(part, "Squeeze")
        axes = constant_array(squeeze.inputs[1]) if squeeze is not None else None
        if squeeze is None or axes is None or [int(a) % len(after) for a in axes] != [axis % len(after)]:
            return None
        squeezes.append(squeeze)
    return reshape, transpose, squeezes


def _rewrite(split: ir.Node, match: tuple[ir.Node, ir.Node, list[ir.Node]]) -> None:
    reshape, transpose, squeezes = match
    value, after = given(reshape), dims(reshape.outputs[0]) or ()
    leading = list(value.shape or ())[:-1]
    factor, parts = len(leading), len(split.outputs)
    inner = [d or 0 for d in after[factor + 1 :]]
    size = int(np.prod(inner))
    sizes = weight(split, np.full(parts, size, np.int64), "split_sizes")
    head = emit(split, "Split", [value, sizes], {"axis": factor}, outputs=parts)
    node = head.producer()
    assert node is not None
    # 0 copies a leading dimension (a dynamic batch too)
    target = weight(split, np.array([0] * factor + inner, np.int64), "head_shape")
    perm = [p - (p > factor) for p in transpose.attributes.get_ints("perm", ()) if p != factor]
    shape: list[Any] = [*leading, *inner]
    for part, squeeze in zip(node.outputs, squeezes, strict=True):
        part.shape = ir.Shape([*leading, size])
        heads = emit(split, "Reshape", [part, target], shape=shape)
        replace(squeeze.outputs[0], emit(split, "Transpose", [heads], {"perm": perm}, shape=[shape[p] for p in perm]))


REWRITE = Rewrite(each(_match, "Split"), _rewrite)
