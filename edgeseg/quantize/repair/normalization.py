"""Layer normalization's gain and shift take a factor for the matrix products and convolutions that read it.

Behind a layer normalization some channels are tens of times larger than the rest, whatever the image (Xiao et al., "SmoothQuant",
ICML 2023): one scale for all leaves the rest a few levels. Gain and shift can be multiplied by any factor per channel that the
readers' weights are divided by, as long as all readers have constant weights; an addition among them, as where a network
normalizes behind its residual, ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.graph.editing import constant_array, constant_input, given_array
from edgeseg.quantize.parameters import along

Factors = NDArray[np.float64]

ROUNDS = 8
"""In which factors are found. After four no error of a badly scaled network differs from that of the well scaled one."""


@dataclass(frozen=True)
class Reader:
    """A layer that contracts over the channels: ``axis`` of its weight, input 1, runs along them, the other of the first two
    along its outputs."""

    node: ir.Node
    axis: int


@dataclass(frozen=True)
class Normalization:
    """A layer normalization whose channels are free.

    Attributes:
        node: with constant gain and, if any, shift.
        output: what it makes, channels along the last axis.
        readers: all that reads it, through what only rearranges it.
    """

    node: ir.Node
    output: ir.Value
    readers: tuple[Reader, ...]


def free_normalizations(graph: ir.Graph) -> list[Normalization]:
    """Those of ``graph`` whose every reader has constant weights, in its order."""
    free = []
    for node in graph:
        if node.op_type != "LayerNormalization" or node.domain or len(node.outputs) != 1:
            continue
        output, gain = node.outputs[0], constant_array(node.inputs[1])
        if output.shape is None or gain is None or gain.dtype != np.float32:
            continue
        # (C,), or with ones in front.
        channels = output.shape[-1]
        shift = constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else gain
        if shift is None or any(array.size != channels or array.shape[-1:] != (channels,) for array in (gain, shift)):
            continue
        last = len(output.shape) - 1
        readers = _readers(output, last)
        if readers and node.attributes.get_int("axis", -1) in (-1, last):
            free.append(Normalization(node, output, tuple(readers)))
    return free


def balance(normalization: Normalization, magnitude: NDArray[np.floating], limit: float) -> Factors:
    """A factor per channel, ``(C,)``: what it is in its activation against what it is in the readers' weights, relative to those
    of the same output, which have one scale.

    Args:
        normalization: of the graph.
        magnitude: ``(C,)``: largest absolute value of each channel on calibration images.
        limit: most a channel is scaled by, up or down.
    """
    numbers = np.arange(len(magnitude))
    weights = [(numbers, _by_output(reader)[None]) for reader in normalization.readers]
    return balanced(len(magnitude), [(numbers, np.asarray(magnitude, np.float64))], weights, limit)


def balanced(
    count: int,
    activations: Sequence[tuple[NDArray[np.int64], Factors]],
    weights: Sequence[tuple[NDArray[np.int64], Factors]],
    limit: float,
    fixed: Sequence[int] = (),
) -> Factors:
    """A factor for each of ``count`` channels, found in rounds.

    Args:
        count: of channels.
        activations: of each the numbers of its channels, and their largest absolute values, ``(C,)``.
        weights: of each reader the numbers of the channels it reads, and its largest absolute weights, ``(groups, outputs of a
            group, inputs of a group)``. A depthwise one has one scale per channel and loses nothing.
        limit: most a channel is scaled by, up or down.
        fixed: numbers of channels that keep 1.
    """
    factors = np.ones(count)
    for _ in range(ROUNDS):
        in_activations, in_weights = np.zeros(count), np.zeros(count)
        for of, seen in activations:
            np.maximum.at(in_activations, of, relative_to(seen * factors[of], axis=0))
        for of, weight in weights:
            if weight.shape[2] > 1:
                shares = relative_to(weight / factors[of].reshape(len(weight), 1, -1), axis=2)
                np.maximum.at(in_weights, of, shares.max(axis=1).reshape(-1))
        both = (in_activations > 0) & (in_weights > 0)
        factors[both] *= np.sqrt(in_weights[both] / in_activations[both])
        depthwise = (in_activations > 0) & (in_weights == 0)
        factors[depthwise] /= in_activations[depthwise]
        factors[list(fixed)] = 1.0
        factors = np.clip(factors, 1.0 / limit, limit)
    return factors


def relative_to(array: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Shares, 0..1, of the largest along ``axis``; zeros stay zero."""
    largest = array.max(axis=axis, keepdims=True)
    return np.asarray(np.divide(array, largest, out=np.zeros_like(array), where=largest > 0))


