"""Marks that fake-quantizers leave in an exported graph: taken out before it is simplified, found again after.

A marked value is an output of the graph meanwhile, so that every simplification and rewrite leaves it as it is: what was
rounded in training is there to be rounded in the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.convert.fake_quantizers import DOMAIN, MARK
from edgeseg.convert.naming import normalize
from edgeseg.graph.editing import (
    constant_array,
    constant_input,
    given,
    remove_unread,
    replace,
    sole_reader,
    tidy,
    weight,
)
from edgeseg.graph.grid import Grid, Marks
from edgeseg.graph.proto import copied, refill


@dataclass(frozen=True)
class Kept:
    """Marks of a graph that is being simplified.

    Attributes:
        grids: by the name of a value, an output of the graph; several where readers rounded it each in its own way.
        added: those of them that were no outputs before.
        lost: how many marks stood between a convolution and the normalization that is folded into it.
    """

    grids: dict[str, tuple[Grid, ...]]
    added: frozenset[str]
    lost: int


def take_marks(exported: onnx.ModelProto) -> tuple[onnx.ModelProto, Kept]:
    """Take the marks out of a graph, fold what follows its convolutions into them, and make the marked values outputs."""
    model = ir.serde.deserialize_model(exported)
    graph = model.graph
    marked: dict[ir.Value, list[Grid]] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == MARK:
            source = given(node)
            numbers = (node.attributes.get_int(name, 0) for name in ("zero_point", "low", "high"))
            marked.setdefault(source, []).append(Grid(node.attributes.get_float("scale", 0.0), *numbers))
            replace(node.outputs[0], source)
            graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)
    lost = fold_into_convolutions(graph, marked)
    outputs = set(graph.outputs)
    added = [value for value in marked if value not in outputs and value.const_value is None]
    graph.outputs.extend(added)
    grids = {str(value.name): tuple(dict.fromkeys(each)) for value, each in marked.items() if value.const_value is None}
    return ir.serde.serialize_model(model), Kept(grids, frozenset(str(value.name) for value in added), lost)


def drop_marks(simplified: onnx.ModelProto, kept: Kept, tools: tuple[str, ...]) -> tuple[onnx.ModelProto, Marks]:
    """Take back the outputs that :func:`take_marks` added; returns the marks by the values' final names."""
    result = copied(simplified)
    refill(result.graph.output, (value for value in result.graph.output if value.name not in kept.added))
    made_by = {name: (node.name, index) for node in result.graph.node for index, name in enumerate(node.output)}
    model = ir.serde.deserialize_model(result)
    tidy(model)
    final = normalize(ir.serde.serialize_model(model))
    makers, inputs = {node.name: node for node in final.graph.node}, {value.name for value in final.graph.input}
    grids: dict[str, tuple[Grid, ...]] = {}
    lost = kept.lost
    for name, each in kept.grids.items():
        node, index = made_by.get(name, ("", 0))
        if node not in makers and name not in inputs:
            lost += 1
            continue
        value = makers[node].output[index] if node in makers else name
        grids[value] = tuple(dict.fromkeys((*grids.get(value, ()), *each)))
    return final, Marks(tools, grids, lost)


def fold_into_convolutions(graph: ir.Graph, marked: dict[ir.Value, list[Grid]]) -> int:
    """Fold the factors, shifts and batch normalizations behind convolutions into them; returns how many marks that cost.

    Training with folded batch normalization computes ``BN(Conv(x, round(w * s)) / s)``: the factors cancel, so that the
    weight is the rounded one again, up to a rounding of the float.
    """
    lost = 0
    for node in list(graph):
        if node.op_type != "Conv" or node.graph is None:
            continue
        kernel = constant_array(node.inputs[1])
        bias = constant_input(node, 2)
        if kernel is None or (len(node.inputs) > 2 and node.inputs[2] is not None and bias is None):
            continue
        channels = kernel.shape[0]
        factor = np.ones(channels)
        shift = np.zeros(channels) if bias is None else bias.astype(np.float64)
        end = node.outputs[0]
        passed: list[ir.Value] = []
        steps: list[ir.Node] = []
        while (reader := sole_reader(end)) is not None and (step := _affine(reader, end, channels)) is not None:
            factor, shift = factor * step[0], shift * step[0] + step[1]
            passed.append(end)
            steps.append(reader)
            end = reader.outputs[0]
        if not passed:
            continue
        lost += sum(len(marked.pop(value, ())) for value in passed)
        folded = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(np.float32)
        stem = (node.name or "conv").rpartition("/")[0]
        node.replace_input_with(1, weight(node, folded, f"{stem}.weight"))
        node.resize_inputs(3)
        node.replace_input_with(2, weight(node, shift.astype(np.float32), f"{stem}.bias"))
        output = node.outputs[0]
        if end in marked:
            marked[output] = marked.pop(end)
        replace(end, output)
        remove_unread(graph, steps)
    return lost


def _affine(node: ir.Node, value: ir.Value, channels: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Factor and shift per channel of ``value`` by which ``node`` computes its output, ``None``: not in this way."""
    if node.op_type == "BatchNormalization":
        parts = [constant_array(v) for v in node.inputs[1:5]]
        if any(part is None for part in parts):
            return None
        gain, shift, mean, variance = (np.asarray(part, np.float64) for part in parts)
        factor = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        return factor, shift - mean * factor
    if node.op_type not in {"Mul", "Div", "Add", "Sub"} or (
        node.op_type in {"Div", "Sub"} and node.inputs[0] is not value
    ):
        return None
    other = constant_array(node.inputs[1] if node.inputs[0] is value else node.inputs[0])
    # Per channel, or one for all: (C, 1, 1), (1, C, 1, 1) or a scalar.
    if other is None or (other.size != 1 and (other.size != channels or other.ndim < 3 or other.shape[-3] != channels)):
        return None
    operand = np.broadcast_to(other.astype(np.float64).reshape(-1), (channels,))
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type in {"Mul", "Div"}:
        return operand if node.op_type == "Mul" else 1.0 / operand, zero
    return one, operand if node.op_type == "Add" else -operand
