"""An ONNX file as a network from outside: read with suspicion; what an engine cannot be made of is refused by name.

Never imports torch, and runs nothing of the file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper, shape_inference
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
)

from edgeseg.arguments import shortened
from edgeseg.errors import SpecError
from edgeseg.graph.editing import given
from edgeseg.store.onnx_file import MAX_PROTOBUF_BYTES, read_onnx

OPSET = 20
"""Of the graphs that are made."""
MIN_OPSET = 11

Shape = tuple[int | None, ...]

_OWN = ("", "ai.onnx")
_INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})
# Between the argmax of a mask and the output.
_AFTER_ARGMAX = frozenset({"Cast", "Squeeze", "Unsqueeze", "Identity"})


@dataclass(frozen=True)
class OnnxSource:
    """The graph of a file, from one image to one map.

    Attributes:
        name: of the file.
        model: its constants are initializers.
        shape: ``(N, C, H, W)`` of the image; ``None`` for what is open.
        sha256: of what was read, wherever its weights were.
        size_bytes: the same.
        notes: what was left out, for the user.
    """

    name: str
    model: onnx.ModelProto
    shape: Shape
    sha256: str
    size_bytes: int
    notes: tuple[str, ...]


def read_source(path: Path) -> OnnxSource:
    """Read a file with float32 ``(N, C, H, W)`` in and a float map ``(N, classes, H, W)`` out.

    Raises:
        ArtifactError: no valid ONNX file, see :func:`~edgeseg.store.onnx_file.read_onnx`; weights that are no numbers.
        SpecError: a graph that no engine is made of, by the name of what it has.
    """
    proto, name = read_onnx(path, data_beside=True), path.name
    written = proto.SerializeToString(deterministic=True)
    opset = max((entry.version for entry in proto.opset_import if entry.domain in _OWN), default=0)
    if opset < MIN_OPSET:
        raise SpecError(f"{name} has opset {opset}; export it again with opset_version={OPSET} ({MIN_OPSET} at least)")
    _refuse_operators(proto, name)
    for tensor in proto.graph.initializer:
        _check_weight(tensor, name)
    model = ir.serde.deserialize_model(_with_types(proto, name))
    RemoveInitializersFromInputsPass()(model)
    shape = _shape_of_image(model.graph, name)
    notes = _settle_output(model, name)
    for node in model.graph:
        node.name = re.sub(r"[^\w./:-]+", "_", node.name or "")[-200:]  # it comes back in messages
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    digest = hashlib.sha256(written).hexdigest()
    return OnnxSource(name, ir.serde.serialize_model(model), shape, digest, len(written), notes)


def _refuse_operators(proto: onnx.ModelProto, name: str) -> None:
    for node in proto.graph.node:
        what = shortened(node.op_type if node.domain in _OWN else f"{node.domain}.{node.op_type}")
        if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
            raise SpecError(
                f"{name} computes with integers ({what}), and an engine's are those of its target; give one in Q/DQ format "
                "(quantize_static with quant_format=QuantFormat.QDQ), or the float file"
            )
        if node.domain not in _OWN:
            raise SpecError(f"{name} has {what}, no operator of ONNX's own; export it with standard ones only")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise SpecError(f"{name} has {what}, and an engine has one way only; export the one that is taken")


def _check_weight(tensor: onnx.TensorProto, name: str) -> None:
    which = f"{name}: weight {shortened(tensor.name)}"
    if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        raise SpecError(f"{which} is of 16 bits; give the float32 file (--precision fp16 makes an FP16 engine of it)")
    array = numpy_helper.to_array(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SpecError(f"{which} holds NaN or Inf: training diverged; export an earlier checkpoint")


def _with_types(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same with the types and shapes that ONNX infers, none of which is larger than a file could be."""
    del proto.graph.value_info[:]
    inferred = shape_inference.infer_shapes(proto, data_prop=True)
    for value in inferred.graph.value_info:
        elements = math.prod(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        if elements > MAX_PROTOBUF_BYTES:
            raise SpecError(
                f"{name} makes a tensor of {elements:.3g} numbers ({shortened(value.name)}); export a smaller size"
            )
    return inferred


def _shape_of_image(graph: ir.Graph, name: str) -> Shape:
    if len(graph.inputs) != 1:
        raise SpecError(f"{name} takes {_listed(graph.inputs, 'inputs')}, a segmentation network one image; {_CUT}")
    image = graph.inputs[0]
    what = f"the input {shortened(image.name)} of {name}"
    if image.dtype != ir.DataType.FLOAT:
        raise SpecError(
            f"{what} is {_type(image)}; give a file that takes normalized float32 (N, C, H, W): the engine's own uint8 input "
            "and normalization are put before it"
        )
    shape = None if image.shape is None else tuple(d if isinstance(d, int) else None for d in image.shape)
    if shape is None or len(shape) != 4:
        raise SpecError(f"{what} is {'of no known shape' if shape is None else list(shape)}; it must be (N, C, H, W)")
    batch, channels, _, width = shape
    if channels is not None and width is not None and width <= 4 < channels:
        raise SpecError(f"{what} is {list(shape)}, channels last; export it as (N, C, H, W)")
    if batch not in (None, 1):
        raise SpecError(f"{what} is of {batch} images; export it for 1, or with a dynamic batch")
    return shape


def _settle_output(model: ir.Model, name: str) -> tuple[str, ...]:
    """Let the map be the one output; an argmax behind it is left out."""
    outputs = model.graph.outputs
    if len(outputs) != 1:
        raise SpecError(f"{name} returns {_listed(outputs, 'outputs')}, and the map alone is built; {_CUT}")
    node = outputs[0].producer()
    while node is not None and node.op_type in _AFTER_ARGMAX and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "ArgMax" and node.attributes.get_int("axis", 0) in (1, -3):
        outputs[0] = given(node)
        RemoveUnusedNodesPass()(model)
        return (f"the ArgMax at the end of {name} is left out: the mask output is the argmax",)
    if outputs[0].dtype != ir.DataType.FLOAT:
        raise SpecError(
            f"the output {shortened(outputs[0].name)} of {name} is {_type(outputs[0])}; give a file that returns the float map "
            "(N, classes, H, W), before a threshold or argmax"
        )
    return ()


_CUT = "cut the rest off with onnx.utils.extract_model(file, part, [image], [map])"


def _listed(values: Sequence[ir.Value], what: str) -> str:
    names = ", ".join(shortened(value.name) for value in values[:4])
    return f"{len(values)} {what} ({names}{', ...' if len(values) > 4 else ''})"


def _type(value: ir.Value) -> str:
    return "of no known type" if value.dtype is None else value.dtype.name.lower()
