"""Equalization of channels: the float graph stays the same function, its activations become even over their channels.

An activation is quantized with one scale for all its channels. A channel a hundred times smaller than the largest has two
or three of the 256 levels, however well its weights are quantized. But a channel's scale is free wherever it passes through
(ReLU, pooling, resizing, concatenation, addition): multiplied by a factor at the convolution that makes it, or at the gain of a
normalization, and divided by the same factor at every convolution that reads it, all outputs stay as they were. For tokens
behind a layer normalization see :mod:`edgeseg.quantize.repair.normalization`.

The factor of a channel balances what it is in its activations against what it is in its readers' weights, the square root of
the quotient of the two, each relative to what has one scale: a tensor, and the filter of an output (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1, with activations seen in calibration in
place of the first layer's weights, whose scales are per channel anyway; the balance of two sides is that of Xiao et al.,
"SmoothQuant", ICML 2023, there relative to the whole weight). What is largest changes with the factors, so they are found in
rounds. A depthwise reader has one scale per channel and loses nothing: where all readers are, the activations are made fully
even.

The result does not depend on how the channels were scaled before, so a badly scaled network comes out as the well scaled one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.errors import QuantizationError
from edgeseg.graph.editing import Editor, constant_array, constant_input, given, maker
from edgeseg.graph.groups import Groups
from edgeseg.graph.running import GraphSession
from edgeseg.quantize.parameters import along
from edgeseg.quantize.repair.fidelity import score_names, windows
from edgeseg.quantize.repair.normalization import balance, balanced, free_normalizations, scaled_constants
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx, write_onnx

MAX_FACTOR = 4096.0
"""Most a channel is scaled by, up or down: far from what float32 or FP16 could not hold."""

IMAGES = 32
"""Images the magnitudes are taken from: the largest value of a whole channel settles early."""

TOLERANCE = 1e-4
"""Largest difference of a score, relative to the largest score, between the graphs before and after."""

# What does to each channel the same, homogeneously: f(c x) = c f(x) for c > 0.
_PER_CHANNEL = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "PRelu",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Resize",
        "Pad",
        "Identity",
    }
)
_REDUCTIONS = frozenset({"ReduceMean", "ReduceMax", "ReduceSum"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
# Their gain and shift, inputs 1 and 2, are per channel, so their output may be scaled whatever their input is.
_NORMALIZATIONS = frozenset({"BatchNormalization", "GroupNormalization", "InstanceNormalization"})
# Outputs in a fixed range: what multiplies by them is scaled by the other side alone.
_GATES = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})

Factors = NDArray[np.float64]


def write_equalized(graph: OnnxGraph, magnitudes: Mapping[str, Sequence[float]], path: Path) -> tuple[OnnxGraph, int]:
    """Write ``graph`` with its channels equalized, and count those; the same magnitudes give the same bytes.

    Args:
        graph: the fp32 graph.
        magnitudes: of :meth:`edgeseg.quantize.calibration.Observation.magnitudes`, of :func:`channel_axes`.
        path: where the new graph goes.

    Raises:
        ArtifactError: ``graph`` cannot be read, or ``path`` not be written.
    """
    model = ir.serde.deserialize_model(read_onnx(graph.path))
    channels = equalize(model, {name: np.asarray(seen, np.float64) for name, seen in magnitudes.items()})
    write_onnx(ir.serde.serialize_model(model), path)
    return replace(graph, path=path, sha256=sha256_file(path)), channels


def scores_are_equal(before: OnnxGraph, after: OnnxGraph, samples: CalibrationSet) -> bool:
    """Whether both graphs give the same scores, up to :data:`TOLERANCE`: where a network amplifies rounding (a logarithm of
    values next to 0, say), no two float32 graphs of it do."""
    models = [read_onnx(graph.path) for graph in (before, after)]
    names = score_names(models[0])
    first, second = (
        GraphSession(model, "the graph", QuantizationError, names=names, optimized=True) for model in models
    )
    for window, what in windows(samples.take(range(2)), before.spec.input):
        for one, other in zip(*(session.run(window, what).values() for session in (first, second)), strict=True):
            if np.abs(one - other).max() > TOLERANCE * np.abs(one).max():
                return False
    return True


@dataclass
class _Channels:
    """Channels of the graph's values, joined where one factor must serve all of them."""

    first: dict[ir.Value, int] = field(default_factory=dict)
    count: int = 0
    joined: Groups[int] = field(default_factory=Groups)
    fixed: set[int] = field(default_factory=set)

    def of(self, value: ir.Value) -> range:
        """Numbers of the channels of ``value``, new ones if it has none yet."""
        count = channel_count(value)
        assert count is not None
        if value not in self.first:
            self.first[value] = self.count
            self.count += count
        return range(self.first[value], self.first[value] + count)

    def join(self, one: Iterable[int], other: Iterable[int]) -> None:
        for a, b in zip(one, other, strict=True):
            self.joined.join(a, b)

    def fix(self, values: Iterable[ir.Value | None]) -> None:
        """Leave the channels of these values as they are."""
        for value in values:
            if value is not None and channel_count(value) is not None:
                self.fixed.update(self.of(value))

    def fixed_roots(self) -> set[int]:
        return {self.joined.root(channel) for channel in self.fixed}

    def roots(self, value: ir.Value) -> NDArray[np.int64]:
        return np.array([self.joined.root(c) for c in self.of(value)], np.int64)


