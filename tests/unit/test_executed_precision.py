"""What ONNX Runtime executed, joined with the file it was saved in: by name, since loading adds nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

ir = pytest.importorskip("onnx_ir", reason="onnx_ir is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from small_graphs import RNG, floats, graph, spec, table_for  # noqa: E402

from edgeseg.backends.cpu.onnxruntime import ENGINE_NAME, backend  # noqa: E402
from edgeseg.backends.cpu.precision import ExecutedNode, executed_precision  # noqa: E402
from edgeseg.errors import BuildError  # noqa: E402
from edgeseg.quantize.qdq import quantize_model  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402
from edgeseg.store.hashing import sha256_file  # noqa: E402
from edgeseg.store.manifest import OnnxGraph  # noqa: E402

SIDE = 8


def hard_swish_network(path: Path) -> OnnxGraph:
    """Convolutions with hard-swish between, quantized: each activation reads its input twice."""
    model = graph(
        f"(uint8[1, {SIDE}, {SIDE}, 3] image) => (uint8[1, {SIDE}, {SIDE}] mask)",
        """real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        a = Conv(x, w1) h = HardSwish(a) b = Conv(h, w2) i = HardSwish(b) y = Conv <pads = [1, 1, 1, 1]> (i, w3)
        index = ArgMax <axis = 1, keepdims = 0> (y) mask = Cast <to = 2> (index)""",
        gain=np.array(1 / 128, np.float32),
        w1=floats(8, 3, 1, 1),
        w2=floats(16, 8, 1, 1),
        w3=floats(4, 16, 3, 3),
    )
    image = RNG.integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    quantized = ir.serde.deserialize_model(model)
    scheme = replace(SCHEMES[backend().scheme], passes=())
    quantize_model(quantized, table_for(model, image=image), scheme)
    onnx.save(ir.serde.serialize_model(quantized), path)
    return OnnxGraph(path, sha256_file(path), "int8", spec(SIDE, SIDE), "0" * 64, scheme.name)


def test_macs_of_an_engine_to_which_loading_adds_nodes(tmp_path: Path) -> None:
    built = backend().build(hard_swish_network(tmp_path / "model.onnx"), tmp_path, {})
    assert built.precision.macs == SIDE * SIDE * (8 * 3 + 16 * 8 + 4 * 16 * 9)
    assert built.precision.mac_share == {"int8": 1.0}
    assert built.precision.float_layers == {}
    assert sum(built.precision.node_share.values()) == pytest.approx(1.0)


def test_a_node_that_was_not_profiled_is_an_error(tmp_path: Path) -> None:
    backend().build(hard_swish_network(tmp_path / "model.onnx"), tmp_path, {})
    other = [ExecutedNode("another", "QLinearConv", "int8", ((1, 8, SIDE, SIDE),))]
    with pytest.raises(BuildError, match="holds no node"):
        executed_precision(tmp_path / ENGINE_NAME, "int8", other, 1)
