"""Graphs for TensorRT 8's parser: what it reads wrongly or refuses is written in another way, and means the same.

The parser is not here. What it would say is what its source says (:mod:`recorded_tensorrt.parser8`); that the graph means
the same, ONNX Runtime says, which takes the result as the file of opset 17 it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from recorded_tensorrt.graphs import SIDE, small_model
from recorded_tensorrt.parser8 import complaints
from small_graphs import plain_session
from test_compile_for_device import portable_folder

from edgeseg.backends.compile import write_graph_for_tensorrt_8
from edgeseg.backends.tensorrt import opset17
from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8
from edgeseg.errors import ArtifactError, BuildError, OutputExistsError, SpecError

SHAPE = (2, 3, 4, 5)


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    kind: int = TensorProto.FLOAT,
    result: int | None = None,
    shape: tuple[int | str, ...] = SHAPE,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind if result is None else result, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    made.graph.output[0].CopyFrom(onnx.shape_inference.infer_shapes(made).graph.output[0])
    return made


def run(made: onnx.ModelProto, x: NDArray[Any], name: str = "x") -> NDArray[Any]:
    y: NDArray[Any] = plain_session(made).run(None, {name: x})[0]
    return y


def rewritten(new: onnx.ModelProto, **how: Any) -> onnx.ModelProto:
    """For TensorRT 8: a file of opset 17 that its parser has nothing against; ``new`` is not touched."""
    before = new.SerializeToString()
    made = for_tensorrt_8(new, **how)
    assert new.SerializeToString() == before
    assert made.model.opset_import[0].version == 17
    onnx.checker.check_model(made.model, full_check=True)
    assert list(complaints(made.model, "8.6" if how.get("has_normalization") else "8.5")) == []
    names = {node.name for node in made.model.graph.node if node.name}
    theirs = {node.name for node in new.graph.node}
    assert names - theirs <= set(made.origins) and set(made.origins.values()) <= theirs
    return made.model


def random(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceProd"])
@pytest.mark.parametrize("axes", [[2, 3], [-1], [1]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_of_a_reduction(op: str, axes: list[int], keepdims: int) -> None:
    node = helper.make_node(op, ["x", "axes"], ["y"], "encoder.se/Reduce", keepdims=keepdims)
    new = model([node], {"axes": np.array(axes, np.int64)})
    made = rewritten(new)
    (changed,) = made.graph.node
    assert changed.name == "encoder.se/Reduce" and list(changed.input) == ["x"]
    np.testing.assert_allclose(run(made, random()), run(new, random()), rtol=1e-6)


def test_axes_in_a_constant_node_and_no_axes() -> None:
    constant = helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.array([1], np.int64)))
    for nodes in (
        [constant, helper.make_node("ReduceMean", ["x", "axes"], ["y"], "m")],
        [helper.make_node("ReduceMean", ["x"], ["y"], "m")],
        [helper.make_node("ReduceMean", ["x", "none"], ["y"], "m", noop_with_empty_axes=1)],
        [helper.make_node("ReduceMean", ["x", "none"], ["y"], "m")],
    ):
        new = model(nodes, {"none": np.array([], np.int64)})
        made = rewritten(new)
        np.testing.assert_allclose(run(made, random()), run(new, random()), rtol=1e-6)
        assert [node.name for node in made.graph.node][-1] == "m"


def test_reduce_sum_is_as_it_was() -> None:
    new = model([helper.make_node("ReduceSum", ["x", "axes"], ["y"], "s")], {"axes": np.array([1], np.int64)})
    assert rewritten(new).graph == new.graph


@pytest.mark.parametrize("start_end", [{"start": 1, "end": 3}, {"start": -2}, {"end": -1}, {"start": 0}])
def test_a_part_of_a_shape(start_end: dict[str, Any]) -> None:
    new = model([helper.make_node("Shape", ["x"], ["y"], "s", **start_end)], {}, result=TensorProto.INT64)
    np.testing.assert_array_equal(run(rewritten(new), random()), run(new, random()))


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_split(parts: int) -> None:
    """Of 5 columns: the parser's own parts would be of 5 // parts."""
    names = [f"p{i}" for i in range(parts)]
    for last in names:
        nodes = [
            helper.make_node("Split", ["x"], names, "s", axis=-1, num_outputs=parts),
            helper.make_node("Identity", [last], ["y"], "i"),
        ]
        new = model(nodes, {})
        np.testing.assert_array_equal(run(rewritten(new), random()), run(new, random()))
    open_size = model(
        [helper.make_node("Split", ["x"], ["y", "z"], "s", axis=3, num_outputs=2)], {}, shape=(2, 3, 4, "w")
    )
    with pytest.raises(BuildError, match="would split s in equal parts, and its size is not known; use a fixed --size"):
        for_tensorrt_8(open_size)


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_modes_of_grid_sample(mode: str) -> None:
    grid = np.random.default_rng(1).uniform(-1, 1, (2, 6, 7, 2)).astype(np.float32)
    new = model([helper.make_node("GridSample", ["x", "grid"], ["y"], "g", mode=mode)], {"grid": grid})
    np.testing.assert_allclose(run(rewritten(new), random()), run(new, random()), rtol=1e-6)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("ReduceMean", ["x", "s"], ["y"], "m"),
            "ignores the axes of ReduceMean m, which are computed",
        ),
        (
            helper.make_node("Resize", ["x", "", "k"], ["y"], "r", antialias=1, mode="linear"),
            "antialias.*use TensorRT 10",
        ),
        (helper.make_node("Resize", ["x", "", "half"], ["y"], "r", axes=[2, 3]), "axes.*use TensorRT 10"),
        (
            helper.make_node("ScatterND", ["x", "at", "x"], ["y"], "n", reduction="add"),
            "ignores the reduction of ScatterND n",
        ),
        (
            helper.make_node("InstanceNormalization", ["x", "c", "c"], ["y"], "n"),
            "with constants only, n computes them",
        ),
        (helper.make_node("LayerNormalization", ["x", "c"], ["y"], "n"), "has no LayerNormalization, and n cannot be"),
        (
            helper.make_node("QuantizeLinear", ["x", "k", "u"], ["y"], "q"),
            "signed integers around zero only, q has others",
        ),
        (helper.make_node("QuantizeLinear", ["x", "k"], ["y"], "q"), "signed integers around zero only, q has others"),
    ],
)
def test_what_cannot_be_written_so_is_an_error_and_not_a_wrong_result(node: onnx.NodeProto, message: str) -> None:
    before = [
        helper.make_node("Shape", ["x"], ["s"], "shape", start=0, end=1),
        helper.make_node("Cast", ["s"], ["c"], "cast", to=TensorProto.FLOAT),
    ]
    constants = {
        "k": np.ones(4, np.float32),
        "half": np.ones(2, np.float32),
        "at": np.zeros((2, 1), np.int64),
        "u": np.uint8(128),
    }
    with pytest.raises(BuildError, match=message):
        for_tensorrt_8(model([*before, node], constants))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_gelu_is_written_out(approximate: str, kind: int) -> None:
    new = model([helper.make_node("Gelu", ["x"], ["y"], "encoder.mlp/Gelu", approximate=approximate)], {}, kind)
    made = rewritten(new)
    assert made.graph.node[-1].name == "encoder.mlp/Gelu"
    x = np.linspace(-6, 6, 120).reshape(SHAPE).astype(helper.tensor_dtype_to_np_dtype(kind))
    tolerance = 1e-6 if kind == TensorProto.FLOAT else 5e-3
    np.testing.assert_allclose(run(made, x), run(new, x), atol=tolerance)


