"""Write a typed FP16 graph: half precision everywhere it is safe, float32 islands where it is not.

TensorRT 11 has no precision flags: what a layer computes in is what the graph's types say. So the types are written here,
with a Cast wherever two regions meet. The contract of the graph does not change: the same image in, the same outputs.

An island is a node that

- makes or reads a value whose calibrated range leaves FP16's (65504, IEEE 754 binary16), with a margin for images the
  calibration did not see;
- has a weight that FP16 cannot hold, other than a bound of Clip, which saturates;
- has a constant that FP16 takes for 0 or for twice as much, such as the epsilon of a norm, makes what that is added to, or
  computes with it what something else is divided by;
- sums squares under a root, which is how TensorRT's parser reads ReduceL2: FP16 holds neither those of 256 nor of 1/8192;
- is an operator that ONNX has for float32 only, such as Celu;
- is fed integers (the preprocessing's first multiplication works on 0..255 in float32 and costs one layer);
- belongs to the preprocessing of a uint16 or float32 image: FP16 has 11 bits for its values, and ends at 65504.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgeseg.errors import QuantizationError, first_line
from edgeseg.graph.proto import copied, drop_unread_constants, refill, value_infos
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx, write_onnx

FP16_MAX = float(np.finfo(np.float16).max)

FP16_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)

RANGE_MARGIN = 4.0
"""A calibrated value must fit this many times over: other images reach further than the calibration's."""

_FLOAT32_INPUTS: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2}), "Upsample": frozenset({1})}
"""Inputs that ONNX types as float32 whatever the data is: regions of interest and scales."""

