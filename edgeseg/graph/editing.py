"""Looking at an onnx_ir graph and changing it: what rewrites and Q/DQ passes need, and nothing about any one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass, ShapeInferencePass

Dims = tuple[int | None, ...]
Match = TypeVar("Match")


def nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these types (none given: of any) that something reads, in order; safe against changes meanwhile."""
    for node in list(model.graph):
        wanted = not op_types or node.op_type in op_types
        if wanted and node.domain in ("", "ai.onnx") and node.graph is not None and any(map(reads, node.outputs)):
            yield node


def matched(
    model: ir.Model, match: Callable[[ir.Node], Match | None], *op_types: str
) -> Iterator[tuple[ir.Node, Match]]:
    """``(node, match(node))`` of those of :func:`nodes` that have one; each is found in the graph as it is by then."""
    for node in nodes(model, *op_types):
        if (found := match(node)) is not None:
            yield node, found


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or Constant, else ``None``."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None or (value is not None and value.is_graph_input()) else tensor.numpy()


def given(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that ``node`` has by what it is."""
    value = node.inputs[index]
    assert value is not None
    return value


def given_array(node: ir.Node, index: int = 1) -> NDArray[Any]:
    """The array of an input that was seen to be constant."""
    array = constant_input(node, index)
    assert array is not None
    return array


def constant_input(node: ir.Node, index: int) -> NDArray[Any] | None:
    """The array of a constant input; ``None`` where ``node`` has no such input, or it is computed."""
    return constant_array(node.inputs[index]) if len(node.inputs) > index else None


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """What ``node`` computes its values of: shapes, indices and bounds left out."""
    inputs = node.inputs if node.op_type in {"Add", "Mul", "Concat"} else node.inputs[:1]
    return [value for value in inputs if value is not None]


def beside_constant(node: ir.Node) -> tuple[ir.Value, NDArray[Any]] | None:
    """Of two inputs the one that is computed, and the other, which is constant; ``None`` where both are either."""
    one, other = node.inputs
    arrays = constant_array(one), constant_array(other)
    if arrays[0] is None and one is not None and arrays[1] is not None:
        return one, arrays[1]
    return (other, arrays[0]) if arrays[1] is None and other is not None and arrays[0] is not None else None


def slice_bounds(node: ir.Node) -> tuple[int, int, int, int] | None:
    """Start, end, axis (not negative) and step of a Slice along one axis, all constant; else ``None``."""
    shape, values = dims(node.inputs[0]), [constant_array(v) for v in node.inputs[1:]]
    if shape is None or len(values) < 3 or any(v is None or v.size != 1 for v in values):
        return None
    start, end, axis, *steps = (int(v.item()) for v in values if v is not None)
    return start, end, axis % len(shape), steps[0] if steps else 1


def maker(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types and node.domain in ("", "ai.onnx") else None


def sole_maker(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """As :func:`maker`, if nothing else reads ``value``: a node that disappears when its reader is rewritten."""
    return maker(value, *op_types) if value is not None and reads(value) == 1 else None


def reads(value: ir.Value) -> int:
    """How often ``value`` is read; a graph output counts as a read."""
    return len(value.uses()) + int(value.is_graph_output())


def sole_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only node that reads ``value``, if it is of one of these types (none given: of any)."""
    if reads(value) != 1 or not value.uses():
        return None
    node = next(iter(value.uses())).node
    return node if not op_types or node.op_type in op_types else None


def dims(value: ir.Value | None) -> Dims | None:
    """Shape with ``None`` for what is not known before run time, or ``None`` when not even the rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def image_shape(value: ir.Value | None) -> tuple[int, int, int] | None:
    """The last three dimensions of a 4-d value when they are known numbers; the batch may be dynamic."""
    known = dims(value)
    if known is None or len(known) != 4 or None in known[1:]:
        return None
    return known[1:]  # type: ignore[return-value]


def emit(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    shape: Iterable[Any] | None = None,
    outputs: int = 1,
) -> ir.Value:
    """Insert a node before ``before``, named after its module; return its first output, of the type of its first input.

    ``shape`` is that of the output, where the caller knows it before shapes are inferred again.
    """
    assert isinstance(before.graph, ir.Graph)
    editor = Editor(before.graph, before, (before.name or "").rpartition("/")[0])
    dtype = next(v for v in inputs if v is not None).dtype
    return editor.op(op_type, op_type, inputs, dtype=dtype, shape=shape, outputs=outputs, **(attributes or {}))


def emit_sum(before: ir.Node, values: Sequence[ir.Value], *, shape: Iterable[Any] | None = None) -> ir.Value:
    """Insert the Adds of ``values``, each sum of the given shape."""
    total, *others = values
    for value in others:
        total = emit(before, "Add", [total, value], shape=shape)
    return total


def weight(near: ir.Node, array: NDArray[Any], name: str) -> ir.Value:
    """Register a new initializer; its name is made unique by a number if taken."""
    assert isinstance(near.graph, ir.Graph)
    return _register(near.graph, name, np.ascontiguousarray(array))


def _register(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=_fresh(graph, name))
    kind = ir.TensorType(tensor.dtype)
    value = ir.Value(name=tensor.name, const_value=tensor, type=kind, shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value


def _fresh(graph: ir.Graph, name: str) -> str:
    taken = graph.meta.setdefault("edgeseg_names", set())
    unique, count = name, 1
    while unique in taken or unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


class Editor:
    """Inserts nodes next to ``anchor``, in the order they are made, with names that start with ``stem``."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, stem: str | None, *, after: bool = False) -> None:
        self._graph = graph
        self._anchor = anchor
        self._stem = stem or anchor.op_type
        self._after = after

    def op(
        self,
        name: str,
        op_type: str,
        inputs: Iterable[ir.Value | None],
        *,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        shape: Iterable[Any] | None = None,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node named ``<stem>/<name>``; returns its first output, of that name and shape. All are of the given type."""
        full_name = _fresh(self._graph, f"{self._stem}/{name}")
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=full_name, num_outputs=outputs)
        for index, value in enumerate(node.outputs):
            value.name = f"{full_name}_{index}" if index else full_name
            value.type = None if dtype is None else ir.TensorType(dtype)
        output = node.outputs[0]
        output.shape = None if shape is None else ir.Shape(list(shape))
        if self._after:
            self._graph.insert_after(self._anchor, node)
            self._anchor = node
        else:
            self._graph.insert_before(self._anchor, node)
        return output

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """Add an initializer named ``<stem>/<name>``."""
        return _register(self._graph, f"{self._stem}/{name}", np.asarray(array))

    def first_channels(self, name: str, value: ir.Value, count: int) -> ir.Value:
        """Add a Slice to the first ``count`` channels of ``(N, C, H, W)``."""
        span = [self.constant(what, np.array([at])) for what, at in (("begin", 0), ("end", count), ("axis", 1))]
        shape = None if value.shape is None else (value.shape[0], count, *value.shape[2:])
        return self.op(name, "Slice", [value, *span], dtype=value.dtype, shape=shape)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` take the place of ``old`` everywhere; a graph output keeps its name."""
    if new.shape is None:
        new.shape = old.shape
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_before"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """As :func:`replace`; ``new`` takes over name, type and shape, too, and what made ``old`` is removed."""
    node, name = old.producer(), old.name
    assert node is not None
    new.type, new.shape = old.type, old.shape
    replace(old, new)
    remove_unread(graph, [node])
    new.name = name


def put_behind(graph: ir.Graph, value: ir.Value, name: str, make: Callable[[ir.Value], ir.Value]) -> None:
    """Let all that read ``value`` read what ``make`` makes of it, which takes over its name, type and shape.

    ``value`` is called ``name`` from then on, and may be given another shape by ``make``.
    """
    before, shape, kind, readers = value.name, value.shape, value.type, list(value.uses())
    value.name = name
    made = make(value)
    for use in readers:
        use.node.replace_input_with(use.idx, made)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = made
    made.name, made.shape, made.type = before, shape, kind


def remove_unread(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove those of ``nodes`` that nothing reads, then what only they read, constants included."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        inputs = [v for v in node.inputs if v is not None]
        graph.remove(node, safe=True)
        for value in inputs:
            maker = value.producer()
            if maker is not None:
                pending.append(maker)
            elif value.is_initializer() and not value.uses():
                graph.initializers.pop(str(value.name), None)


def remove_unread_constants(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads, such as float weights whose integers took their place."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)


def tidy(model: ir.Model) -> None:
    """Remove nodes and initializers nothing reads, make names unique, and infer the shapes of new values."""
    RemoveUnusedNodesPass()(model)
    NameFixPass()(model)
    ShapeInferencePass(strict_mode=True)(model)
