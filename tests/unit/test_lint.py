"""The linter passes what the writer writes, and every rule fails on a graph broken in just that way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import RNG, floats, graph, table_for  # noqa: E402

from edgeseg.quantize import lint as lint_module  # noqa: E402
from edgeseg.quantize.lint import RULES, lint  # noqa: E402
from edgeseg.quantize.qdq import quantize_model  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402

IMAGE = RNG.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
Mutation = Callable[[onnx.ModelProto], None]


def written(scheme: str) -> onnx.ModelProto:
    """Convolutions joined by a Concat, then more with a transposed one and a pooling between, quantized."""
    model = graph(
        "(uint8[1, 8, 8, 3] image) => (float[1, 4, h, w] y)",
        """real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        a = Conv(x, w1, b1) r = Relu(a) b = Conv(r, w2, b2) c = Concat <axis = 1> (r, b)
        d = Conv(c, w3, b3) e = ConvTranspose <strides = [2, 2]> (d, w5)
        m = MaxPool <kernel_shape = [2, 2]> (e) y = Conv(m, w4)""",
        gain=np.array(1 / 128, np.float32),
        w1=floats(4, 3, 1, 1),
        b1=floats(4),
        w2=np.abs(floats(4, 4, 1, 1)) / 4,
        b2=np.abs(floats(4)),
        w3=floats(4, 8, 1, 1),
        b3=floats(4),
        w4=floats(4, 4, 1, 1),
        w5=floats(4, 4, 2, 2),
    )
    after = ir.serde.deserialize_model(model)
    quantize_model(after, table_for(model, image=IMAGE), replace(SCHEMES[scheme], passes=()))
    return ir.serde.serialize_model(after)


def tensor(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    """Replace an initializer by what ``change`` makes of it."""
    (constant,) = [t for t in model.graph.initializer if t.name == name]
    constant.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(constant))), name))


def of(name: str, change: Callable[[Any], Any]) -> Mutation:
    return lambda model: tensor(model, name, change)


def node(model: onnx.ModelProto, op_type: str, output: str = "") -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == op_type and n.output[0].startswith(output))


def insert_before(model: onnx.ModelProto, reader: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
    nodes = list(model.graph.node)
    place = nodes.index(reader)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place:]])


def computed_scale(model: onnx.ModelProto) -> None:
    node(model, "QuantizeLinear", "x/").input[1] = "gain2"


def per_channel_activation(model: onnx.ModelProto) -> None:
    tensor(model, "x/scale", lambda v: np.full(3, v))
    tensor(model, "x/zero_point", lambda v: np.full(3, v))


def weight_per_tensor(model: onnx.ModelProto) -> None:
    tensor(model, "a/Conv/weight/scale", lambda v: v[0])
    tensor(model, "a/Conv/weight/zero_point", lambda v: v[0])


def weight_axis(model: onnx.ModelProto) -> None:
    pair = node(model, "DequantizeLinear", "b/Conv/weight")
    del pair.attribute[:]
    pair.attribute.append(helper.make_attribute("axis", 1))


def integer_bias(model: onnx.ModelProto) -> None:
    conv = node(model, "Conv", "a")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.int32), "i"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "i_scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.int32), "i_zero"))
    pair = helper.make_node("DequantizeLinear", ["i", "i_scale", "i_zero"], ["i_dq"], "i/DQ", axis=0)
    conv.input[2] = "i_dq"
    insert_before(model, conv, [pair])


def float_bias(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "plain"))
    node(model, "Conv", "a").input[2] = "plain"


def float_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(floats(4, 3, 1, 1), "plain"))
    node(model, "Conv", "a").input[1] = "plain"


def float_input(model: onnx.ModelProto) -> None:
    node(model, "Conv", "a").input[0] = "x"


def float_reader(model: onnx.ModelProto) -> None:
    conv = node(model, "Conv", "b")
    insert_before(model, node(model, "Conv", "d"), [helper.make_node("Relu", [conv.output[0]], ["spy"], "spy")])


def other_numbers(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "other"))
    node(model, "DequantizeLinear", "x/").input[1] = "other"


def integers_in_float(model: onnx.ModelProto) -> None:
    pair = node(model, "DequantizeLinear", "x/")
    node(model, "Conv", "a").input[0] = pair.input[0]


def unread(model: onnx.ModelProto) -> None:
    pair = node(model, "QuantizeLinear", "x/")
    spare = helper.make_node("QuantizeLinear", list(pair.input), ["spare"], "spare/Q")
    insert_before(model, node(model, "Conv", "a"), [spare])


def float_weight_left(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(floats(4, 3, 1, 1), "left"))


def mixed_concat(model: onnx.ModelProto) -> None:
    node(model, "Concat", "c").input[1] = "x"


def pair_before_relu(model: onnx.ModelProto) -> None:
    relu = node(model, "Relu", "r")
    x, source = node(model, "QuantizeLinear", "x/"), relu.input[0]
    relu.input[0] = "before_dq"
    insert_before(
        model,
        relu,
        [
            helper.make_node("QuantizeLinear", [source, *x.input[1:]], ["before"], "before/Q"),
            helper.make_node("DequantizeLinear", ["before", *x.input[1:]], ["before_dq"], "before/DQ"),
        ],
    )


def concat_scales(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "other"))
    concat = node(model, "Concat", "c")
    pair = next(n for n in model.graph.node if concat.input[1] in n.output)
    quantizer = next(n for n in model.graph.node if pair.input[0] in n.output)
    zero = quantizer.input[2]
    fresh = [
        helper.make_node("QuantizeLinear", [quantizer.input[0], "other", zero], ["own"], "own/Q"),
        helper.make_node("DequantizeLinear", ["own", "other", zero], ["own_dq"], "own/DQ"),
    ]
    concat.input[1] = "own_dq"
    insert_before(model, concat, fresh)


MUTATIONS: list[tuple[str, Mutation, str, str]] = [
    ("onnxruntime-vnni", of("x/scale", lambda v: -v), "_parameters_are_sound", "not positive and finite"),
    (
        "tensorrt",
        of("a/Conv/weight/scale", lambda v: v * np.float32(np.inf)),
        "_parameters_are_sound",
        "not positive and finite",
    ),
    ("tensorrt", computed_scale, "_parameters_are_sound", "no constant scale"),
    ("tensorrt", of("a/Conv/weight/zero_point", lambda v: v[:2]), "_parameters_are_sound", "zero points of shape"),
    ("tensorrt", of("x/zero_point", lambda v: v + np.int8(3)), "_parameters_are_sound", "zero point other than 0"),
    ("tensorrt", of("x/zero_point", lambda v: v.astype(np.uint8)), "_activation_types", "integers of type uint8"),
    ("onnxruntime-vnni", of("x/zero_point", lambda v: v.astype(np.int8)), "_activation_types", "integers of type int8"),
    ("onnxruntime-vnni", per_channel_activation, "_activation_types", "scale per channel"),
    (
        "onnxruntime-avx2",
        of("a/Conv/weight/integers", lambda v: np.full_like(v, 65)),
        "_weights",
        "add to 130",
    ),
    ("tensorrt", of("a/Conv/weight/integers", lambda v: v.astype(np.uint8)), "_weights", "not symmetric int8"),
    ("tensorrt", weight_per_tensor, "_weights", "not quantized per output channel"),
    ("tensorrt", weight_axis, "_weights", "not quantized per output channel"),
    ("tensorrt", integer_bias, "_biases", "wants it float"),
    ("onnxruntime-vnni", float_bias, "_biases", "bias is not int32"),
    ("onnxruntime-vnni", of("a/Conv/bias/scale", lambda v: v * np.float32(1.01)), "_biases", "bias scale is not"),
    ("onnxruntime-vnni", float_weight, "_layers_are_whole", "its weight is float"),
    ("tensorrt", float_input, "_layers_are_whole", "reads a float value"),
    ("onnxruntime-vnni", float_reader, "_layers_are_whole", "float reader"),
    ("onnxruntime-vnni", other_numbers, "_pairs_agree", "other numbers"),
    (
        "openvino",
        of("d/zero_point", lambda v: np.array(7, np.uint8)),
        "_transposed_convolutions_meet_no_zero_point",
        "reads integers with a zero point",
    ),
    ("tensorrt", integers_in_float, "_integers_are_read_right", "reads integers of"),
    ("onnxruntime-vnni", unread, "_integers_are_read_right", "nothing reads it"),
    ("tensorrt", float_weight_left, "_constants_are_read", "constant left is not read"),
    ("onnxruntime-vnni", mixed_concat, "_integers_are_read_right", "joins integers with float"),
    ("tensorrt", pair_before_relu, "_nothing_before_a_clamp", "belongs behind the Relu"),
    ("tensorrt", concat_scales, "_concats_share_a_scale", "do not share one scale"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_the_writer_writes_is_clean(scheme: str) -> None:
    assert lint(written(scheme), SCHEMES[scheme]) == []


@pytest.mark.parametrize(("scheme", "mutate", "rule", "message"), MUTATIONS, ids=[m[3] for m in MUTATIONS])
def test_each_rule_finds_its_mistake(scheme: str, mutate: Mutation, rule: str, message: str) -> None:
    model = written(scheme)
    mutate(model)
    problems = list(getattr(lint_module, rule)(lint_module._Graph(model, frozenset()), SCHEMES[scheme]))
    assert any(message in problem for problem in problems), problems
    assert set(problems) <= set(lint(model, SCHEMES[scheme]))


def test_every_rule_is_broken_by_a_mutation() -> None:
    assert {rule.__name__ for rule in RULES} == {rule for _, _, rule, _ in MUTATIONS}


def test_a_scheme_is_not_another() -> None:
    assert lint(written("tensorrt"), SCHEMES["onnxruntime-vnni"])
    assert lint(written("onnxruntime-vnni"), SCHEMES["tensorrt"])


@pytest.mark.parametrize(("read", "problems"), [((1,), 0), ((), 2)], ids=["one part unread", "both unread"])
def test_a_part_of_a_split_may_be_for_nobody(read: tuple[int, ...], problems: int) -> None:
    model = written("onnxruntime-vnni")
    quantizer = node(model, "QuantizeLinear", "x/")
    parts = helper.make_node("Split", [quantizer.output[0]], ["part0", "part1"], "Split", num_outputs=2, axis=1)
    readers = [
        helper.make_node("DequantizeLinear", [f"part{k}", *quantizer.input[1:]], [f"float{k}"], f"DQ{k}") for k in read
    ]
    insert_before(model, node(model, "Conv", "a"), [parts, *readers])
    unread = [line for line in lint(model, SCHEMES["onnxruntime-vnni"]) if "nothing reads it" in line]
    assert len(unread) == problems
