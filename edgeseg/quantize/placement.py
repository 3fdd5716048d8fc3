"""Decide what runs on integers: which values get a Q/DQ pair, which operators sit between them, which share a scale.

Two policies, chosen by the scheme. ``operators`` (ONNX Runtime): an operator runs on integers when it has an integer
kernel, its inputs are integers anyway, and somebody wants its output as integers. Float islands between integer layers
are what costs time, and a needless Q/DQ pair is what costs accuracy, so integers neither stop early nor are forced on.
``inputs`` (TensorRT, OpenVINO): the inputs of multiplying layers are quantized, and one side of a residual addition;
the target's compiler fuses the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir

from edgeseg.graph.editing import constant_array, data_inputs, maker, sole_reader
from edgeseg.graph.groups import Groups
from edgeseg.graph.proto import REARRANGES
from edgeseg.graph.signs import clamp_limits
from edgeseg.quantize.observed import Observed, Range
from edgeseg.quantize.schemes import QuantScheme

_FUSED = frozenset({"Add", "Mul", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"})
_MOVES = REARRANGES | {"Slice", "Split", "Gather", "Expand", "Tile", "MaxPool"}
_CLAMPS = frozenset({"Relu", "Clip"})
_INTEGER = _FUSED | _MOVES | _CLAMPS | {"Concat"}

SHARED_SCALE_RATIO = 3.0
"""Concat inputs share one scale while none that others read as well gives up more than this factor of its resolution."""


class Role(Enum):
    """How a node takes part in the integer graph."""

    WEIGHTED = "weighted"
    """Multiplies by a constant weight: reads DQ of its input and of its weight."""
    FUSED = "fused"
    """Has an integer kernel: reads DQ, writes Q."""
    MOVES = "moves"
    """Only moves or selects values: runs on the integers themselves, input and output share a scale."""
    CLAMP = "clamp"
    """Relu or Clip that the saturation of the producer's Q does already: removed."""


@dataclass
class Placement:
    """The decision.

    Attributes:
        roles: of the nodes that take part; all others stay float.
        quantized: values that get a Q/DQ pair (outputs of ``MOVES`` nodes excepted: they are integers already).
        scales: groups of values with one scale.
        rescaled: (Concat, index of an input) that gets a pair of the result's scale there, for this reader alone.
    """

    roles: dict[ir.Node, Role] = field(default_factory=dict)
    quantized: set[ir.Value] = field(default_factory=set)
    scales: Groups[ir.Value] = field(default_factory=Groups)
    rescaled: set[tuple[ir.Node, int]] = field(default_factory=set)

    def share(self, values: Iterable[ir.Value]) -> None:
        """Let ``values`` have one scale."""
        first, *rest = values
        for other in rest:
            self.scales.join(other, first)


def place(graph: ir.Graph, observed: Observed, scheme: QuantScheme) -> Placement:
    """Decide the placement of ``scheme`` for a float graph with calibrated ranges.

    A node that stays float takes no part, but for one that only moves values to a layer that runs on integers: where the
    values are quantized, in front of it or behind, costs the same.
    """
    if scheme.placement == "inputs":
        return _place_inputs(graph, observed, scheme)
    return _OperatorPlacement(graph, observed).run()


def propagate_ranges(graph: ir.Graph, observed: Observed) -> None:
    """Give values that only move others' values their range and integers, where the table has none."""
    ranges, grids = observed.ranges, observed.grids
    for node in graph:
        if node.op_type not in _MOVES | {"Concat"}:
            continue
        sources = [ranges.get(str(v.name)) for v in _activations(node)]
        known = [limits for limits in sources if limits is not None]
        if known and len(known) == len(sources):
            of_sources = {grids.get(str(v.name)) for v in _activations(node)}
            grid = of_sources.pop() if len(of_sources) == 1 else None
            for output in node.outputs:
                if str(output.name) not in ranges and grid is not None:
                    grids[str(output.name)] = grid
                ranges.setdefault(str(output.name), _union(known))


