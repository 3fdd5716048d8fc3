"""Looking at an ONNX graph as the file has it: who makes and reads a value, of what type and shape it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx
from onnx import helper, shape_inference

REARRANGES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that give the values they read in another shape or order, all of them and none twice."""

Dims = tuple[int | None, ...]


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy to change."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def refill(entries: Any, kept: Iterable[Any]) -> None:
    """Let a repeated field of a graph have these entries alone."""
    every = list(kept)
    del entries[:]
    entries.extend(every)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, ``default`` where the node has none of that name."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """By value: the node that makes it."""
    return {name: node for node in graph.node for name in node.output}


def maker_behind_moves(made_by: Mapping[str, onnx.NodeProto], name: str) -> onnx.NodeProto | None:
    """The node that makes ``name``, or makes what reaches it through nodes that only rearrange."""
    while (node := made_by.get(name)) is not None and node.op_type in REARRANGES:
        name = node.input[0]
    return node


def readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """By value: the nodes that read it, in order; one that reads it twice stands twice."""
    by_value: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            by_value.setdefault(name, []).append(node)
    return by_value


def value_infos(model: onnx.ModelProto, *, data_prop: bool = False) -> dict[str, onnx.ValueInfoProto]:
    """By name: inputs, outputs and what shape inference knows of the values between, tensors only.

    ``data_prop``: follow sizes through the nodes that compute with them.
    """
    graph = shape_inference.infer_shapes(model, data_prop=data_prop).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value for value in values if value.type.HasField("tensor_type")}


def dims(value: onnx.ValueInfoProto) -> Dims | None:
    """Shape with ``None`` for what is not known before run time, or ``None`` when not even the rank is."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


def drop_unread_constants(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads, and that are no output."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    refill(graph.initializer, (tensor for tensor in graph.initializer if tensor.name in read))
