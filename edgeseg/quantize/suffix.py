"""The part of a partly quantized graph that differs from the float graph, run from the float graph's own values.

With one module on integers and all others in float, everything in front of that module computes what the float graph
computes. So the float graph runs once for each image, its values where modules begin are kept, and of each partly quantized
graph only what lies behind its first pair runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import onnx
from numpy.typing import NDArray

from edgeseg.closing import Closing
from edgeseg.errors import QuantizationError
from edgeseg.graph.proto import copied, drop_unread_constants, makers, refill, value_infos
from edgeseg.graph.running import GraphSession

Values = Mapping[str, NDArray[Any]]
_PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})


def float_values(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """The float32 values that ``model`` computes, by name, with their shapes."""
    values, computed = value_infos(model), makers(model.graph)
    return {n: v for n, v in values.items() if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and n in computed}


def cut(model: onnx.ModelProto, known: Mapping[str, onnx.ValueInfoProto]) -> onnx.ModelProto:
    """``model`` without what computes the same as the float graph.

    Args:
        model: partly quantized.
        known: values of the float graph, of :func:`float_values`.

    Returns:
        a model of the same outputs whose inputs are values of ``known``, or inputs of ``model``.
    """
    graph = model.graph
    made_by = makers(graph)
    changed: set[str] = set()
    kept: set[str] = set()
    for node in graph.node:
        if node.op_type in _PAIR or not changed.isdisjoint(node.input):
            changed.update(node.output)
            kept.add(node.output[0])
    inputs: dict[str, onnx.ValueInfoProto] = {}
    given = {value.name: value for value in graph.input}
    pending = [name for node in graph.node if node.output[0] in kept for name in node.input]
    pending += [value.name for value in graph.output]
    while pending:
        name = pending.pop()
        maker = made_by.get(name)
        if name in changed or name in inputs:
            continue
        if name in given:
            inputs[name] = given[name]
        elif name in known:
            inputs[name] = known[name]
        elif maker is not None and maker.output[0] not in kept:
            # A pass made it, integers of the image for example: the float graph does not know it.
            kept.add(maker.output[0])
            pending.extend(maker.input)
    part = copied(model)
    refill(part.graph.node, (node for node in part.graph.node if node.output[0] in kept))
    refill(part.graph.input, (inputs[name] for name in sorted(inputs)))
    del part.graph.value_info[:]
    drop_unread_constants(part.graph)
    return part


def value_bytes(value: onnx.ValueInfoProto) -> int | None:
    """Of a float value, for one image; ``None`` where only the run knows its size."""
    tensor = value.type.tensor_type
    sizes = [int(dim.dim_value) for dim in tensor.shape.dim][1:]
    return 4 * prod(sizes) if tensor.HasField("shape") and all(sizes) else None


class SharedPrefix(Closing):
    """The float graph, which keeps what it computed for the batches it ran: a session whose values others begin with.

    Args:
        model: the float graph.
        names: values to keep, besides the outputs.
    """

    def __init__(self, model: onnx.ModelProto, names: Iterable[str]) -> None:
        outputs = [value.name for value in model.graph.output]
        known = float_values(model)
        watched = copied(model)
        watched.graph.output.extend(known[name] for name in dict.fromkeys(names) if name not in outputs)
        self._outputs = outputs
        self._part = GraphSession(watched, "the float graph", QuantizationError)
        self._image = model.graph.input[0].name
        self._kept: dict[tuple[tuple[int, ...], bytes], Values] = {}
        self.runs = 0
        """How often the graph ran."""

    def values(self, images: NDArray[Any]) -> Values:
        """Outputs and kept values for a batch, and the batch itself."""
        key = images.shape, images.tobytes()
        if key not in self._kept:
            self.runs += 1
            self._kept[key] = {**self._part.run(images), self._image: images}
        return self._kept[key]

    def run(self, images: NDArray[Any]) -> Values:
        """What the float graph returns; see :class:`~edgeseg.backends.base.Session`."""
        values = self.values(images)
        return {name: values[name] for name in self._outputs}

    def close(self) -> None:
        """Free what was kept."""
        self._kept.clear()


class SuffixSession(Closing):
    """A partly quantized graph, run as it is written from the values of ``prefix``.

    Args:
        part: of :func:`cut`.
        values: of :meth:`SharedPrefix.values`.
    """

    def __init__(self, part: onnx.ModelProto, values: Callable[[NDArray[Any]], Values]) -> None:
        self._part = GraphSession(part, "a part of the graph", QuantizationError)
        self._values = values

    def run(self, images: NDArray[Any]) -> Values:
        """Run one batch; see :class:`~edgeseg.backends.base.Session`."""
        return self._part.run(self._values(images))

    def close(self) -> None:
        """Nothing outlives the session."""
