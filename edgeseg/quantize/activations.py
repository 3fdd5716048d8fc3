"""Which activations of a graph have to be watched.

The graph runs in ONNX Runtime in fp32 with every watched tensor fetched (:mod:`edgeseg.graph.running`). Two kinds of tensor
cost nothing:

- one that only rearranges another (Reshape, Transpose, ...) has that one's values, so it has its range;
- the input of a Relu or Clip that nothing else reads, made by a Conv, ConvTranspose, Gemm or Add: integer kernels
  of every target clip in the accumulator, nothing is ever quantized between the two, so it is left out of the
  table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from edgeseg.errors import QuantizationError, first_line
from edgeseg.graph.proto import REARRANGES, Dims, attribute, copied, dims, makers, readers, value_infos
from edgeseg.spec import InputSpec

_REARRANGING = REARRANGES | {"Identity", "Dropout", "DepthToSpace", "SpaceToDepth"}
_CLIPPED_IN_PLACE = frozenset({"Conv", "ConvTranspose", "Gemm", "Add"})
_SHAPE_READERS = frozenset({"Shape", "Size"})
_CHANNEL_AXIS = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


@dataclass(frozen=True)
class Activation:
    """A float activation tensor of the graph.

    Attributes:
        name: of the tensor.
        values_of: the tensor whose values this one rearranges; its own name if none.
        elements: how many values it has in the smallest batch; an estimate where the shape is known only when it runs.
        channel_axis: the axis a multiplying layer contracts it over, ``None`` if none reads it.
    """

    name: str
    values_of: str
    elements: int
    channel_axis: int | None

    @property
    def is_fetched(self) -> bool:
        return self.values_of == self.name or self.channel_axis is not None


def find_activations(model: onnx.ModelProto, spec: InputSpec) -> list[Activation]:
    """List the float tensors of ``model`` that depend on its input, in the graph's order.

    Raises:
        QuantizationError: the type of a tensor cannot be told, or there is no float activation.
    """
    shapes = _float_shapes(model, spec)
    consumers, producers = readers(model.graph), makers(model.graph)
    outputs = {value.name for value in model.graph.output}
    sizes = {name: _size(shape) for name, shape in shapes.items()}
    largest = max((size for size in sizes.values() if size is not None), default=0)
    root: dict[str, str] = {}
    activations = []
    for name in _computed_from_input(model.graph):
        if name not in shapes:
            continue
        producer = producers.get(name)
        if producer is not None and producer.op_type in _REARRANGING:
            root[name] = root.get(producer.input[0], producer.input[0])
        elif producer is not None and name not in outputs and _is_clipped_in_place(producer, consumers.get(name, [])):
            continue
        size = sizes[name]
        axis = _channel_axis(name, shapes[name], consumers.get(name, []))
        activations.append(Activation(name, root.get(name, name), largest if size is None else size, axis))
    if not activations:
        raise QuantizationError("the graph has no float activation to calibrate; export the model again")
    known = {activation.name for activation in activations}
    # What rearranges an unwatched tensor (an integer, a constant) has to be watched itself.
    return [a if a.values_of in known else Activation(a.name, a.name, a.elements, a.channel_axis) for a in activations]


def group_by_size(activations: Sequence[Activation], budget_bytes: int) -> list[list[Activation]]:
    """Split what has to be fetched, in order, into groups of at most ``budget_bytes`` (or one tensor that is larger)."""
    groups: list[list[Activation]] = []
    used = 0
    for activation in activations:
        if not activation.is_fetched:
            continue
        size = 4 * activation.elements
        if not groups or used + size > budget_bytes:
            groups.append([])
            used = 0
        groups[-1].append(activation)
        used += size
    return groups


def _float_shapes(model: onnx.ModelProto, spec: InputSpec) -> dict[str, Dims | None]:
    """Shapes of all float32 tensors with the input at the smallest batch and the size of ``spec``."""
    sized = copied(model)
    del sized.graph.value_info[:]
    batch = spec.batch.minimum
    for dim, value in zip(
        sized.graph.input[0].type.tensor_type.shape.dim, (batch, spec.height, spec.width, spec.channels), strict=False
    ):
        dim.dim_value = value
    for output in sized.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        values = value_infos(sized, data_prop=True)
    except Exception as exc:  # a C++ error with no Python class of its own
        raise QuantizationError(f"the shapes of the graph cannot be inferred: {first_line(exc)}") from exc
    for node in model.graph.node:
        for name in node.output:
            if name and name not in values:
                raise QuantizationError(
                    f"cannot tell the type of tensor {name!r} (operator {node.domain or 'onnx'}::{node.op_type}); "
                    "calibration takes graphs of standard ONNX operators"
                )
    return {name: dims(v) for name, v in values.items() if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def _size(shape: Dims | None) -> int | None:
    return None if shape is None or None in shape else math.prod(size or 0 for size in shape)


def _computed_from_input(graph: onnx.GraphProto) -> list[str]:
    """Names of the tensors whose values depend on the input's values, graph inputs first, then in node order."""
    constants = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in constants]
    known = set(names)
    for node in graph.node:
        if node.op_type not in _SHAPE_READERS and known.intersection(node.input):
            outputs = [name for name in node.output if name]
            names.extend(outputs)
            known.update(outputs)
    return names


def _is_clipped_in_place(producer: onnx.NodeProto, consumers: list[onnx.NodeProto]) -> bool:
    if producer.op_type not in _CLIPPED_IN_PLACE or len(consumers) != 1:
        return False
    return consumers[0].op_type in {"Relu", "Clip"} and consumers[0].input[0] == producer.output[0]


def _channel_axis(name: str, shape: Dims | None, consumers: list[onnx.NodeProto]) -> int | None:
    """Axis the first multiplying layer that reads ``name`` as its data sums over."""
    for node in consumers:
        if node.op_type in _CHANNEL_AXIS and node.input[0] == name and shape is not None:
            axis = 0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else _CHANNEL_AXIS[node.op_type]
            return axis % len(shape)
    return None
