"""Deterministic names: a node is called after the SMP module it came from, a value after the node that makes it.

``encoder.layer3.0.conv1/Conv`` makes ``encoder.layer3.0.conv1/Conv_output_0``. Equal exports give equal bytes, and a
vendor's message about a node leads back to a line of the model.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

import onnx
import onnx_ir as ir

from edgeseg.graph.proto import copied, makers, refill

_SCOPES = "pkg.torch.onnx.name_scopes"
_NETWORK = "model"
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def name_by_scope(model: ir.Model) -> None:
    """Name every node after its torch module path, from the exporter's metadata.

    Done before anything rewrites the graph: node names survive onnxsim, metadata does not.
    """
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        stem = f"{_module_path(node)}/{node.op_type}".lstrip("/")
        node.name = _unique(stem, taken)


def name_dynamic_axes(model: ir.Model) -> None:
    """Call the image's dynamic dimensions ``batch``, ``height`` and ``width``, in the outputs too.

    torch names them by expressions of any length; sizes are given by these names. An output is ``(N, ...)``, a map
    ``(N, H, W)`` or ``(N, C, H, W)``.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            rank = len(value.shape)
            sides = (1, 2) if value.is_graph_input() else (rank - 2, rank - 1)
            names = {0: "batch"} | (dict(zip(sides, ("height", "width"), strict=True)) if rank > 2 else {})
            value.shape = ir.Shape([d if isinstance(d, int) else names.get(i, d) for i, d in enumerate(value.shape)])


def _module_path(node: ir.Node) -> str:
    # A convolution into which a batch normalization was folded carries the latter's scopes; its weight knows better.
    if node.op_type in _WEIGHTED:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name and value.name.endswith(".weight"):
                return _strip(value.name.removesuffix(".weight"))
    # name_scopes is the repr of a list: "", each module path outside in, and last the operator's own name
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    return _strip(
        next((scope for scope in reversed(scopes[:-1]) if scope), "") if scopes else _traced_path(node.name or "")
    )


def _traced_path(name: str) -> str:
    """``/encoder/layer1/layer1.0/conv1/Conv``, as torch's older exporter writes it, is of ``encoder.layer1.0.conv1``."""
    path: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(path)


def _strip(path: str) -> str:
    return path.removeprefix(_NETWORK).removeprefix(".") if (path + ".").startswith(_NETWORK + ".") else path


def _unique(stem: str, taken: dict[str, int]) -> str:
    name = stem
    while name in taken:
        name = f"{stem}_{taken[stem]}"
        taken[stem] += 1
    taken[name] = 1
    return name


def adopt_names(model: onnx.ModelProto, known: Container[str]) -> None:
    """Call nodes whose name is not among ``known`` after the module of the node before or behind them, in place."""
    made_by = makers(model.graph)
    readers = {value: node for node in reversed(model.graph.node) for value in node.input}
    for node in model.graph.node:
        if node.name not in known:
            around = [made_by.get(v) for v in node.input] + [readers.get(v) for v in node.output]
            names = [n.name for n in around if n is not None and "/" in n.name]
            node.name = f"{names[0].rpartition('/')[0] if names else 'edgeseg'}/{node.op_type}"


def normalize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make names unique and deterministic, drop metadata and unused entries; graph inputs and outputs keep theirs.

    Returns a changed copy; node order is kept.
    """
    result = copied(model)
    graph = result.graph
    fixed = {v.name for v in (*graph.input, *graph.output)}
    taken: dict[str, int] = dict.fromkeys(fixed, 1)
    for node in graph.node:
        node.name = _unique(node.name or f"edgeseg/{node.op_type}", taken)
    renamed = {name: name for name in fixed}
    weights = {t.name for t in graph.initializer}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in weights and name not in renamed:
                renamed[name] = _unique(_weight_name(name, node, index), taken)
        for index, name in enumerate(node.output):
            if name and name not in renamed:
                renamed[name] = _unique(f"{node.name}_output_{index}", taken)
    _rename(graph, renamed)
    for item in (result, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.name = "edgeseg"
    result.producer_name, result.producer_version = "edgeseg", ""
    return result


def _weight_name(name: str, node: onnx.NodeProto, index: int) -> str:
    # Parameters keep their state-dict name; constants made on the way are called after their first reader.
    if "." in name and not name.endswith("_bias") and not name.startswith(("val_", "onnx::")):
        return _strip(name)
    if node.op_type in ("Conv", "ConvTranspose", "Gemm") and index == 2:
        return f"{node.name.rpartition('/')[0]}.bias"
    return f"{node.name}_input_{index}"


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [renamed.get(n, n) for n in node.input]
        node.output[:] = [renamed.get(n, n) for n in node.output]
    known = set(renamed.values())
    entries: Any
    for entries in (graph.initializer, graph.value_info):
        for item in entries:
            item.name = renamed.get(item.name, item.name)
        refill(entries, sorted((item for item in entries if item.name in known), key=lambda item: item.name))
