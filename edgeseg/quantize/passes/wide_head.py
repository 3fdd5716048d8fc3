"""A last convolution of classes that fill whole blocks: ONNX Runtime's integer kernels want a multiple of four, at least 16.

With 11, 19 or 21 classes they take up to twice the time they take with 16, 20 or 24 (x86 with VNNI, ONNX Runtime 1.31). So
classes are added that never win: the first one again, one less. Where both are rounded to the same integer, ArgMax takes the
first. Where somebody else reads the scores, they are cut off again.

Precondition: Conv of one group, with constant weight and bias and no other weighted layer behind it; more than eight classes,
since an ArgMax of 16 takes longer than one of eight. To be cut off, a pixel has to be worth it: :data:`WORTH_CUTTING`.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from edgeseg.graph.convolution import Convolution, convolution
from edgeseg.graph.editing import Editor, put_behind, sole_reader
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.placement import tail

BLOCK, LEAST, FEWEST = 4, 16, 9
WORTH_CUTTING = 512
"""Products of a class and pixel, from which on the copy of a pixel's scores costs less than is gained."""


def wide_head(model: ir.Model, observed: Observed) -> int:
    """Apply the pass; returns how many convolutions it made wider."""
    count, last = 0, tail(model.graph)
    for node in list(model.graph):
        conv = convolution(node) if node in last else None
        if conv is not None and (missing := _missing(conv)):
            _replace(model.graph, conv, missing, observed)
            count += 1
    return count


def _missing(conv: Convolution) -> int:
    """Classes to add."""
    classes = len(conv.weight)
    is_worth = _is_only_decided(conv.node) or prod(conv.weight.shape[1:]) >= WORTH_CUTTING
    if classes < FEWEST or conv.node.attributes.get_int("group", 1) != 1 or not is_worth:
        return 0
    return max(LEAST, -(-classes // BLOCK) * BLOCK) - classes


def _is_only_decided(node: ir.Node) -> bool:
    decided = sole_reader(node.outputs[0], "ArgMax")
    return (
        decided is not None
        and decided.attributes.get_int("axis", 0) == 1
        and decided.attributes.get_int("select_last_index", 0) == 0
    )


def _replace(graph: ir.Graph, conv: Convolution, missing: int, observed: Observed) -> None:
    node, weight, bias = conv.node, conv.weight, conv.bias
    editor = Editor(graph, node, f"{node.name}/wide_head")
    node.replace_input_with(1, editor.constant("weight", np.concatenate([weight, weight[:1].repeat(missing, 0)])))
    node.resize_inputs(3)
    node.replace_input_with(2, editor.constant("bias", np.concatenate([bias, bias[:1].repeat(missing) - 1])))
    scores, is_cut = node.outputs[0], not _is_only_decided(node)
    before = str(scores.name)

    def cut(wide: ir.Value) -> ir.Value:
        observed.copy_range(before, wide)
        return Editor(graph, node, f"{node.name}/wide_head", after=True).first_channels("classes", wide, len(weight))

    if is_cut:
        put_behind(graph, scores, f"{node.name}/wide_head/scores", cut)
    if scores.shape is not None:
        scores.shape = ir.Shape([scores.shape[0], len(weight) + missing, *scores.shape[2:]])
