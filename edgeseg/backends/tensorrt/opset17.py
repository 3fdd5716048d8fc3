"""Graphs for TensorRT 8, whose parser knows ONNX up to opset 17 and reads newer ones as if they were that.

What it refuses it says. What it reads wrongly it does not: from opset 18 on the axes of a reduction are an input, which it
ignores, and reduces over everything. So they become the attribute they were. Gelu, new in opset 20, is written out. The
result is for that parser only: it claims the opset it came with, and is no valid ONNX file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeseg.errors import BuildError
from edgeseg.store.artifacts import check_file, read_manifest
from edgeseg.store.onnx_file import read_onnx

# ReduceSum had its axes as an input before, and is read rightly.
_REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)


def graph_for_tensorrt_8(folder: Path | str) -> bytes:
    """The portable graph of an engine folder, to be given to the ``trtexec`` of TensorRT 8 (JetPack 5).

    Raises:
        ArtifactError: no engine folder, or its graph is damaged.
        BuildError: see :func:`for_tensorrt_8`.
    """
    manifest = read_manifest(Path(folder))
    check_file(Path(folder), manifest.graph)
    return bytes(for_tensorrt_8(read_onnx(Path(folder) / manifest.graph.name)).SerializeToString())


def for_tensorrt_8(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that TensorRT 8 reads rightly; the names of nodes and values stay.

    Raises:
        BuildError: a reduction whose axes are computed.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {t.name: t.data_type for t in graph.initializer}
    types.update({v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)})
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT64}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    makers = {name: node for node in graph.node for name in node.output}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for node in nodes:
        if node.op_type in _REDUCTIONS and len(node.input) > 1:
            made.graph.node.append(_with_axes_attribute(node, constants))
        elif node.op_type == "Gelu":
            made.graph.node.extend(_erf_form(node, types.get(node.input[0], TensorProto.FLOAT)))
        elif node.op_type == "Cast" and _makes_bytes_of_integers(node, makers):
            # "kUINT8 conversions are only supported for {kFLOAT, kHALF}"; a float32 holds every class number.
            between = f"{node.name}/float"
            made.graph.node.append(helper.make_node("Cast", [node.input[0]], [between], between, to=TensorProto.FLOAT))
            node.input[0] = between
            made.graph.node.append(node)
        else:
            made.graph.node.append(node)
    return made


def _makes_bytes_of_integers(node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    to = next(a.i for a in node.attribute if a.name == "to")
    maker = makers.get(node.input[0])
    return (
        to == TensorProto.UINT8
        and maker is not None
        and maker.op_type in ("ArgMax", "Cast", "Greater", "GreaterOrEqual")
    )


def _with_axes_attribute(node: NodeProto, constants: dict[str, np.ndarray]) -> NodeProto:
    if not node.input[1]:
        return node
    if node.input[1] not in constants:
        raise BuildError(
            f"TensorRT 8 ignores the axes of {node.op_type} {node.name}, which are computed; use TensorRT 10 or later"
        )
    kept = [a for a in node.attribute if a.name not in ("noop_with_empty_axes", "axes")]
    axes = [int(axis) for axis in constants[node.input[1]].reshape(-1)]
    noop = next((a.i for a in node.attribute if a.name == "noop_with_empty_axes"), 0)
    if not axes and noop:
        return helper.make_node("Identity", [node.input[0]], list(node.output), node.name)
    made = NodeProto()
    made.CopyFrom(node)
    del made.attribute[:]
    made.attribute.extend(kept)
    if axes:
        made.attribute.append(helper.make_attribute("axes", axes))
    del made.input[1:]
    return made


def _erf_form(node: NodeProto, kind: int) -> Iterator[NodeProto]:
    """``0.5 x (1 + erf(x / sqrt 2))``, or with tanh where the node asks for that."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)

    def constant(name: str, value: float) -> NodeProto:
        tensor = numpy_helper.from_array(np.asarray(value, dtype))
        return helper.make_node("Constant", [], [f"{node.name}/{name}"], f"{node.name}/{name}", value=tensor)

    def step(op: str, name: str, *inputs: str) -> NodeProto:
        # The last one has the node's own name, by which messages and the inspector's layers are matched.
        output = node.output[0] if name == "" else f"{node.name}/{name}"
        return helper.make_node(op, list(inputs), [output], f"{node.name}/{name}" if name else node.name)

    x, at = node.input[0], node.name
    approximate = next((a.s for a in node.attribute if a.name == "approximate"), b"none")
    yield constant("half", 0.5)
    yield constant("one", 1.0)
    if approximate == b"tanh":
        yield constant("cubic", 0.044715)
        yield constant("scale", math.sqrt(2 / math.pi))
        yield step("Mul", "squared", x, x)
        yield step("Mul", "cubed", f"{at}/squared", x)
        yield step("Mul", "term", f"{at}/cubed", f"{at}/cubic")
        yield step("Add", "sum", x, f"{at}/term")
        yield step("Mul", "scaled", f"{at}/sum", f"{at}/scale")
        yield step("Tanh", "inner", f"{at}/scaled")
    else:
        yield constant("root", math.sqrt(2))
        yield step("Div", "scaled", x, f"{at}/root")
        yield step("Erf", "inner", f"{at}/scaled")
    yield step("Add", "shifted", f"{at}/inner", f"{at}/one")
    yield step("Mul", "halved", x, f"{at}/half")
    yield step("Mul", "", f"{at}/halved", f"{at}/shifted")