def channel_count(value: ir.Value | None) -> int | None:
    """Channels of an image-like value ``(N, C, H, W)``; ``None`` for any other."""
    if value is None or value.shape is None or len(value.shape) != 4 or constant_array(value) is not None:
        return None
    channels = value.shape[1]
    return channels if isinstance(channels, int) else None


def channel_axes(model: ir.Model) -> dict[str, int]:
    """Values whose magnitude per channel :func:`equalize` wants to know, and the axis of their channels: all that are rounded
    with channels that are free, and what free layer normalizations make."""
    channels = _join_channels(model.graph)
    fixed = channels.fixed_roots()
    rounded = [v for v in channels.first if _is_rounded(v) and not fixed.issuperset(channels.roots(v).tolist())]
    made = [normalization.output for normalization in free_normalizations(model.graph)]
    return {str(v.name): 1 for v in rounded} | {str(v.name): len(v.shape) - 1 for v in made if v.shape is not None}


def _is_rounded(value: ir.Value) -> bool:
    """Whether a value is quantized itself: of one that only a Relu reads, what is negative never is."""
    return any(node.op_type != "Relu" for node in value.consumers())


def equalize(model: ir.Model, magnitudes: Mapping[str, NDArray[np.floating]]) -> int:
    """Scale the channels of ``model``, in place.

    Args:
        model: the float32 graph, shapes inferred.
        magnitudes: by value name, float ``(C,)``: largest absolute value of each channel on the calibration images, of
            :func:`channel_axes`.

    Returns:
        how many channels got a factor other than 1; with 0 the graph is as it was.
    """
    channels = _join_channels(model.graph)
    factors = _factors(model.graph, channels, magnitudes)
    scaled = _Scaling(channels, factors)
    for node in list(model.graph):
        _scale(node, scaled)
    return int(np.count_nonzero(factors != 1.0)) + _scale_tokens(model.graph, magnitudes)


def _scale_tokens(graph: ir.Graph, magnitudes: Mapping[str, NDArray[np.floating]]) -> int:
    """Scale what layer normalizations make; returns how many channels got a factor other than 1."""
    count = 0
    for normalization in free_normalizations(graph):
        seen = magnitudes.get(str(normalization.output.name))
        if seen is None or not np.max(seen) > 0:
            continue
        factors = balance(normalization, np.asarray(seen), MAX_FACTOR)
        for node, index, array in scaled_constants(normalization, factors):
            _put(node, index, array)
        count += int(np.count_nonzero(factors != 1.0))
    return count


def _join_channels(graph: ir.Graph) -> _Channels:
    channels = _Channels()
    channels.fix(graph.inputs)
    channels.fix(graph.outputs)
    for node in graph:
        if not _passes(node, channels):
            channels.fix(node.inputs)
            channels.fix(node.outputs)
    return channels


