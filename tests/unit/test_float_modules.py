"""Modules that stay float: any of them, in every scheme, and the graph keeps its scheme's rules and the float graph's values."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import RNG, floats, graph, run, spec, table_for  # noqa: E402

from edgeseg.errors import QuantizationError  # noqa: E402
from edgeseg.quantize.modules import Modules  # noqa: E402
from edgeseg.quantize.qdq import write_qdq  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402
from edgeseg.store.hashing import sha256_file  # noqa: E402
from edgeseg.store.manifest import OnnxGraph  # noqa: E402

IMAGE = RNG.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
NAMES = tuple(f"encoder.layer{k}" for k in range(4)) + tuple(f"decoder.blocks.{k}" for k in range(3))


def network(seed: int) -> onnx.ModelProto:
    """Everything that moves, joins and gates between convolutions, its nodes given to modules in stretches of random length."""
    model = graph(
        "(uint8[1, 16, 16, 3] image) => (float[1, 4, h, w] y)",
        """real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w1, b1) r = Relu(a)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
        c = Conv(p, w2) d = Relu(c) e = Conv(d, w2) f = Add(e, p) g = Relu(f)
        s = GlobalAveragePool(g) t = Conv(s, w2) u = Sigmoid(t) v = Mul(g, u)
        up = ConvTranspose <strides = [2, 2]> (v, w3) cat = Concat <axis = 1> (up, r)
        h = Conv <pads = [1, 1, 1, 1]> (cat, w4, b1) i = Relu(h)
        half1, half2 = Split <axis = 1, num_outputs = 2> (i)
        both = Concat <axis = 1> (half2, half1) j = Conv(both, w2)
        y = Conv(j, w5, b5)""",
        gain=np.array(1 / 128, np.float32),
        w1=floats(8, 3, 3, 3) / 4,
        b1=floats(8),
        w2=floats(8, 8, 1, 1) / 3,
        w3=floats(8, 8, 2, 2) / 3,
        w4=floats(8, 16, 3, 3) / 12,
        w5=floats(4, 8, 1, 1) / 3,
        b5=floats(4),
    )  # fmt: skip
    inner = list(model.graph.node)[3:]
    cuts = sorted(random.Random(seed).sample(range(1, len(inner)), len(NAMES) - 1))
    for position, node in enumerate(inner):
        node.name = f"{NAMES[sum(position >= cut for cut in cuts)]}.{position}/{node.op_type}"
    for node in list(model.graph.node)[:3]:
        node.name = f"preprocess/{node.op_type}"
    return model


def integer_layers(model: onnx.ModelProto) -> set[str]:
    """Names of layers whose weight is dequantized."""
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = [n for n in model.graph.node if n.op_type in {"Conv", "ConvTranspose", "MatMul", "Gemm"}]
    return {n.name for n in layers if n.input[1] in makers and makers[n.input[1]].op_type == "DequantizeLinear"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(4))
def test_any_modules_may_stay_float(scheme: str, seed: int, tmp_path: Any) -> None:
    model = network(seed)
    onnx.save(model, str(tmp_path / "f.onnx"))
    whole = OnnxGraph(tmp_path / "f.onnx", sha256_file(tmp_path / "f.onnx"), "fp32", spec(16, 16), "0")
    table = table_for(model, image=IMAGE)
    modules = Modules.of(ir.serde.deserialize_model(model).graph)
    (expected,) = run(model, image=IMAGE)
    chosen = random.Random(seed)
    for _ in range(6):
        names = chosen.sample(modules.names, chosen.randint(1, len(modules.names) - 1))
        try:
            # The linter raises; what no layer of the rest can be quantized by is an error of its own.
            written = write_qdq(whole, table, SCHEMES[scheme], tmp_path / "q.onnx", names)
        except QuantizationError as exc:
            assert "no convolution" in str(exc)
            continue
        quantized = onnx.load(str(written.path))
        onnx.checker.check_model(quantized, full_check=True)
        owners = {modules.owner(name) for name in integer_layers(quantized)}
        assert owners and not owners.intersection(names)
        (got,) = run(quantized, image=IMAGE)
        assert np.abs(got - expected).max() < 0.25 * np.abs(expected).max()


def test_float_modules_are_half_for_tensorrt(tmp_path: Any) -> None:
    model = network(0)
    onnx.save(model, str(tmp_path / "f.onnx"))
    whole = OnnxGraph(tmp_path / "f.onnx", sha256_file(tmp_path / "f.onnx"), "fp32", spec(16, 16), "0")
    modules = Modules.of(ir.serde.deserialize_model(model).graph)
    name = modules.names[1]
    table = table_for(model, image=IMAGE)
    written = write_qdq(whole, table, SCHEMES["tensorrt"], tmp_path / "q.onnx", [name])
    quantized = onnx.shape_inference.infer_shapes(onnx.load(str(written.path)), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*quantized.graph.value_info, *quantized.graph.output)}
    layers = [n for n in quantized.graph.node if n.op_type in {"Conv", "ConvTranspose"}]
    halves = {n.name for n in layers if types[n.output[0]] == onnx.TensorProto.FLOAT16}
    assert halves == {n.name for n in layers if modules.owner(n.name) == name} != set()


def test_a_module_without_a_layer_belongs_to_what_it_reads() -> None:
    model = network(1)
    nodes = list(model.graph.node)
    alone = nodes[4]
    assert alone.op_type == "Relu"
    alone.name = "encoder.act1/Relu"
    nodes[3].name = "encoder.conv1/Conv"
    modules = Modules.of(ir.serde.deserialize_model(model).graph)
    assert "encoder.act1" not in modules.names
    assert modules.owner("encoder.act1/Relu") == modules.owner("encoder.conv1/Conv/weight/DQ") == "encoder.conv1"
    assert modules.owner("preprocess/Mul") is None
