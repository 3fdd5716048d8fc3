"""How a few torch operators become ONNX, where the exporter's own translation is poor or wrong for our targets.

Given to ``torch.onnx.export(custom_translation_table=...)``. Each is compared with torch in the tests.

- ``adaptive_avg_pool2d``: the exporter writes sizes that are no factor of the input as hundreds of Gather and
  Add nodes, and size 1 as a mean, a reshape and a gather. Here: a pooling operator, or one small matrix per
  axis (the pooled value is linear in the input; see :func:`pooling_matrix`).
- ``_upsample_bicubic2d_aa`` (position embeddings of ViTs): no TensorRT has an antialiased Resize. One matrix per axis;
  constant for a static size, computed from the size in the graph for a dynamic one.
- ``scaled_dot_product_attention``: no Reshape round trip around the key's transposition, and one scale instead
  of two.
- ``unbind``: Split instead of one Slice per part (TensorRT's parser makes 27 layers of a Slice, and one of a
  Split's output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset20 as op


def pooling_matrix(size: int, output: int) -> NDArray[np.float32]:
    """Float32 ``(output, size)``: row i averages input cells floor(i*size/output) up to ceil((i+1)*size/output).

    These are the windows of torch's adaptive average pooling.
    """
    matrix = np.zeros((output, size), np.float32)
    for i in range(output):
        start, end = i * size // output, -((i + 1) * size // -output)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def _adaptive_avg_pool2d(x: Any, output_size: Sequence[int]) -> Any:
    rows, columns = (int(v) for v in output_size)
    if (rows, columns) == (1, 1):
        return op.GlobalAveragePool(x)
    height, width = x.shape[-2], x.shape[-1]
    if isinstance(height, int) and isinstance(width, int):
        if height % rows == 0 and width % columns == 0:
            kernel = [height // rows, width // columns]
            return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
        left = _constant(pooling_matrix(height, rows))
        right = _constant(np.ascontiguousarray(pooling_matrix(width, columns).T))
    else:
        left = _symbolic_pooling_matrix(x, 2, rows)
        right = op.Transpose(_symbolic_pooling_matrix(x, 3, columns), perm=[1, 0])
    return op.MatMul(left, op.MatMul(x, right))


def _symbolic_pooling_matrix(x: Any, axis: int, output: int) -> Any:
    """:func:`pooling_matrix` computed inside the graph, for a size known only at run time."""
    size = op.Shape(x, start=axis, end=axis + 1)
    rows = _constant(np.arange(output, dtype=np.int64).reshape(output, 1))
    count = _constant(np.array([output], np.int64))
    start = op.Div(op.Mul(rows, size), count)
    # ceil(a / b) = (a + b - 1) // b, for integers
    end = op.Div(op.Add(op.Mul(rows, size), op.Add(size, _constant(np.array([output - 1], np.int64)))), count)
    zero, one = _constant(np.array(0, np.int64)), _constant(np.array(1, np.int64))
    cells = op.Range(zero, op.Squeeze(size, _constant(np.array([0], np.int64))), one)
    inside = op.And(op.GreaterOrEqual(cells, start), op.Less(cells, end))
    cells_in_window: Any = op.Cast(op.Sub(end, start), to=ir.DataType.FLOAT)
    return op.Div(op.Cast(inside, to=ir.DataType.FLOAT), cells_in_window)


def _upsample_bicubic2d_aa(x: Any, output_size: Sequence[Any], align_corners: bool, *scales: Any) -> Any:
    height, width = x.shape[-2], x.shape[-1]
    known = isinstance(height, int) and isinstance(width, int)
    if align_corners or not known or any(s is not None for s in scales):
        raise NotImplementedError("antialiased bicubic interpolation by a factor, or of a dynamic input")
    rows = _bicubic_matrix(height, output_size[0])
    columns = op.Transpose(_bicubic_matrix(width, output_size[1]), perm=[1, 0])
    return op.MatMul(rows, op.MatMul(x, columns))


def _bicubic_matrix(size: int, output: Any) -> Any:
    """Float32 ``(output, size)`` of antialiased bicubic interpolation; ``output`` may be known at run time only.

    Weights of Keys' cubic kernel (a = -0.5), stretched by the reduction and normalized, as torch computes them.
    """
    if isinstance(output, int):
        count = _constant(np.array(output, np.int64))
    else:
        count = op.Reshape(output, _constant(np.array([], np.int64)))
    zero, one = _constant(np.array(0, np.int64)), _constant(np.array(1, np.int64))
    cells: Any = op.Cast(op.Range(zero, count, one), to=ir.DataType.FLOAT)
    scale = op.Div(_float(size), op.Cast(count, to=ir.DataType.FLOAT))
    centers = op.Unsqueeze(op.Mul(op.Add(cells, _float(0.5)), scale), _constant(np.array([1], np.int64)))
    inputs = _constant(np.arange(size, dtype=np.float32)[None] + np.float32(0.5))
    x = op.Abs(op.Div(op.Sub(inputs, centers), op.Max(scale, _float(1.0))))
    square = op.Mul(x, x)
    near = op.Add(op.Mul(square, op.Sub(op.Mul(x, _float(1.5)), _float(2.5))), _float(1.0))
    far = op.Add(
        op.Mul(op.Sub(op.Mul(square, _float(-0.5)), _float(4.0)), x), op.Add(op.Mul(square, _float(2.5)), _float(2.0))
    )
    outside = op.Where(op.Less(x, _float(2.0)), far, _float(0.0))
    weights = op.Where(op.Less(x, _float(1.0)), near, outside)
    return op.Div(weights, op.ReduceSum(weights, _constant(np.array([1], np.int64)), keepdims=1))


def _scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if is_causal or enable_gqa:
        raise NotImplementedError("causal or grouped-query attention")
    rank = len(key.shape)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, _constant(np.array(factor, np.float32))), op.Transpose(key, perm=swapped))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            attn_mask = op.Where(attn_mask, _constant(np.float32(0)), _constant(np.float32(-np.inf)))
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _unbind(x: Any, dim: int = 0) -> Any:
    count = x.shape[dim]
    if not isinstance(count, int):
        raise NotImplementedError("unbind of a dynamic dimension")
    axis = _constant(np.array([dim], np.int64))
    if count == 1:
        return [op.Squeeze(x, axis)]
    parts = op.Split(x, num_outputs=count, axis=dim)
    return [op.Squeeze(part, axis) for part in parts]


def _float(value: float) -> Any:
    return _constant(np.float32(value))


def _constant(array: NDArray[Any] | np.generic) -> Any:
    tensor: Any = ir.tensor(np.asarray(array))
    return op.Constant(value=tensor)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._upsample_bicubic2d_aa.default: _upsample_bicubic2d_aa,
    torch.ops.aten._upsample_bicubic2d_aa.vec: _upsample_bicubic2d_aa,
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
    torch.ops.aten.unbind.int: _unbind,
}
