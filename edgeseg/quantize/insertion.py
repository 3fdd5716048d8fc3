"""Insert the Q/DQ pairs a placement asks for into a float graph."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.errors import QuantizationError
from edgeseg.graph.editing import Editor, constant_input, given, given_array, remove_unread
from edgeseg.graph.grid import Grid
from edgeseg.graph.signs import clamp_limits
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.parameters import (
    QuantizedWeight,
    activation_parameters,
    bias_correction,
    quantize_bias,
    quantize_weight,
    trained_parameters,
    trained_weight,
    weight_axis,
    widen_for_bias,
)
from edgeseg.quantize.placement import Placement, Role
from edgeseg.quantize.schemes import QuantScheme


@dataclass(frozen=True)
class _Affine:
    """Parameters of one group of values, and the constants that hold them in the graph."""

    parameters: Grid
    scale: ir.Value
    zero_point: ir.Value


def insert_pairs(graph: ir.Graph, observed: Observed, placement: Placement, scheme: QuantScheme) -> int:
    """Change ``graph`` in place; returns how many layers' biases were corrected.

    Args:
        graph: float, as ``placement`` was decided on.
        observed: a range for every value the placement quantizes; channel means, where known, correct biases.
        placement: what to insert where.
        scheme: types and limits.

    Raises:
        QuantizationError: a value that has to be quantized has no range, or one that is not finite.
    """
    return _Inserter(graph, observed, placement, scheme).run()


class _Inserter:
    """Walks the graph once in order. A value that was quantized has its integers in ``_integers``; its float readers
    get one shared DQ of them, made when the first is met."""

    def __init__(self, graph: ir.Graph, observed: Observed, placement: Placement, scheme: QuantScheme) -> None:
        self._graph = graph
        self._observed = observed
        self._placement = placement
        self._scheme = scheme
        self._corrected = 0
        self._signed = {
            placement.scales.root(node.inputs[0])
            for node, role in placement.roles.items()
            if node.op_type == "ConvTranspose" and role is Role.WEIGHTED and node.inputs[0] is not None
        }
        self._integers: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._affines: dict[ir.Value, _Affine] = {}

    def run(self) -> int:
        nodes = list(self._graph)
        for value in self._graph.inputs:  # float images that nothing has to be done to but move their values
            self._quantize(value, value, nodes[0], after=False)
        for node in nodes:
            role = self._placement.roles.get(node)
            if role is Role.MOVES:
                self._move(node)
            elif role is not Role.CLAMP:
                self._read(node, role)
                self._write(node, role)
        self._finish_outputs()
        remove_unread(self._graph, [n for n, role in self._placement.roles.items() if role is Role.CLAMP])
        return self._corrected

    def _read(self, node: ir.Node, role: Role | None) -> None:
        """Let ``node`` read dequantized values where it is integer, or where no float value is computed any more."""
        source = str(node.inputs[0].name) if node.inputs and node.inputs[0] is not None else ""
        for index, value in enumerate(list(node.inputs)):
            if value is None:
                continue
            takes_integers = role is Role.FUSED or (role is Role.WEIGHTED and index == 0)
            if value in self._integers and (takes_integers or not self._is_read_in_float(value, node)):
                node.replace_input_with(index, self._dequantized(value, node))
            elif role is Role.FUSED and value.const_value is not None:
                node.replace_input_with(index, self._operand(value, node))
            if (node, index) in self._placement.rescaled:
                node.replace_input_with(index, self._rescaled(node, index))
        if role is Role.WEIGHTED:
            self._quantize_weight(node, self._observed.channel_means.get(source))

    def _is_read_in_float(self, value: ir.Value, reader: ir.Node) -> bool:
        if self._is_computed_in_float(value):
            return True
        # Between two layers that stay float nothing is rounded, though another reader takes integers. A Concat is read by
        # whoever reads its result.
        producer, stays_float = value.producer(), self._observed.stays_float
        if producer is None or producer in self._placement.roles or reader.op_type == "Concat":
            return False
        return stays_float(reader) and stays_float(producer)

    def _is_computed_in_float(self, value: ir.Value) -> bool:
        producer = value.producer()
        if self._scheme.placement == "inputs" or producer is None:
            return False
        return producer not in self._placement.roles

    def _write(self, node: ir.Node, role: Role | None) -> None:
        for output in node.outputs:
            target = output
            reader = next(iter(output.consumers()), None)
            if role is not None and reader is not None and self._placement.roles.get(reader) is Role.CLAMP:
                target = reader.outputs[0]  # the Q put here saturates where the clamp clips
            self._quantize(target, output, node, after=True)

    def _quantize(self, value: ir.Value, source: ir.Value, node: ir.Node, *, after: bool) -> None:
        """Make the integers of ``value``, where it is quantized, of the floats in ``source`` next to ``node``."""
        if value not in self._placement.quantized:
            return
        editor = Editor(self._graph, node, value.name, after=after)
        self._integers[value] = _quantized(editor, source, self._affine(value), value.shape)

    def _move(self, node: ir.Node) -> None:
        """Let a data movement run on integers."""
        for index, value in enumerate(list(node.inputs)):
            if value in self._integers:
                node.replace_input_with(index, self._integers[value])
        for output in node.outputs:
            self._integers[output] = output
            output.type = ir.TensorType(ir.DataType.from_numpy(self._affine(output).parameters.dtype))

    def _dequantized(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._floats:
            editor = Editor(self._graph, reader, value.name)
            self._floats[value] = _restored(editor, self._integers[value], self._affine(value), value.shape)
        return self._floats[value]

    def _rescaled(self, node: ir.Node, index: int) -> ir.Value:
        """What ``node`` reads there in the steps of its result."""
        value, affine = given(node, index), self._affine(node.outputs[0])
        editor = Editor(self._graph, node, f"{node.name}/input_{index}")
        return _restored(editor, _quantized(editor, value, affine, value.shape), affine, value.shape)

    def _affine(self, value: ir.Value) -> _Affine:
        leader = self._placement.scales.root(value)
        if leader not in self._affines:
            names = (str(member.name) for member in self._placement.scales.members(leader))
            limits = [self._observed.ranges[name] for name in names if name in self._observed.ranges]
            if not limits:
                raise QuantizationError(
                    f"the calibration table has no range for {value.name}; calibrate this graph again"
                )
            low, high = min(lo for lo, _ in limits), max(hi for _, hi in limits)
            signed = self._scheme.signed_transposed and leader in self._signed
            parameters = self._trained(leader, signed=signed) or activation_parameters(
                str(leader.name), low, high, self._scheme, symmetric=signed
            )
            editor = Editor(self._graph, self._graph[0], leader.name)
            self._affines[leader] = _Affine(
                parameters,
                editor.constant("scale", np.array(parameters.scale, np.float32)),
                editor.constant("zero_point", np.array(parameters.zero_point, parameters.dtype)),
            )
        return self._affines[leader]

    def _trained(self, leader: ir.Value, *, signed: bool) -> Grid | None:
        """The integers of training for a group of values, where all of them have the same and the scheme can hold them."""
        members = [member for member in self._placement.scales.members(leader) if member.name in self._observed.ranges]
        grids = {self._observed.grids.get(str(member.name)) for member in members}
        grid = grids.pop() if len(grids) == 1 else None
        if grid is None:
            return None
        clamps = [producer for member in members if (producer := member.producer()) is not None]
        clamps = [node for node in clamps if self._placement.roles.get(node) is Role.CLAMP]
        lows, highs = zip((-math.inf, math.inf), *map(clamp_limits, clamps), strict=True)
        return trained_parameters(grid, self._scheme, symmetric=signed, clamp=(max(lows), min(highs)))

    def _operand(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """A constant that an integer operator adds or multiplies with, quantized like an activation."""
        array = given_array(node, node.inputs.index(value))
        parameters = activation_parameters(str(value.name), float(array.min()), float(array.max()), self._scheme)
        return self._constant_pair(
            Editor(self._graph, node, f"{node.name}/operand"),
            parameters.quantize(array),
            np.array(parameters.scale, np.float32),
            np.array(parameters.zero_point, parameters.dtype),
        )

    def _quantize_weight(self, node: ir.Node, channel_mean: NDArray[np.float64] | None) -> None:
        """Replace the float weight by DQ of integers, and the bias too if the scheme wants it."""
        weight, bias = given_array(node), constant_input(node, 2)
        groups, transposed = node.attributes.get_int("group", 1), bool(node.attributes.get_int("transB", 0))
        axis = weight_axis(node.op_type, groups=groups, transposed=transposed)
        quantize = trained_weight if self._observed.rounded_weights else quantize_weight
        quantized = quantize(weight, axis, self._scheme, groups=groups)
        takes_bias = node.op_type != "MatMul" and node.attributes.get_float("beta", 1.0) == 1.0
        if takes_bias and channel_mean is not None and channel_mean.size == self._input_channels(node, weight, axis):
            correction = bias_correction(weight, quantized, channel_mean, groups=groups)
            self._corrected += 1
            bias = (correction + (0.0 if bias is None else bias)).astype(np.float32)
        if takes_bias and bias is not None:
            quantized = self._quantize_bias(node, quantized, bias)
        editor, zeros = Editor(self._graph, node, f"{node.name}/weight"), np.zeros(quantized.scale.shape, np.int8)
        pair = self._constant_pair(editor, quantized.values, quantized.scale, zeros, quantized.axis)
        node.replace_input_with(1, pair)

    @staticmethod
    def _input_channels(node: ir.Node, weight: NDArray[np.float32], axis: int) -> int:
        return int(weight.shape[1 - axis]) * (node.attributes.get_int("group", 1) if axis == 0 else 1)

    def _quantize_bias(self, node: ir.Node, weight: QuantizedWeight, bias: NDArray[np.float32]) -> QuantizedWeight:
        """Give ``node`` its bias; returns the weight, with wider scales where the bias needs them."""
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        if not self._scheme.integer_bias:
            node.replace_input_with(2, Editor(self._graph, node, f"{node.name}/bias").constant("corrected", bias))
            return weight
        input_scale = self._input_scale(node)
        weight = widen_for_bias(weight, input_scale, bias)
        scale = (weight.scale.astype(np.float64) * input_scale).astype(np.float32)
        editor, zeros = Editor(self._graph, node, f"{node.name}/bias"), np.zeros(scale.shape, np.int32)
        node.replace_input_with(2, self._constant_pair(editor, quantize_bias(bias, scale), scale, zeros, 0))
        return weight

    def _constant_pair(
        self, editor: Editor, integers: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any], axis: int = 1
    ) -> ir.Value:
        inputs = [
            editor.constant("integers", integers),
            editor.constant("scale", scale),
            editor.constant("zero_point", zero_point),
        ]
        return editor.op("DQ", "DequantizeLinear", inputs, shape=integers.shape, axis=axis)

    def _input_scale(self, node: ir.Node) -> float:
        dequantize = given(node).producer()
        scale = constant_input(dequantize, 1) if dequantize is not None else None
        assert scale is not None, f"{node.name} reads a value that was not quantized"
        return float(scale)

    def _finish_outputs(self) -> None:
        """Graph outputs keep their float type: dequantize those that ended as integers."""
        for index, value in enumerate(list(self._graph.outputs)):
            if value in self._integers and not self._is_computed_in_float(value):
                name = value.name
                value.name = f"{name}/quantized_output"
                editor = Editor(self._graph, self._graph[len(self._graph) - 1], name, after=True)
                result = _restored(editor, self._integers[value], self._affine(value), value.shape)
                result.name = name
                self._graph.outputs[index] = result


def _quantized(editor: Editor, value: ir.Value, affine: _Affine, shape: ir.Shape | None) -> ir.Value:
    dtype = ir.DataType.from_numpy(affine.parameters.dtype)
    return editor.op("Q", "QuantizeLinear", [value, affine.scale, affine.zero_point], dtype=dtype, shape=shape)


def _restored(editor: Editor, integers: ir.Value, affine: _Affine, shape: ir.Shape | None) -> ir.Value:
    return editor.op("DQ", "DequantizeLinear", [integers, affine.scale, affine.zero_point], shape=shape)
