"""Small edits of an onnx_ir graph: new nodes in front of an anchor, constants, removal of what is no longer read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


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
        dtype: ir.DataType = ir.DataType.FLOAT,
        shape: Iterable[Any] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output of the given type, named ``<stem>/<name>``."""
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=self._fresh(name))
        output = node.outputs[0]
        output.name, output.type = node.name, ir.TensorType(dtype)
        output.shape = None if shape is None else ir.Shape(list(shape))
        if self._after:
            self._graph.insert_after(self._anchor, node)
            self._anchor = node
        else:
            self._graph.insert_before(self._anchor, node)
        return output

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
        """Add an initializer named ``<stem>/<name>``."""
        full_name = self._fresh(name)
        tensor = ir.tensor(np.asarray(array), name=full_name)
        value = ir.Value(
            name=full_name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(np.shape(array)))
        )
        self._graph.register_initializer(value)
        return value

    def _fresh(self, name: str) -> str:
        full_name = base = f"{self._stem}/{name}"
        taken = self._graph.meta.setdefault("edgeseg_names", set())
        count = 1
        while full_name in taken or full_name in self._graph.initializers:
            count += 1
            full_name = f"{base}_{count}"
        taken.add(full_name)
        return full_name


def replace_value(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old`` read ``new``, which takes over its name, type and shape; remove what made ``old``."""
    node = old.producer()
    assert node is not None
    new.type, new.shape, name = old.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    remove_unread(graph, [node])
    new.name = name


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


def constant_array(value: ir.Value | None) -> NDArray[Any] | None:
    """Values of an initializer, ``None`` for anything else."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, ``None`` if there are several uses, none, or it is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def image_shape(value: ir.Value | None) -> tuple[int, int, int] | None:
    """The last three dimensions of a 4-d value when they are known numbers; the batch may be dynamic."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    dims = list(value.shape)[1:]
    return tuple(dims) if all(isinstance(d, int) for d in dims) else None  # type: ignore[return-value]
