"""An ONNX file as the network: read with suspicion, its Q/DQ pairs taken for fake-quantizers, run by ONNX Runtime as written.

To the stages after loading, :class:`OnnxNetwork` is a module like any other: what it returns is what ONNX Runtime makes of the
file with every optimization off, and where it is exported its nodes are put in.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import numpy_helper, version_converter
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from torch import Tensor, nn

from edgeseg.arguments import shortened
from edgeseg.convert.fake_quantizers import DOMAIN, MARK, FakeQuantizer, Mode, quantizer_of, refused
from edgeseg.convert.naming import name_by_scope
from edgeseg.errors import ArtifactError, BuildError, SpecError, first_line
from edgeseg.graph.editing import constant_array, remove_unread, replace, weight
from edgeseg.graph.signs import not_negative
from edgeseg.store.onnx_file import read_onnx

OPSET = 20
MIN_OPSET = 11

_CALL = "OnnxFile"
_INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"})
_INTEGERS = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}
# Between the argmax of a mask and the output.
_RESHAPES = frozenset({"Cast", "Squeeze", "Unsqueeze", "Identity"})


class OnnxNetwork(nn.Module):
    """Runs an ONNX file: float32 ``(N, C, H, W)`` -> its output.

    Attributes:
        stem: of the file's name, which stands for the encoder's.
        image_shape: ``(N, C, H, W)`` of the image it takes; ``None`` for what it leaves open.
        classes: of its output; needed for the export, and known once it has run.
        notes: what was left out of the file, for the user.
        optimized: let ONNX Runtime do what it does by default, to be timed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stem = path.stem
        self.graphs = _Graphs(path)
        self.image_shape, self.notes = self.graphs.image_shape, self.graphs.notes
        self.classes: int | None = None
        self.optimized = False
        self.quantizers = nn.ModuleList(self.graphs.quantizers)

    @property
    def end(self) -> _Step:
        """The node that makes the output, and those before it."""
        return _Step(ir.serde.deserialize_model(self.graphs.models["on"]).graph.outputs[0].producer())

    @property
    def _mode(self) -> Mode:
        parts: Any = self.quantizers
        return next((part.mode for part in parts), "on")

    def forward(self, image: Tensor) -> Tensor:
        """Run a batch, or stand for the file's nodes in a graph that is exported."""
        if torch.compiler.is_exporting():
            batch, _, height, width = image.shape
            shape = (batch, self.classes, height, width)
            call: Tensor = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{_CALL}", (image,), dtype=image.dtype, shape=shape, version=1
            )
            return call
        if image.dtype != torch.float32:
            raise RuntimeError(f"{self.graphs.path.name} takes float32, got {image.dtype}")
        result = torch.from_numpy(self.graphs.run(self._mode, self.optimized, image.cpu().numpy()))
        self.classes = result.shape[1] if result.ndim == 4 else None
        return result.to(image.device)

    def as_timed(self) -> OnnxNetwork:
        """The same file as ONNX Runtime runs it by default."""
        twin = copy.copy(self)
        twin.optimized = True
        return twin

    def inline(self, exported: ir.Model) -> None:
        """Put the file's nodes in the place of the call in ``exported``, opset 20, with the marks of its fake-quantizers."""
        graph = exported.graph
        call = next(node for node in graph if node.domain == DOMAIN and node.op_type == _CALL)
        image = call.inputs[0]
        assert image is not None
        inner = ir.serde.deserialize_model(
            _in_opset(self.graphs.models["off" if self._mode == "off" else "weights"], self.graphs.path.name)
        ).graph
        known = {value.name for value in (*graph.inputs, *graph.initializers.values(), *_made(graph))}
        values = {str(value.name): value for value in (*inner.inputs, *inner.initializers.values(), *_made(inner))}
        for value in values.values():
            if not value.is_initializer():
                value.shape = None  # the file's names of sizes are not those of the engine
            if value.name in known:
                value.name = f"{value.name}_of_file"
        [before], [after], nodes, weights = (
            list(inner.inputs),
            list(inner.outputs),
            list(inner),
            list(inner.initializers.values()),
        )
        inner.outputs.clear()
        inner.inputs.clear()
        inner.remove(nodes)
        before.replace_all_uses_with(image)
        graph.insert_before(call, nodes)
        for value in weights:
            inner.initializers.pop(str(value.name))
            graph.register_initializer(value)
        if self._mode == "marked":
            for name, part in self.graphs.marks:
                if part.grid is not None:
                    source = image if values[name] is before else values[name]
                    graph.insert_before(call, ir.node(MARK, [source], dataclasses.asdict(part.grid), domain=DOMAIN))
        after.dtype = ir.DataType.FLOAT
        replace(call.outputs[0], after)
        graph.remove(call, safe=True)
        if self._mode != "marked":
            exported.opset_imports.pop(DOMAIN, None)
        ShapeInferencePass()(exported)


