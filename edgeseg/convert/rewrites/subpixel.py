"""3x3 convolution of a nearest-2x upsampled tensor -> four 2x2 convolutions at the low resolution, interleaved.

After nearest 2x upsampling every pixel stands four times, so the nine taps of a 3x3 kernel meet at most four different
values. For each of the four output phases the taps that meet the same value are added up once, in the weights: 9
multiply-accumulates per input channel become 4, and the upsampled tensor is never written (Shi et al., "Is the
deconvolution layer the same as a convolutional layer?", 2016, in reverse).

Decoders upsample right before they merge, so the rewrite looks through the merge: convolution is linear, and
``conv(concat(up(a), b)) = conv_a(up(a)) + conv_b(b)``, ``conv(up(a) + b) = conv(up(a)) + conv(b)``. A 1x1 convolution that
made ``b`` is then composed into the 3x3 (FPN's lateral convolutions: 24 input channels instead of 256).

Precondition: float Conv, 3x3, stride, dilation and group 1, padding 1, constant weight, whose input is made by nearest 2x
Resize, directly or below Add and channel Concat nodes; and it saves a quarter of the convolution.
Postcondition: no such Conv is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

MINIMUM_SAVING = 0.25
"""Share of the multiply-accumulates that has to go; below it the interleaving costs more than is saved."""


@dataclass
class _Terms:
    """A 3x3 convolution as a sum: over low-resolution values, and over values at full resolution."""

    low: list[tuple[ir.Value, FloatArray]] = field(default_factory=list)
    full: list[tuple[ir.Value, FloatArray]] = field(default_factory=list)
    constant: FloatArray | None = None
    """Bias of composed 1x1 convolutions, per channel of the 3x3 kernel's input. Zero padding keeps it away from the
    border, so it is no bias of the result: it is added to the first low-resolution value, which is padded alike."""

    def macs_per_pixel(self) -> int:
        return sum(4 * w.shape[0] * w.shape[1] for _, w in self.low) + sum(w.size for _, w in self.full)


def apply(model: ir.Model) -> int:
    """Rewrite every convolution that matches; return how many."""
    found = list(_matches(model.graph))
    for index, (node, terms) in enumerate(found):
        _replace(model.graph, node, terms, f"subpixel_{index}")
    return len(found)


def leaves(model: ir.Model) -> int:
    """Count the convolutions that still match."""
    return sum(1 for _ in _matches(model.graph))


def _matches(graph: ir.Graph) -> Iterator[tuple[ir.Node, _Terms]]:
    for node in graph:
        weight = _constant(node.inputs[1]) if node.op_type == "Conv" and len(node.inputs) > 1 else None
        if weight is None or weight.dtype != np.float32 or not _is_plain_3x3(node, weight):
            continue
        terms = _Terms()
        _decompose(node.inputs[0], weight, terms)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if terms.low and (bias is None or _constant(bias) is not None):
            if terms.macs_per_pixel() <= (1.0 - MINIMUM_SAVING) * weight.size:
                yield node, terms


def _is_plain_3x3(node: ir.Node, weight: FloatArray) -> bool:
    return (
        weight.shape[2:] == (3, 3)
        and _ints(node, "pads", (0, 0, 0, 0)) == (1, 1, 1, 1)
        and _ints(node, "strides", (1, 1)) == (1, 1)
        and _ints(node, "dilations", (1, 1)) == (1, 1)
        and node.attributes.get_int("group", 1) == 1
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _decompose(value: ir.Value | None, weight: FloatArray, terms: _Terms, *, added: bool = False) -> None:
    """Split ``conv(value, weight)`` into terms; ``added`` says that ``value`` is a term of a sum."""
    assert value is not None
    node = value.producer()
    if node is not None and _is_nearest_2x(node):
        assert node.inputs[0] is not None
        terms.low.append((node.inputs[0], weight))
    elif node is not None and node.op_type == "Add" and _same_shapes(node):
        for side in node.inputs:
            _decompose(side, weight, terms, added=True)
    elif node is not None and node.op_type == "Concat" and _concat_channels(node) is not None:
        starts = np.cumsum([0, *(_concat_channels(node) or ())])
        for part, start, stop in zip(node.inputs, starts, starts[1:], strict=False):
            _decompose(part, weight[:, start:stop], terms)
    elif node is not None and added and terms.constant is None and _is_pointwise(node):
        _compose_pointwise(node, weight, terms)
    else:
        terms.full.append((value, weight))


def _compose_pointwise(node: ir.Node, weight: FloatArray, terms: _Terms) -> None:
    pointwise = _constant(node.inputs[1])
    assert pointwise is not None and node.inputs[0] is not None
    composed = np.einsum("oihw,ic->ochw", weight.astype(np.float64), pointwise[:, :, 0, 0]).astype(np.float32)
    terms.full.append((node.inputs[0], composed))
    if len(node.inputs) > 2:
        terms.constant = _constant(node.inputs[2])


def phase_kernels(weight: FloatArray) -> dict[tuple[int, int], FloatArray]:
    """Kernels ``(O, I, 2, 2)`` by output phase (row, column), for a 3x3 kernel over a nearest-2x upsampled tensor.

    Phase 0 reads the low-resolution rows i-1 and i, phase 1 the rows i and i+1; columns alike.
    """

    def halve(kernel: NDArray[np.float64], axis: int, phase: int) -> NDArray[np.float64]:
        first, middle, last = (np.take(kernel, k, axis) for k in range(3))
        pair = (first, middle + last) if phase == 0 else (first + middle, last)
        return np.stack(pair, axis)

    wide = weight.astype(np.float64)
    return {
        (row, column): np.ascontiguousarray(halve(halve(wide, 2, row), 3, column).astype(np.float32))
        for row in (0, 1)
        for column in (0, 1)
    }


def _replace(graph: ir.Graph, node: ir.Node, terms: _Terms, prefix: str) -> None:
    tape = _Emitter(graph, node, prefix)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    low, kernels = _joined(tape, terms.low, "low", terms.constant)
    phases = []
    for (row, column), kernel in phase_kernels(kernels).items():
        pads = [1 - row, 1 - column, row, column]
        inputs = [low, tape.constant(f"weight_{row}{column}", kernel)]
        if bias is not None and not terms.full:
            inputs.append(bias)
        phases.append(tape.op(f"Conv_{row}{column}", "Conv", inputs, kernel_shape=[2, 2], pads=pads))
    stacked = tape.op("phases", "Concat", phases, axis=1)
    result = tape.op("interleave", "DepthToSpace", [stacked], blocksize=2, mode="DCR")
    if terms.full:
        full, kernel = _joined(tape, terms.full, "full", None)
        inputs = [full, tape.constant("weight", kernel)]
        if bias is not None:
            inputs.append(bias)
        skip = tape.op("Conv", "Conv", inputs, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        result = tape.op("merge", "Add", [result, skip])
    output = node.outputs[0]
    result.shape, result.type, name = output.shape, output.type, output.name
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    _remove_dead(graph, node)
    result.name = name


def _joined(
    tape: _Emitter, parts: list[tuple[ir.Value, FloatArray]], name: str, constant: FloatArray | None
) -> tuple[ir.Value, FloatArray]:
    """One value and one kernel for a sum of convolutions: same value -> kernels added, different values -> concat."""
    merged: dict[ir.Value, FloatArray] = {}
    for value, weight in parts:
        merged[value] = merged[value] + weight if value in merged else weight
    values = list(merged)
    if constant is not None:
        # Channels of the constant follow the 3x3 kernel's input, which is what the first low-resolution value has.
        shifted = tape.op("shift", "Add", [values[0], tape.constant("shift", constant.reshape(1, -1, 1, 1))])
        shifted.shape, shifted.type = values[0].shape, values[0].type
        merged = {shifted: merged.pop(values[0]), **merged}
        values = list(merged)
    kernel = np.concatenate(list(merged.values()), axis=1)
    return (values[0] if len(values) == 1 else tape.op(f"{name}_concat", "Concat", values, axis=1)), kernel


class _Emitter:
    """Puts new nodes in front of the node being replaced, named after it."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node, prefix: str) -> None:
        self._graph = graph
        self._anchor = anchor
        self._stem = anchor.name.removesuffix("/Conv") if anchor.name else prefix

    def op(self, name: str, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        full_name = f"{self._stem}/subpixel/{name}"
        node = ir.node(op_type, inputs, attributes, name=full_name)
        node.outputs[0].name = full_name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def constant(self, name: str, array: FloatArray) -> ir.Value:
        full_name = f"{self._stem}/subpixel/{name}.value"
        value = ir.Value(name=full_name, const_value=ir.tensor(array, name=full_name))
        self._graph.register_initializer(value)
        return value


def _remove_dead(graph: ir.Graph, node: ir.Node) -> None:
    """Remove ``node`` and whatever only it needed."""
    pending = [node]
    while pending:
        current = pending.pop()
        if any(o.uses() or o.is_graph_output() for o in current.outputs):
            continue
        makers = [v.producer() for v in current.inputs if v is not None]
        constants = [v for v in current.inputs if v is not None and v.is_initializer()]
        graph.remove(current, safe=True)
        for constant in constants:
            if not constant.uses() and constant.name in graph.initializers:
                graph.initializers.pop(constant.name)
        pending.extend(m for m in dict.fromkeys(makers) if m is not None)


def _is_nearest_2x(node: ir.Node) -> bool:
    if node.op_type != "Resize" or node.attributes.get_string("mode", "nearest") != "nearest":
        return False
    transform = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    # Both rules repeat each pixel twice at factor 2; others shift the image by one.
    if (transform, rounding) not in {("asymmetric", "floor"), ("half_pixel", "round_prefer_floor")}:
        return False
    scales = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size:
        return scales.tolist() == [1.0, 1.0, 2.0, 2.0]
    source, target = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or target.shape is None:
        return False
    a, b = list(source.shape), list(target.shape)
    return all(isinstance(n, int) for n in (*a, *b)) and b == [a[0], a[1], 2 * a[2], 2 * a[3]]  # type: ignore[operator]


def _is_pointwise(node: ir.Node) -> bool:
    weight = _constant(node.inputs[1]) if node.op_type == "Conv" and len(node.inputs) > 1 else None
    return (
        weight is not None
        and weight.shape[2:] == (1, 1)
        and _ints(node, "strides", (1, 1)) == (1, 1)
        and not any(_ints(node, "pads", (0, 0, 0, 0)))
        and node.attributes.get_int("group", 1) == 1
        and (len(node.inputs) < 3 or _constant(node.inputs[2]) is not None)
    )


def _same_shapes(node: ir.Node) -> bool:
    shapes = [v.shape if v is not None else None for v in (*node.inputs, *node.outputs)]
    return None not in shapes and all(s == shapes[0] and len(s or ()) == 4 for s in shapes)


def _concat_channels(node: ir.Node) -> list[int] | None:
    """Channels of each input of a channel Concat of images; ``None`` for any other Concat or unknown channels."""
    if node.attributes.get_int("axis", 0) not in {1, -3}:
        return None
    shapes = [v.shape if v is not None else None for v in node.inputs]
    channels = [s[1] if s is not None and len(s) == 4 else None for s in shapes]
    return [c for c in channels if isinstance(c, int)] if all(isinstance(c, int) for c in channels) else None


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, default))