_SATURATING = frozenset({"Clip"})
_NORM = frozenset({"Mul", "Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt"})
_DIVISOR = frozenset({"Expand", "Pow", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"})
"""What a small number is added to is made by the former, mostly; the latter make of the sum what something is divided by."""


def write_fp16(graph: OnnxGraph, table: CalibrationTable | None, path: Path) -> OnnxGraph:
    """Write ``graph`` with FP16 types.

    Args:
        graph: the fp32 graph.
        table: calibrated ranges that decide the islands; without one only the weights do.
        path: the ONNX file to write, atomically.

    Returns:
        the written graph, precision ``fp16``.

    Raises:
        QuantizationError: no layer can run in FP16, or the result is not valid ONNX.
        ArtifactError: ``graph`` cannot be read.
    """
    model = read_onnx(graph.path)
    typed = fp16_model(model, {} if table is None else magnitudes(table))
    try:
        onnx.checker.check_model(typed, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as exc:
        raise QuantizationError(
            f"the FP16 graph of {graph.path.name} is not valid: {first_line(exc)}; please report it"
        ) from exc
    write_onnx(typed, path)
    return replace(graph, path=path, sha256=sha256_file(path), precision="fp16")


def magnitudes(table: CalibrationTable) -> dict[str, float]:
    """Largest absolute value that calibration saw, by tensor."""
    return {name: max(-limits.minimum, limits.maximum) for name, limits in table.ranges.items()}


def fp16_model(
    model: onnx.ModelProto,
    magnitudes: Mapping[str, float],
    within: Callable[[onnx.NodeProto], bool] = lambda node: True,
) -> onnx.ModelProto:
    """Return a typed FP16 copy of a float32 ``model``.

    Args:
        model: ONNX, float32.
        magnitudes: largest absolute value seen per tensor; absent ones are taken to fit.
        within: of a node: whether it may run in FP16; all others are left as they are.

    Raises:
        QuantizationError: nothing is left to run in FP16.
    """
    typed = copied(model)
    _Writer(typed, magnitudes, within).run()
    # The types noted for the float32 graph no longer hold; every reader infers them anew.
    del typed.graph.value_info[:]
    return typed


class _Writer:
    """Walks the nodes in order, keeping for each float value the names it has in either type."""

    def __init__(
        self,
        model: onnx.ModelProto,
        magnitudes: Mapping[str, float],
        within: Callable[[onnx.NodeProto], bool],
    ) -> None:
        self._graph = graph = model.graph
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        values = value_infos(model)
        floats = {name for name, v in values.items() if v.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._within = within
        self._weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self._floats = floats | set(self._weights)
        self._too_large = {n for n, magnitude in magnitudes.items() if magnitude * RANGE_MARGIN > FP16_MAX}
        self._half: dict[str, str] = {}
        self._full: dict[str, str] = {value.name: value.name for value in graph.input if value.name in floats}
        self._around_small = self._find_around_small()
        self._is_wide = graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8
        self._nodes: list[onnx.NodeProto] = []
        self._outputs = {value.name for value in graph.output if value.name in floats}
        self._fresh: set[str] = set()
        """Values straight from integers."""

    def run(self) -> None:
        converted = 0
        for node in self._graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            island = self._is_island(node)
            converted += not island and any(name in self._floats for name in node.output)
            for index, name in enumerate(node.input):
                if name in self._floats:
                    full = island or index in _FLOAT32_INPUTS.get(node.op_type, ())
                    copy.input[index] = self._as_full(name) if full else self._as_half(name)
            self._add(copy)
            if not island:
                self._retype(copy)
            for index, name in enumerate(node.output):
                if name in self._floats:
                    self._made(copy, index, name, island)
        if not converted:
            raise QuantizationError("no layer can run in FP16: every range or weight leaves it; build fp32 or int8")
        refill(self._graph.node, self._nodes)
        drop_unread_constants(self._graph)

    def _is_island(self, node: onnx.NodeProto) -> bool:
        if not self._within(node) or (self._is_wide and node.name.startswith("preprocess/")):
            return True
        if self._too_large.intersection((*node.input, *node.output)):
            return True
        if node.op_type == "ReduceL2" or self._around_small.intersection(node.output) or not self._has_half(node):
            return True
        if node.op_type == "Cast":
            # An image's 0..255 becomes float32 and is normalized there.
            return node.input[0] not in self._floats
        if any(self._full.get(name) == name and name in self._fresh for name in node.input):
            return True
        held = [self._weights[n] for n in node.input if n in self._weights]
        return node.op_type not in _SATURATING and any(
            np.abs(numpy_helper.to_array(w)).max(initial=0.0) > FP16_MAX for w in held
        )

    def _has_half(self, node: onnx.NodeProto) -> bool:
        schema = onnx.defs.get_schema(node.op_type, self._opsets[node.domain], node.domain)
        kinds = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
        made = kinds.get(schema.outputs[0].type_str, ())
        return "tensor(float)" not in made or "tensor(float16)" in made

    def _find_around_small(self) -> set[str]:
        """What nodes make that have a small constant, and those before and behind them that depend on its exact value."""
        small = {
            name
            for name, w in self._weights.items()
            if 0 < np.abs(numpy_helper.to_array(w)).max(initial=0.0) < FP16_SMALLEST
        }
        around, divisors, terms = set[str](), set[str](), set[str]()
        for node in self._graph.node:
            if small.intersection(node.input):
                terms.update(node.input)
                divisors.update(node.output)
            elif divisors.intersection(node.input):
                around.update(node.output)
                if node.op_type in _DIVISOR:
                    divisors.update(node.output)
        for node in reversed(self._graph.node):
            if node.op_type in _NORM and terms.intersection(node.output):
                around.update(node.output)
                terms.update(node.input)
        return around | divisors

    def _add(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)
        if node.op_type == "Cast" and node.input[0] not in self._floats:
            self._fresh.add(node.output[0])

    def _cast(self, value: str, result: str, name: str, to: int) -> None:
        self._add(helper.make_node("Cast", [value], [result], name, to=to))

    def _retype(self, node: onnx.NodeProto) -> None:
        """Change what the node's attributes say about float32."""
        for attribute in node.attribute:
            if attribute.name in {"to", "dtype"} and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
            elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(_half_tensor(attribute.t, attribute.t.name))

    def _made(self, node: onnx.NodeProto, index: int, name: str, island: bool) -> None:
        if island:
            self._full[name] = name
        elif name in self._outputs:
            # The graph's float outputs stay float32 under their own names.
            node.output[index] = self._half[name] = f"{name}_fp16"
            self._full[name] = name
            self._cast(f"{name}_fp16", name, f"{name}/to_fp32", TensorProto.FLOAT)
        else:
            self._half[name] = name

    def _as_half(self, name: str) -> str:
        if name not in self._half:
            self._half[name] = half = f"{name}_fp16"
            if name in self._weights:
                self._graph.initializer.append(_half_tensor(self._weights[name], half))
            else:
                self._cast(name, half, f"{name}/to_fp16", TensorProto.FLOAT16)
        return self._half[name]

    def _as_full(self, name: str) -> str:
        if name in self._weights:
            return name
        if name not in self._full:
            self._full[name] = full = f"{name}_fp32"
            self._cast(self._half[name], full, f"{name}/to_fp32", TensorProto.FLOAT)
        return self._full[name]


def _half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    values = np.clip(numpy_helper.to_array(tensor).astype(np.float64), -FP16_MAX, FP16_MAX)
    return numpy_helper.from_array(values.astype(np.float16), name)