def _passes(node: ir.Node, channels: _Channels) -> bool:
    """Join what ``node`` scales alike; ``False`` when a scale does not pass through it."""
    if node.domain not in ("", "ai.onnx") or any(channel_count(v) is None for v in node.outputs):
        return False
    inputs = [v for v in node.inputs if channel_count(v) is not None and v is not None]
    output = node.outputs[0]
    if node.op_type in _CONVOLUTIONS:
        if _kernel(node) is None or any(v is not None and constant_array(v) is None for v in node.inputs[2:]):
            return False
        channels.of(output)
        if inputs:
            channels.of(inputs[0])
        return bool(inputs)
    if not inputs:
        return False
    if node.op_type in _NORMALIZATIONS or _gain(node) is not None:
        if node.op_type in _NORMALIZATIONS and any(_per_channel(v, output) is None for v in node.inputs[1:3]):
            return False
        channels.fix(inputs)
        channels.of(output)
        return True
    if node.op_type == "Concat" and _axis(node) == 1 and len(inputs) == len(node.inputs):
        channels.join([c for v in inputs for c in channels.of(v)], channels.of(output))
        return True
    if node.op_type == "Split" and _axis(node) == 1:
        channels.join(channels.of(inputs[0]), [c for v in node.outputs for c in channels.of(v)])
        return True
    same = all(channel_count(v) == channel_count(output) for v in inputs)
    if not same or len(node.outputs) != 1:
        return False
    if node.op_type in _PER_CHANNEL | _REDUCTIONS:
        if not _is_per_channel(node):
            return False
    elif node.op_type in ("Add", "Sub"):
        if any(_addend(v, channel_count(output) or 0) is None for v in node.inputs if v not in inputs):
            return False
    elif node.op_type in ("Mul", "Div"):
        gates = [v for v in inputs if maker(v, *_GATES) is not None]
        scaled = [v for v in inputs if v not in gates]
        if len(scaled) != 1 or len(inputs) + sum(constant_array(v) is not None for v in node.inputs) != len(
            node.inputs
        ):
            return False
        if node.op_type == "Div" and scaled[0] is not node.inputs[0]:
            return False
        channels.fix(gates)
        inputs = scaled
    else:
        return False
    for value in inputs:
        channels.join(channels.of(value), channels.of(output))
    return True


def _is_per_channel(node: ir.Node) -> bool:
    if node.op_type == "Pad":
        pads = constant_input(node, 1)
        value = constant_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
        zeros = node.attributes.get_string("mode", "constant") != "constant" or (value is not None and not value.any())
        return zeros and pads is not None and pads.size == 8 and pads[1] == pads[5] == 0
    if node.op_type == "PRelu":
        return constant_array(node.inputs[1]) is not None
    if node.op_type in _REDUCTIONS:
        axes = constant_input(node, 1)
        return axes is not None and {int(a) % 4 for a in axes} <= {2, 3}
    return True


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0) % 4


def _kernel(node: ir.Node) -> NDArray[np.float32] | None:
    """The constant weights of a convolution."""
    kernel = constant_array(node.inputs[1]) if node.op_type in _CONVOLUTIONS else None
    return kernel if kernel is not None and kernel.ndim == 4 and kernel.dtype == np.float32 else None


def _addend(value: ir.Value | None, channels: int) -> NDArray[np.float32] | None:
    """A constant that is added to an image-like value, as ``(1 or N, C, ...)``; ``None`` if it cannot be scaled by channel."""
    array = constant_array(value)
    if array is None or array.dtype != np.float32:
        return None
    full = array.reshape((1,) * (4 - array.ndim) + array.shape) if array.ndim <= 4 else array
    return np.asarray(full) if full.ndim == 4 and full.shape[1] in (1, channels) else None


def _per_channel(value: ir.Value | None, output: ir.Value) -> NDArray[np.float32] | None:
    """A constant ``(C,)`` for the channels of ``output``."""
    array = constant_array(value)
    return (
        array if array is not None and array.dtype == np.float32 and array.shape == (channel_count(output),) else None
    )


def _gain(node: ir.Node) -> int | None:
    """Which input of a Mul is a constant with a value for each channel: a group normalization's gain is exported so."""
    if node.op_type != "Mul":
        return None
    count = channel_count(node.outputs[0]) or 0
    for index, value in enumerate(node.inputs):
        array = _addend(value, count)
        if array is not None and count > 1 and array.shape == (1, count, 1, 1):
            return index
    return None


