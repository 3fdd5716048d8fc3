"""Matrix products as what TensorRT-RTX has for Turing (SM 75): convolutions, or multiplications and a sum.

Measured with TensorRT-RTX 1.7: for SM 75 it has no float32 matrix product, not of dequantized int8 values either ("FP32
GEMM is not supported"). It has half-precision ones, and float32 and int8 convolutions, also with a kernel that the graph
computes. So the graph its parser gets, and only when the engine is for SM 75, is rewritten:

- a product with a constant matrix is a 1x1 convolution over the axis that is summed;
- of two computed operands, the batch axes are groups of a 1x1 convolution, and the left operand is its kernel;
- where that would need a size that is not known before run time, the operands are multiplied element by element and
  summed. It is the same sum, and int8 operands become float for it: the precision report says so.

The node that multiplies keeps the product's name, so messages, modules and multiply-accumulates keep their place.

Precondition: a MatMul, or a Gemm that is a linear layer, in float32 or of dequantized int8, of known ranks. Postcondition:
none is left. Products this does not know (Einsum) stay, and TensorRT-RTX refuses them by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.errors import BuildError, SpecError
from edgeseg.graph.editing import Editor, constant_array, dims, maker, replace_value

TURING = 75
"""The compute capability without float32 matrix products."""

_MOST_AXES = 4
"""Of a product with a constant matrix: it becomes a two-dimensional convolution."""


def for_turing(parsed: ParsedGraph, *, keep_weights: bool = False) -> ParsedGraph:
    """The graph that TensorRT-RTX can build for SM 75; ``parsed`` itself when it needs no change.

    Args:
        parsed: a typed graph, as it is for every other target.
        keep_weights: whether the engine is to get its weights from the portable graph later, by their names and shapes.

    Raises:
        SpecError: weights are to be kept, but would be turned into kernels.
        BuildError: the rewrite left a product it should have replaced.
    """
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(parsed.model, data_prop=True))
    products = [node for node in model.graph if _matches(node, parsed.dtypes)]
    if not products:
        return parsed
    if keep_weights:
        raise SpecError(
            f"{len(products)} matrix products of {parsed.path.name} become convolutions for SM 75, so strip_weights and "
            "refit would not find their weights; leave out these options, or 75 of sm"
        )
    origins: dict[str, str] = {}
    for node in products:
        _Product(model.graph, node, origins).replace()
    RemoveUnusedNodesPass()(model)
    if left := sum(_matches(node, parsed.dtypes) for node in model.graph):
        raise BuildError(
            f"{parsed.path.name} has {left} products that were not rewritten for SM 75; please report the model"
        )
    rewritten = ir.serde.serialize_model(model)
    nodes = tuple(node.name for node in rewritten.graph.node)
    return dataclasses.replace(parsed, model=rewritten, nodes=nodes, origins=origins)


def _matches(node: ir.Node, dtypes: Mapping[str, str]) -> bool:
    if node.op_type not in {"MatMul", "Gemm"} or dtypes.get(str(node.name)) not in ("fp32", "int8"):
        return False
    ranks = [len(dims(value) or ()) for value in node.inputs[:2]]
    return min(ranks) >= 2 and (node.op_type == "MatMul" or _is_linear(node))


def _is_linear(node: ir.Node) -> bool:
    """Whether a Gemm is ``x @ W + b`` with a constant W and b, and nothing more."""
    attributes = node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    columns = (dims(node.inputs[1]) or ())[0 if attributes.get_int("transB", 0) else 1]
    fits = len(node.inputs) < 3 or (bias is not None and bias.size == columns)
    return not scaled and not attributes.get_int("transA", 0) and fits and _constant(node.inputs[1]) is not None


@dataclass(frozen=True)
class _Constant:
    """A constant matrix, or the integers of a dequantized one.

    Attributes:
        array: ``(rows, columns)``, float32 or int8.
        scales: of each row or column, or one for all; ``None`` for float32.
        axis: 0 when there is a scale a row, 1 when there is one a column.
    """

    array: NDArray[Any]
    scales: NDArray[np.float32] | None = None
    axis: int = 1

    def kernel(self, outputs: int) -> NDArray[Any]:
        """As ``(O, I, 1, 1)``, with axis ``outputs`` of the matrix first."""
        return np.ascontiguousarray(self.array if outputs == 0 else self.array.T)[:, :, None, None]


def _constant(value: ir.Value | None) -> _Constant | None:
    """A constant matrix of two axes, leading ones of size 1 left out; ``None`` if it is computed or quantized otherwise."""
    dequantize = maker(value, "DequantizeLinear")
    array = constant_array(value if dequantize is None else dequantize.inputs[0])
    if array is None or array.ndim < 2 or math.prod(array.shape[:-2]) != 1:
        return None
    matrix = array.reshape(array.shape[-2:])
    if dequantize is None:
        return _Constant(matrix)
    axis = dequantize.attributes.get_int("axis", 1) % array.ndim
    return _Constant(matrix, constant_array(dequantize.inputs[1]), axis - array.ndim + 2)


class _Product:
    """One product of a graph; new nodes stand where it stood, and ``origins`` says of each what it is a part of."""

    def __init__(self, graph: ir.Graph, node: ir.Node, origins: dict[str, str]) -> None:
        self._graph = graph
        self._node = node
        self._origins = origins
        self._editor = Editor(graph, node, node.name)

    def replace(self) -> None:
        """Put one of the four forms in its place."""
        node = self._node
        left, right = node.inputs[:2]
        assert left is not None
        assert right is not None
        ranks = [len(dims(value) or ()) for value in (left, right)]
        matrix = _constant(right)
        if matrix is not None and (node.op_type == "Gemm" or ranks[0] <= _MOST_AXES):
            result = self._linear(left, matrix, 0 if node.attributes.get_int("transB", 0) else 1)
        elif (matrix := _constant(left)) is not None and ranks[1] <= _MOST_AXES:
            result = self._linear_rows(right, matrix)
        elif _is_grouped(left, right):
            result = self._grouped(left, right)
        else:
            result = self._multiplied(left, right)
        replace_value(self._graph, node.outputs[0], result)

    # ---- the four forms

    def _linear(self, x: ir.Value, matrix: _Constant, outputs: int) -> ir.Value:
        """``x (..., N, K) @ matrix (K, O)``: K becomes the channels, O are what they become."""
        rank = len(dims(x) or ())
        # (N, K) -> (N, K, 1, 1); (B, N, K) -> (B, K, N, 1); (B, C, N, K) -> (B, K, C, N)
        return self._convolution(x, matrix, outputs, [0, rank - 1, *range(1, rank - 1)])

    def _linear_rows(self, x: ir.Value, matrix: _Constant) -> ir.Value:
        """``matrix (O, K) @ x (..., K, N)``."""
        rank = len(dims(x) or ())
        # (K, N) -> (N, K, 1, 1), which alone changes the batch; else (B, K, N, 1) and (B, K, C, N)
        return self._convolution(x, matrix, 0, [1, 0] if rank == 2 else [0, rank - 2, *range(1, rank - 2), rank - 1])

    def _convolution(self, x: ir.Value, matrix: _Constant, outputs: int, forth: list[int]) -> ir.Value:
        missing, is_moved = list(range(len(forth), 4)), forth != sorted(forth)
        moved = self._moved(x, "Transpose", perm=forth) if is_moved else x
        if missing:
            moved = self._moved(moved, "Unsqueeze", missing)
        inputs = [moved, self._kernel(matrix, outputs)]
        bias = constant_array(self._node.inputs[2]) if len(self._node.inputs) > 2 else None
        if bias is not None:
            inputs.append(self._editor.constant("bias", bias.reshape(-1)))
        result = self._multiply("Conv", inputs, kernel_shape=[1, 1])
        if missing:
            result = self._move(result, "Squeeze", missing)
        return self._move(result, "Transpose", perm=[int(axis) for axis in np.argsort(forth)]) if is_moved else result

    def _grouped(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """``left (..., M, K) @ right (..., K, N)``: the rows of ``left`` are kernels of a group for each of the rest."""
        a, b = dims(left) or (), dims(right) or ()
        groups = math.prod(d or 0 for d in a[:-2])
        rows, inner = (d or 0 for d in a[-2:])
        columns = -1 if b[-1] is None else b[-1]
        kernel = self._moved(left, "Reshape", [groups * rows, inner, 1, 1])
        planes = self._moved(right, "Reshape", [1, groups * inner, columns, 1])
        result = self._multiply("Conv", [planes, kernel], kernel_shape=[1, 1], group=groups)
        return self._move(result, "Reshape", [*(d or 0 for d in a[:-1]), columns])

    def _multiplied(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """``sum_k left[..., m, k, 1] * right[..., 1, k, n]``."""
        factors = [
            self._move(left, "Unsqueeze", [len(dims(left) or ())]),
            self._move(right, "Unsqueeze", [len(dims(right) or ()) - 2]),
        ]
        product = self._multiply("Mul", factors)
        return self._op("sum", "ReduceSum", [product, self._editor.constant("axes", np.array([-2]))], keepdims=0)

    # ---- what they are made of

    def _moved(self, value: ir.Value, op_type: str, numbers: Sequence[int] = (), **attributes: Any) -> ir.Value:
        """A movement of an operand. Of a dequantized one the integers are moved: only a DQ right before it makes int8."""
        dequantize = maker(value, "DequantizeLinear")
        scale = constant_array(dequantize.inputs[1]) if dequantize is not None else None
        if dequantize is None or scale is None or scale.size > 1:
            return self._move(value, op_type, numbers, **attributes)
        integers = self._move(dequantize.inputs[0], op_type, numbers, **attributes)
        result = self._op("DQ", "DequantizeLinear", [integers, *dequantize.inputs[1:]])
        result.producer().attributes.update(dequantize.attributes)  # type: ignore[union-attr]
        return result

    def _move(self, value: ir.Value | None, op_type: str, numbers: Sequence[int] = (), **attributes: Any) -> ir.Value:
        assert value is not None
        inputs = [value, self._editor.constant(f"{op_type}/to", np.array(numbers, np.int64))] if numbers else [value]
        return self._op(op_type, op_type, inputs, dtype=value.dtype or ir.DataType.FLOAT, **attributes)

    def _op(self, name: str, op_type: str, inputs: Sequence[ir.Value | None], **how: Any) -> ir.Value:
        value = self._editor.op(name, op_type, inputs, **how)
        self._origins[str(value.name)] = str(self._node.name)
        return value

    def _multiply(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """The node that multiplies, which has the product's name."""
        value = self._editor.op(op_type, op_type, inputs, **attributes)
        value.producer().name = self._node.name  # type: ignore[union-attr]
        return value

    def _kernel(self, matrix: _Constant, outputs: int) -> ir.Value:
        scales = matrix.scales
        if scales is None:
            return self._editor.constant("kernel", matrix.kernel(outputs))
        if scales.size > 1 and matrix.axis != outputs:
            # A scale along the axis that is summed: no convolution has that, so its weight is the float one.
            factors = scales[:, None] if matrix.axis == 0 else scales[None]
            return self._editor.constant("kernel", _Constant(matrix.array * factors).kernel(outputs))
        arrays = {
            "integers": matrix.kernel(outputs),
            "scale": scales,
            "zero_point": np.zeros(scales.shape, matrix.array.dtype),
        }
        inputs = [self._editor.constant(f"kernel/{name}", array) for name, array in arrays.items()]
        return self._op("kernel", "DequantizeLinear", inputs, axis=0)


def _is_grouped(left: ir.Value, right: ir.Value) -> bool:
    a, b = dims(left) or (), dims(right) or ()
    return None not in a and None not in b[:-1] and a[:-2] == b[:-2]