@dataclass(frozen=True)
class _Step:
    """A node as autograd shows one: its name, and those before it."""

    node: ir.Node | None

    def name(self) -> str:
        return "" if self.node is None else self.node.op_type

    @property
    def next_functions(self) -> list[tuple[_Step | None, int]]:
        inputs = [] if self.node is None else self.node.inputs
        return [(_Step(value.producer()), 0) for value in inputs if value is not None and not value.is_initializer()]


class _Graphs:
    """The file's graph in the forms it is run and converted in; shared between copies of the network.

    Attributes:
        models: ``on``: as written; ``weights``: the float graph with the weights that its Q/DQ pairs round them to; ``off``:
            with those it holds itself.
        quantizers: its Q/DQ pairs.
        marks: values of the float graphs, and what rounds them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model, self.image_shape, self.notes = _read(path)
        whole = ir.serde.serialize_model(model)
        self.sha256 = hashlib.sha256(whole.SerializeToString(deterministic=True)).hexdigest()
        self.models = {"on": whole}
        for form in ("off", "weights"):
            model = ir.serde.deserialize_model(whole)
            self.quantizers, self.marks = _take_pairs(model, path.name, rounds_weights=form == "weights")
            self.models[form] = ir.serde.serialize_model(model)
        self._sessions: dict[tuple[str, bool], Any] = {}

    def __deepcopy__(self, memo: object) -> _Graphs:
        return self

    @property
    def size_bytes(self) -> int:
        """Of the file, with what it keeps beside it."""
        return int(self.models["on"].ByteSize())

    def run(self, mode: str, optimized: bool, image: NDArray[np.float32]) -> NDArray[Any]:
        form = "weights" if mode == "marked" else mode
        session = self._sessions.get((form, optimized))
        try:
            if session is None:
                session = self._sessions[form, optimized] = _session(self.models[form], optimized)
            (result,) = session.run(None, {session.get_inputs()[0].name: image}, _quiet())
        except Exception as exc:  # ONNX Runtime's own derive from nothing else
            raise BuildError(f"ONNX Runtime does not run {self.path.name}: {first_line(exc)}") from exc
        return np.asarray(result)


def _session(model: onnx.ModelProto, optimized: bool = False) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def _quiet() -> Any:
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4  # a size that does not fit is an answer, nothing to print
    return options


def _read(path: Path) -> tuple[ir.Model, tuple[int | None, ...], tuple[str, ...]]:
    """The file's graph, from float32 ``(N, C, H, W)`` to one output; that shape, and what was left out.

    Raises:
        ArtifactError: no valid ONNX file, see :func:`~edgeseg.store.onnx_file.read_onnx`; weights that are no numbers.
        SpecError: a graph that is not read here, by the name of what it has.
    """
    proto, name = read_onnx(path, data_beside=True), path.name
    opset = max((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < MIN_OPSET:
        raise SpecError(
            f"{name} has opset {opset}, from {MIN_OPSET} on is read; export it again with opset_version={OPSET}"
        )
    if proto.functions:
        called = shortened(proto.functions[0].name)
        raise SpecError(
            f"{name} has functions of its own ({called}); save onnx.inliner.inline_local_functions(onnx.load({name!r})) instead"
        )
    _refuse_operators(proto, name)
    for tensor in proto.graph.initializer:
        try:
            array = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as exc:
            raise ArtifactError(
                f"{name}: tensor {shortened(tensor.name)} is damaged: {first_line(exc)}; export it again"
            ) from exc
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            raise SpecError(
                f"{name} has float16 weights ({shortened(tensor.name)}); give the float32 file, --precision fp16 does the rest"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SpecError(
                f"{name} has NaN or Inf in {shortened(tensor.name)}: training diverged; export an earlier checkpoint"
            )
    model = ir.serde.deserialize_model(proto)
    RemoveInitializersFromInputsPass()(model)
    shape = _shape_of_input(model.graph, name)
    notes = _settle_output(model, name)
    for named in (*model.graph, *model.graph.initializers.values()):
        # They come back in messages and file names.
        named.name = re.sub(r"[^\w./:-]+", "_", named.name or "")[-200:] if isinstance(named, ir.Node) else named.name
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model, shape, notes


def _refuse_operators(proto: onnx.ModelProto, name: str) -> None:
    if proto.graph.sparse_initializer:
        raise SpecError(f"{name} has sparse weights; export it with dense ones")
    for node in proto.graph.node:
        what = shortened(f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type)
        if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear"):
            raise SpecError(
                f"{name} computes with integers ({what}): an engine's are chosen for its target; give the float file with "
                "--calibration, or one in Q/DQ format (quantize_static with quant_format=QuantFormat.QDQ)"
            )
        if node.domain not in ("", "ai.onnx"):
            raise SpecError(
                f"{name} has the operator {what}, which is not ONNX's own; export it with standard operators only"
            )
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise SpecError(
                f"{name} decides by values ({what}), and an engine has one way only; export the way that is taken"
            )


def _shape_of_input(graph: ir.Graph, name: str) -> tuple[int | None, ...]:
    if len(graph.inputs) != 1:
        listed = ", ".join(shortened(value.name) for value in graph.inputs[:4])
        raise SpecError(
            f"{name} takes {len(graph.inputs)} inputs ({listed}), a segmentation network one image; cut it out with "
            "onnx.utils.extract_model(file, part, [input], [output])"
        )
    image = graph.inputs[0]
    dims = None if image.shape is None else tuple(d if isinstance(d, int) else None for d in image.shape)
    if image.dtype != ir.DataType.FLOAT:
        raise SpecError(
            f"the input {shortened(image.name)} of {name} is {_type(image)}; give a file that takes normalized float32 (N, C, H, W): the "
            "engine's own uint8 input and normalization are put before it"
        )
    if dims is None or len(dims) != 4:
        raise SpecError(
            f"the input {shortened(image.name)} of {name} is {'of no known shape' if dims is None else list(dims)}; it must be (N, C, H, W)"
        )
    if dims[1] is not None and dims[3] is not None and dims[3] <= 4 < dims[1]:
        raise SpecError(
            f"the input {shortened(image.name)} of {name} is {list(dims)}, channels last; export it as (N, C, H, W)"
        )
    if dims[0] not in (None, 1):
        raise SpecError(f"{name} takes {dims[0]} images at a time only; export it for 1, or with a dynamic batch")
    return dims


def _settle_output(model: ir.Model, name: str) -> tuple[str, ...]:
    """Let the map be the one output; an argmax behind it is left out."""
    graph = model.graph
    if len(graph.outputs) != 1:
        listed = ", ".join(shortened(value.name) for value in graph.outputs[:4])
        raise SpecError(
            f"{name} returns {len(graph.outputs)} outputs ({listed}); cut out the map with "
            f"onnx.utils.extract_model({name!r}, 'part.onnx', [{graph.inputs[0].name!r}], [...])"
        )
    output = graph.outputs[0]
    value: ir.Value | None = output
    while value is not None and (node := value.producer()) is not None and node.op_type in _RESHAPES:
        value = node.inputs[0]
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "ArgMax" and node.attributes.get_int("axis", 0) in (1, -3):
        graph.outputs[0] = node.inputs[0]  # type: ignore[assignment]
        RemoveUnusedNodesPass()(model)
        return ("the ArgMax at the end of the file is left out: the mask output is the argmax",)
    if output.dtype is not None and output.dtype != ir.DataType.FLOAT:
        raise SpecError(
            f"the output {shortened(output.name)} of {name} is {_type(output)}; give a file that returns the float map (N, classes, H, W), "
            "before a threshold or argmax"
        )
    return ()


def _type(value: ir.Value) -> str:
    return "of no known type" if value.dtype is None else value.dtype.name.lower()


def _take_pairs(
    model: ir.Model, name: str, *, rounds_weights: bool
) -> tuple[list[FakeQuantizer], list[tuple[str, FakeQuantizer]]]:
    """Take the Q/DQ pairs out of a graph, in place; returns them, and which value each of activations rounds.

    A pair of which 0 is the lowest integer is also a ReLU, and exporters leave out the one before it: there it is put back.

    Raises:
        SpecError: one that no int8 engine can take over; integers that something else reads.
    """
    graph = model.graph
    pairs = [node for node in graph if node.op_type == "DequantizeLinear"]
    made_of_constants = _made_of_constants(graph)
    numbers = {
        value for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear") for value in node.inputs[1:]
    }
    _fold(model, [value for value in numbers if value in made_of_constants and not value.is_initializer()])
    quantizers: list[FakeQuantizer] = []
    marks: list[tuple[ir.Value, FakeQuantizer]] = []
    clips: list[ir.Node] = []
    for node in pairs:
        integers, output = node.inputs[0], node.outputs[0]
        assert integers is not None
        quantize, clip = _quantize_before(integers)
        stem = node.name or str(output.name)
        if quantize is None:
            if integers not in made_of_constants:
                what = getattr(integers.producer(), "op_type", "the input")
                raise SpecError(
                    f"{name} computes with integers ({stem} reads those of {what}); export it in Q/DQ format"
                )
            if integers.dtype != ir.DataType.INT32:  # a bias, in the steps of its layer
                quantizers.append(_quantizer(stem, node, None))
                quantizers[-1].is_activation = False
            continue
        source = quantize.inputs[0]
        assert source is not None
        if not _same_numbers(quantize, node):
            raise refused(stem, "is read in other steps than it was rounded to", "export it in Q/DQ format")
        part = _quantizer(stem, node, clip)
        quantizers.append(part)
        part.is_activation = source not in made_of_constants
        if not part.is_activation:
            if not rounds_weights:
                output.replace_all_uses_with(source, replace_graph_outputs=True)
            continue
        if part.grid is not None and part.grid.zero_point == part.grid.low:
            relu = ir.node("Relu", [source], name=f"{stem.rpartition('/')[0]}/Relu")
            relu.outputs[0].name = f"{output.name}_not_negative"
            relu.outputs[0].dtype = ir.DataType.FLOAT
            graph.insert_before(node, relu)
            clips.append(relu)
            source = relu.outputs[0]
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        marks.append((source, part))
    positive = not_negative(graph)
    for relu in clips:
        before, after = relu.inputs[0], relu.outputs[0]
        if before in positive:
            assert before is not None
            after.replace_all_uses_with(before, replace_graph_outputs=True)
            marks = [(before if value is after else value, part) for value, part in marks]
    RemoveUnusedNodesPass()(model)
    _fold(model, list(_frontier(graph)))
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise SpecError(
                f"{name} computes with integers (behind {node.name or node.op_type}); export it in Q/DQ format"
            )
    RemoveUnusedNodesPass()(model)
    name_by_scope(model)
    return quantizers, [(str(value.name), part) for value, part in marks]


def _quantize_before(integers: ir.Value) -> tuple[ir.Node | None, ir.Node | None]:
    """The QuantizeLinear that makes these integers, and the Clip to fewer of them that torch writes behind it."""
    node, clip = integers.producer(), None
    if node is not None and node.op_type == "Clip":
        clip, node = node, None if node.inputs[0] is None else node.inputs[0].producer()
    return (node, clip) if node is not None and node.op_type == "QuantizeLinear" else (None, None)


def _same_numbers(quantize: ir.Node, dequantize: ir.Node) -> bool:
    for one, other in zip(_numbers_of(quantize), _numbers_of(dequantize), strict=True):
        if one is not None and other is not None and not np.array_equal(one, other):
            return False
    return True


def _numbers_of(node: ir.Node) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    return constant_array(node.inputs[1]), constant_array(node.inputs[2]) if len(node.inputs) > 2 else None


def _quantizer(stem: str, node: ir.Node, clip: ir.Node | None) -> FakeQuantizer:
    scale, zero_point = _numbers_of(node)
    if scale is None or (zero_point is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        raise refused(stem, "computes its scale anew for each image", "quantize with static ranges")
    kind = node.inputs[2].dtype if len(node.inputs) > 2 and node.inputs[2] is not None else node.inputs[0].dtype  # type: ignore[union-attr]
    if zero_point is None:
        zero_point = np.zeros(scale.shape, np.int64)
        kind = kind or ir.DataType.UINT8
    if kind is None or kind not in _INTEGERS:
        raise refused(
            stem,
            f"has {'unknown' if kind is None else kind.name.lower()} numbers, int8 has 256 integers",
            "quantize with 8 bits",
        )
    if scale.ndim > 1 or node.attributes.get_int("block_size", 0):
        raise refused(stem, "has blocks", "use one scale per tensor or channel")
    low, high = int(kind.min), int(kind.max)
    if clip is not None:
        low, high = (
            end if bound is None else int(bound)
            for end, bound in zip((low, high), map(constant_array, clip.inputs[1:3]), strict=False)
        )
    axis = node.attributes.get_int("axis", 1) if scale.size > 1 else None
    return quantizer_of(
        stem, torch.from_numpy(scale.astype(np.float32)), torch.from_numpy(zero_point.astype(np.int64)), low, high, axis
    )


def _made(graph: ir.Graph) -> Iterator[ir.Value]:
    return (value for node in graph for value in node.outputs)


def _made_of_constants(graph: ir.Graph) -> set[ir.Value]:
    """Initializers, and what nodes compute from nothing else."""
    known = set(graph.initializers.values())
    for node in graph:
        if node.inputs and all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
    return known


def _frontier(graph: ir.Graph) -> Iterator[ir.Value]:
    """Values computed from dequantized constants alone that the rest of the graph reads."""
    constant = _made_of_constants(graph)
    dequantized: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "DequantizeLinear" or any(value in dequantized for value in node.inputs):
            dequantized.update(node.outputs)
    for value in _made(graph):
        if (
            value in constant
            and value in dequantized
            and any(use.node.outputs[0] not in constant for use in value.uses())
        ):
            yield value


def _fold(model: ir.Model, values: list[ir.Value]) -> None:
    """Compute ``values``, of constants alone, by ONNX Runtime, and make them initializers."""
    if not values:
        return
    graph = model.graph
    needed: dict[ir.Node, None] = {}
    pending = [node for value in values if (node := value.producer()) is not None]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed[node] = None
            pending += [
                before for value in node.inputs if value is not None and (before := value.producer()) is not None
            ]
    proto = ir.serde.serialize_model(model)
    read = {str(value.name) for node in needed for value in node.inputs if value is not None}
    names = {str(value.name) for node in needed for value in node.outputs}
    part = onnx.helper.make_graph(
        [node for node in proto.graph.node if names.intersection(node.output)],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in values],
        [tensor for tensor in proto.graph.initializer if tensor.name in read],
    )
    whole = onnx.helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    for value, array in zip(values, _session(whole).run(None, {}), strict=True):
        node = value.producer()
        assert node is not None
        value.replace_all_uses_with(weight(node, array, _weight_name(value)), replace_graph_outputs=True)
        remove_unread(graph, [node])


def _weight_name(value: ir.Value) -> str:
    """The module's name of the weight that ``value`` is made of, if one is."""
    pending, name = [value], str(value.name)
    while pending:
        node = pending.pop().producer()
        for before in () if node is None else node.inputs[:1]:
            if before is not None:
                pending.append(before)
                stem, word, _ = str(before.name).partition(".weight")
                name = f"{stem}{word}" if word else name
    return name


def _in_opset(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset == OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as exc:  # the converter raises RuntimeError, and what its adapters do
        raise SpecError(
            f"{name} has opset {opset}, and ONNX cannot convert it to {OPSET}: {first_line(exc)}; export it with opset_version={OPSET}"
        ) from exc
