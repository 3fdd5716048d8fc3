"""GroupNorm for ONNX Runtime: InstanceNormalization for the statistics, BatchNormalization for gain and shift in one go.

Exported, GroupNorm is Reshape, InstanceNormalization, Reshape, Mul, Add (or one GroupNormalization node, which ONNX
Runtime expands to eleven). Mul and Add each walk over the whole tensor; BatchNormalization with mean 0 and variance 1
is both in one walk.

Precondition: InstanceNormalization with constant gain and shift between two Reshapes, then Mul and Add with one constant
per channel; static height, width and channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.graph.editing import Editor, constant_array, image_shape, maker, replace_value, sole_reader
from edgeseg.quantize.observed import Observed, each


@dataclass(frozen=True)
class _GroupNorm:
    source: ir.Value
    groups: int
    gain: NDArray[np.float32]
    shift: NDArray[np.float32]
    epsilon: float
    last: ir.Node
    """Its output is the normalized value."""


def _match(node: ir.Node) -> _GroupNorm | None:
    if node.op_type == "GroupNormalization":
        return _match_single(node)
    if node.op_type != "InstanceNormalization":
        return None
    before, after = maker(node.inputs[0], "Reshape"), sole_reader(node.outputs[0], "Reshape")
    gain, shift = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    if before is None or after is None:
        return None
    source = before.inputs[0]
    shape = image_shape(source)
    if source is None or shape is None or image_shape(after.outputs[0]) != shape:
        return None
    if gain is None or shift is None or np.ptp(gain) or np.ptp(shift):
        return None
    channels, last = shape[0], after
    per_channel = {"Mul": np.full(channels, gain[0], np.float32), "Add": np.full(channels, shift[0], np.float32)}
    for op_type in ("Mul", "Add"):
        reader = sole_reader(last.outputs[0], op_type)
        constant = _channel_constant(reader, channels) if reader is not None else None
        if reader is None or constant is None:
            break
        if op_type == "Mul":
            per_channel = {name: value * constant for name, value in per_channel.items()}
        else:
            per_channel["Add"] = per_channel["Add"] + constant
        last = reader
    return _GroupNorm(
        source, gain.size, per_channel["Mul"], per_channel["Add"], node.attributes.get_float("epsilon", 1e-5), last
    )


def _match_single(node: ir.Node) -> _GroupNorm | None:
    source, shape = node.inputs[0], image_shape(node.inputs[0])
    gain, shift = constant_array(node.inputs[1]), constant_array(node.inputs[2])
    groups = node.attributes.get_int("num_groups", 1)
    if source is None or shape is None or gain is None or shift is None or gain.size != shape[0]:
        return None
    return _GroupNorm(source, groups, gain, shift, node.attributes.get_float("epsilon", 1e-5), node)


def _channel_constant(node: ir.Node, channels: int) -> NDArray[np.float32] | None:
    """The constant of a Mul or Add, if it has one value per channel of an ``(N, C, H, W)`` operand."""
    for value in node.inputs:
        array = constant_array(value)
        if array is not None and array.size == channels and array.reshape(-1).shape == (channels,):
            padded = (1,) * (4 - array.ndim) + array.shape
            return array.reshape(-1) if array.ndim <= 4 and padded[1] == channels else None
    return None


def _replace(graph: ir.Graph, node: ir.Node, match: _GroupNorm, _: Observed) -> None:
    channels, height, width = image_shape(match.source) or (0, 0, 0)
    editor = Editor(graph, match.last, f"{match.last.name}/group_norm")
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    grouped_shape = editor.constant("grouped_shape", np.array([0, match.groups, -1], np.int64))
    grouped = editor.op("grouped", "Reshape", [match.source, grouped_shape])
    unit = [editor.constant("unit_gain", ones[: match.groups]), editor.constant("no_shift", zeros[: match.groups])]
    normal = editor.op("normal", "InstanceNormalization", [grouped, *unit], epsilon=match.epsilon)
    shape = editor.constant("shape", np.array([0, channels, height, width], np.int64))
    image = editor.op("image", "Reshape", [normal, shape])
    statistics = [
        editor.constant(name, array)
        for name, array in (("gain", match.gain), ("shift", match.shift), ("mean", zeros), ("variance", ones))
    ]
    scaled = editor.op("scaled", "BatchNormalization", [image, *statistics], epsilon=0.0)
    replace_value(graph, match.last.outputs[0], scaled)


group_norm = each(_match, _replace)