def _by_output(reader: Reader) -> NDArray[np.float64]:
    """``(outputs, C)``: the largest absolute weight over a kernel's plane."""
    weight = np.abs(_constant(reader.node, 1))
    return np.moveaxis(weight.reshape(*weight.shape[:2], -1).max(axis=2), reader.axis, 1)


def scaled_constants(normalization: Normalization, factors: Factors) -> list[tuple[ir.Node, int, NDArray[np.float64]]]:
    """Node, input and new constant: the channels come out multiplied, and all that is behind their readers as before."""
    node = normalization.node
    changes = [(node, 1, _constant(node, 1) * factors)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        changes.append((node, 2, _constant(node, 2) * factors))
    for reader in normalization.readers:
        weight = _constant(reader.node, 1)
        changes.append((reader.node, 1, weight / along(factors, reader.axis, weight.ndim)))
    return changes


def _constant(node: ir.Node, index: int) -> NDArray[np.float64]:
    return given_array(node, index).astype(np.float64)


def _readers(value: ir.Value, axis: int) -> list[Reader] | None:
    """All that multiplies ``value`` by a weight along ``axis``; ``None`` when something else reads it."""
    if value.is_graph_output() or value.shape is None:
        return None
    readers: list[Reader] = []
    for node, index in value.uses():
        if node.op_type in ("Transpose", "Reshape", "Identity") and not node.domain and index == 0:
            moved = _moved(node, axis)
            behind = None if moved is None else _readers(node.outputs[0], moved)
            if behind is None:
                return None
            readers += behind
            continue
        weight_axis = _weight_axis(node, axis, len(value.shape)) if index == 0 else None
        if weight_axis is None:
            return None
        readers.append(Reader(node, weight_axis))
    return readers


def _moved(node: ir.Node, axis: int) -> int | None:
    """Where the channels are behind what rearranges them; ``None`` if they do not stay one axis."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return None
    rank = len(before.shape)
    if node.op_type == "Identity":
        return axis
    if node.op_type == "Transpose":
        order = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
        return order.index(axis)
    if axis == rank - 1 and before.shape[-1] == after.shape[-1]:
        return len(after.shape) - 1
    # Images to tokens and back: the batch and the channels in front of it stay.
    if axis == 1 and len(after.shape) > 1 and [*before.shape][:2] == [*after.shape][:2]:
        return 1
    return None


def _weight_axis(node: ir.Node, axis: int, rank: int) -> int | None:
    """The weight's axis along the channels, for a layer with a constant weight that contracts over them."""
    weight = constant_input(node, 1)
    if node.domain or weight is None or weight.dtype != np.float32:
        return None
    if node.op_type == "MatMul":
        return 0 if weight.ndim == 2 and axis == rank - 1 else None
    if node.op_type == "Gemm":
        plain = not node.attributes.get_int("transA", 0) and axis == 1
        return node.attributes.get_int("transB", 0) if plain else None
    if node.op_type in ("Conv", "ConvTranspose"):
        if axis != 1 or rank != 4 or node.attributes.get_int("group", 1) != 1:
            return None
        return 1 if node.op_type == "Conv" else 0
    return None
