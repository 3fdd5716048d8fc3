"""Graphs for TensorRT 8, whose parser knows ONNX up to opset 17 and reads newer ones as if they were that.

Read in the parser's source, branch 8.5-GA of onnx-tensorrt. What it refuses it says; what it reads wrongly it does not: the
axes of a reduction, which are an input from opset 18 on, the start and end of a Shape, the new names of GridSample's modes,
the uneven parts of a Split, the reduction of a Scatter, an antialiased Resize. So the graph becomes one of opset 17, checked
by onnx, in which every such thing is written in another way or, where that cannot be, an error. Beyond the opset:

- Q and DQ have three inputs, and integer constants become floats with a Q: "invalid weights type of Int8" (reported of 8.4).
  The Q gives the same integers: a float that is an integer times a scale is at most one rounding away from it.
- InstanceNormalization is a plugin there, of cuDNN; LayerNormalization is known from 8.6 on, Mish not at all. They are written
  out, the normalizations in float32 where the graph has halves: their squares overflow.
- uint8 is a type of inputs and outputs only, cast from and to a float type: inside, such values are float32, which is exact.

Names of nodes and values stay. What is made of a node has a name that begins with the node's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import shape_inference

from edgeseg.errors import BuildError, first_line
from edgeseg.graph.editing import Dims, Editor, constant_array, dims, remove_unread_constants, replace_value

OPSET = 17
_IR_VERSION = 8
# ReduceSum had its axes as an input before.
_REDUCTIONS = tuple(
    f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)
# Attributes of newer opsets at the value that means what opset 17 does; any other value is an error of the checker.
_NEW_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": "stretch"},
    "Cast": {"saturate": 1},
    "QuantizeLinear": {"saturate": 1, "block_size": 0, "output_dtype": 0},
    "DequantizeLinear": {"block_size": 0},
    "AveragePool": {"dilations": (1, 1)},
}
_GRID_SAMPLE_MODES = {"linear": "bilinear", "cubic": "bicubic"}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Rewritten:
    """A graph for TensorRT 8's parser.

    Attributes:
        model: of opset 17.
        origins: by name of a node that was made: the node of the given graph it is a part of.
        float32: names of nodes that half precision would overflow: the statistics of normalizations. TensorRT 8 takes the
            graph's types for a hint and computes in half where that is allowed.
    """

    model: onnx.ModelProto
    origins: Mapping[str, str]
    float32: frozenset[str]


def for_tensorrt_8(model: onnx.ModelProto, *, has_normalization: bool = False) -> Rewritten:
    """The graph as TensorRT 8 reads it rightly.

    Args:
        model: of a later opset; not changed.
        has_normalization: the version has LayerNormalization (8.6), which then stays.

    Raises:
        BuildError: something that cannot be written for opset 17; names the node.
    """
    made = ir.from_proto(shape_inference.infer_shapes(model))
    made_of = _Parts()
    for node in list(made.graph):
        _Rewrite(made.graph, node, Editor(made.graph, node, node.name), has_normalization, made_of).run()
    remove_unread_constants(made.graph)
    made.opset_imports[""] = OPSET
    made.ir_version = min(made.ir_version, _IR_VERSION)
    result = ir.to_proto(made)
    # Types noted for values of before, bytes among them that are floats now: the parser infers its own.
    del result.graph.value_info[:]
    try:
        onnx.checker.check_model(result)
    except onnx.checker.ValidationError as exc:
        raise BuildError(
            f"TensorRT 8 reads ONNX up to opset {OPSET}, and this graph cannot be written so: {first_line(exc)}; use "
            "TensorRT 10 or later"
        ) from exc
    return Rewritten(result, made_of.origins, frozenset(made_of.statistics))


@dataclass
class _Parts:
    """What was made: see :class:`Rewritten`; and by input of bytes, its value in float32."""

    origins: dict[str, str] = field(default_factory=dict)
    statistics: set[str] = field(default_factory=set)
    float_images: dict[ir.Value, ir.Value] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rewrite:
    """What becomes of one node; what replaces it stands in its place."""

    graph: ir.Graph
    node: ir.Node
    editor: Editor
    has_normalization: bool
    parts: _Parts

    def run(self) -> None:
        node = self.node
        for name, value in _NEW_DEFAULTS.get(node.op_type, {}).items():
            if self._attribute(name, None) == value:
                del node.attributes[name]
        rewrite = _REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(self)
        if node.graph is None:
            return  # another stands in its place
        if node.op_type == "Cast":
            self._cast()
        else:
            self._without_bytes()

    # ---- uint8 inside of the graph, which every node may have

    def _without_bytes(self) -> None:
        """Float32 for the bytes that the node reads or makes."""
        node = self.node
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.UINT8:
                continue
            if value.is_graph_input():
                node.replace_input_with(index, self._float_image(value))
            elif (array := constant_array(value)) is not None:
                stem = str(value.name).rpartition("/")[2]
                node.replace_input_with(index, self.editor.constant(stem, array.astype(np.float32)))
        for value in node.outputs:
            if _is_mask(value):
                name = value.name
                after = Editor(self.graph, node, node.name, after=True)
                mask = self._step("Cast", "bytes", value, editor=after, to=ir.DataType.UINT8)
                ir.convenience.replace_all_uses_with(value, mask, replace_graph_outputs=True)
                cast = mask.producer()
                assert cast is not None
                cast.replace_input_with(0, value)
                value.name, mask.name = f"{name}/float", name
                mask.type, mask.shape = value.type, value.shape

    def _cast(self) -> None:
        node, value = self.node, self.node.inputs[0]
        to = self._attribute("to", None)
        assert value is not None
        if to == ir.DataType.UINT8 and not _is_mask(node.outputs[0]):
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        elif to == ir.DataType.UINT8 and value.dtype not in (*_FLOATS, None):
            node.replace_input_with(0, self._step("Cast", "float", value, to=ir.DataType.FLOAT))
        elif value.is_graph_input() and value.dtype == ir.DataType.UINT8 and to not in _FLOATS:
            node.replace_input_with(0, self._float_image(value))

    def _float_image(self, image: ir.Value) -> ir.Value:
        if image not in self.parts.float_images:
            self.parts.float_images[image] = self._step("Cast", f"{image.name}_float", image, to=ir.DataType.FLOAT)
        return self.parts.float_images[image]

    # ---- by operator

    def _quantize(self) -> None:
        self._zero_point(ir.DataType.UINT8)

    def _dequantize(self) -> None:
        node, value = self.node, self.node.inputs[0]
        assert value is not None
        self._zero_point(value.dtype or ir.DataType.FLOAT)
        integers, steps = (constant_array(v) for v in node.inputs[:2])
        if integers is None:
            return
        if value.dtype != ir.DataType.INT8 or steps is None:
            raise BuildError(
                f"TensorRT 8 takes int8 constants with constant scales only; {node.name} has others; use TensorRT 10 or later"
            )
        axis = self._attribute("axis", 1)
        axes = {"axis": axis} if steps.size > 1 else {}
        if steps.size > 1:
            steps = steps.reshape([-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)])
        floats = self.editor.constant("floats", integers.astype(steps.dtype) * steps)
        node.replace_input_with(0, self._step("QuantizeLinear", "Q", floats, *node.inputs[1:3], **axes))

    def _convolution(self) -> None:
        """Write the kernel's size: of a kernel that is no constant the parser takes it from the attribute alone."""
        node, kernel = self.node, self.node.inputs[1]
        if "kernel_shape" not in node.attributes and constant_array(kernel) is None:
            sides = [side or 0 for side in self._dims(kernel)[2:]]
            node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", sides)

    def _zero_point(self, kind: ir.DataType) -> None:
        """Write the zero point, of as many elements as the scale; without one, a Q's integers are uint8."""
        node = self.node
        scale, given = constant_array(node.inputs[1]), self._given(2)
        kind = kind if given is None else ir.DataType.from_numpy(given.dtype)
        if kind != ir.DataType.INT8 or (given is not None and given.any()):
            raise BuildError(f"TensorRT 8 takes signed integers around zero only, {node.name} has others")
        if given is None or (scale is not None and given.shape != scale.shape):
            node.resize_inputs(3)
            zeros = np.zeros(() if scale is None else scale.shape, np.int8)
            node.replace_input_with(2, self.editor.constant("zero_point", zeros))

    def _reduction(self) -> None:
        node = self.node
        if len(node.inputs) < 2:
            return
        keeps_all = self._attribute("noop_with_empty_axes", 0)
        node.attributes.pop("noop_with_empty_axes", None)
        axes = self._given(1)
        if node.inputs[1] is not None and axes is None:
            raise BuildError(
                f"TensorRT 8 ignores the axes of {node.op_type} {node.name}, which are computed; use TensorRT 10 or later"
            )
        if axes is not None and not axes.size and keeps_all:
            self._become(self._step("Identity", "same", node.inputs[0]))
            return
        if axes is not None and axes.size:
            node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in axes.reshape(-1)])
        node.resize_inputs(1)

    def _shape(self) -> None:
        """Start and end are taken from the whole shape."""
        start, end = self._attribute("start", 0), self._attribute("end", None)
        self._drop("start", "end")
        if start != 0 or end is not None:
            whole = self._step("Shape", "whole", *self.node.inputs)
            limits = (("start", start), ("end", end or 2**31 - 1))
            constants = (self.editor.constant(name, np.array([value], np.int64)) for name, value in limits)
            self._become(self._step("Slice", "part", whole, *constants))

    def _split(self) -> None:
        """Parts of a number become parts of sizes: the parser gives all the same, and leaves a rest out."""
        node, count = self.node, self._attribute("num_outputs", None)
        self._drop("num_outputs")
        if count is None:
            return
        size = self._dims(node.inputs[0])[self._attribute("axis", 0)]
        if size is None:
            raise BuildError(
                f"TensorRT 8 would split {node.name} in equal parts, and its size is not known; use a fixed --size"
            )
        part = -(-size // count)
        sizes = [min(part, max(size - i * part, 0)) for i in range(count)]
        node.resize_inputs(2)
        node.replace_input_with(1, self.editor.constant("sizes", np.array(sizes, np.int64)))

    def _grid_sample(self) -> None:
        if (mode := self._attribute("mode", None)) in _GRID_SAMPLE_MODES:
            self.node.attributes["mode"] = ir.AttrString("mode", _GRID_SAMPLE_MODES[mode])

    def _scatter(self) -> None:
        if self._attribute("reduction", "none") != "none":
            raise BuildError(
                f"TensorRT 8 ignores the reduction of {self.node.op_type} {self.node.name}; use TensorRT 10 or later"
            )

    def _gelu(self) -> None:
        """``0.5 x (1 + erf(x / sqrt 2))``, or with tanh where the node asks for that."""
        x = self.node.inputs[0]
        if self._attribute("approximate", "none") == "tanh":
            cubed = self._step("Mul", "cubed", self._step("Mul", "squared", x, x), x)
            total = self._step("Add", "sum", x, self._step("Mul", "term", cubed, self._scalar("cubic", 0.044715)))
            scaled = self._step("Mul", "scaled", total, self._scalar("scale", math.sqrt(2 / math.pi)))
            inner = self._step("Tanh", "inner", scaled)
        else:
            inner = self._step("Erf", "inner", self._step("Div", "scaled", x, self._scalar("root", math.sqrt(2))))
        shifted = self._step("Add", "shifted", inner, self._scalar("one", 1.0))
        self._become(self._step("Mul", "gelu", self._step("Mul", "halved", x, self._scalar("half", 0.5)), shifted))

    def _mish(self) -> None:
        x = self.node.inputs[0]
        self._become(self._step("Mul", "mish", x, self._step("Tanh", "gate", self._step("Softplus", "softplus", x))))

    def _instance_normalization(self) -> None:
        """The statistics of each plane, the gain and shift of each channel."""
        rank = len(self._dims(self.node.inputs[0]))
        gain, shift = self._given(1), self._given(2)
        if gain is None or shift is None:
            raise BuildError(
                f"TensorRT 8 takes InstanceNormalization with constants only, {self.node.name} computes them"
            )
        of_channel = [1, -1, *[1] * (rank - 2)]
        self._normalized(list(range(2, rank)), gain.reshape(of_channel), shift.reshape(of_channel))

    def _layer_normalization(self) -> None:
        node = self.node
        if self.has_normalization:
            return
        axis = self._attribute("axis", -1)
        axes = list(range(axis, 0)) if axis < 0 else list(range(axis, len(self._dims(node.inputs[0]))))
        gain, shift = self._given(1), self._given(2)
        if gain is None or (shift is None and any(node.inputs[2:])) or len(node.outputs) > 1:
            raise BuildError(
                f"TensorRT before 8.6 has no LayerNormalization, and {node.name} cannot be written out: its gain is "
                "computed, or its mean is read; use TensorRT 8.6 or later"
            )
        self._normalized(axes, gain, shift)

    def _normalized(self, axes: list[int], gain: NDArray[Any], shift: NDArray[Any] | None = None) -> None:
        x = self.node.inputs[0]
        half = x is not None and x.dtype == ir.DataType.FLOAT16
        if half:
            x = self._step("Cast", "float", x, to=ir.DataType.FLOAT)
        centred = self._step("Sub", "centred", x, self._step("ReduceMean", "mean", x, axes=axes, keepdims=1))
        squares = self._step("Mul", "squares", centred, centred)
        variance = self._step("ReduceMean", "variance", squares, axes=axes, keepdims=1)
        epsilon = self.editor.constant("epsilon", np.float32(self._attribute("epsilon", 1e-5)))
        deviation = self._step("Sqrt", "deviation", self._step("Add", "positive", variance, epsilon))
        parts = ("centred", "mean", "squares", "variance", "positive", "deviation", "normal")
        self.parts.statistics |= {f"{self.node.name}/{part}" for part in parts}
        value = self._step("Div", "normal", centred, deviation)
        value = self._step("Mul", "scaled", value, self.editor.constant("gain", gain.astype(np.float32)))
        if shift is not None:
            value = self._step("Add", "shifted", value, self.editor.constant("shift", shift.astype(np.float32)))
        self._become(self._step("Cast", "half", value, to=ir.DataType.FLOAT16) if half else value)

    # ---- what they are made of

    def _step(
        self, op: str, name: str, *inputs: ir.Value | None, editor: Editor | None = None, **attributes: Any
    ) -> ir.Value:
        """A node that is part of this one, named below it."""
        value = (editor or self.editor).op(name, op, inputs, **attributes)
        self.parts.origins[str(value.name)] = str(self.node.name)
        return value

    def _become(self, value: ir.Value) -> None:
        """Let ``value`` stand for the node's output, and what makes it have the node's own name.

        By it messages and the inspector's layers are matched.
        """
        last, name = value.producer(), self.node.name
        assert last is not None
        del self.parts.origins[str(last.name)]
        replace_value(self.graph, self.node.outputs[0], value)
        last.name = name

    def _scalar(self, name: str, value: float) -> ir.Value:
        """A constant of the type of the node's input."""
        x = self.node.inputs[0]
        dtype = ir.DataType.FLOAT if x is None or x.dtype is None else x.dtype
        return self.editor.constant(name, np.asarray(value, dtype.numpy()))

    def _given(self, index: int) -> NDArray[Any] | None:
        """The constant at an input that may be left out."""
        return constant_array(self.node.inputs[index]) if index < len(self.node.inputs) else None

    def _dims(self, value: ir.Value | None) -> Dims:
        known = dims(value)
        if known is None:
            raise BuildError(f"the rank of what {self.node.name} reads is not known; please report the model")
        return known

    def _attribute(self, name: str, default: Any) -> Any:
        given = self.node.attributes.get(name)
        return default if given is None else given.value

    def _drop(self, *names: str) -> None:
        for name in names:
            self.node.attributes.pop(name, None)


def _is_mask(value: ir.Value) -> bool:
    return value.is_graph_output() and value.dtype == ir.DataType.UINT8


_REWRITES: dict[str, Callable[[_Rewrite], None]] = {
    "QuantizeLinear": _Rewrite._quantize,
    "DequantizeLinear": _Rewrite._dequantize,
    "Conv": _Rewrite._convolution,
    "ConvTranspose": _Rewrite._convolution,
    "Shape": _Rewrite._shape,
    "Split": _Rewrite._split,
    "GridSample": _Rewrite._grid_sample,
    "ScatterElements": _Rewrite._scatter,
    "ScatterND": _Rewrite._scatter,
    "Gelu": _Rewrite._gelu,
    "Mish": _Rewrite._mish,
    "InstanceNormalization": _Rewrite._instance_normalization,
    "LayerNormalization": _Rewrite._layer_normalization,
    **dict.fromkeys(_REDUCTIONS, _Rewrite._reduction),
}