def is_weighted(node: ir.Node) -> bool:
    """Whether ``node`` multiplies its first input by a constant weight matrix or kernel."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.domain or len(node.inputs) < 2:
        return False
    weight = constant_array(node.inputs[1])
    return weight is not None and weight.ndim >= 2 and (node.op_type != "MatMul" or weight.ndim == 2)


def _has_integer_kernel(node: ir.Node) -> bool:
    """Whether an operator that does not multiply by weights runs on integers; a MaxPool's places are none of its steps."""
    return node.op_type in _INTEGER and (node.op_type != "MaxPool" or len(node.outputs) == 1)


def tail(graph: ir.Graph) -> set[ir.Node]:
    """Nodes with no weighted layer behind them: their rounding goes straight into the result."""
    followed: set[ir.Node] = set()
    for node in reversed(list(graph)):
        readers = [reader for output in node.outputs for reader in output.consumers()]
        if any(reader in followed or is_weighted(reader) for reader in readers):
            followed.add(node)
    return set(graph) - followed


class _OperatorPlacement:
    """The ``operators`` policy: one backward pass over who wants integers, one forward pass over who has them."""

    def __init__(self, graph: ir.Graph, observed: Observed) -> None:
        self._nodes = list(graph)
        self._ranges = observed.ranges
        self._grids = observed.grids
        self._is_trained = observed.rounded_weights
        self._floats = {node for node in self._nodes if observed.stays_float(node)}
        self._wanted: set[ir.Value] = set()
        self._demanded: set[ir.Value] = set()
        self._tail = tail(graph)
        self._natural: set[ir.Value] = set()
        self._clamped: dict[ir.Value, Range] = {}
        self._result = Placement()

    def run(self) -> Placement:
        for node in reversed(self._nodes):
            self._want(node)
        for node in self._nodes:
            role = self._role(node)
            if role is not None:
                self._result.roles[node] = role
        self._quantize_remaining_inputs()
        return self._result

    def _want(self, node: ir.Node) -> None:
        """Note who wants ``node``'s inputs as integers, and who would quantize them in any case (``demanded``)."""
        if is_weighted(node) and node not in self._floats:
            self._wanted.update(v for v in node.inputs[:1] if v is not None)
            self._demanded.update(v for v in node.inputs[:1] if v is not None)
        if (
            node.op_type in _MOVES | {"Concat"}
            and _has_integer_kernel(node)
            and self._demanded.intersection(node.outputs)
        ):
            self._demanded.update(_activations(node))
        if _has_integer_kernel(node) and node not in self._floats and self._wanted.intersection(node.outputs):
            self._wanted.update(_activations(node))

    def _role(self, node: ir.Node) -> Role | None:
        if node.domain:
            return None
        inputs = _activations(node)
        is_float = node in self._floats
        if is_weighted(node):
            return None if is_float else self._weighted(node)
        if node.op_type in _CLAMPS:
            # Its output was marked when the producer was visited.
            return Role.CLAMP if node.outputs[0] in self._clamped else None
        if not _has_integer_kernel(node) or not inputs or not all(v.name in self._ranges for v in inputs):
            return None
        demanded = bool(self._demanded.intersection(node.outputs))
        natural = not is_float and all(v in self._natural for v in inputs)
        if node.op_type == "Concat":
            whole = len(inputs) == len(node.inputs)  # a constant among the inputs has no integers
            return self._concat(node, inputs) if whole and (demanded or natural) else None
        if node.op_type in _MOVES and (natural or (demanded and sole_reader(inputs[0]) is node)):
            return self._moves(node, inputs)
        if node.op_type in _FUSED and natural and node not in self._tail and all(map(self._can_emit, node.outputs)):
            self._emit(node.outputs)
            return Role.FUSED
        return None

    def _weighted(self, node: ir.Node) -> Role | None:
        if node.inputs[0] is None or node.inputs[0].name not in self._ranges:
            return None
        output = node.outputs[0]
        # A convolution has no integer kernel with a float result; a matrix product has, so its result stays float
        # unless every reader takes integers.
        if node.op_type == "Conv" and not self._can_emit(output):
            return None
        all_take = output in self._wanted and all(map(self._takes_integers, output.consumers()))
        if node.op_type == "Conv" or (all_take and self._can_emit(output)):
            self._emit([output])
        return Role.WEIGHTED

    def _can_emit(self, value: ir.Value) -> bool:
        """Whether the table knows what ``value`` would be quantized to; training may have left it in float.

        A table of calibration has all: one that is missing is an error of whoever writes the pairs, not a float layer.
        """
        if not self._is_trained:
            return True
        clamp = sole_reader(value, *_CLAMPS)
        return value.name in self._ranges or (clamp is not None and clamp.outputs[0].name in self._ranges)

    def _takes_integers(self, node: ir.Node) -> bool:
        if node in self._floats:
            return False
        return is_weighted(node) or (_has_integer_kernel(node) and bool(self._wanted.intersection(node.outputs)))

    def _moves(self, node: ir.Node, inputs: list[ir.Value]) -> Role:
        self._natural.update(node.outputs)
        self._result.share([*inputs, *node.outputs])
        return Role.MOVES

    def _concat(self, node: ir.Node, inputs: list[ir.Value]) -> Role | None:
        bound = [v for v in inputs if self._is_read_elsewhere(v, node)]
        if self._may_share(inputs, bound):
            return self._moves(node, inputs)
        self._emit(node.outputs)
        # What has the result's scale is copied, the rest looked up in a table, byte by byte.
        copied = [*(v for v in inputs if v not in bound), *node.outputs]
        if node.outputs[0] in self._result.quantized and self._may_share(copied, ()):
            self._result.share(copied)
        return Role.FUSED

    def _may_share(self, values: Iterable[ir.Value], bound: Iterable[ir.Value]) -> bool:
        """Whether ``values`` may have one scale: none of them is clipped by it, and ``bound`` keep their resolution."""
        members = [m for v in values for m in self._result.scales.members(v)]
        low, high = _union(_limits(members, self._ranges))
        # What training rounded each in its own steps keeps them: integers are joined only where they mean the same.
        grids = {self._grids.get(str(m.name)) for m in members if m.name in self._ranges}
        if len(grids) != 1 or any(
            low < self._clamped[m][0] or high > self._clamped[m][1] for m in members if m in self._clamped
        ):
            return False
        least = _narrowest(_limits((m for v in bound for m in self._result.scales.members(v)), self._ranges))
        return grids != {None} or high - low <= SHARED_SCALE_RATIO * least

    def _is_read_elsewhere(self, value: ir.Value, concat: ir.Node) -> bool:
        """Whether somebody besides ``concat``, whose result has coarse steps in any case, reads these integers."""
        group = set(self._result.scales.members(value))
        readers = {reader for member in group for reader in member.consumers()}
        return any(reader is not concat and group.isdisjoint(reader.outputs) for reader in readers)

    def _emit(self, values: Iterable[ir.Value]) -> None:
        """Values an integer kernel writes: quantized, and integers for whoever reads them.

        A Relu or Clip behind it costs nothing: the Q that follows saturates where it clips.
        """
        for value in values:
            clamp = sole_reader(value, *_CLAMPS)
            if clamp is not None and clamp.outputs[0].name in self._ranges:
                value = clamp.outputs[0]
                self._clamped[value] = clamp_limits(clamp)
            self._natural.add(value)
            self._result.quantized.add(value)

    def _quantize_remaining_inputs(self) -> None:
        """Give a Q/DQ pair to float values that integer nodes read."""
        for node, role in self._result.roles.items():
            if role is Role.CLAMP:
                continue
            inputs = list(node.inputs[:1]) if role is Role.WEIGHTED else _activations(node)
            for value in inputs:
                producer = value.producer() if value is not None else None
                made_of_integers = producer is not None and self._result.roles.get(producer) is Role.MOVES
                # A pass may have quantized the value already.
                if value is not None and not made_of_integers and maker(value, "DequantizeLinear") is None:
                    self._result.quantized.add(value)


