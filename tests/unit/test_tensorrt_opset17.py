"""Graphs for TensorRT 8's parser: what it reads wrongly or refuses is written in another way, and means the same.

The parser is not here. Its reading of a reduction (the attribute ``axes``, else all of them; a second input is ignored) is
what its source says; ONNX Runtime stands in for the rest.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_compile_for_device import portable_folder

from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8, graph_for_tensorrt_8
from edgeseg.errors import ArtifactError, BuildError

SHAPE = (2, 3, 4, 5)


def model(nodes: list[onnx.NodeProto], constants: dict[str, Any], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, SHAPE)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(made: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    y: np.ndarray = session.run(None, {"x": x})[0]
    return y


def as_opset_17(made: onnx.ModelProto) -> onnx.ModelProto:
    """What TensorRT 8 takes the graph for."""
    old = copy.deepcopy(made)
    old.opset_import[0].version = 17
    return old


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceProd"])
@pytest.mark.parametrize("axes", [[2, 3], [-1], [1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_of_a_reduction(op: str, axes: list[int], keepdims: int) -> None:
    node = helper.make_node(op, ["x", "axes"], ["y"], "encoder.se/Reduce", keepdims=keepdims)
    new = model([node], {"axes": np.array(axes, np.int64)})
    made = for_tensorrt_8(new)
    (changed,) = made.graph.node
    assert changed.name == "encoder.se/Reduce" and list(changed.input) == ["x"]
    x = np.random.default_rng(0).random(SHAPE, np.float32)
    np.testing.assert_allclose(run(as_opset_17(made), x), run(new, x), rtol=1e-6)
    assert list(new.graph.node[0].input) == ["x", "axes"], "the graph itself is not touched"


def test_axes_in_a_constant_node_and_no_axes() -> None:
    constant = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([1], np.int64)))
    x = np.random.default_rng(1).random(SHAPE, np.float32)
    for nodes in (
        [constant, helper.make_node("ReduceMean", ["x", "axes"], ["y"], "m")],
        [helper.make_node("ReduceMean", ["x"], ["y"], "m")],
        [helper.make_node("ReduceMean", ["x", "none"], ["y"], "m", noop_with_empty_axes=1)],
        [helper.make_node("ReduceMean", ["x", "none"], ["y"], "m")],
    ):
        new = model(nodes, {"none": np.array([], np.int64)})
        made = for_tensorrt_8(new)
        np.testing.assert_allclose(run(as_opset_17(made), x), run(new, x), rtol=1e-6)
        assert [node.name for node in made.graph.node][-1] == "m"


def test_axes_that_are_computed_are_an_error_not_a_wrong_result() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "s", start=0, end=1),
        helper.make_node("ReduceMean", ["x", "shape"], ["y"], "encoder.se/Reduce"),
    ]
    with pytest.raises(BuildError, match="TensorRT 8 ignores the axes of ReduceMean encoder.se/Reduce"):
        for_tensorrt_8(model(nodes, {}))


def test_reduce_sum_is_as_it_was() -> None:
    new = model([helper.make_node("ReduceSum", ["x", "axes"], ["y"], "s")], {"axes": np.array([1], np.int64)})
    assert for_tensorrt_8(new).graph == new.graph


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_gelu_is_written_out(approximate: str, kind: int) -> None:
    new = model([helper.make_node("Gelu", ["x"], ["y"], "encoder.mlp/Gelu", approximate=approximate)], {}, kind)
    made = for_tensorrt_8(new)
    assert "Gelu" not in {node.op_type for node in made.graph.node} and made.graph.node[-1].name == "encoder.mlp/Gelu"
    x = np.linspace(-6, 6, 120).reshape(SHAPE).astype(helper.tensor_dtype_to_np_dtype(kind))
    tolerance = 1e-6 if kind == TensorProto.FLOAT else 5e-3
    np.testing.assert_allclose(run(as_opset_17(made), x), run(new, x), atol=tolerance)


def test_a_file_for_trtexec(tmp_path: Path) -> None:
    folder = portable_folder(tmp_path / "fpn")
    made = onnx.load_model_from_string(graph_for_tensorrt_8(folder))
    casts = [a.i for node in made.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert casts == [TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.UINT8]
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError):
        graph_for_tensorrt_8(folder)
