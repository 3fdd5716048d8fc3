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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.errors import BuildError, SpecError
from edgeseg.graph.proto import Dims, attribute, dims, drop_unread_constants, makers, value_infos

TURING = 75
"""The compute capability without float32 matrix products."""

_GEMM = frozenset({"MatMul", "Gemm"})
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
    products = _Products(parsed)
    count = products.apply()
    if not count:
        return parsed
    if keep_weights:
        raise SpecError(
            f"{count} matrix products of {parsed.path.name} become convolutions for SM 75, so strip_weights and refit "
            "would not find their weights; leave out these options, or 75 of --sm"
        )
    if left := products.leaves():
        raise BuildError(
            f"{parsed.path.name} has {left} products that were not rewritten for SM 75; please report the model"
        )
    nodes = tuple(node.name for node in products.model.graph.node)
    return dataclasses.replace(parsed, model=products.model, nodes=nodes, origins=products.origins)


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


class _Products:
    """A copy of a graph, walked once; new nodes stand where the product stood."""

    def __init__(self, parsed: ParsedGraph) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(parsed.model)
        self._dtypes = parsed.dtypes
        self._weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._makers = makers(parsed.model.graph)
        self._shapes = _shapes(parsed.model)
        self._new: list[onnx.NodeProto] = []
        self.origins: dict[str, str] = {}
        """By node that was made: the product it is a part of."""
        self._at = ""
        self._moves = 0

    def apply(self) -> int:
        """Rewrite; return how often."""
        count = 0
        for node in self.model.graph.node:
            replaced = self._matches(node) and self._replace(node)
            count += replaced
            if not replaced:
                self._new.append(node)
        if count:
            nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._new]
            del self.model.graph.node[:]
            self.model.graph.node.extend(nodes)
            self._remove_unread()
        return count

    def leaves(self) -> int:
        """How many are left."""
        return sum(self._matches(node) for node in self.model.graph.node)

    def _matches(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in _GEMM or self._dtypes.get(node.name) not in ("fp32", "int8"):
            return False
        ranks = [len(self._shapes.get(name, ())) for name in node.input[:2]]
        return min(ranks) >= 2 and (node.op_type == "MatMul" or self._is_linear(node))

    def _is_linear(self, node: onnx.NodeProto) -> bool:
        """Whether a Gemm is ``x @ W + b`` with a constant W and b, and nothing more."""
        plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA")
        bias = self._weights.get(node.input[2]) if len(node.input) > 2 else None
        columns = self._shapes[node.input[1]][0 if attribute(node, "transB") else 1]
        fits = len(node.input) < 3 or (bias is not None and math.prod(bias.dims) == columns)
        return bool(plain and fits and self._constant(node.input[1]) is not None)

    def _replace(self, node: onnx.NodeProto) -> bool:
        self._moves, self._at = 0, node.name
        left, right = node.input[0], node.input[1]
        ranks = [len(self._shapes[name]) for name in (left, right)]
        matrix = self._constant(right)
        if node.op_type == "Gemm":
            assert matrix is not None
            self._linear(node, left, matrix, 0 if attribute(node, "transB") else 1)
        elif matrix is not None and ranks[0] <= _MOST_AXES:
            self._linear(node, left, matrix, 1)
        elif (matrix := self._constant(left)) is not None and ranks[1] <= _MOST_AXES:
            self._linear_rows(node, right, matrix)
        elif self._is_grouped(left, right):
            self._grouped(node, left, right)
        else:
            self._multiplied(node, left, right)
        return True

    # ---- the four forms

    def _linear(self, node: onnx.NodeProto, x: str, matrix: _Constant, outputs: int) -> None:
        """``x (..., N, K) @ matrix (K, O)``: K becomes the channels, O are what they become."""
        rank = len(self._shapes[x])
        # (N, K) -> (N, K, 1, 1); (B, N, K) -> (B, K, N, 1); (B, C, N, K) -> (B, K, C, N)
        forth = [0, rank - 1, *range(1, rank - 1)]
        self._convolution(node, x, matrix, outputs, forth, list(np.argsort(forth)))

    def _linear_rows(self, node: onnx.NodeProto, x: str, matrix: _Constant) -> None:
        """``matrix (O, K) @ x (..., K, N)``."""
        rank = len(self._shapes[x])
        # (K, N) -> (N, K, 1, 1), which alone changes the batch; else (B, K, N, 1) and (B, K, C, N)
        forth = [1, 0] if rank == 2 else [0, rank - 2, *range(1, rank - 2), rank - 1]
        self._convolution(node, x, matrix, 0, forth, list(np.argsort(forth)))

    def _convolution(
        self, node: onnx.NodeProto, x: str, matrix: _Constant, outputs: int, forth: list[int], back: list[int]
    ) -> None:
        missing = list(range(len(forth), 4))
        moved = self._moved(node, x, "Transpose", perm=forth) if forth != sorted(forth) else x
        if missing:
            moved = self._moved(node, moved, "Unsqueeze", axes=missing)
        inputs = [moved, self._kernel(node, matrix, outputs)]
        if len(node.input) > 2:
            bias = numpy_helper.to_array(self._weights[node.input[2]]).reshape(-1)
            inputs.append(self._weight(f"{node.name}_bias", bias))
        steps: list[tuple[str, dict[str, Any]]] = []
        if missing:
            steps.append(("Squeeze", {"axes": missing}))
        if back != sorted(back):
            steps.append(("Transpose", {"perm": back}))
        result = f"{node.name}_convolved" if steps else node.output[0]
        self._emit("Conv", inputs, result, node.name, kernel_shape=[1, 1])
        for index, (op_type, how) in enumerate(steps):
            last = index == len(steps) - 1
            result = self._move(node, result, op_type, output=node.output[0] if last else None, **how)

    def _is_grouped(self, left: str, right: str) -> bool:
        a, b = self._shapes[left], self._shapes[right]
        known = None not in a and None not in b[:-1]
        return known and a[:-2] == b[:-2]

    def _grouped(self, node: onnx.NodeProto, left: str, right: str) -> None:
        """``left (..., M, K) @ right (..., K, N)``: the rows of ``left`` are kernels of a group for each of the rest."""
        a, b = self._shapes[left], self._shapes[right]
        groups = math.prod(d or 0 for d in a[:-2])
        rows, inner = (d or 0 for d in a[-2:])
        kernel = self._moved(node, left, "Reshape", shape=[groups * rows, inner, 1, 1])
        planes = self._moved(node, right, "Reshape", shape=[1, groups * inner, -1 if b[-1] is None else b[-1], 1])
        result = f"{node.name}_convolved"
        self._emit("Conv", [planes, kernel], result, node.name, kernel_shape=[1, 1], group=groups)
        shape = [*(d or 0 for d in a[:-1]), -1 if b[-1] is None else b[-1]]
        self._move(node, result, "Reshape", output=node.output[0], shape=shape)

    def _multiplied(self, node: onnx.NodeProto, left: str, right: str) -> None:
        """``sum_k left[..., m, k, 1] * right[..., 1, k, n]``."""
        factors = [
            self._move(node, left, "Unsqueeze", axes=[len(self._shapes[left])]),
            self._move(node, right, "Unsqueeze", axes=[len(self._shapes[right]) - 2]),
        ]
        self._emit("Mul", factors, f"{node.name}_multiplied", node.name)
        axes = self._weight(f"{node.name}_summed_axes", np.array([-2], np.int64))
        self._emit("ReduceSum", [f"{node.name}_multiplied", axes], node.output[0], f"{node.name}_sum", keepdims=0)

    # ---- what they are made of

    def _moved(self, node: onnx.NodeProto, value: str, op_type: str, **how: Any) -> str:
        """A movement of an operand. Of a dequantized one the integers are moved: only a DQ right before it makes int8."""
        maker = self._made(value)
        if maker is None or maker.op_type != "DequantizeLinear" or self._per_channel(maker):
            return self._move(node, value, op_type, **how)
        integers = self._move(node, maker.input[0], op_type, **how)
        copy = onnx.NodeProto()
        copy.CopyFrom(maker)
        copy.input[0] = integers
        copy.name, copy.output[0] = f"{integers}_DQ", f"{integers}_DQ"
        self.origins[copy.name] = self._at
        self._new.append(copy)
        return str(copy.output[0])

    def _move(self, node: onnx.NodeProto, value: str, op_type: str, output: str | None = None, **how: Any) -> str:
        self._moves += 1
        name = f"{node.name}_move{self._moves}"
        if op_type == "Transpose":
            return self._emit(op_type, [value], output or name, name, perm=how["perm"])
        (numbers,) = how.values()
        tensor = self._weight(f"{name}_{next(iter(how))}", np.array(numbers, np.int64))
        return self._emit(op_type, [value, tensor], output or name, name)

    def _emit(self, op_type: str, inputs: Sequence[str], output: str, name: str, **attributes: Any) -> str:
        self._new.append(helper.make_node(op_type, list(inputs), [output], name, **attributes))
        if name != self._at:
            self.origins[name] = self._at
        return output

    def _made(self, value: str) -> onnx.NodeProto | None:
        made = next((n for n in reversed(self._new) if value in n.output), None)
        return made if made is not None else self._makers.get(value)

    def _weight(self, name: str, array: NDArray[Any]) -> str:
        tensor = numpy_helper.from_array(array, name)
        self.model.graph.initializer.append(tensor)
        self._weights[name] = tensor
        return name

    def _constant(self, value: str) -> _Constant | None:
        """A constant matrix of two axes, leading ones of size 1 left out; ``None`` if it is computed or quantized otherwise."""
        maker = self._makers.get(value)
        if value in self._weights:
            array = numpy_helper.to_array(self._weights[value])
            return _Constant(_matrix(array)) if _is_matrix(array) else None
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in self._weights:
            return None
        array, scales = (numpy_helper.to_array(self._weights[name]) for name in maker.input[:2])
        axis = attribute(maker, "axis", 1) % max(array.ndim, 1)
        return _Constant(_matrix(array), scales, axis - array.ndim + 2) if _is_matrix(array) else None

    def _kernel(self, node: onnx.NodeProto, matrix: _Constant, outputs: int) -> str:
        name = f"{node.name}_kernel"
        if matrix.scales is None:
            return self._weight(name, matrix.kernel(outputs))
        if matrix.scales.size > 1 and matrix.axis != outputs:
            # A scale along the axis that is summed: no convolution has that, so its weight is the float one.
            factors = matrix.scales[:, None] if matrix.axis == 0 else matrix.scales[None]
            return self._weight(name, _Constant(matrix.array * factors).kernel(outputs))
        integers = self._weight(f"{name}_integers", matrix.kernel(outputs))
        scales = self._weight(f"{name}_scale", matrix.scales)
        zeros = self._weight(f"{name}_zero_point", np.zeros(matrix.scales.shape, matrix.array.dtype))
        return self._emit("DequantizeLinear", [integers, scales, zeros], name, f"{name}_DQ", axis=0)

    def _per_channel(self, dequantize: onnx.NodeProto) -> bool:
        scale = self._weights.get(dequantize.input[1])
        return scale is None or math.prod(scale.dims) > 1

    def _remove_unread(self) -> None:
        graph = self.model.graph
        read = {v.name for v in graph.output}
        for node in reversed(list(graph.node)):
            if any(output in read for output in node.output):
                read.update(node.input)
            else:
                graph.node.remove(node)
        drop_unread_constants(graph)
        infos = [v for v in graph.value_info if v.name in read]
        del graph.value_info[:]
        graph.value_info.extend(infos)


def _is_matrix(array: NDArray[Any]) -> bool:
    return array.ndim >= 2 and math.prod(array.shape[:-2]) == 1


def _matrix(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(array.shape[-2:])


def _shapes(model: onnx.ModelProto) -> dict[str, Dims]:
    """Shapes of all values whose rank is known; ``None`` for a size known at run time only."""
    known = {name: dims(value) for name, value in value_infos(model, data_prop=True).items()}
    constants: dict[str, Dims] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    return constants | {name: shape for name, shape in known.items() if shape is not None}