def _place_inputs(graph: ir.Graph, observed: Observed, scheme: QuantScheme) -> Placement:
    ranges, stays_float = observed.ranges, observed.stays_float
    result = Placement()
    for node in graph:
        source = node.inputs[0] if is_weighted(node) or _is_transposed(node) else None
        if source is not None and source.name in ranges and not stays_float(node):
            result.roles[node] = Role.WEIGHTED
            if maker(source, "DequantizeLinear") is None:
                result.quantized.add(source)
    if scheme.pairs_before_moves:
        for node in reversed(graph):
            _quantize_before_move(node, observed, result)
    for node in graph:
        if node.op_type == "Add" and not stays_float(node):
            _quantize_identity(node, ranges, result)
        elif node.op_type == "Concat":
            _share_concat(node, ranges, result)
    return result


def _is_transposed(node: ir.Node) -> bool:
    """Whether ``node`` is a transposed convolution whose weight has an axis of output channels, to be quantized along."""
    whole = node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) == 1
    return whole and constant_array(node.inputs[1]) is not None


def _quantize_before_move(node: ir.Node, observed: Observed, result: Placement) -> None:
    """Quantize what ``node`` rearranges in place of what it makes of it, where both have the same integers.

    A ConvTranspose has integers of its own, see :attr:`QuantScheme.signed_transposed`; between nodes that stay float nothing
    is rounded.
    """
    if node.op_type not in REARRANGES or observed.stays_float(node):
        return
    if node.inputs[0] is None or node.outputs[0] not in result.quantized:
        return
    if any(reader.op_type == "ConvTranspose" for reader in node.outputs[0].consumers()):
        return
    source, moved = node.inputs[0], node.outputs[0]
    alike = all(
        known.get(str(source.name)) == known.get(str(moved.name)) for known in (observed.ranges, observed.grids)
    )
    free = source in result.quantized or sole_reader(source) is node
    if alike and free and maker(source, "DequantizeLinear") is None:
        result.quantized.remove(node.outputs[0])
        result.quantized.add(source)


