"""The calibration table of a network that was trained with fake-quantizers: their scales in place of calibrated ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeseg.graph.grid import Grid, Marks
from edgeseg.graph.proto import attribute
from edgeseg.graph.signs import MOVES, not_negative
from edgeseg.quantize.calibration import DEFAULT_METHOD, TRAINED, calibrate, table_key
from edgeseg.quantize.parameters import along
from edgeseg.quantize.ranges import RangeMethod
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange, Trained
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx


def trained_table(
    graph: OnnxGraph,
    marks: Marks,
    samples: CalibrationSet | None,
    method: str = DEFAULT_METHOD,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationTable:
    """Take the scales of training; what it left in float is calibrated where there are images, else it has no range.

    No channel means: a bias corrected for the rounding of weights would undo what training did about it.

    Args:
        graph: the fp32 graph.
        marks: where its fake-quantizers stand.
        samples: images for the tensors without one.
        method: how their ranges are chosen.
        progress: called with images done and images in all.

    Raises:
        QuantizationError, InputError: see :func:`edgeseg.quantize.calibration.calibrate`.
    """
    observed: dict[str, TensorRange] = {}
    if samples is not None:
        observed = calibrate(graph, samples, method=method, progress=progress).ranges
    model = ir.serde.deserialize_model(read_onnx(graph.path))
    first = {name: each[0] for name, each in marks.grids.items()}
    grids = spread(model.graph, first)
    ranges: dict[str, TensorRange] = {}
    for name in dict.fromkeys((*observed, *grids)):
        seen, grid = observed.get(name), grids.get(name)
        if grid is None:
            assert seen is not None
            ranges[name] = replace(seen, channel_mean=None, channel_axis=None, method=method)
            continue
        low, high = grid.limits
        extremes = (low, high) if seen is None else (seen.minimum, seen.maximum)
        ranges[name] = TensorRange(low, high, *extremes, method=TRAINED, grid=grid)
    key = table_key(graph, samples, RangeMethod(TRAINED))
    return CalibrationTable(
        schema_version=TABLE_SCHEMA_VERSION,
        method=TRAINED,
        options={},
        key={"images": sha256_json(None), **key},
        images=0 if samples is None else len(samples),
        ranges=ranges,
        trained=Trained(
            tools=marks.tools,
            activations=len(marks.grids),
            derived=len(grids) - len(marks.grids),
            ambiguous=sum(len(each) > 1 for each in marks.grids.values()),
            lost=marks.lost,
            calibrated=len(ranges) - len(grids),
        ),
    )


def spread(graph: ir.Graph, marked: Mapping[str, Grid]) -> dict[str, Grid]:
    """Grids of the marked values and of those that have the same by what the graph does, by name.

    Clipping, moving, selecting and repeating values leaves them on their grid, and to round the largest of some is to take
    the largest of the rounded ones: so forward, and back where the value before has no grid of its own.
    """
    grids: dict[ir.Value, Grid] = {}
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.name in marked:
            grids[value] = marked[str(value.name)]
    for node in graph:
        known = {grids.get(value) for value in _sources(node)}
        if len(known) == 1 and (grid := known.pop()) is not None:
            for output in node.outputs:
                grids.setdefault(output, grid)
    for node in reversed(list(graph)):
        grid = grids.get(node.outputs[0])
        if grid is not None and node.op_type not in {"Relu", "Clip"}:
            for value in _sources(node):
                grids.setdefault(value, grid)
    positive = not_negative(graph)
    return {str(value.name): grid.without_negative() if value in positive else grid for value, grid in grids.items()}


def _sources(node: ir.Node) -> list[ir.Value]:
    """The values of which all values of ``node``'s outputs are, clipped perhaps."""
    is_nearest = node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Concat":
        return [value for value in node.inputs if value is not None]
    if node.op_type in MOVES | {"Relu", "Clip"} or is_nearest:
        return [value for value in node.inputs[:1] if value is not None]
    return []


@dataclass(frozen=True)
class Held:
    """How much of training's rounding a quantized graph does exactly.

    Attributes:
        activations: tensors quantized in the steps of training, of ``activations_trained`` that have some and are quantized.
        weights: layers whose integers stand for the weights of the float graph, of ``layers`` quantized ones.
        others: tensors quantized in other steps than those of training, in the graph's order.
    """

    activations: int
    activations_trained: int
    weights: int
    layers: int
    others: tuple[str, ...]

    @property
    def words(self) -> str:
        """For the user."""
        listed = f": {', '.join(self.others[:2])}{' and others' if len(self.others) > 2 else ''}" if self.others else ""
        return (
            f"{self.activations} of {self.activations_trained} trained scales and the weights of {self.weights} of "
            f"{self.layers} layers are held as they were trained{listed}"
        )


def held(graph: OnnxGraph, quantized: OnnxGraph, table: CalibrationTable) -> Held:
    """Look in a quantized graph for what training rounded to, by its own nodes and numbers.

    Args:
        graph: the float graph.
        quantized: written from it with ``table``.
        table: of :func:`trained_table`.

    Raises:
        ArtifactError: a graph cannot be read.
    """
    plain, typed = read_onnx(graph.path).graph, read_onnx(quantized.path).graph
    constants = {tensor.name: tensor for tensor in typed.initializer}

    def array(name: str) -> NDArray[np.float64]:
        return np.asarray(numpy_helper.to_array(constants[name]), np.float64)

    exact: list[str] = []
    others: list[str] = []
    for node in typed.node:
        # Named after the value that is quantized; where a Relu went into the saturation, its input is another.
        name = node.name.rpartition("/")[0]
        grid = table.ranges[name].grid if name in table.ranges else None
        if node.op_type == "QuantizeLinear" and grid is not None:
            (exact if float(array(node.input[1])) == np.float32(grid.scale) else others).append(name)
    weights = {tensor.name: tensor for tensor in plain.initializer}
    floats = {
        node.name: weights[node.input[1]] for node in plain.node if len(node.input) > 1 and node.input[1] in weights
    }
    pairs = {
        node.output[0]: node for node in typed.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    same = [
        _stands_for(array, pairs[node.input[1]], numpy_helper.to_array(floats[node.name]))
        for node in typed.node
        if len(node.input) > 1 and node.input[1] in pairs and node.name in floats
    ]
    return Held(len(exact), len(exact) + len(others), sum(same), len(same), tuple(others))


def _stands_for(array: Callable[[str], NDArray[np.float64]], pair: onnx.NodeProto, weight: NDArray[np.float32]) -> bool:
    integers, scale = array(pair.input[0]), array(pair.input[1])
    axis = attribute(pair, "axis", 1)
    step = along(scale, axis, integers.ndim)
    # Half a step anywhere would be a rounding of its own.
    return integers.shape == weight.shape and bool(np.all(np.abs(integers * step - weight) <= 0.01 * step))
