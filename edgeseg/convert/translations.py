"""How a few torch operators become ONNX, where the exporter's own translation is poor or wrong for our targets.

Given to ``torch.onnx.export(custom_translation_table=...)``. Each is compared with torch in the tests.

- ``adaptive_avg_pool2d``: the exporter writes sizes that are no factor of the input as hundreds of Gather and
  Add nodes, and size 1 as a mean, a reshape and a gather. Here: a pooling operator, or one small matrix per
  axis (the pooled value is linear in the input; see :func:`pooling_matrix`).
- ``adaptive_max_pool2d``: the exporter has none, or one of a fixed window. Here: a pooling operator, or gathered windows.
- ``amax``, ``amin`` without a dimension, ``avg_pool2d`` with a divisor of its own and ``rrelu``: it has none, or a wrong one.
- ``_upsample_bicubic2d_aa`` (position embeddings of ViTs): no TensorRT has an antialiased Resize. One matrix per axis;
  constant for a static size, computed from the size in the graph for a dynamic one.
- ``scaled_dot_product_attention``: no Reshape round trip around the key's transposition, and one scale instead
  of two.
- ``unbind``: Split instead of one Slice per part (TensorRT's parser makes 27 layers of a Slice, and one of a
  Split's output); Gather where another dimension is dynamic (five of a Split's output then, three of a Gather).
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
from torch.overrides import TorchFunctionMode


def pooling_matrix(size: int, output: int) -> NDArray[np.float32]:
    """Float32 ``(output, size)``: row i averages input cells floor(i*size/output) up to ceil((i+1)*size/output).

    These are the windows of torch's adaptive average pooling.
    """
    matrix = np.zeros((output, size), np.float32)
    for i in range(output):
        start, end = i * size // output, -((i + 1) * size // -output)
        matrix[i, start:end] = 1.0 / (end - start)
    return matrix


def _adaptive_avg_pool2d(x: Any, output_size: Sequence[Any]) -> Any:
    rows, columns = output_size
    if (rows, columns) == (1, 1):
        return op.GlobalAveragePool(x)
    height, width = x.shape[-2], x.shape[-1]
    if all(isinstance(side, int) for side in (height, width, rows, columns)):
        if height % rows == 0 and width % columns == 0:
            kernel = [height // rows, width // columns]
            return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
        left = _constant(pooling_matrix(height, rows))
        right = _constant(np.ascontiguousarray(pooling_matrix(width, columns).T))
    else:
        left, right = _symbolic_pooling_matrix(x, 2, rows), _symbolic_pooling_matrix(x, 3, columns)
    return op.MatMul(left, op.MatMul(x, right))


def _symbolic_pooling_matrix(x: Any, axis: int, output: Any) -> Any:
    """:func:`pooling_matrix` computed inside the graph, for sizes known only at run time; transposed for ``axis`` 3.

    Every operand has four axes: TensorRT's parser makes five layers to bring one of fewer to that. Cell j is in window i when
    ``i * size / output - 1 < j < (i + 1) * size / output``, here in integers, which are exact.
    """
    size: Any = op.Shape(x, start=axis, end=axis + 1)
    cells = _count_up(size, (1, 1, 1, -1) if axis == 2 else (1, 1, -1, 1))
    sides: Any = op.Reshape(size, _constant(np.array([1, 1, 1, 1], np.int64)))
    windows = _count_up(output, (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
    outputs = _whole(output)
    # (j - i * size / output) * output
    offset = op.Sub(op.Mul(cells, outputs), op.Mul(windows, sides))
    inside: Any = op.Cast(op.And(op.Greater(offset, op.Neg(outputs)), op.Less(offset, sides)), to=ir.DataType.FLOAT)
    return op.Div(inside, op.ReduceSum(inside, _constant(np.array([5 - axis], np.int64)), keepdims=1))


def _adaptive_max_pool2d(x: Any, output_size: Sequence[Any]) -> tuple[Any, Any]:
    # No operator makes the second output: hardly anyone reads it, and a graph that does is not valid.
    places = ir.Value(name="places_of_adaptive_max_pool2d", type=ir.TensorType(ir.DataType.INT64))
    rows, columns = output_size
    height, width = x.shape[-2], x.shape[-1]
    if (rows, columns) == (1, 1):
        return op.GlobalMaxPool(x), places
    if all(isinstance(side, int) for side in (height, width, rows, columns)) and not (height % rows or width % columns):
        kernel = [height // rows, width // columns]
        largest, _ = op.MaxPool(x, kernel_shape=kernel, strides=kernel)
        return largest, places
    return _largest_in_windows(_largest_in_windows(x, 2, rows), 3, columns), places


def _largest_in_windows(x: Any, axis: int, output: Any) -> Any:
    """Gather the windows of :func:`pooling_matrix` along ``axis`` as rows of one length; shorter ones repeat their last cell."""
    count = op.Shape(x, start=axis, end=axis + 1)
    outputs = op.Reshape(_whole(output), _constant(np.array([1], np.int64)))
    windows, one = _count_up(output, (-1, 1)), _constant(np.array(1, np.int64))
    # of ceil(count / output) + 1 cells at most
    cells = _count_up(op.Add(op.Div(count, outputs), _constant(np.array([2], np.int64))), (1, -1))
    last = op.Div(op.Sub(op.Mul(op.Add(windows, one), count), one), outputs)
    places = op.Min(op.Add(op.Div(op.Mul(windows, count), outputs), cells), last)
    return op.ReduceMax(op.Gather(x, places, axis=axis), _constant(np.array([axis + 1], np.int64)), keepdims=0)


def _count_up(count: Any, shape: tuple[int, ...]) -> Any:
    """``0 .. count - 1`` as int64 of ``shape``."""
    target = _constant(np.array(shape, np.int64))
    if isinstance(count, int):
        return _constant(np.arange(count, dtype=np.int64).reshape(shape))
    end = op.Reshape(count, _constant(np.array([], np.int64)))
    return op.Reshape(op.Range(_constant(np.array(0, np.int64)), end, _constant(np.array(1, np.int64))), target)


def _avg_pool2d(
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    if len(x.shape) != 4 or (ceil_mode and divisor_override is not None):
        raise NotImplementedError("avg_pool2d without a batch, or with divisor_override and ceil_mode")
    # torch keeps one number for both axes
    kernel, strides, pads = ([*sides] * (2 // len(sides)) for sides in (kernel_size, stride or kernel_size, padding))
    pooled = op.AveragePool(
        x,
        kernel_shape=kernel,
        strides=strides,
        pads=pads * 2,
        ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad or divisor_override is not None),
    )
    return (
        pooled
        if divisor_override is None
        else op.Mul(pooled, _constant(np.float32(math.prod(kernel) / divisor_override)))
    )


def _amax(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return op.ReduceMax(x, _constant(np.array(dim, np.int64)), keepdims=int(keepdim))


def _amin(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    return op.ReduceMin(x, _constant(np.array(dim, np.int64)), keepdims=int(keepdim))


def _rrelu(x: Any, noise: Any, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, *_: Any) -> Any:
    if training:
        raise NotImplementedError("rrelu in training mode")
    return op.LeakyRelu(x, alpha=(lower + upper) / 2), noise


def _upsample_bicubic2d_aa(x: Any, output_size: Sequence[Any], align_corners: bool, *scales: Any) -> Any:
    height, width = x.shape[-2], x.shape[-1]
    known = isinstance(height, int) and isinstance(width, int)
    if align_corners or not known or any(s is not None for s in scales):
        raise NotImplementedError("antialiased bicubic interpolation by a factor, or of a dynamic input")
    rows, columns = _bicubic_matrix(height, output_size[0], 2), _bicubic_matrix(width, output_size[1], 3)
    return op.MatMul(rows, op.MatMul(x, columns))


def _bicubic_matrix(size: int, output: Any, axis: int) -> Any:
    """Float32 ``(1, 1, output, size)`` of antialiased bicubic interpolation; transposed for ``axis`` 3.

    ``output`` may be known at run time only. Weights of Keys' cubic kernel (a = -0.5), stretched by the reduction and
    normalized, as torch computes them. The kernel's two pieces are 0 where they meet, so they are added: one of the distance
    below 1, one of the distance from 1 to 2, each clipped to 0 beyond.
    """
    along, across = ((1, 1, -1, 1), (1, 1, 1, size)) if axis == 2 else ((1, 1, 1, -1), (1, 1, size, 1))
    cells: Any = op.Cast(_count_up(output, along), to=ir.DataType.FLOAT)
    scale = op.Div(_float(size), op.Cast(_whole(output), to=ir.DataType.FLOAT))
    centers = op.Mul(op.Add(cells, _float(0.5)), scale)
    inputs = _constant((np.arange(size, dtype=np.float32) + np.float32(0.5)).reshape(across))
    distance = op.Abs(op.Div(op.Sub(inputs, centers), op.Max(scale, _float(1.0))))
    near = op.Relu(op.Sub(_float(1.0), distance))
    far = op.Clip(op.Sub(_float(2.0), distance), _constant(np.float32(0)), _constant(np.float32(1)))
    # 1.5 d^3 - 2.5 d^2 + 1 with d = 1 - near, and -0.5 d^3 + 2.5 d^2 - 4 d + 2 with d = 2 - far
    peak = op.Mul(near, op.Add(op.Mul(near, op.Sub(_float(2.0), op.Mul(near, _float(1.5)))), _float(0.5)))
    tail = op.Mul(op.Mul(far, far), op.Mul(op.Sub(far, _float(1.0)), _float(0.5)))
    weights = op.Add(peak, tail)
    return op.Div(weights, op.ReduceSum(weights, _constant(np.array([5 - axis], np.int64)), keepdims=1))


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
    if not all(isinstance(size, int) for size in x.shape):
        return [op.Gather(x, _constant(np.array(i, np.int32)), axis=dim) for i in range(count)]
    parts = op.Split(x, num_outputs=count, axis=dim)
    return [op.Squeeze(part, axis) for part in parts]


def _float(value: float) -> Any:
    return _constant(np.full((1, 1, 1, 1), value, np.float32))


def _whole(value: Any) -> Any:
    if isinstance(value, int):
        return _constant(np.full((1, 1, 1, 1), value, np.int64))
    return op.Reshape(value, _constant(np.array([1, 1, 1, 1], np.int64)))


def _constant(array: NDArray[Any] | np.generic) -> Any:
    tensor: Any = ir.tensor(np.asarray(array))
    return op.Constant(value=tensor)


class FloatBounds(TorchFunctionMode):
    """While it is on, ``clamp(0, 0.5)`` is of two floats: the exporter makes a tensor of the 0, and no clamp takes both."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _CLAMPS and any(type(value) is float for value in (*args, *named.values())):
            args = [float(value) if type(value) is int else value for value in args]
            named = {name: float(value) if type(value) is int else value for name, value in named.items()}
        return func(*args, **named)


_CLAMPS = frozenset(getattr(of, name) for of in (torch, torch.Tensor) for name in ("clamp", "clamp_", "clip", "clip_"))

TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten._upsample_bicubic2d_aa.default: _upsample_bicubic2d_aa,
    torch.ops.aten._upsample_bicubic2d_aa.vec: _upsample_bicubic2d_aa,
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    torch.ops.aten.amax.default: _amax,
    torch.ops.aten.amin.default: _amin,
    torch.ops.aten.avg_pool2d.default: _avg_pool2d,
    torch.ops.aten.rrelu_with_noise_functional.default: _rrelu,
    torch.ops.aten.scaled_dot_product_attention.default: _scaled_dot_product_attention,
    torch.ops.aten.unbind.int: _unbind,
}