def _quantize_identity(node: ir.Node, ranges: Mapping[str, Range], result: Placement) -> None:
    """A layer fuses with the residual addition behind it when the other side is integer: quantize the earlier side."""
    inputs, clamp = _activations(node), sole_reader(node.outputs[0], *_CLAMPS)
    clamped = (node if clamp is None else clamp).outputs[0]
    if len(inputs) != 2 or clamped not in result.quantized or result.quantized.intersection(inputs):
        return
    makers = [value.producer() for value in inputs]
    if any(maker in result.roles for maker in makers) and all(value.name in ranges for value in inputs):
        first = inputs[0] if makers[1] in result.roles else inputs[1]
        result.quantized.add(first)


def _share_concat(node: ir.Node, ranges: Mapping[str, Range], result: Placement) -> None:
    """Concat fuses only when all its inputs and its output have one scale.

    What others read as well, and would be too coarse for them, keeps its own and is brought to the result's for the Concat.
    """
    output = node.outputs[0]
    if output not in result.quantized:
        return
    inputs = [v for v in node.inputs if v is not None and v.name in ranges]
    if len(inputs) != len(node.inputs):
        return
    members = {v: result.scales.members(v) for v in (*inputs, output)}
    low, high = _union(_limits((m for group in members.values() for m in group), ranges))
    joined = [output]
    for index, value in enumerate(inputs):
        bound = [m for m in members[value] if any(reader.op_type != "Concat" for reader in m.consumers())]
        if any(reader is not node for reader in value.consumers()):
            bound.append(value)
        if high - low > SHARED_SCALE_RATIO * _narrowest(_limits(bound, ranges)):
            result.rescaled.add((node, index))
        else:
            joined.append(value)
    result.quantized.update(joined)
    result.share(joined)


def _activations(node: ir.Node) -> list[ir.Value]:
    """Inputs that carry an image's values."""
    return [v for v in data_inputs(node) if v.const_value is None]


def _limits(values: Iterable[ir.Value], ranges: Mapping[str, Range]) -> list[Range]:
    return [ranges[str(v.name)] for v in values if v.name in ranges]


def _narrowest(limits: Iterable[Range]) -> float:
    return min((high - low for low, high in limits), default=math.inf)


def _union(limits: Iterable[Range]) -> Range:
    lows, highs = zip(*limits, strict=True)
    return min(lows), max(highs)
