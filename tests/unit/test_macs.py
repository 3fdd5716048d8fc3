"""Multiply-accumulates against hand counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper  # noqa: E402

from edgeseg.errors import ArtifactError  # noqa: E402
from edgeseg.graph.macs import count_macs  # noqa: E402


def model(nodes: list[Any], inputs: dict[str, Any], weights: dict[str, tuple[int, ...]], domains: tuple[str, ...] = ()):
    """A one-output model; weights are zeros of a shape."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    tensors = [helper.make_tensor(n, TensorProto.FLOAT, s, np.zeros(s).ravel()) for n, s in weights.items()]
    output = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [output], tensors)
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets)


def test_convolution_counts_outputs_times_taps() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    assert count_macs(model([conv], {"x": (1, 4, 8, 8)}, {"w": (6, 4, 3, 3)})) == {"c": 6 * 4 * 4 * 4 * 9}


def test_grouped_convolution_counts_its_group_only() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c", kernel_shape=[3, 3], pads=[1] * 4, group=4)
    assert count_macs(model([conv], {"x": (1, 4, 8, 8)}, {"w": (4, 1, 3, 3)})) == {"c": 4 * 64 * 9}


def test_transposed_convolution_counts_inputs_times_taps() -> None:
    conv = helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="t", kernel_shape=[2, 2], strides=[2, 2])
    assert count_macs(model([conv], {"x": (1, 4, 8, 8)}, {"w": (4, 6, 2, 2)})) == {"t": 4 * 64 * 6 * 4}


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ((5, 7), (7, 3), 5 * 7 * 3),
        ((2, 5, 7), (7, 3), 2 * 5 * 7 * 3),
        ((2, 1, 5, 7), (4, 7, 3), 2 * 4 * 5 * 7 * 3),
        ((7,), (7, 3), 7 * 3),
        ((5, 7), (7,), 5 * 7),
    ],
)
def test_matmul_broadcasts_like_numpy(left: tuple[int, ...], right: tuple[int, ...], expected: int) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"], name="m")
    assert count_macs(model([node], {"a": left, "b": right}, {})) == {"m": expected}


def test_gemm_heeds_its_transpositions() -> None:
    node = helper.make_node("Gemm", ["a", "b"], ["y"], name="g", transA=1, transB=1)
    assert count_macs(model([node], {"a": (7, 5)}, {"b": (3, 7)})) == {"g": 5 * 7 * 3}


def test_other_nodes_have_none_and_names_are_made_up_when_missing() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    assert count_macs(model(nodes, {"x": (5, 7)}, {"w": (7, 3)})) == {"MatMul#1": 105}


def test_dynamic_dimensions_take_the_sizes_given() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c", kernel_shape=[1, 1])
    dynamic = model([conv], {"x": ("batch", 4, "height", "width")}, {"w": (6, 4, 1, 1)})
    assert count_macs(dynamic, {"height": 8, "width": 16}) == {"c": 6 * 4 * 8 * 16}
    assert count_macs(dynamic, {"batch": 2, "height": 8, "width": 16}) == {"c": 2 * 6 * 4 * 8 * 16}


def test_a_dynamic_dimension_without_a_size_is_named() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="c", kernel_shape=[1, 1])
    with pytest.raises(ArtifactError, match="'height'"):
        count_macs(model([conv], {"x": ("batch", 4, "height", 8)}, {"w": (6, 4, 1, 1)}))


def test_an_unknown_shape_names_the_node() -> None:
    nodes = [
        helper.make_node("Mystery", ["x"], ["u"], domain="nobody.knows"),
        helper.make_node("MatMul", ["u", "w"], ["y"], name="m"),
    ]
    with pytest.raises(ArtifactError, match="'u' at node 'm'"):
        count_macs(model(nodes, {"x": (5, 7)}, {"w": (7, 3)}, domains=("nobody.knows",)))
