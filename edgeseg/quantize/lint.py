"""Check a written Q/DQ graph against the rules of its scheme, independently of the code that wrote it.

Compilers rarely refuse a badly placed Q/DQ pair: they run the layer in float, or slower than float, or saturate. So each
rule a target documents, and each that was measured, is checked here on the file's own nodes and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgeseg.graph.proto import REARRANGES, attribute, maker_behind_moves, makers, readers
from edgeseg.quantize.parameters import pair_sums
from edgeseg.quantize.schemes import QuantScheme

_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_CLAMPS = frozenset({"Relu", "Clip"})
_INTEGER_MOVES = REARRANGES | {"Slice", "Split", "Gather", "Expand", "Tile", "MaxPool", "Concat"}


def lint(model: onnx.ModelProto, scheme: QuantScheme, floats: Collection[str] = ()) -> list[str]:
    """Return one line per broken rule; an empty list means the graph fulfils its scheme.

    ``floats``: names of nodes that were asked to stay float.
    """
    graph = _Graph(model, frozenset(floats), behind_moves=scheme.pairs_before_moves)
    return [problem for rule in RULES for problem in rule(graph, scheme)]


class _Numbers(NamedTuple):
    """What a Q or DQ node quantizes with."""

    scale: NDArray[Any]
    zero_point: NDArray[Any]


class _Graph:
    """A graph's nodes by what they make and read, and its constants as arrays."""

    def __init__(self, model: onnx.ModelProto, floats: frozenset[str], *, behind_moves: bool = False) -> None:
        self.floats = floats
        self._behind_moves = behind_moves
        self.nodes = list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self._tensors = {t.name: t for t in model.graph.initializer}
        self.maker, self.readers = makers(model.graph), readers(model.graph)

    @property
    def unread_constants(self) -> list[str]:
        return sorted(name for name in self._tensors if name not in self.readers and name not in self.outputs)

    def constant(self, name: str) -> NDArray[Any] | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def each(self, *op_types: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in op_types)

    def dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that makes ``name``, or what reaches it rearranged where the scheme wants it so."""
        node = maker_behind_moves(self.maker, name) if self._behind_moves else self.maker.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def is_constant_pair(self, node: onnx.NodeProto) -> bool:
        """Whether a DequantizeLinear reads a constant (a weight, a bias, an operand)."""
        return node.input[0] in self._tensors

    def numbers(self, node: onnx.NodeProto | None) -> _Numbers | None:
        """Scale and zero point of a Q or DQ node, ``None`` if one of them is missing or not constant."""
        known = [self.constant(name) for name in node.input[1:3]] if node is not None else []
        values = [value for value in known if value is not None]
        return _Numbers(*values) if len(values) == 2 else None

    def quantizers(self, name: str) -> Iterator[onnx.NodeProto]:
        """The QuantizeLinear nodes whose integers reach ``name`` through nodes that move them."""
        node = self.maker.get(name)
        if node is None:
            return
        if node.op_type == "QuantizeLinear":
            yield node
        elif node.op_type in _INTEGER_MOVES:
            for source in node.input if node.op_type == "Concat" else node.input[:1]:
                yield from self.quantizers(source)


Rule = Callable[[_Graph, QuantScheme], Iterator[str]]


def _parameters_are_sound(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    for node in graph.each("QuantizeLinear", "DequantizeLinear"):
        numbers = graph.numbers(node)
        if numbers is None:
            yield f"{node.name} has no constant scale and zero point"
            continue
        scale, zero_point = numbers
        if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
            yield f"{node.name} has a scale that is not positive and finite"
        if scale.shape != zero_point.shape:
            yield f"{node.name} has scales of shape {scale.shape} and zero points of shape {zero_point.shape}"
        if scheme.symmetric and np.any(zero_point):
            yield f"{node.name} has a zero point other than 0; {scheme.name} is symmetric"


def _activation_types(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    dtype = np.uint8 if scheme.activations == "u8" else np.int8
    for node in graph.each("QuantizeLinear", "DequantizeLinear"):
        numbers = graph.numbers(node)
        if numbers is None or graph.is_constant_pair(node):
            continue
        if numbers.scale.size != 1:
            yield f"{node.name} has a scale per channel; activations are quantized per tensor"
        kind = numbers.zero_point.dtype
        unzeroed = scheme.signed_transposed and kind == np.int8 and not np.any(numbers.zero_point)
        if kind != dtype and not unzeroed:
            yield f"{node.name} has integers of type {kind}; {scheme.name} takes {np.dtype(dtype)}"


def _weights(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    for node in graph.each(*_WEIGHTED):
        pair = graph.dequantizer(node.input[1])
        if pair is None or not graph.is_constant_pair(pair):
            continue
        values, numbers = graph.constant(pair.input[0]), graph.numbers(pair)
        if values is None or numbers is None:
            continue
        if values.dtype != np.int8 or np.any(numbers.zero_point):
            yield f"{node.name}: weight is not symmetric int8"
        axis, wanted = attribute(pair, "axis", 1), _channel_axis(node, values)
        if scheme.adds_pairs:
            sums = pair_sums(values, wanted, scheme, groups=attribute(node, "group", 1))
            if sums.max(initial=0) > scheme.pair_limit:
                yield f"{node.name}: neighbouring weights add to {sums.max()}, and {scheme.name} holds {scheme.pair_limit}"
        if numbers.scale.ndim != 1 or axis != wanted or numbers.scale.size != values.shape[wanted]:
            yield f"{node.name}: weight is not quantized per output channel (axis {wanted})"


def _biases(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    for node in graph.each("Conv", "ConvTranspose", "Gemm"):
        weight, source = graph.dequantizer(node.input[1]), graph.dequantizer(node.input[0])
        if weight is None or source is None or len(node.input) < 3:
            continue
        bias = graph.dequantizer(node.input[2])
        if not scheme.integer_bias:
            if bias is not None:
                yield f"{node.name}: bias is quantized; {scheme.name} wants it float"
            continue
        values = graph.constant(bias.input[0]) if bias is not None else None
        if bias is None or values is None or values.dtype != np.int32:
            yield f"{node.name}: bias is not int32"
            continue
        numbers = [graph.numbers(pair) for pair in (bias, weight, source)]
        of_bias, of_weight, of_source = (None if pair is None else pair.scale for pair in numbers)
        if of_bias is not None and of_weight is not None and of_source is not None and of_source.size == 1:
            product = of_weight.astype(np.float64) * of_source.item()
            if of_bias.shape != of_weight.shape or not np.allclose(of_bias, product, rtol=1e-5, atol=0):
                yield f"{node.name}: bias scale is not input scale times weight scale"


def _layers_are_whole(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    """A layer runs on integers with both operands quantized, and in ONNX Runtime a Conv with its output as well."""
    # ONNX Runtime has no integer ConvTranspose: one that could not be split into convolutions is float, whatever it reads.
    without_kernel = {"ConvTranspose"} if scheme.placement == "operators" else set()
    for node in graph.each(*(_WEIGHTED - without_kernel)):
        if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
            continue  # float: its weight has no axis of output channels
        source, pair = graph.dequantizer(node.input[0]), graph.dequantizer(node.input[1])
        weight = graph.constant(node.input[1])
        operands = [source is not None, pair is not None and graph.is_constant_pair(pair)]
        if node.name in graph.floats:
            if operands[1]:
                yield f"{node.name} has an integer weight and was asked to stay float"
            continue
        if operands == [True, False] and weight is not None and weight.ndim >= 2:
            yield f"{node.name} reads integers but its weight is float: it runs in float"
        if operands == [False, True]:
            yield f"{node.name} has an integer weight but reads a float value: it runs in float"
        if all(operands) and scheme.placement == "operators" and node.op_type == "Conv":
            readers = graph.readers.get(node.output[0], [])
            if not readers or any(r.op_type != "QuantizeLinear" for r in readers) or node.output[0] in graph.outputs:
                yield f"{node.name} has a float reader: ONNX Runtime has no integer Conv with a float result"


def _pairs_agree(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    """Integers are dequantized with the numbers they were quantized with, however they were moved in between."""
    for node in graph.each("DequantizeLinear"):
        if graph.is_constant_pair(node):
            continue
        for quantizer in graph.quantizers(node.input[0]):
            ours, theirs = graph.numbers(node), graph.numbers(quantizer)
            if ours is None or theirs is None:
                continue
            if not all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)):
                yield f"{node.name} dequantizes with other numbers than {quantizer.name} quantized with"


def _transposed_convolutions_meet_no_zero_point(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    if not scheme.signed_transposed:
        return
    for node in graph.each("ConvTranspose"):
        numbers = graph.numbers(graph.dequantizer(node.input[0]))
        if numbers is not None and np.any(numbers.zero_point):
            yield f"{node.name} reads integers with a zero point: {scheme.name} runs it in float"


def _integers_are_read_right(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    allowed = _INTEGER_MOVES | {"DequantizeLinear"} if scheme.placement == "operators" else {"DequantizeLinear"}
    integers = {node.output[0] for node in graph.each("QuantizeLinear")}
    unread = {name for name in integers if name not in graph.readers}
    for node in graph.nodes:
        taken = [name for name in node.input if name in integers]
        if taken and node.op_type == "Concat" and len(taken) < len(node.input):
            yield f"{node.name} joins integers with float values"
        if taken and node.op_type in _INTEGER_MOVES & allowed:
            integers.update(node.output)
            # Of a Split, one part may be for nobody: that costs nothing.
            if not any(name in graph.readers for name in node.output):
                unread.update(node.output)
        elif taken and node.op_type not in allowed:
            yield f"{node.name} ({node.op_type}) reads integers of {taken[0]}; only {', '.join(sorted(allowed))} may"
    for name in sorted(unread):
        yield f"{name} is quantized, and nothing reads it"


def _constants_are_read(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    """A float weight left beside its integers travels to the device and is loaded for nothing."""
    for name in graph.unread_constants:
        yield f"constant {name} is not read"


def _nothing_before_a_clamp(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    """A pair between a layer and its Relu keeps them from being fused, and costs the negative half of the range."""
    for node in graph.each(*_CLAMPS):
        pair = graph.dequantizer(node.input[0])
        quantizer = graph.maker.get(pair.input[0]) if pair is not None else None
        layer = graph.maker.get(quantizer.input[0]) if quantizer is not None and quantizer.input else None
        only_reader = quantizer is not None and len(graph.readers.get(quantizer.output[0], [])) == 1
        if layer is not None and layer.op_type in _WEIGHTED and only_reader and len(graph.readers[pair.output[0]]) == 1:  # type: ignore[union-attr]
            yield f"{node.name} reads a Q/DQ pair behind {layer.name}; the pair belongs behind the {node.op_type}"


def _concats_share_a_scale(graph: _Graph, scheme: QuantScheme) -> Iterator[str]:
    """TensorRT and OpenVINO fuse a Concat only if all its inputs and its output have one scale."""
    if scheme.placement != "inputs":
        return
    for node in graph.each("Concat"):
        readers = [r for r in graph.readers.get(node.output[0], []) if r.op_type == "QuantizeLinear"]
        if not readers:
            continue
        pairs = [*(graph.dequantizer(name) for name in node.input), readers[0]]
        seen = {n and (n.scale.tobytes(), n.zero_point.tobytes()) for n in map(graph.numbers, pairs)}
        if None in seen or len(seen) != 1:
            yield f"{node.name}: inputs and output of a Concat do not share one scale"


RULES: tuple[Rule, ...] = (
    _parameters_are_sound,
    _activation_types,
    _weights,
    _biases,
    _layers_are_whole,
    _pairs_agree,
    _transposed_convolutions_meet_no_zero_point,
    _integers_are_read_right,
    _constants_are_read,
    _nothing_before_a_clamp,
    _concats_share_a_scale,
)
"""Every rule; each can fail (``tests/unit/test_lint.py`` breaks a good graph once per rule)."""


def _channel_axis(node: onnx.NodeProto, weight: NDArray[Any]) -> int:
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": weight.ndim - 1}[node.op_type]
