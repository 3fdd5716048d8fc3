"""Transformer tokens ``(B, N, C)`` -> ``(B * N, C)`` through linear layers, norms, residual sums and GELU.

None of these looks at batch and position. With two axes a linear layer is one GEMM in every runtime, and
TensorRT's parser adds no layer per weight, bias, norm scale and norm shift to bring it to three.

Precondition: a connected set of such nodes on three-axis values of one B and N, with at least two linear layers; N known,
or B 1; parameters constant along the last axis. Postcondition: no such set is left.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeseg.convert.rewrites.driver import Rewrite
from edgeseg.graph.editing import Editor, constant_array, dims, emit, nodes, replace, weight
from edgeseg.graph.groups import Groups

_POINTWISE = frozenset({"Add", "Mul", "Sub", "Div", "Gelu", "Erf", "Relu", "Sigmoid", "Tanh", "HardSwish"})


def _matches(model: ir.Model) -> list[tuple[list[ir.Node]]]:
    """Connected sets, each in graph order."""
    order = dict.fromkeys(node for node in nodes(model) if _rank_agnostic(node))
    groups = Groups[ir.Node]()
    for node in order:
        for value in node.inputs:
            before = value.producer() if value is not None else None
            if before is not None and before in order:
                groups.join(node, before)
    regions: dict[ir.Node, list[ir.Node]] = {}
    for node in order:
        regions.setdefault(groups.root(node), []).append(node)
    return [(r,) for r in regions.values() if sum(n.op_type == "MatMul" for n in r) > 1]


def _rank_agnostic(node: ir.Node) -> bool:
    leads = set()
    for value in node.inputs:
        if value is None or constant_array(value) is not None:
            continue
        shape = dims(value)
        if shape is None or len(shape) != 3 or shape[2] is None or (shape[1] is None and shape[0] != 1):
            return False
        leads.add(shape[:2])
    if len(leads) != 1 or node.domain not in ("", "ai.onnx"):
        return False
    if any((dims(v) or ())[:2] not in leads or len(dims(v) or ()) != 3 for v in node.outputs):
        return False
    parameters = [
        (i, constant_array(v)) for i, v in enumerate(node.inputs) if v is not None and constant_array(v) is not None
    ]
    if node.op_type == "MatMul":
        return len(parameters) == 1 and parameters[0][0] == 1 and parameters[0][1].ndim == 2  # type: ignore[union-attr]
    if node.op_type == "LayerNormalization":
        return (
            node.attributes.get_int("axis", -1) in (-1, 2)
            and all(i > 0 for i, _ in parameters)
            and len(node.outputs) == 1
        )
    if node.op_type == "Split":
        return node.attributes.get_int("axis", 0) in (-1, 2)
    last_axis_only = all(a is not None and a.size == (a.shape[-1] if a.ndim else 1) for _, a in parameters)
    return node.op_type in _POINTWISE and last_axis_only


def _rewrite(region: list[ir.Node]) -> int:
    """Returns how many linear layers now work on two axes."""
    inside = set(region)
    flat: dict[ir.Value, ir.Value] = {}

    def flattened(value: ir.Value, near: ir.Node) -> ir.Value:
        if value not in flat:
            channels = (dims(value) or ())[-1] or 0
            target = weight(near, np.array([-1, channels], np.int64), "tokens_shape")
            flat[value] = emit(near, "Reshape", [value, target], shape=_flat_shape(value))
        return flat[value]

    for node in region:
        inputs = []
        for value in node.inputs:
            array = constant_array(value)
            if value is None or (node.op_type == "Split" and array is not None):
                inputs.append(value)
            elif array is None:
                inputs.append(flattened(value, node))
            elif node.op_type == "MatMul" or array.ndim == 0:
                inputs.append(value)
            else:
                inputs.append(weight(node, array.reshape(1, -1), value.name or "parameter"))
        axis = {"axis": 1} if "axis" in node.attributes else {}
        first = emit(node, node.op_type, inputs, {**node.attributes, **axis}, outputs=len(node.outputs))
        new = first.producer()
        assert new is not None
        for old_output, output in zip(node.outputs, new.outputs, strict=True):
            output.shape = ir.Shape(_flat_shape(old_output))
            flat[old_output] = output
    for node in region:
        for output in node.outputs:
            _restore(output, flat[output], inside)
    return sum(node.op_type == "MatMul" for node in region)


def _flat_shape(value: ir.Value) -> list[int | None]:
    batch, tokens, channels = dims(value) or (None, None, None)
    return [None if batch is None or tokens is None else batch * tokens, channels]


def _restore(old: ir.Value, new: ir.Value, inside: set[ir.Node]) -> None:
    """Give readers outside the region the value with three axes."""
    outside = [use for use in old.uses() if use.node not in inside]
    if not outside and not old.is_graph_output():
        return
    target = np.array([-1 if d is None else d for d in dims(old) or ()], np.int64)
    producer = new.producer()
    assert producer is not None
    assert isinstance(producer.graph, ir.Graph)
    # right after its producer: readers may stand in any order
    editor = Editor(producer.graph, producer, producer.name, after=True)
    inputs = [new, editor.constant("tokens_shape", target)]
    replace(old, editor.op("Reshape", "Reshape", inputs, dtype=new.dtype, shape=old.shape))


REWRITE = Rewrite(_matches, _rewrite)
