"""Applying one rewrite to a small graph, for the tests of rewrites. Oracle: ONNX Runtime without optimizations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from small_graphs import run

from edgeseg.graph.editing import tidy


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def noise(model: onnx.ModelProto, batch: int = 2) -> dict[str, NDArray[np.float32]]:
    """A random array for every input; ``batch`` stands for each size that is not known."""
    rng = np.random.default_rng(11)
    weights = {tensor.name for tensor in model.graph.initializer}
    shapes = {
        value.name: [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in weights
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rewritten(
    model: onnx.ModelProto, module: ModuleType, times: int, *feeds: Mapping[str, NDArray[Any]], within: float = 1e-4
) -> onnx.ModelProto:
    """Apply one rewrite, check that it applied ``times`` and changed no output for these inputs (none given: noise)."""
    after = ir.serde.deserialize_model(model)
    assert module.REWRITE.apply(after) == times
    tidy(after)
    assert not list(module.REWRITE.matches(after))
    proto = ir.serde.serialize_model(after)
    onnx.checker.check_model(proto, full_check=True)
    # A rewrite may leave an input under the name of the output it is.
    for before, behind in [(feed, feed) for feed in feeds] or [(noise(model), noise(proto))]:
        for expected, actual in zip(run(model, **before), run(proto, **behind), strict=True):
            assert actual.shape == expected.shape
            np.testing.assert_allclose(actual, expected, rtol=within, atol=within)
    return proto


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