def _by_group(node: ir.Node, kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """The kernel as ``(groups, outputs of a group, inputs of a group, kH, kW)``."""
    groups = node.attributes.get_int("group", 1)
    grouped = np.asarray(kernel.reshape(groups, -1, *kernel.shape[1:]))
    return grouped.swapaxes(1, 2) if node.op_type == "ConvTranspose" else grouped


def _factors(graph: ir.Graph, channels: _Channels, magnitudes: Mapping[str, NDArray[np.floating]]) -> Factors:
    """One factor a channel; 1 for those that are fixed or that nothing is known of."""
    roots = np.array([channels.joined.root(c) for c in range(channels.count)], np.int64)
    # Not only what convolutions read: a channel that is small behind a Relu may be large in the sum in front of it.
    rounded = [
        (channels.roots(value), np.asarray(seen, np.float64))
        for value in channels.first
        if (seen := magnitudes.get(str(value.name))) is not None and len(seen) == channel_count(value)
    ]
    kernels = [
        (channels.roots(read), np.abs(_by_group(node, kernel)).max(axis=(3, 4)).astype(np.float64))
        for node in graph
        if (kernel := _kernel(node)) is not None and (read := node.inputs[0]) is not None and read in channels.first
    ]
    return balanced(channels.count, rounded, kernels, MAX_FACTOR, sorted(channels.fixed_roots()))[roots]


@dataclass(frozen=True)
class _Scaling:
    channels: _Channels
    factors: Factors

    def of(self, value: ir.Value | None) -> Factors:
        """Factors ``(C,)`` of a value's channels; ones for a value that is not image-like."""
        if value is None or value not in self.channels.first:
            return np.ones(channel_count(value) or 1)
        return self.factors[list(self.channels.of(value))]


def _scale(node: ir.Node, scaling: _Scaling) -> None:
    """Put the factors into the constants of one node."""
    kernel = _kernel(node)
    if kernel is not None:
        _scale_convolution(node, kernel, scaling.of(node.inputs[0]), scaling.of(node.outputs[0]))
    elif node.outputs[0] in scaling.channels.first and ((factors := scaling.of(node.outputs[0])) != 1.0).any():
        for index, constant in _scaled_with(node, len(factors)):
            _put(node, index, constant * (factors if constant.ndim == 1 else along(factors, 1, 4)))


def _scaled_with(node: ir.Node, channels: int) -> list[tuple[int, NDArray[np.float32]]]:
    """The constants of a node, by input, that are scaled as its output is."""
    if node.op_type in _NORMALIZATIONS:
        constants = [(index, _per_channel(node.inputs[index], node.outputs[0])) for index in (1, 2)]
    else:
        gain = _gain(node)
        every = range(len(node.inputs) if node.op_type in ("Add", "Sub") else 0)
        constants = [(index, _addend(node.inputs[index], channels)) for index in (every if gain is None else [gain])]
    return [(index, constant) for index, constant in constants if constant is not None]


def _scale_convolution(node: ir.Node, kernel: NDArray[np.float32], before: Factors, after: Factors) -> None:
    if (before == 1.0).all() and (after == 1.0).all():
        return
    grouped = _by_group(node, kernel).astype(np.float64)
    groups, outputs, inputs = grouped.shape[:3]
    grouped = grouped * after.reshape(groups, outputs, 1, 1, 1) / before.reshape(groups, 1, inputs, 1, 1)
    if node.op_type == "ConvTranspose":
        grouped = grouped.swapaxes(1, 2)
    _put(node, 1, grouped.reshape(kernel.shape))
    bias = constant_input(node, 2)
    if bias is not None:
        _put(node, 2, bias * after)


def _put(node: ir.Node, index: int, array: NDArray[np.floating]) -> None:
    """Give ``node`` a constant of its own: another node may share the old one."""
    graph, old = node.graph, given(node, index)
    assert isinstance(graph, ir.Graph)
    new = Editor(graph, node, node.name).constant("equalized", np.ascontiguousarray(array, np.float32))
    node.replace_input_with(index, new)
    if not old.uses() and old.is_initializer():
        graph.initializers.pop(str(old.name), None)