def test_mish_is_written_out() -> None:
    new = model([helper.make_node("Mish", ["x"], ["y"], "encoder.act/Mish")], {})
    np.testing.assert_allclose(run(rewritten(new), 4 * random()), run(new, 4 * random()), atol=1e-6)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 700.0])
def test_instance_normalization_is_written_out(kind: int, scale: float) -> None:
    """In halves too, where the squares of 700 are no number."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants = {"g": np.array([0.5, 1, 2], dtype), "b": np.array([1, 0, -1], dtype)}
    node = helper.make_node("InstanceNormalization", ["x", "g", "b"], ["y"], "decoder.norm/IN", epsilon=1e-5)
    new = model([node], constants, kind)
    made = rewritten(new)
    assert made.graph.node[-1].name == "decoder.norm/IN"
    x = (scale * random()).astype(dtype)
    wide = x.astype(np.float64)
    mean, variance = wide.mean((2, 3), keepdims=True), wide.var((2, 3), keepdims=True)
    gain, shift = (constants[name].astype(np.float64).reshape(1, 3, 1, 1) for name in "gb")
    expected = (wide - mean) / np.sqrt(variance + 1e-5) * gain + shift
    np.testing.assert_allclose(run(made, x), expected, atol=1e-5 if kind == TensorProto.FLOAT else 5e-3)


@pytest.mark.parametrize("axis", [-1, -2, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_layer_normalization_is_written_out(axis: int, bias: bool, kind: int) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    shape = SHAPE[axis:]
    constants: dict[str, Any] = {"g": np.linspace(0.5, 2, int(np.prod(shape))).reshape(shape).astype(dtype)}
    if bias:
        constants["b"] = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype)
    node = helper.make_node("LayerNormalization", ["x", *constants], ["y"], "encoder.norm/LN", axis=axis, epsilon=1e-6)
    new = model([node], constants, kind)
    made = rewritten(new)
    x = (300 * random()).astype(dtype)
    np.testing.assert_allclose(run(made, x), run(new, x), atol=1e-5 if kind == TensorProto.FLOAT else 5e-3)
    assert [n.op_type for n in rewritten(new, has_normalization=True).graph.node] == ["LayerNormalization"]


def test_every_integer_survives_its_scale() -> None:
    """The Q in front of an int8 constant gives back what was there, for scales of any size and mantissa."""
    rng = np.random.default_rng(0)
    scales = np.exp(rng.uniform(-80, 80, 2000)).astype(np.float32)
    integers = np.broadcast_to(np.arange(-128, 128, dtype=np.int8), (2000, 256)).copy()
    nodes = [
        helper.make_node("DequantizeLinear", ["i", "s"], ["w"], "DQ", axis=0),
        helper.make_node("MatMul", ["w", "x"], ["y"], "m"),
    ]
    new = model(nodes, {"i": integers, "s": scales}, shape=(256, 1))
    made = rewritten(new)
    quantize = next(node for node in made.graph.node if node.op_type == "QuantizeLinear")
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info(quantize.output[0], TensorProto.INT8, None))
    np.testing.assert_array_equal(run(made, np.zeros((256, 1), np.float32)), integers)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_integer_weights_of_any_axis(axis: int) -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (4, 5), np.int8)
    scales = rng.uniform(0.001, 0.1, integers.shape[axis]).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["i", "s"], ["w"], "DQ", axis=axis),
        helper.make_node("MatMul", ["w", "x"], ["y"], "m"),
    ]
    new = model(nodes, {"i": integers, "s": scales}, shape=(5, 3))
    x = rng.standard_normal((5, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(rewritten(new), x), run(new, x))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_small_network_gives_the_same_mask(precision: str) -> None:
    new = small_model(precision)
    x = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    np.testing.assert_array_equal(run(rewritten(new), x, "image"), run(new, x, "image"))


def test_bytes_are_cast_first_and_last() -> None:
    """A flipped image and a squeezed binary mask, as exported: TensorRT 8 has uint8 for inputs and outputs only."""
    nodes = [
        helper.make_node("Gather", ["image", "bgr"], ["flipped"], "preprocess/Gather", axis=3),
        helper.make_node("Cast", ["flipped"], ["float"], "preprocess/Cast", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "last"], ["mean"], "net/Mean", keepdims=1),
        helper.make_node("Greater", ["mean", "limit"], ["above"], "postprocess/Greater"),
        helper.make_node("Cast", ["above"], ["bytes"], "postprocess/Cast", to=TensorProto.UINT8),
        helper.make_node("Where", ["above", "bytes", "none"], ["chosen"], "postprocess/Where"),
        helper.make_node("Squeeze", ["chosen", "last"], ["mask"], "postprocess/Squeeze"),
    ]
    constants = {"bgr": np.array([2, 1, 0]), "last": np.array([3]), "limit": np.float32(100), "none": np.uint8(7)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, 6, 8, 3))],
        [helper.make_tensor_value_info("mask", TensorProto.UINT8, (1, 6, 8))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    new = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert {"Found invalid input type of UINT8"} <= {text for _, text in complaints(new, "8.5")}
    image = np.random.default_rng(0).integers(0, 256, (1, 6, 8, 3), np.uint8)
    mask = run(rewritten(new), image, "image")
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {1, 7}
    np.testing.assert_array_equal(mask, run(new, image, "image"))


def test_a_rewrite_that_were_missing_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(opset17._REWRITES, "DequantizeLinear")
    made = for_tensorrt_8(small_model("int8")).model
    said = {text for _, text in complaints(made, "8.5")}
    assert said == {"This version of TensorRT requires 3 inputs for the DequantizeLinear operator."}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_file_for_trtexec(tmp_path: Path, precision: Any) -> None:
    folder = portable_folder(tmp_path / "fpn", precision)
    flags = write_graph_for_tensorrt_8(folder, tmp_path / "trt8.onnx")
    assert flags == {"fp32": (), "fp16": ("--fp16",), "int8": ("--int8", "--fp16")}[precision]
    made = onnx.load(tmp_path / "trt8.onnx")
    assert list(complaints(made, "8.5")) == [] and made.opset_import[0].version == 17
    with pytest.raises(OutputExistsError):
        write_graph_for_tensorrt_8(folder, tmp_path / "trt8.onnx")
    write_graph_for_tensorrt_8(folder, tmp_path / "trt8.onnx", force=True)
    with pytest.raises(SpecError, match="would replace the input"):
        write_graph_for_tensorrt_8(folder, folder / "model.onnx", force=True)
    (folder / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError):
        write_graph_for_tensorrt_8(folder, tmp_path / "other.onnx")
