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
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeseg.errors import BuildError, first_line
from edgeseg.graph.proto import Dims, attribute, dims, drop_unread_constants, value_infos

OPSET = 17
_IR_VERSION = 8
# ReduceSum had its axes as an input before.
_REDUCTIONS = tuple(
    f"Reduce{kind}" for kind in ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)
# Attributes of newer opsets at the value that means what opset 17 does; any other value is an error of the checker.
_NEW_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "Resize": {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"},
    "Cast": {"saturate": 1},
    "QuantizeLinear": {"saturate": 1, "block_size": 0, "output_dtype": 0},
    "DequantizeLinear": {"block_size": 0},
    "AveragePool": {"dilations": [1, 1]},
}
_GRID_SAMPLE_MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}


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
    return _Rewrite(model, has_normalization).run()


class _Rewrite:
    """One walk over a graph's nodes; what replaces a node stands in its place."""

    def __init__(self, model: onnx.ModelProto, has_normalization: bool) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = model.graph
        self._values = value_infos(model)
        self._constants = {t.name: t for t in self._model.graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._images = {v.name for v in graph.input if v.type.tensor_type.elem_type == TensorProto.UINT8}
        self._masks = {v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.UINT8}
        self._new: list[NodeProto] = []
        self._made: list[TensorProto] = []
        self._node = NodeProto()
        self._origins: dict[str, str] = {}
        self._statistics: set[str] = set()
        self._floats: dict[str, str] = {}
        self._has_normalization = has_normalization

    def run(self) -> Rewritten:
        for node in list(self._model.graph.node):
            self._node = NodeProto()
            self._node.CopyFrom(node)
            self._drop_new_defaults()
            rewrite = _REWRITES.get(node.op_type)
            if rewrite is None or not rewrite(self):
                self._keep()
        model = self._model
        del model.graph.node[:]
        model.graph.node.extend(self._new)
        # Types noted for values of before, bytes among them that are floats now: the parser infers its own.
        del model.graph.value_info[:]
        model.graph.initializer.extend(self._made)
        drop_unread_constants(model.graph)
        next(domain for domain in model.opset_import if domain.domain in ("", "ai.onnx")).version = OPSET
        model.ir_version = min(model.ir_version, _IR_VERSION)
        self._check()
        return Rewritten(model, self._origins, frozenset(self._statistics))

    def _check(self) -> None:
        try:
            onnx.checker.check_model(self._model)
        except onnx.checker.ValidationError as exc:
            raise BuildError(
                f"TensorRT 8 reads ONNX up to opset {OPSET}, and this graph cannot be written so: {first_line(exc)}; use "
                "TensorRT 10 or later"
            ) from exc

    # ---- uint8 inside of the graph, which every node may have

    def _keep(self) -> None:
        """The node as it is, with float32 for bytes."""
        node = self._node
        if node.op_type == "Cast":
            self._cast()
            return
        for index, name in enumerate(node.input):
            if name in self._images:
                node.input[index] = self._float_image(name)
            elif self._type(name) == TensorProto.UINT8 and name in self._constants:
                array = numpy_helper.to_array(self._constants[name]).astype(np.float32)
                node.input[index] = self._constant(name.rpartition("/")[2], array)
        bytes_out = [name for name in node.output if name in self._masks]
        for index, name in enumerate(node.output):
            if name in bytes_out:
                node.output[index] = f"{name}/float"
        self._new.append(node)
        for name in bytes_out:
            self._step("Cast", "bytes", f"{name}/float", output=name, to=TensorProto.UINT8)

    def _cast(self) -> None:
        node = self._node
        to = next(a for a in node.attribute if a.name == "to")
        if to.i == TensorProto.UINT8 and node.output[0] not in self._masks:
            to.i = TensorProto.FLOAT
        elif to.i == TensorProto.UINT8 and self._type(node.input[0]) not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            node.input[0] = self._step("Cast", "float", node.input[0], to=TensorProto.FLOAT)
        elif node.input[0] in self._images and to.i not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            node.input[0] = self._float_image(node.input[0])
        self._new.append(node)

    def _float_image(self, name: str) -> str:
        if name not in self._floats:
            self._floats[name] = self._step("Cast", f"{name}_float", name, to=TensorProto.FLOAT)
        return self._floats[name]

    # ---- by operator; each says whether the node is done with

    def _quantize(self) -> bool:
        self._zero_point(TensorProto.UINT8)
        return False

    def _dequantize(self) -> bool:
        node = self._node
        self._zero_point(self._type(node.input[0]))
        integers, scale = (self._constants.get(name) for name in node.input[:2])
        if integers is None:
            return False
        if integers.data_type != TensorProto.INT8 or scale is None:
            raise BuildError(
                f"TensorRT 8 takes int8 constants with constant scales only; {node.name} has others; use TensorRT 10 or later"
            )
        array, steps = numpy_helper.to_array(integers), numpy_helper.to_array(scale)
        axis = self._attribute("axis", 1)
        if steps.size > 1:
            steps = steps.reshape([-1 if i == axis % array.ndim else 1 for i in range(array.ndim)])
        floats = self._constant("floats", array.astype(steps.dtype) * steps)
        axes = {"axis": axis} if steps.size > 1 else {}
        node.input[0] = self._step("QuantizeLinear", "Q", floats, node.input[1], node.input[2], **axes)
        return False

    def _convolution(self) -> bool:
        """Write the kernel's size: of a kernel that is no constant the parser takes it from the attribute alone."""
        node = self._node
        if self._attribute("kernel_shape", None) is None and node.input[1] not in self._constants:
            sides = [dim.dim_value for dim in self._values[node.input[1]].type.tensor_type.shape.dim[2:]]
            node.attribute.append(helper.make_attribute("kernel_shape", sides))
        return False

    def _zero_point(self, kind: int) -> None:
        """Write the zero point, of as many elements as the scale; without one, a Q's integers are uint8."""
        node = self._node
        scale = self._array(node.input[1])
        given = self._array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        kind = kind if given is None else helper.np_dtype_to_tensor_dtype(given.dtype)
        if kind != TensorProto.INT8 or (given is not None and given.any()):
            raise BuildError(f"TensorRT 8 takes signed integers around zero only, {node.name} has others")
        if given is None or (scale is not None and given.shape != scale.shape):
            zeros = self._constant("zero_point", np.zeros(() if scale is None else scale.shape, np.int8))
            node.input[:] = [*node.input[:2], zeros]

    def _reduction(self) -> bool:
        node = self._node
        if len(node.input) < 2:
            return False
        if node.input[1]:
            axes = self._array(node.input[1])
            if axes is None:
                raise BuildError(
                    f"TensorRT 8 ignores the axes of {node.op_type} {node.name}, which are computed; use TensorRT 10 or later"
                )
            if not axes.size and self._attribute("noop_with_empty_axes", 0):
                self._new.append(helper.make_node("Identity", [node.input[0]], list(node.output), node.name))
                return True
            if axes.size:
                node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes.reshape(-1)]))
        self._drop("noop_with_empty_axes")
        del node.input[1:]
        return False

    def _shape(self) -> bool:
        """Start and end are taken from the whole shape."""
        node = self._node
        start, end = self._attribute("start", 0), self._attribute("end", None)
        self._drop("start", "end")
        if start == 0 and end is None:
            return False
        whole = self._step("Shape", "whole", *node.input)
        limits = [self._constant(n, np.array([v], np.int64)) for n, v in (("start", start), ("end", end or 2**31 - 1))]
        self._step("Slice", "", whole, *limits)
        return True

    def _split(self) -> bool:
        """Parts of a number become parts of sizes: the parser gives all the same, and leaves a rest out."""
        node = self._node
        count = self._attribute("num_outputs", None)
        self._drop("num_outputs")
        if count is None:
            return False
        size = self._dims(node.input[0])[self._attribute("axis", 0)]
        if size is None:
            raise BuildError(
                f"TensorRT 8 would split {node.name} in equal parts, and its size is not known; use a fixed --size"
            )
        part = -(-size // count)
        sizes = [min(part, max(size - i * part, 0)) for i in range(count)]
        node.input[:] = [node.input[0], self._constant("sizes", np.array(sizes, np.int64))]
        return False

    def _grid_sample(self) -> bool:
        for given in self._node.attribute:
            if given.name == "mode":
                given.s = _GRID_SAMPLE_MODES.get(given.s, given.s)
        return False

    def _scatter(self) -> bool:
        if self._attribute("reduction", b"none") != b"none":
            raise BuildError(
                f"TensorRT 8 ignores the reduction of {self._node.op_type} {self._node.name}; use TensorRT 10 or later"
            )
        return False

    def _gelu(self) -> bool:
        """``0.5 x (1 + erf(x / sqrt 2))``, or with tanh where the node asks for that."""
        x = self._node.input[0]
        if self._attribute("approximate", b"none") == b"tanh":
            cubed = self._step("Mul", "cubed", self._step("Mul", "squared", x, x), x)
            total = self._step("Add", "sum", x, self._step("Mul", "term", cubed, self._scalar("cubic", 0.044715)))
            scaled = self._step("Mul", "scaled", total, self._scalar("scale", math.sqrt(2 / math.pi)))
            inner = self._step("Tanh", "inner", scaled)
        else:
            inner = self._step("Erf", "inner", self._step("Div", "scaled", x, self._scalar("root", math.sqrt(2))))
        shifted = self._step("Add", "shifted", inner, self._scalar("one", 1.0))
        self._step("Mul", "", self._step("Mul", "halved", x, self._scalar("half", 0.5)), shifted)
        return True

    def _mish(self) -> bool:
        x = self._node.input[0]
        self._step("Mul", "", x, self._step("Tanh", "gate", self._step("Softplus", "softplus", x)))
        return True

    def _instance_normalization(self) -> bool:
        """The statistics of each plane, the gain and shift of each channel."""
        node = self._node
        rank = len(self._dims(node.input[0]))
        gain, shift = (self._array(name) for name in node.input[1:3])
        if gain is None or shift is None:
            raise BuildError(f"TensorRT 8 takes InstanceNormalization with constants only, {node.name} computes them")
        of_channel = [1, -1, *[1] * (rank - 2)]
        self._normalized(list(range(2, rank)), gain.reshape(of_channel), shift.reshape(of_channel))
        return True

    def _layer_normalization(self) -> bool:
        node = self._node
        if self._has_normalization:
            return False
        axis = self._attribute("axis", -1)
        axes = list(range(axis, 0)) if axis < 0 else list(range(axis, len(self._dims(node.input[0]))))
        gain = self._array(node.input[1])
        shift = self._array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if gain is None or (shift is None and len(node.input) > 2 and node.input[2]) or len(node.output) > 1:
            raise BuildError(
                f"TensorRT before 8.6 has no LayerNormalization, and {node.name} cannot be written out: its gain is "
                "computed, or its mean is read; use TensorRT 8.6 or later"
            )
        self._normalized(axes, gain, shift)
        return True

    def _normalized(self, axes: list[int], gain: NDArray[Any], shift: NDArray[Any] | None = None) -> None:
        node, x = self._node, self._node.input[0]
        half = self._type(x) == TensorProto.FLOAT16
        if half:
            x = self._step("Cast", "float", x, to=TensorProto.FLOAT)
        centred = self._step("Sub", "centred", x, self._step("ReduceMean", "mean", x, axes=axes, keepdims=1))
        squares = self._step("Mul", "squares", centred, centred)
        variance = self._step("ReduceMean", "variance", squares, axes=axes, keepdims=1)
        epsilon = self._constant("epsilon", np.float32(self._attribute("epsilon", 1e-5)))
        deviation = self._step("Sqrt", "deviation", self._step("Add", "positive", variance, epsilon))
        parts = ("centred", "mean", "squares", "variance", "positive", "deviation", "normal")
        self._statistics |= {f"{node.name}/{part}" for part in parts}
        steps = [("Div", "normal", deviation), ("Mul", "scaled", self._constant("gain", gain.astype(np.float32)))]
        if shift is not None:
            steps.append(("Add", "shifted", self._constant("shift", shift.astype(np.float32))))
        if half:
            steps.append(("Cast", "half", ""))
        value = centred
        for number, (op, name, operand) in enumerate(steps):
            # The last one has the node's own name, by which messages and the inspector's layers are matched.
            inputs = [value, operand] if operand else [value]
            to: dict[str, Any] = {"to": TensorProto.FLOAT16} if op == "Cast" else {}
            value = self._step(op, "" if number == len(steps) - 1 else name, *inputs, **to)
        assert value == node.output[0]

    # ---- what they are made of

    def _step(self, op: str, name: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node that is part of this one; with no name it takes the node's own, and its output."""
        at = self._node.name
        full = f"{at}/{name}" if name else at
        if name:
            self._origins[full] = at
        result = output or (full if name else self._node.output[0])
        self._new.append(helper.make_node(op, list(inputs), [result], full, **attributes))
        return str(result)

    def _scalar(self, name: str, value: float) -> str:
        """A constant of the type of the node's input."""
        return self._constant(name, np.asarray(value, helper.tensor_dtype_to_np_dtype(self._type(self._node.input[0]))))

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> str:
        full = f"{self._node.name}/{name}"
        self._constants[full] = numpy_helper.from_array(np.asarray(array), full)
        self._made.append(self._constants[full])
        return full

    def _array(self, name: str) -> NDArray[Any] | None:
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def _type(self, name: str) -> int:
        if name in self._constants:
            return int(self._constants[name].data_type)
        return int(self._values[name].type.tensor_type.elem_type) if name in self._values else int(TensorProto.FLOAT)

    def _dims(self, name: str) -> Dims:
        known = dims(self._values[name]) if name in self._values else None
        if known is None:
            raise BuildError(f"the rank of what {self._node.name} reads is not known; please report the model")
        return known

    def _attribute(self, name: str, default: Any) -> Any:
        return attribute(self._node, name, default)

    def _drop(self, *names: str) -> None:
        kept = [a for a in self._node.attribute if a.name not in names]
        del self._node.attribute[:]
        self._node.attribute.extend(kept)

    def _drop_new_defaults(self) -> None:
        defaults = _NEW_DEFAULTS.get(self._node.op_type, {})
        self._drop(*(name for name, value in defaults.items() if self._attribute(name, None) == value))


_REWRITES: dict[str, Callable[[_Rewrite], bool]] = {
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
