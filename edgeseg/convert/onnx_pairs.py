"""Q/DQ pairs of an ONNX graph, taken out of it as fake-quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeseg.convert.fake_quantizers import FakeQuantizer, quantizer_of, refused
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.graph.editing import constant_array, given, maker, remove_unread, weight
from edgeseg.graph.running import GraphSession
from edgeseg.graph.signs import not_negative

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}

Marked = list[tuple[str, FakeQuantizer]]


def take_pairs(model: ir.Model, name: str) -> tuple[list[FakeQuantizer], Marked]:
    """Take the pairs out of a graph, in place; returns them, and which value each of activations rounds.

    Weights are left as their pairs round them. A pair whose lowest integer is 0 is a ReLU as well, and quantizers leave out
    the one before it: it is put back.

    Args:
        model: constants are initializers, types are known.
        name: of its file, for messages.

    Raises:
        SpecError: one that no int8 engine can take over; integers that something else reads.
    """
    graph = model.graph
    fixed = _constants(graph)
    numbers = [value for node in graph if node.op_type in _PAIR for value in node.inputs[1:] if value is not None]
    _fold(model, [value for value in dict.fromkeys(numbers) if value in fixed and not value.is_initializer()])
    pairs: list[FakeQuantizer] = []
    marks: list[tuple[ir.Value, FakeQuantizer]] = []
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        integers, output = given(node), node.outputs[0]
        if integers.dtype == ir.DataType.INT32 and integers in fixed:
            continue  # a bias, in the steps of its layer
        quantize, clip = _quantize_before(integers)
        if quantize is None and integers not in fixed:
            break
        pair = _read_pair(node, quantize, clip)
        pair.is_activation = integers not in fixed
        pairs.append(pair)
        if quantize is None or not pair.is_activation:
            continue
        source = given(quantize)
        if pair.grid is not None and pair.grid.zero_point == pair.grid.low and source not in not_negative(graph):
            relu = ir.node("Relu", [source], name=f"{(node.name or '').rpartition('/')[0]}/Relu")
            relu.outputs[0].name = f"{output.name}_not_negative"
            relu.outputs[0].dtype = ir.DataType.FLOAT
            graph.insert_before(node, relu)
            source = relu.outputs[0]
        marks.append((source, pair))
        output.replace_all_uses_with(source, replace_graph_outputs=True)
    RemoveUnusedNodesPass()(model)
    fixed = _constants(graph)
    read = {value for node in graph if node.outputs[0] not in fixed for value in node.inputs}
    _fold(model, [value for value in fixed if value in read and not value.is_initializer()])
    RemoveUnusedNodesPass()(model)
    for node in graph:
        if node.op_type in _PAIR:
            where = node.name or node.op_type
            raise SpecError(f"{name} computes with integers between Q/DQ pairs (at {where}); give one in Q/DQ format")
    return pairs, [(str(value.name), pair) for value, pair in marks]


def _quantize_before(integers: ir.Value) -> tuple[ir.Node | None, ir.Node | None]:
    """The QuantizeLinear that makes these integers, and the Clip to fewer of them that torch writes behind it."""
    clip = maker(integers, "Clip")
    quantize = maker(integers if clip is None else clip.inputs[0], "QuantizeLinear")
    return quantize, None if quantize is None else clip


def _read_pair(node: ir.Node, quantize: ir.Node | None, clip: ir.Node | None) -> FakeQuantizer:
    stem, kind = node.name or str(node.outputs[0].name), None if node.inputs[0] is None else node.inputs[0].dtype
    scale, zero_point = _numbers(node)
    if scale is None or zero_point is None:
        raise refused(stem, "computes its scale anew for each image", "quantize with static ranges")
    written = (scale, zero_point) if quantize is None else _numbers(quantize)
    if any(one is None or not np.array_equal(one, two) for one, two in zip(written, (scale, zero_point), strict=True)):
        raise refused(stem, "is read in other steps than it was rounded to", "give one in Q/DQ format")
    if kind is None or kind not in _INTEGERS:
        numbers = "numbers of no known type" if kind is None else f"{kind.name.lower()} numbers"
        raise refused(stem, f"has {numbers}", "use int8 or uint8")
    if scale.ndim > 1 or node.attributes.get("block_size") is not None:
        raise refused(stem, "has blocks", "use one scale per tensor or channel")
    low, high = int(kind.min), int(kind.max)
    if clip is not None:
        bounds = [constant_array(value) for value in clip.inputs[1:3]]
        low, high = (end if bound is None else int(bound) for end, bound in zip((low, high), bounds, strict=True))
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    return quantizer_of(stem, torch.tensor(scale), torch.tensor(zero_point.astype(np.int32)), low, high, axis)


def _numbers(node: ir.Node) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Scale and zero point; ``None`` for what is no constant."""
    scale, given = constant_array(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    if given is None:
        return scale, None if scale is None else np.zeros(scale.shape, np.int32)
    return scale, constant_array(given)


def _constants(graph: ir.Graph) -> dict[ir.Value, None]:
    """Initializers, and what nodes compute from nothing else, in order."""
    known: dict[ir.Value, None] = dict.fromkeys(graph.initializers.values())
    for node in graph:
        if node.inputs and all(value is None or value in known for value in node.inputs):
            known.update(dict.fromkeys(node.outputs))
    return known


def _fold(model: ir.Model, values: list[ir.Value]) -> None:
    """Compute ``values``, which constants alone make, by ONNX Runtime, and make initializers of them."""
    if not values:
        return
    needed = _before(values)
    proto = ir.serde.serialize_model(model)
    names = {str(value.name) for node in needed for value in node.outputs}
    read = {str(value.name) for node in needed for value in node.inputs if value is not None}
    part = onnx.helper.make_graph(
        [node for node in proto.graph.node if names.intersection(node.output)],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in values],
        [tensor for tensor in proto.graph.initializer if tensor.name in read],
    )
    whole = onnx.helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    arrays = GraphSession(whole, "what its constants make", ArtifactError).run({})
    for value, array in zip(values, arrays.values(), strict=True):
        node = value.producer()
        assert node is not None
        value.replace_all_uses_with(weight(node, array, _weight_name(value)), replace_graph_outputs=True)
        remove_unread(model.graph, [node])


def _before(values: Iterable[ir.Value]) -> dict[ir.Node, None]:
    """The nodes that make ``values``, and all before them."""
    ancestors: dict[ir.Node, None] = {}
    pending = list(values)
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in ancestors:
            ancestors[node] = None
            pending += [value for value in node.inputs if value is not None]
    return ancestors


def _weight_name(value: ir.Value) -> str:
    """The module's name of the weight that ``value`` is made of, if one is."""
    for node in _before([value]):
        stem, word, _ = str(node.inputs[0] and node.inputs[0].name).partition(".weight")
        if word:
            return stem + word
    return str(value.name)
